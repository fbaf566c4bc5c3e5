"""Counts of a decoded set."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scored_results import random_results
from zipformer_crctc.metrics import FeatureDistance, join_phones, score
from zipformer_crctc.results import UtteranceResult
from zipformer_crctc.scoring import DELETIONS, PHONES, RATES, rates, score_set
from zipformer_crctc.segments import inventory


def test_rates_are_those_of_the_metrics() -> None:
    results = random_results(60)
    scored = score_set(results, ["test"] * 60)
    counts = score((r.ref, r.hyp) for r in results)
    features = FeatureDistance()
    texts = [(join_phones(r.hyp), join_phones(r.ref)) for r in results]
    wanted = counts.per, features.distances(texts).mean(), features.percent(texts)
    assert rates(scored.columns.sum(axis=0)).tolist() == pytest.approx(wanted, abs=1e-9)
    assert scored.columns[:, PHONES].sum() == counts.reference_phones
    assert len(RATES) == 3


def test_distances_of_segments_add_up_to_those_of_utterances() -> None:
    scored = score_set(random_results(40), ["test"] * 40)
    vectors = inventory().vectors.astype(int)
    sums = np.zeros(40)
    for row, (ref, hyp) in zip(scored.segment_rows, scored.segment_pairs, strict=True):
        if min(ref, hyp) >= 0:
            sums[row] += np.abs(vectors[ref] - vectors[hyp]).sum() / 48
        else:
            sums[row] += (1 + np.abs(vectors[max(ref, hyp)])).sum() / 48
    assert sums == pytest.approx(scored.columns[:, 4], abs=1e-9)


def test_empty_hypotheses_and_references() -> None:
    results = [UtteranceResult("a", ["p", "a"], []), UtteranceResult("b", [], ["p"]), UtteranceResult("c", [], [])]
    scored = score_set(results, ["x", "y", "y"])
    assert scored.keys == [("x", "a")]
    assert scored.unscorable == [("y", "b"), ("y", "c")]
    assert scored.columns[0, DELETIONS] == scored.columns[0, PHONES] == 2
    assert scored.empty_hypotheses == 1


def test_nothing_to_score() -> None:
    scored = score_set([], [])
    assert scored.columns.shape == (0, 8)
    assert all(math.isnan(rate) for rate in rates(scored.columns.sum(axis=0)))


def test_what_panphon_drops_is_counted() -> None:
    scored = score_set([UtteranceResult("a", ["a", "ʜ", "g"], ["a", "<unk>"])], ["x"])
    assert scored.dropped == {"ʜ": 1, "<unk>": 1}
