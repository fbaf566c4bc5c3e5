"""Panphon's segments, many texts at a time."""

from __future__ import annotations

import random

import numpy as np
import pytest

from zipformer_crctc.segments import inventory


def names(texts: list[str]) -> list[list[str]]:
    found = inventory().split(texts).sequences
    ends = np.cumsum(found.lengths)
    return [
        [inventory().names[i] for i in found.ids[end - n : end]] for end, n in zip(ends, found.lengths, strict=True)
    ]


def test_splits_as_panphon_does() -> None:
    table = pytest.importorskip("panphon.featuretable").FeatureTable()
    rng = random.Random(1)
    letters = sorted(set("".join(inventory().names))) + list("gʜ▁ ç1!\n")
    texts = ["".join(rng.choices(letters, k=rng.randrange(20))) for _ in range(300)]
    texts += ["".join(rng.choices(inventory().names, k=rng.randrange(20))) for _ in range(300)]
    assert names(texts) == [table.ipa_segs(text) for text in texts]


def test_what_panphon_reads_otherwise() -> None:
    assert names(["a¹b⁵", "", "t͡ʃʰ", "ã"]) == [["a", "˩", "b", "˥"], [], ["t͡ʃʰ"], ["a\u0303"]]


def test_dropped_symbols_are_counted() -> None:
    split = inventory().split(["aʜ", "ʜ\ud800", "g"])
    assert split.dropped == {"ʜ": 2, "\ud800": 1, "g": 1}
    assert split.sequences.lengths.tolist() == [1, 0, 0]
    assert inventory().split([]).sequences.lengths.shape == (0,)


def test_features_and_costs() -> None:
    table = inventory()
    assert table.vectors.shape == (len(table.names), 24)
    p, b, a = (table.numbers[name] for name in "pba")
    voice = table.features.index("voi")
    assert (table.vectors[p, voice], table.vectors[b, voice]) == (-1, 1)
    costs = table.costs(np.array([p, b, a]))
    assert costs.substitute[0, 1] == costs.substitute[1, 0] == 2
    assert costs.indel[0] == 24 + np.count_nonzero(table.vectors[p])
