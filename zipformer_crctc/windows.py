"""Recordings of any length through a model that was trained on utterances: stretches, overlapping windows, and back.

A recording that fits into one window is passed whole. A longer one is cut in its pauses (pauses.py) into stretches,
each of which is passed and searched like an utterance of its own; silence is left out. A stretch without a pause that
is longer than a window, or the whole recording if no pauses are looked for, is cut into windows that begin on a grid
on which all frame rates of the model meet, so that a frame of a window is the same piece of audio as that of the whole;
of two windows each is kept up to the middle of their overlap. What is put together is cut again for the search, where
the model is surest that nothing begins: so hours of audio never stand in memory at once.

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
from zipformer_crctc.pauses import PauseFinder

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
    """A stretch of a recording, or a part of one that is too long."""

    samples: np.ndarray
    """(S,) float32."""
    start: int
    """Where it begins in the recording, in samples."""
    first: bool
    """Whether its stretch begins with it."""
    last: bool
    """Whether its stretch ends with it."""


class Cutter:
    """Cuts a recording that is read as a stream; holds one window and one block at a time.

    Args:
        grid: of the windows.
        pauses: where to cut before a window is full; None is nowhere.
    """

    def __init__(self, grid: Grid, pauses: PauseFinder | None = None) -> None:
        self.grid = grid
        self.pauses = pauses
        self.position = 0
        """Samples of the recording that are done with."""
        self.silence = 0
        """Samples of them that were left out, in long pauses."""
        self._held: np.ndarray = np.zeros(0, np.float32)
        self._first = True

    def windows(self, blocks: Iterable[np.ndarray]) -> Iterator[Window]:
        """The windows of a recording, whose samples come in blocks; what the blocks are makes no difference."""
        for block in blocks:
            self._held = np.concatenate([self._held, block])
            while len(self._held) > self.grid.window:
                before = self.position
                yield from self._in_pauses(self.grid.window)
                if self.position == before:
                    yield self._take(self.grid.window, self.grid.hop, last=False)
        if self.position:
            yield from self._in_pauses(len(self._held), ended=True)
        if len(self._held) or not self.position:
            yield self._take(len(self._held), len(self._held), last=True)

    def _in_pauses(self, length: int, ended: bool = False) -> Iterator[Window]:
        """The stretches that end within so many of the samples held."""
        if self.pauses is None:
            return
        done = 0 if self._first else 2 * self.grid.margin  # an overlap, where the window before has found no pause
        begin = 0
        for end, speech in self.pauses.stretches(self._held[:length], ended):
            if end <= done:
                continue
            window = self._take(end - begin, end - begin, last=True)
            begin = end
            if speech or not window.first:
                yield window
            else:
                self.silence += len(window.samples)

    def _take(self, length: int, hop: int, last: bool) -> Window:
        window = Window(self._held[:length].copy(), self.position, self._first, last)
        if self.pauses is not None:
            self.pauses.advance(hop)
        self._held = self._held[hop:]
        self.position += hop
        self._first = last
        return window


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
    stretch_start: int
    """Where its stretch begins in the recording, in samples."""
    first_frame: int
    """Where it begins in its stretch, in output frames."""


class Stitcher:
    """Puts what is kept of the windows of a stretch together and cuts it into pieces for the search.

    Args:
        max_frames: output frames held back at most before a piece is cut.
        blank_id: the blank.
    """

    def __init__(self, max_frames: int, blank_id: int) -> None:
        self.max_frames = max_frames
        self.blank_id = blank_id
        self._held: Tensor | None = None
        self._stretch_start = 0
        self._first_frame = 0

    def add(self, log_probs: Tensor, start: int, last: bool) -> Iterator[Piece]:
        """The pieces that are ready after the next frames (T', V), of a window that begins at a sample."""
        if self._held is None:
            self._held, self._stretch_start, self._first_frame = log_probs, start, 0
        else:
            self._held = torch.cat([self._held, log_probs])
        while not last and len(self._held) > self.max_frames:
            yield self._take(self._quiet_frame(self._held))
        if last:
            yield self._take(len(self._held))
            self._held = None

    def _take(self, frames: int) -> Piece:
        assert self._held is not None
        piece = Piece(self._held[:frames], self._stretch_start, self._first_frame)
        self._held = self._held[frames:].clone()
        self._first_frame += frames
        return piece

    def _quiet_frame(self, log_probs: Tensor) -> int:
        """The frame of the second half around which the blank is most probable."""
        half = len(log_probs) // 2
        blank = log_probs[half:, self.blank_id][None, None]
        around = torch.nn.functional.avg_pool1d(blank, SURE_FRAMES, stride=1)  # of frames half + 2, ...
        return half + SURE_FRAMES // 2 + int(around.argmax())
