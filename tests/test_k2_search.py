"""Lattice methods: without k2, and what does not need it; tests/optional/k2_one_best.sh runs the rest."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

from test_beam import brute_force, random_log_probs
from zipformer_crctc.k2_search import LatticeOptions, _Path, _summed, lattice_search, load_k2
from zipformer_crctc.search import greedy_search


@pytest.mark.parametrize("method", ["ctc-decoding", "nbest"])
def test_without_k2(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "k2", None)
    with pytest.raises(ValueError, match=f"--decoding-method {method}: needs the package k2.*ctc-prefix-beam-search"):
        load_k2(method)
    with pytest.raises(ValueError, match="needs the package k2"):
        lattice_search(torch.zeros(1, 2, 3), torch.tensor([2]), LatticeOptions(method))


def test_a_path_is_read_from_its_labels() -> None:
    path = _Path.of(torch.tensor([0, 5, 0, 0, 5, 7, -1]), torch.tensor([-0.5, -0.25, -0.5, 0.0, 0.0, 0.0, 0.0]))
    assert path == _Path([5, 5, 7], [1, 4, 5], -1.25)
    assert _Path.of(torch.tensor([]), torch.tensor([])) == _Path([], [], float("-inf"))


def test_strings_are_scored_by_all_their_alignments() -> None:
    log_probs = random_log_probs(torch.Generator().manual_seed(0), 5, 4)
    wanted = brute_force(log_probs)
    paths = [_Path([1], [0], -3.0), _Path([1], [2], -2.0), _Path([], [], -9.0), _Path([2, 2], [0, 2], -4.0)]
    found = _summed(paths, log_probs, factor=2)
    assert [hypothesis.score for hypothesis in found] == sorted((h.score for h in found), reverse=True)
    assert {tuple(h.tokens): h.score for h in found} == pytest.approx(
        {labels: wanted[labels] for labels in ((1,), (), (2, 2))}, abs=1e-5
    )
    (one,) = (hypothesis for hypothesis in found if hypothesis.tokens == [1])
    assert (one.frames, one.factor) == ([2], 2)


@pytest.mark.skipif(importlib.util.find_spec("k2") is None, reason="the package k2 is not installed")
def test_the_best_path_is_the_greedy_one() -> None:
    log_probs = random_log_probs(torch.Generator().manual_seed(1), 4, 30, 9, peaky=4.0)
    lengths = torch.tensor([30, 0, 12, 29])
    for (found,), wanted in zip(lattice_search(log_probs, lengths), greedy_search(log_probs, lengths), strict=True):
        assert (found.tokens, found.frames) == (wanted.tokens, wanted.frames)
