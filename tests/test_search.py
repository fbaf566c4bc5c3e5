"""Greedy CTC search."""

from __future__ import annotations

import pytest
import torch

from zipformer_crctc.forced_alignment import force_align
from zipformer_crctc.search import Hypothesis, NotANumber, frame_time, greedy_search, naming


def path_log_probs(paths: list[list[int]], num_pieces: int) -> torch.Tensor:
    """Log-probabilities (N, T', V) whose best path is given: ln 0.5 on it, the rest spread evenly."""
    ids = torch.tensor(paths)
    rest = 0.5 / (num_pieces - 1)
    return torch.full((*ids.shape, num_pieces), rest).scatter(2, ids.unsqueeze(2), 0.5).log()


def test_merges_repeats_and_removes_blanks() -> None:
    log_probs = path_log_probs([[0, 5, 5, 0, 5, 6, 6], [4, 4, 0, 0, 3, 3, 3], [0] * 7], num_pieces=8)
    first, second, third = greedy_search(log_probs, torch.tensor([7, 4, 7]))
    assert (first.tokens, first.frames) == ([5, 5, 6], [1, 4, 5])
    assert (second.tokens, second.frames) == ([4], [0])
    assert (third.tokens, third.frames) == ([], [])
    assert [best.last_frames for best in (first, second, third)] == [[2, 4, 6], [1], []]
    assert first.score == pytest.approx(7 * torch.tensor(0.5).log().item(), abs=1e-5)
    assert second.score == pytest.approx(4 * torch.tensor(0.5).log().item(), abs=1e-5)


def test_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(6, 50, 5, generator=generator).log_softmax(dim=2)
    lengths = torch.tensor([50, 49, 20, 1, 0, 33])
    for n, found in enumerate(greedy_search(log_probs, lengths)):
        tokens, frames, previous, score = [], [], 0, 0.0
        for t in range(int(lengths[n])):
            best = int(log_probs[n, t].argmax())
            score += float(log_probs[n, t, best])
            if best not in (0, previous):
                tokens.append(best)
                frames.append(t)
            previous = best
        assert (found.tokens, found.frames) == (tokens, frames)
        assert found.score == pytest.approx(score, abs=1e-4)


def test_its_path_is_the_best_one_through_its_tokens() -> None:
    log_probs = torch.randn(20, 40, 6, generator=torch.Generator().manual_seed(1)).log_softmax(dim=2)
    lengths = torch.arange(21, 41)
    found = greedy_search(log_probs, lengths)
    aligned = force_align(log_probs, lengths, [best.tokens for best in found])
    assert [(best.frames, best.last_frames) for best in found] == [(path.first, path.last) for path in aligned]


def test_padding_does_not_count() -> None:
    log_probs = path_log_probs([[4, 5, 6]], num_pieces=8)
    log_probs[0, 2] = float("nan")
    assert greedy_search(log_probs, torch.tensor([2]))[0].score == pytest.approx(-1.386294, abs=1e-5)


def test_times() -> None:
    assert frame_time(0) == 0.045
    assert Hypothesis([4, 5], [1, 10], 0.0).times == [0.065, 0.245]


def test_times_at_25_hz_lie_between_those_of_the_two_frames() -> None:
    log_probs = path_log_probs([[0, 5, 0, 6]], num_pieces=8)
    (found,) = greedy_search(log_probs, torch.tensor([4]), factor=2)
    assert found.times == pytest.approx([(frame_time(2) + frame_time(3)) / 2, (frame_time(6) + frame_time(7)) / 2])


def test_empty_input() -> None:
    assert greedy_search(torch.zeros(0, 5, 4), torch.zeros(0, dtype=torch.int64)) == []
    assert greedy_search(torch.zeros(2, 0, 4), torch.zeros(2, dtype=torch.int64)) == 2 * [
        Hypothesis([], [], 0.0, last_frames=[])
    ]


def test_wrong_shapes() -> None:
    with pytest.raises(ValueError, match="expected \\(N, T', V\\)"):
        greedy_search(torch.zeros(5, 4), torch.tensor([5]))
    with pytest.raises(ValueError, match="expected \\(2,\\)"):
        greedy_search(torch.zeros(2, 5, 4), torch.tensor([5]))
    with pytest.raises(ValueError, match="do not lie within 0 and T' = 5"):
        greedy_search(torch.zeros(2, 5, 4), torch.tensor([5, 6]))


def test_nan_can_name_the_utterance() -> None:
    log_probs = torch.zeros(2, 3, 4)
    log_probs[1, 2, 0] = float("nan")
    with pytest.raises(NotANumber) as found:
        greedy_search(log_probs, torch.tensor([3, 3]))
    assert (found.value.row, found.value.frame) == (1, 2)
    with pytest.raises(ValueError, match="utterance b: log_probs: NaN in row 1, frame 2"), naming(["a", "b"]):
        greedy_search(log_probs, torch.tensor([3, 3]))
