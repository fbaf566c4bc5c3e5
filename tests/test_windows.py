"""Windows over recordings, and what is put together again."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from zipformer_crctc.config import ModelConfig
from zipformer_crctc.search import greedy_search
from zipformer_crctc.windows import Grid, Stitcher, cut_windows, kept_frames, make_grid

GRID = Grid(window=3200, margin=640, samples_per_frame=320)


@pytest.mark.parametrize("length", [0, 100, 3200, 3201, 5120, 5121, 20_000])
@pytest.mark.parametrize("block", [1000, 7000])
def test_kept_frames_cover_a_recording_once(length: int, block: int) -> None:
    """A window's log-probs stand for its samples here: number t is that of sample 320 t, but for the last few."""
    samples = np.arange(length, dtype=np.float32)
    windows = list(cut_windows((samples[i : i + block] for i in range(0, length, block)), GRID))
    assert [window.first for window in windows] == [True] + [False] * (len(windows) - 1)
    assert [window.last for window in windows] == [False] * (len(windows) - 1) + [True]
    assert all(len(window.samples) <= GRID.window for window in windows)
    assert all(len(window.samples) > 2 * GRID.margin for window in windows[1:])
    kept = [
        kept_frames(torch.from_numpy(window.samples[::320].copy())[:, None], GRID, window.first, window.last)
        for window in windows
    ]
    assert torch.cat(kept).flatten().tolist() == samples[::320].tolist()


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
    pieces = [piece for i in range(0, 400, 50) for piece in stitcher.add(log_probs[i : i + 50], last=i == 350)]
    assert torch.equal(torch.cat([piece.log_probs for piece in pieces]), log_probs)
    starts = [piece.first_frame for piece in pieces]
    assert starts[0] == 0 and 72 <= starts[1] <= 77
    assert starts == np.cumsum([0, *(len(piece.log_probs) for piece in pieces[:-1])]).tolist()
    whole = greedy_search(log_probs[None], torch.tensor([400]))[0].tokens
    parts = [greedy_search(piece.log_probs[None], torch.tensor([len(piece.log_probs)]))[0].tokens for piece in pieces]
    assert [token for part in parts for token in part] == whole
