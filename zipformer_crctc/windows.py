"""Recordings of any length through a model that was trained on utterances: overlapping windows, and back.

A recording that fits into one window is passed whole. A longer one is cut into windows that begin on a grid on which
all frame rates of the model meet, so that a frame of a window is the same stretch of audio as that of the whole; of
two windows each is kept up to the middle of their overlap. What is put together is cut again for the search, where the
model is surest that nothing begins: so hours of audio never stand in memory at once.

Legend: S samples at 16 kHz, T feature frames of 10 ms, T' output frames, V pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from zipformer_crctc.config import ModelConfig
from zipformer_crctc.features import FRAME_SHIFT, SAMPLING_RATE

PIECE_WINDOWS = 2
"""Log-probs that are held back before they are cut for the search, in windows."""
SURE_FRAMES = 5
"""Output frames around a cut, over which the blank is to be probable."""


@dataclass(frozen=True)
class Grid:
    """How long windows are, in samples and in output frames."""

    window: int
    """Samples of a window."""
    margin: int
    """Samples at either end of a window that only give context: half of the overlap."""
    samples_per_frame: int
    """Samples from one output frame to the next."""

    @property
    def hop(self) -> int:
        """Samples from the start of one window to that of the next."""
        return self.window - 2 * self.margin


def make_grid(config: ModelConfig, window: float, overlap: float) -> Grid:
    """The grid for windows of so many seconds, rounded to what the model's frame rates allow.

    Raises ValueError for an overlap that leaves nothing of a window.
    """
    frames = math.lcm(*config.downsampling_factor, config.output_downsampling_factor)
    if config.causal and min(config.chunk_size) > 0:
        frames = math.lcm(frames, max(config.chunk_size))
    unit = frames * 2 * FRAME_SHIFT  # the front-end halves the rate of the features

    def units(seconds: float) -> int:
        return max(1, round(seconds * SAMPLING_RATE / unit))

    margin, whole = units(overlap / 2), units(window)
    if not (overlap > 0 and whole > 4 * margin):
        raise ValueError(
            f"windows of {window:g} s with an overlap of {overlap:g} s: the overlap must be above 0 and below half of "
            f"the window, in steps of {unit / SAMPLING_RATE:g} s; give a longer window or a shorter overlap"
        )
    return Grid(whole * unit, margin * unit, config.output_downsampling_factor * 2 * FRAME_SHIFT)


@dataclass(frozen=True)
class Window:
    """A stretch of a recording."""

    samples: np.ndarray
    """(S,) float32."""
    first: bool
    last: bool


def cut_windows(blocks: Iterable[np.ndarray], grid: Grid) -> Iterator[Window]:
    """Windows of a stream of samples; holds one window and one block at a time."""
    held: np.ndarray = np.zeros(0, np.float32)
    first = True
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > grid.window:
            yield Window(held[: grid.window].copy(), first, last=False)
            held = held[grid.hop :]
            first = False
    yield Window(held, first, last=True)


def kept_frames(log_probs: Tensor, grid: Grid, first: bool, last: bool) -> Tensor:
    """Of a window's log-probs (T', V) those that stand for it in the whole."""
    begin = 0 if first else grid.margin // grid.samples_per_frame
    end = len(log_probs) if last else (grid.window - grid.margin) // grid.samples_per_frame
    return log_probs[begin:end]


@dataclass(frozen=True)
class Piece:
    """A stretch of a recording for the search."""

    log_probs: Tensor
    """(T', V)."""
    first_frame: int
    """Where it begins in the recording, in output frames."""


class Stitcher:
    """Puts what is kept of windows together and cuts it into pieces for the search.

    Args:
        max_frames: output frames held back at most before a piece is cut.
        blank_id: the blank.
    """

    def __init__(self, max_frames: int, blank_id: int) -> None:
        self.max_frames = max_frames
        self.blank_id = blank_id
        self._held: Tensor | None = None
        self._first_frame = 0

    def add(self, log_probs: Tensor, last: bool) -> Iterator[Piece]:
        """The pieces that are ready after the next frames (T', V)."""
        self._held = log_probs if self._held is None else torch.cat([self._held, log_probs])
        while not last and len(self._held) > self.max_frames:
            yield self._take(self._quiet_frame(self._held))
        if last:
            yield self._take(len(self._held))

    def _take(self, frames: int) -> Piece:
        assert self._held is not None
        piece = Piece(self._held[:frames], self._first_frame)
        self._held = self._held[frames:].clone()
        self._first_frame += frames
        return piece

    def _quiet_frame(self, log_probs: Tensor) -> int:
        """The frame of the second half around which the blank is most probable."""
        half = len(log_probs) // 2
        blank = log_probs[half:, self.blank_id][None, None]
        around = torch.nn.functional.avg_pool1d(blank, SURE_FRAMES, stride=1)  # of frames half + 2, ...
        return half + SURE_FRAMES // 2 + int(around.argmax())
