"""FLAC data in memory -> samples.

miniaudio's decoder (dr_flac) takes a little over half of libsndfile's time. Both are lossless, so the samples are equal
to the bit. Whatever it does not decode whole is left to libsndfile, whose errors are the ones that are reported.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import soundfile

try:
    import miniaudio
except ImportError:  # no wheel for this machine: libsndfile does it all
    miniaudio = None

_MAGIC = b"fLaC"
_COUNT_FIELD = slice(18, 26)  # of the data: ends with the 36 bits that say how many samples there are
_COUNT_BITS = (1 << 36) - 1


def decode(data: bytes) -> tuple[np.ndarray, int]:
    """Samples float32 in [-1, 1], (S,) or (S, channels), and the sampling rate.

    Raises what ``soundfile.read`` raises, which also reads data of other formats.
    """
    if miniaudio is not None and data.startswith(_MAGIC):
        promised = int.from_bytes(data[_COUNT_FIELD], "big") & _COUNT_BITS
        with contextlib.suppress(miniaudio.DecodeError):
            decoded = miniaudio.flac_read_f32(data)
            # It leaves damaged frames out without a word.
            if decoded.nchannels == 1 and decoded.num_frames == promised > 0:
                return np.frombuffer(decoded.samples, dtype=np.float32), decoded.sample_rate
    samples, sampling_rate = soundfile.read(io.BytesIO(data), dtype="float32")
    return samples, sampling_rate
