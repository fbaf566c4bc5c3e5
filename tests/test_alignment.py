"""Edit distances and alignments of many pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from zipformer_crctc import alignment
from zipformer_crctc.alignment import Costs, Sequences, alignments, distances


def slow_distance(ref: list[int], hyp: list[int], costs: Costs) -> int:
    """The textbook recurrence with three neighbours."""
    table = np.zeros((len(ref) + 1, len(hyp) + 1), dtype=np.int64)
    for i, j in itertools.product(range(len(ref) + 1), range(len(hyp) + 1)):
        ways = [0] if i == j == 0 else []
        if i:
            ways.append(table[i - 1, j] + costs.indel[ref[i - 1]])
        if j:
            ways.append(table[i, j - 1] + costs.indel[hyp[j - 1]])
        if i and j:
            ways.append(table[i - 1, j - 1] + costs.substitute[ref[i - 1], hyp[j - 1]])
        table[i, j] = min(ways)
    return int(table[-1, -1])


def random_case(seed: int, num_pairs: int = 60) -> tuple[list[list[int]], list[list[int]], Costs]:
    rng = np.random.default_rng(seed)
    refs, hyps = ([rng.integers(0, 5, size=rng.integers(0, 12)).tolist() for _ in range(num_pairs)] for _ in range(2))
    half = rng.integers(0, 30, size=(5, 5))
    substitute = half + half.T
    np.fill_diagonal(substitute, 0)
    return refs, hyps, Costs(substitute, rng.integers(1, 30, size=5))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cells", [1, 500, 1 << 20])
def test_distances_and_alignments(seed: int, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the blocks are."""
    monkeypatch.setattr(alignment, "_CELLS", cells)
    refs, hyps, costs = random_case(seed)
    wanted = [slow_distance(ref, hyp, costs) for ref, hyp in zip(refs, hyps, strict=True)]
    sequences = Sequences.of(refs), Sequences.of(hyps)
    assert distances(*sequences, costs).tolist() == wanted
    found = alignments(*sequences, costs)
    for ref, hyp, places, cost in zip(refs, hyps, found, wanted, strict=True):
        assert [i for i in places[:, 0] if i >= 0] == list(range(len(ref)))
        assert [j for j in places[:, 1] if j >= 0] == list(range(len(hyp)))
        steps = [
            costs.indel[hyp[j]] if i < 0 else costs.indel[ref[i]] if j < 0 else costs.substitute[ref[i], hyp[j]]
            for i, j in places
        ]
        assert sum(steps) == cost


def test_large_costs_need_no_more_than_their_own_type() -> None:
    costs = Costs((1 - np.eye(2, dtype=np.int64)) << 40, np.full(2, 1 << 40, dtype=np.int64))
    refs, hyps = Sequences.of([[0, 1, 0]]), Sequences.of([[1, 1]])
    assert distances(refs, hyps, costs).tolist() == [2 << 40]


def test_nothing() -> None:
    nothing = Sequences.of([])
    assert distances(nothing, nothing, Costs.unit(0)).shape == (0,)
    assert alignments(nothing, nothing, Costs.unit(0)) == []
    empty = Sequences.of([[], []])
    assert distances(empty, empty, Costs.unit(0)).tolist() == [0, 0]
    assert [places.shape for places in alignments(empty, empty, Costs.unit(0))] == [(0, 2), (0, 2)]


def test_sums_and_padding() -> None:
    sequences = Sequences.of([[1, 2], [], [0]])
    assert sequences.sums(np.array([5, 7, 9])).tolist() == [16, 0, 5]
    assert sequences.padded(np.array([2, 1, 0]), padding=9).tolist() == [[0, 9], [9, 9], [1, 2]]
