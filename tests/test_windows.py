"""Windows over recordings, and what is put together again."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from zipformer_crctc.config import ModelConfig
from zipformer_crctc.search import greedy_search
from zipformer_crctc.windows import Cutter, Grid, Stitcher, Window, kept_frames, make_grid

GRID = Grid(window=3200, margin=640, samples_per_frame=320)


class Marked:
    """Stands for the search for pauses, in samples that are their own numbers: stretches end `at` some of these.

    Those in `silent` hold no speech.
    """

    def __init__(self, at: Sequence[int], silent: Sequence[int] = ()) -> None:
        self.at = at
        self.silent = silent

    def stretches(self, samples: np.ndarray, ended: bool) -> list[tuple[int, bool]]:
        found = [end for end in self.at if samples[0] < end <= samples[-1] + ended]
        return [(end - int(samples[0]), end not in self.silent) for end in found]

    def advance(self, samples: int) -> None:
        pass


def cut(samples: np.ndarray, block: int, pauses: Any = None) -> list[Window]:
    return list(Cutter(GRID, pauses).windows(samples[i : i + block] for i in range(0, len(samples), block)))


def kept(windows: list[Window]) -> list[float]:
    """Of windows whose log-probs are every 320th sample."""
    frames = [torch.from_numpy(window.samples[::320].copy())[:, None] for window in windows]
    parts = [kept_frames(part, GRID, w.first, w.last) for part, w in zip(frames, windows, strict=True)]
    return [float(value) for value in torch.cat(parts).flatten()]


@pytest.mark.parametrize("length", [0, 100, 3200, 3201, 5120, 5121, 20_000])
@pytest.mark.parametrize("block", [1000, 7000])
def test_kept_frames_cover_a_recording_once(length: int, block: int) -> None:
    """A window's log-probs stand for its samples here: number t is that of sample 320 t, but for the last few."""
    samples = np.arange(length, dtype=np.float32)
    windows = cut(samples, block)
    assert [window.first for window in windows] == [True] + [False] * (len(windows) - 1)
    assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
    assert [window.start for window in windows] == [GRID.hop * i for i in range(len(windows))]
    assert all(len(window.samples) <= GRID.window for window in windows)
    assert all(len(window.samples) > 2 * GRID.margin for window in windows[1:])
    assert kept(windows) == samples[::320].tolist()


def test_a_recording_that_fits_is_whole_and_one_without_a_pause_is_windows() -> None:
    fits, long = np.arange(3200, dtype=np.float32), np.arange(20_000, dtype=np.float32)
    (whole,) = cut(fits, 1000, Marked([640, 1600]))
    assert whole.first and whole.last and len(whole.samples) == 3200
    for with_finder, without in zip(cut(long, 1000, Marked([])), cut(long, 1000), strict=True):
        assert np.array_equal(with_finder.samples, without.samples)
        assert (with_finder.start, with_finder.first, with_finder.last) == (without.start, without.first, without.last)


@pytest.mark.parametrize("seed", range(20))
def test_stretches_and_windows_hold_every_frame_once_whatever_the_blocks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = np.arange(320 * int(rng.integers(20, 150)), dtype=np.float32)
    pauses = Marked(sorted(320 * rng.choice(len(samples) // 320, int(rng.integers(0, 8)), replace=False)))
    windows = cut(samples, 1000, pauses)
    assert kept(windows) == samples[::320].tolist()
    assert all(window.samples[0] == window.start and len(window.samples) <= GRID.window for window in windows)
    for window, following in pairwise(windows):
        assert following.first == window.last
        assert following.start == window.start + (len(window.samples) if window.last else GRID.hop)
    for block in (70, 7000, 10**6):
        again = cut(samples, block, pauses)
        assert [(w.start, len(w.samples)) for w in again] == [(w.start, len(w.samples)) for w in windows]


def test_silence_is_left_out_and_counted() -> None:
    cutter = Cutter(GRID, Marked([1600, 2560, 6400, 6720], [2560, 6720]))  # type: ignore[arg-type]
    windows = list(cutter.windows([np.arange(8000, dtype=np.float32)]))
    assert cutter.position == 8000 and cutter.silence == 960 + 320
    assert kept(windows) == [320.0 * i for i in range(25) if not (5 <= i < 8 or i == 20)]
    ends_in_silence = Cutter(GRID, Marked([3000, 4000], [4000]))  # type: ignore[arg-type]
    (window,) = ends_in_silence.windows([np.arange(4000, dtype=np.float32)])
    assert len(window.samples) == 3000 and ends_in_silence.silence == 1000


@pytest.mark.parametrize(("factor", "unit"), [(1, 2560), (2, 2560), (3, 7680)])
def test_windows_begin_where_all_frame_rates_meet(factor: int, unit: int) -> None:
    grid = make_grid(ModelConfig(output_downsampling_factor=factor), 30.0, 4.0)
    assert grid.window % unit == grid.margin % unit == grid.hop % unit == 0
    assert grid.window / 16_000 == pytest.approx(30.0, abs=0.25) and grid.margin / 16_000 == pytest.approx(
        2.0, abs=0.25
    )
    assert grid.samples_per_frame == 320 * factor


def test_windows_begin_with_a_chunk_of_a_causal_model() -> None:
    grid = make_grid(ModelConfig(causal=True, chunk_size=(48,), left_context_frames=(96,)), 30.0, 4.0)
    assert grid.hop % (48 * 320) == grid.margin % (48 * 320) == 0
    assert make_grid(ModelConfig(causal=True, chunk_size=(-1,)), 30.0, 4.0).hop % 2560 == 0


def test_pieces_are_cut_in_a_pause_and_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn((400, 9), generator=generator)
    scores[::2, 0] += 9.0
    for pause in (70, 210, 330):
        scores[pause : pause + 9, 0] += 30.0
    log_probs = scores.log_softmax(-1)
    stitcher = Stitcher(max_frames=100, blank_id=0)
    pieces = [piece for i in range(0, 400, 50) for piece in stitcher.add(log_probs[i : i + 50], 7 + i, last=i == 350)]
    assert torch.equal(torch.cat([piece.log_probs for piece in pieces]), log_probs)
    starts = [piece.first_frame for piece in pieces]
    assert starts[0] == 0 and 72 <= starts[1] <= 77
    assert starts == np.cumsum([0, *(len(piece.log_probs) for piece in pieces[:-1])]).tolist()
    assert {piece.stretch_start for piece in pieces} == {7}
    (next_stretch,) = stitcher.add(log_probs[:9], 1000, last=True)
    assert (next_stretch.stretch_start, next_stretch.first_frame, len(next_stretch.log_probs)) == (1000, 0, 9)
    whole = greedy_search(log_probs[None], torch.tensor([400]))[0].tokens
    parts = [greedy_search(piece.log_probs[None], torch.tensor([len(piece.log_probs)]))[0].tokens for piece in pieces]
    assert [token for part in parts for token in part] == whole
