"""Where a recording pauses: what is quiet next to the minute around it, for as long as a pause lasts.

The level of a frame is the mean of its log-mel energies, over 5 frames. All bands weigh alike, so that hum and single
tones count little and weak fricatives much. Quiet is the lowest fifth between the floor, the 5th percentile of the
levels of the last half minute and of what is at hand, and the speech, their 99th: so the rule follows noise and voices,
and finds nothing where nothing stands out, in noise alone or dense music. Quiet that lasts is a pause and is cut in its
middle. Of a long one the speech on either side keeps about as much as utterances in corpora have, and the middle is
silence: a model that was trained on speech invents phones in noise.

Legend: S samples at 16 kHz, T frames of 10 ms.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from zipformer_crctc.features import FRAME_SHIFT, SAMPLING_RATE, Fbank
from zipformer_crctc.frontend import MIN_FEATURE_FRAMES

SMOOTHING = 5
"""Frames whose levels are averaged: noise swings less from frame to frame."""
FLOOR, SPEECH = 5, 99
"""Percentiles of levels."""
QUIET_SHARE = 0.2
"""Part of the range from the floor to speech that is quiet."""
HISTORY = 3000
"""Frames before those at hand that count for the floor and the speech."""
KEPT = 30
"""Frames of a pause that stay with the speech on either side; what is left in the middle of a longer one is silence."""
MIN_PAUSE = 0.2
"""Seconds; half of a pause must be long enough for the model."""

assert MIN_PAUSE * SAMPLING_RATE / FRAME_SHIFT >= 2 * MIN_FEATURE_FRAMES


class PauseFinder:
    """Finds the pauses of one recording, a stretch at a time.

    Args:
        shortest: seconds that a pause lasts at least, not below MIN_PAUSE.
        fbank: the features.
    """

    def __init__(self, shortest: float, fbank: Fbank) -> None:
        self.shortest = round(shortest * SAMPLING_RATE / FRAME_SHIFT)
        self._fbank = fbank
        self._past: np.ndarray = np.zeros(0)
        self._levels: np.ndarray = np.zeros(0)

    def stretches(self, samples: np.ndarray, ended: bool) -> list[tuple[int, bool]]:
        """The ends of the stretches that samples (S,) float32 hold, and whether there is speech in each.

        The ends are samples in rising order, whole frames, in pauses; what comes after the last one is open, unless
        the recording has ended there in silence.
        """
        levels = self._fbank(torch.from_numpy(samples)).mean(1).numpy().astype(np.float64)
        self._levels = _moving_mean(levels, SMOOTHING)
        floor, speech = np.percentile(np.concatenate([self._past, self._levels]), [FLOOR, SPEECH])
        quiet = self._levels < floor + QUIET_SHARE * (speech - floor)
        ends: list[tuple[int, bool]] = []
        for begin, end in _runs(quiet):
            to_the_end = ended and end == len(quiet)
            if end - begin > 2 * KEPT or (to_the_end and begin == 0):
                ends += [(FRAME_SHIFT * (begin + KEPT), True)] * (begin > 0)
                ends.append((len(samples) if to_the_end else FRAME_SHIFT * (end - KEPT), False))
            elif end - begin >= self.shortest and begin > 0 and not to_the_end:  # else there is no speech on one side
                ends.append((FRAME_SHIFT * ((begin + end) // 2), True))
        return ends

    def advance(self, samples: int) -> None:
        """The next stretch begins so many samples, whole frames, after the last one."""
        frames = samples // FRAME_SHIFT
        self._past = np.concatenate([self._past, self._levels[:frames]])[-HISTORY:]
        self._levels = self._levels[frames:]


def _moving_mean(values: np.ndarray, count: int) -> np.ndarray:
    """(T,): each the mean of `count` values around it, the first and last repeated beyond the ends."""
    padded = np.pad(values, (count // 2, (count - 1) // 2), mode="edge")
    return np.lib.stride_tricks.sliding_window_view(padded, count).mean(1)


def _runs(flags: np.ndarray) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of true values."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)
