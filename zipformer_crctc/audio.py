"""Audio files of any kind -> mono float32 at 16 kHz."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import soundfile

from zipformer_crctc.features import SAMPLING_RATE

UNKNOWN_SIZE = (0, 0xFFFFFFFF)
"""Sizes that programs writing to a pipe leave in a wav header: they promise nothing."""


class AudioError(ValueError):
    """Audio that cannot be used; the text gives the reason without the path."""


def load_audio(path: Path) -> tuple[np.ndarray, int]:
    """Decode (wav, flac, mp3, ogg: whatever libsndfile reads), mix down by the mean of the channels, resample.

    Returns float32 samples (num_samples,) at 16 kHz and the number of channels of the file.
    Raises AudioError for a missing, unreadable, truncated or empty file.
    """
    if not path.is_file():
        raise AudioError("no such file")
    promised = _promised_wav_bytes(path)
    if promised > path.stat().st_size:
        raise AudioError(f"truncated: the wav header promises {promised} bytes, the file has {path.stat().st_size}")
    try:
        with soundfile.SoundFile(path) as file:
            rate, channels, frames = file.samplerate, file.channels, file.frames
            exact_length = file.format in ("WAV", "WAVEX", "FLAC", "AIFF")
            samples = file.read(dtype="float32", always_2d=True)  # (num_samples, channels)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        # libsndfile's own sentence is enough: its "Error opening '<path>':" would repeat the path.
        raise AudioError(f"cannot be decoded ({str(error).split(': ')[-1].strip()})") from error
    if samples.shape[0] == 0:
        raise AudioError("no samples")
    if exact_length and samples.shape[0] < frames:
        raise AudioError(f"truncated: {samples.shape[0]} of {frames} samples can be read")
    mono = samples.mean(axis=1, dtype=np.float32)
    if rate != SAMPLING_RATE:
        import soxr  # installations for decoding alone can do without

        mono = soxr.resample(mono, rate, SAMPLING_RATE, quality="HQ")
    if mono.shape[0] == 0:
        raise AudioError("no samples")
    if not np.isfinite(mono).all():
        raise AudioError("NaN or infinity in the audio")
    return mono.astype(np.float32, copy=False), channels


def _promised_wav_bytes(path: Path) -> int:
    """File size that the header of a RIFF wav promises; 0 if it is no such file or promises nothing.

    libsndfile shortens a truncated wav without a word, so its own frame count cannot tell.
    """
    with path.open("rb") as file:
        head = file.read(12)
        if len(head) < 12 or head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return 0
        while len(chunk := file.read(8)) == 8:
            name, size = chunk[:4], struct.unpack("<I", chunk[4:])[0]
            if name == b"data":
                return 0 if size in UNKNOWN_SIZE else file.tell() + size
            file.seek(size + size % 2, 1)
    return 0
