"""FLAC data in memory -> samples.

miniaudio's decoder (dr_flac) takes three fifths of libsndfile's time. Both are lossless, so the samples are equal to
the bit. Whatever it does not decode whole is left to libsndfile, whose errors are the ones that are reported.
"""

from __future__ import annotations

import io
from types import ModuleType

import numpy as np
import soundfile

try:
    import miniaudio
except ImportError:  # no wheel for this machine: libsndfile does it all
    miniaudio = None

_FUNCTIONS = ("ma_dr_flac_open_memory", "ma_dr_flac_read_pcm_frames_f32", "ma_dr_flac_close")
_MAGIC = b"fLaC"


def decode(data: bytes) -> tuple[np.ndarray, int]:
    """Samples float32 in [-1, 1], (S,) or (S, channels), and the sampling rate.

    Raises what ``soundfile.read`` raises, which also reads data of other formats, and ValueError for a damaged header
    that promises more than fits into memory.
    """
    try:
        if data.startswith(_MAGIC) and _has_functions(miniaudio) and (decoded := _decode_mono(data)) is not None:
            return decoded
        samples, sampling_rate = soundfile.read(io.BytesIO(data), dtype="float32")
    except MemoryError as error:
        raise ValueError(f"audio that does not fit into memory, from {len(data)} bytes") from error
    return samples, sampling_rate


def _has_functions(module: ModuleType | None) -> bool:
    """Whether the C functions are there that other versions of miniaudio name otherwise."""
    return module is not None and all(hasattr(module.lib, name) for name in _FUNCTIONS)


def _decode_mono(data: bytes) -> tuple[np.ndarray, int] | None:
    """One channel, straight into an array (``miniaudio.flac_read_f32`` copies it twice); None if not all is there."""
    ffi, lib = miniaudio.ffi, miniaudio.lib
    stream = lib.ma_dr_flac_open_memory(data, len(data), ffi.NULL)
    if not stream:
        return None
    try:
        promised = stream.totalPCMFrameCount
        if stream.channels != 1 or promised == 0:  # 0: the header does not say
            return None
        samples = np.empty(promised, dtype=np.float32)
        # It leaves damaged frames out without a word.
        if lib.ma_dr_flac_read_pcm_frames_f32(stream, promised, ffi.from_buffer("float[]", samples)) != promised:
            return None
        return samples, stream.sampleRate
    finally:
        lib.ma_dr_flac_close(stream)
