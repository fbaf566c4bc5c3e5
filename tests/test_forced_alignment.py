"""Forced alignment against all paths of small cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from zipformer_crctc.filters import frames_needed
from zipformer_crctc.forced_alignment import ForcedAlignment, force_align


def collapse(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label != 0]


def spans(path: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """First and last frame of each label of a path of pieces."""
    first, last, frame = [], [], 0
    for label, run in itertools.groupby(path):
        length = len(list(run))
        if label != 0:
            first.append(frame)
            last.append(frame + length - 1)
        frame += length
    return first, last


def brute_force(log_probs: Tensor, target: list[int]) -> tuple[float, set[tuple[tuple[int, ...], tuple[int, ...]]]]:
    """The best score of all paths, and the (first, last) of those that have it."""
    num_frames, num_pieces = log_probs.shape
    best = -math.inf
    found: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for path in itertools.product(range(num_pieces), repeat=num_frames):
        if collapse(path) != target:
            continue
        score = float(sum(log_probs[t, piece].double() for t, piece in enumerate(path)))
        if score > best + 1e-9:
            best, found = score, set()
        if score > best - 1e-9:
            first, last = spans(path)
            found.add((tuple(first), tuple(last)))
    return best, found


def random_batch(seed: int, count: int, frames: int, pieces: int) -> tuple[Tensor, Tensor, list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)

    def below(high: int) -> int:
        return int(torch.randint(high, (1,), generator=generator))

    log_probs = (2 * torch.randn(count, frames, pieces, generator=generator)).log_softmax(dim=2)
    lengths = torch.tensor([1 + below(frames) for _ in range(count)])
    targets = [[1 + below(pieces - 1) for _ in range(below(4))] for _ in range(count)]
    return log_probs, lengths, targets


def test_equals_the_best_of_all_paths() -> None:
    aligned = impossible = 0
    for seed in range(15):
        log_probs, lengths, targets = random_batch(seed, count=20, frames=5, pieces=3)
        for n, found in enumerate(force_align(log_probs, lengths, targets)):
            score, best = brute_force(log_probs[n, : lengths[n]], targets[n])
            assert found.tokens == targets[n]
            if math.isinf(score):
                assert found.problem is not None and "longer than the audio allows" in found.problem
                assert (found.first, found.last, found.score) == ([], [], -math.inf)
                impossible += 1
            else:
                assert found.problem is None
                assert found.score == pytest.approx(score, abs=1e-5)
                assert (tuple(found.first), tuple(found.last)) in best
                aligned += 1
    assert aligned >= 200 and impossible >= 50


def test_the_batch_equals_one_by_one() -> None:
    log_probs, lengths, targets = random_batch(7, count=40, frames=30, pieces=6)
    targets = [target * 3 for target in targets]
    together = force_align(log_probs, lengths, targets)
    log_probs[torch.arange(30) >= lengths[:, None]] = math.nan  # what lies behind the end does not count
    for n, found in enumerate(together):
        alone = force_align(log_probs[n : n + 1, : lengths[n]], lengths[n : n + 1], [targets[n]])
        assert alone == [found]
    assert force_align(log_probs, lengths, targets) == together
    assert {found.problem is None for found in together} == {True, False}


def test_the_frames_of_the_labels_are_in_order() -> None:
    log_probs, lengths, targets = random_batch(3, count=30, frames=60, pieces=5)
    for found, length in zip(force_align(log_probs, lengths, targets), lengths.tolist(), strict=True):
        if found.problem is None:
            assert all(0 <= first <= last < length for first, last in zip(found.first, found.last, strict=True))
            for k in range(1, len(found.tokens)):
                gap = 1 + (found.tokens[k] == found.tokens[k - 1])
                assert found.first[k] >= found.last[k - 1] + gap


def test_equal_neighbours_need_a_blank_between_them() -> None:
    log_probs = torch.full((1, 3, 2), 0.5).log()
    assert frames_needed([1, 1]) == 3
    (found,) = force_align(log_probs, torch.tensor([3]), [[1, 1]])
    assert (found.first, found.last) == ([0, 2], [0, 2])
    (none,) = force_align(log_probs, torch.tensor([2]), [[1, 1]])
    assert none.problem is not None and "2 tokens need 3 output frames" in none.problem


def test_what_cannot_be_aligned_is_named_and_leaves_the_others_alone() -> None:
    log_probs, _, _ = random_batch(1, count=3, frames=8, pieces=4)
    lengths = torch.tensor([8, 8, 8])
    (clean,) = force_align(log_probs[2:], lengths[2:], [[2, 3]])
    log_probs[0, 4, 1] = math.nan
    log_probs[1, :, 3] = -math.inf
    damaged, hopeless, good = force_align(log_probs, lengths, [[1], [3], [2, 3]])
    assert damaged.problem is not None and "NaN" in damaged.problem
    assert hopeless.problem is not None and "above zero" in hopeless.problem
    assert good == clean


def test_empty_input() -> None:
    assert force_align(torch.zeros(0, 5, 4), torch.zeros(0, dtype=torch.int64), []) == []
    one = force_align(torch.zeros(1, 0, 4), torch.tensor([0]), [[]])
    assert one == [ForcedAlignment([], [], [], 0.0)]
    silent = force_align(torch.full((1, 4, 4), 0.25).log(), torch.tensor([4]), [[]])
    assert silent[0].score == pytest.approx(4 * math.log(0.25))
    single = force_align(torch.full((1, 1, 4), 0.25).log(), torch.tensor([1]), [[2]])
    assert (single[0].first, single[0].last) == ([0], [0])


def test_wrong_arguments() -> None:
    log_probs, lengths = torch.zeros(2, 5, 4), torch.tensor([5, 5])
    with pytest.raises(ValueError, match="expected \\(N, T', V\\)"):
        force_align(torch.zeros(5, 4), lengths, [[1], [1]])
    with pytest.raises(ValueError, match="expected \\(2,\\)"):
        force_align(log_probs, torch.tensor([5]), [[1], [1]])
    with pytest.raises(ValueError, match="labels of 1 utterances, log_probs has 2"):
        force_align(log_probs, lengths, [[1]])
    with pytest.raises(ValueError, match="do not lie within 0 and T' = 5"):
        force_align(log_probs, torch.tensor([5, 6]), [[1], [1]])
    with pytest.raises(ValueError, match="targets\\[1\\] holds the label 0"):
        force_align(log_probs, lengths, [[1], [0]])
    with pytest.raises(ValueError, match="targets\\[1\\] holds the label 4"):
        force_align(log_probs, lengths, [[1], [4]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    log_probs, lengths, targets = random_batch(5, count=30, frames=50, pieces=8)
    assert force_align(log_probs.cuda(), lengths.cuda(), targets) == force_align(log_probs, lengths, targets)
