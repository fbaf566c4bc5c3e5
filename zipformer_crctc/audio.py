"""Audio files of any kind -> mono float32 at 16 kHz, whole or block by block."""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from zipformer_crctc.features import SAMPLING_RATE

UNKNOWN_SIZE = (0, 0xFFFFFFFF)
"""Sizes that programs writing to a pipe leave in a wav header: they promise nothing."""
BLOCK = 1 << 18
"""Samples of each channel that are read at a time."""
FFMPEG_SUFFIXES = (".m4a", ".mp4", ".aac", ".wma", ".webm", ".mkv", ".mov", ".amr", ".3gp")
"""Files that libsndfile does not read and ffmpeg does."""
ESTIMATED_LENGTH_ERROR = 0.1
"""Part of an mp3's stated length that may be missing before it is taken for truncated; some only estimate theirs."""


class AudioError(ValueError):
    """Audio that cannot be used; the text gives the reason without the path."""


class AudioStream:
    """A recording that is read as it is iterated over: blocks of mono float32 samples at 16 kHz.

    Iterating raises AudioError for a missing, unreadable, truncated or empty file, and for NaN; what can be told from
    the header is told first.

    Args:
        path: wav, flac, mp3, ogg (whatever libsndfile reads), or what ffmpeg reads, where it is installed.
        channel: the channel to take, from 1; None is the mean of all.
    """

    def __init__(self, path: Path, channel: int | None = None) -> None:
        self.path = path
        self.channel = channel
        self.channels = 0
        """Channels of the file; known once it has been read."""
        self.warning: str | None = None
        """What is odd about the file but does not forbid its use; known once it has been read."""

    def __iter__(self) -> Iterator[np.ndarray]:
        _check_file(self.path)
        with _readable(self.path) as path, _open(path) as file:
            self.channels = file.channels
            yield from mono_blocks(self._raw_blocks(file), file.samplerate, self.channel)

    def _raw_blocks(self, file: soundfile.SoundFile) -> Iterator[np.ndarray]:
        """(up to BLOCK, channels) each."""
        read, expected = 0, file.frames
        while True:
            try:
                block = file.read(BLOCK, dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, RuntimeError, OSError) as error:
                raise _undecodable(error) from error
            read += len(block)
            if len(block):
                yield block
            if len(block) < BLOCK:
                break
        if read and read < expected and file.format in ("WAV", "WAVEX", "FLAC", "AIFF"):
            raise AudioError(f"truncated: {read} of {expected} samples can be read")
        if read < (1 - ESTIMATED_LENGTH_ERROR) * expected:
            self.warning = f"seems truncated: {read} of {expected} samples can be read"


def load_audio(path: Path) -> tuple[np.ndarray, int]:
    """Decode, mix down by the mean of the channels, resample.

    Returns float32 samples (num_samples,) at 16 kHz and the number of channels of the file.
    Raises AudioError as `AudioStream` does.
    """
    stream = AudioStream(path)
    return np.concatenate(list(stream)), stream.channels


def mono_blocks(raw: Iterable[np.ndarray], rate: float, channel: int | None = None) -> Iterator[np.ndarray]:
    """Blocks (samples, channels) at any rate to mono blocks (samples,) at 16 kHz, none of them empty.

    channel: from 1; None is the mean of all. Raises AudioError for no samples at all, a channel that is not there, and
    for NaN or infinity.
    """
    resample: Callable[..., np.ndarray] = lambda samples, last: samples  # noqa: E731
    if rate != SAMPLING_RATE:
        import soxr  # installations that only train can do without

        resample = soxr.ResampleStream(rate, SAMPLING_RATE, 1, dtype="float32", quality="HQ").resample_chunk
    empty = True
    for block in raw:
        if channel is not None and not 1 <= channel <= block.shape[1]:
            raise AudioError(f"has {block.shape[1]} channels, so there is no channel {channel}")
        mono = block.mean(axis=1, dtype=np.float32) if channel is None else block[:, channel - 1]
        if not np.isfinite(mono).all():
            raise AudioError("NaN or infinity in the audio")
        mono = resample(np.ascontiguousarray(mono), last=False)
        if len(mono):
            empty = False
            yield mono
    if rate != SAMPLING_RATE and len(rest := resample(np.zeros(0, np.float32), last=True)):
        empty = False
        yield rest
    if empty:
        raise AudioError("no samples")


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise AudioError("no such file")
    try:
        promised = _promised_wav_bytes(path)
    except OSError as error:
        raise AudioError(f"cannot be read ({error.strerror})") from error
    if promised > path.stat().st_size:
        raise AudioError(f"truncated: the wav header promises {promised} bytes, the file has {path.stat().st_size}")


def _open(path: Path) -> soundfile.SoundFile:
    try:
        return soundfile.SoundFile(path)
    except (soundfile.SoundFileError, RuntimeError, OSError) as error:
        raise _undecodable(error) from error


def _undecodable(error: Exception) -> AudioError:
    # libsndfile's own sentence is enough: its "Error opening '<path>':" would repeat the path.
    return AudioError(f"cannot be decoded ({str(error).split(': ')[-1].strip()})")


@contextmanager
def _readable(path: Path) -> Iterator[Path]:
    """The file itself, or a temporary FLAC that ffmpeg made of it."""
    if path.suffix.lower() not in FFMPEG_SUFFIXES:
        yield path
        return
    if (ffmpeg := shutil.which("ffmpeg")) is None:
        raise AudioError(f"{path.suffix} files need the program ffmpeg; install it, or convert the file to flac")
    with tempfile.TemporaryDirectory() as folder:
        flac = Path(folder) / "audio.flac"
        command = [ffmpeg, "-nostdin", "-v", "error", "-i", str(path.resolve()), "-map", "0:a:0", str(flac)]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if result.returncode != 0:
            raise AudioError(f"cannot be decoded (ffmpeg: {result.stderr.strip()[-200:]})")
        yield flac


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
