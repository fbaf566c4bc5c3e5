"""Error rates by group, phone and feature."""

from __future__ import annotations

import math

import pytest

from scored_results import random_results
from zipformer_crctc.breakdown import FEATURE_GROUPS, NONE, by_feature, by_group, by_phone, confusions, total
from zipformer_crctc.metrics import ErrorCounts
from zipformer_crctc.results import UtteranceResult
from zipformer_crctc.scoring import score_set
from zipformer_crctc.segments import inventory

SMALL = [
    UtteranceResult("a", list("pat"), list("bat"), "eng", "s1"),
    UtteranceResult("b", list("pat"), list("pt"), "eng", ""),
    UtteranceResult("c", ["k", "ʰ", "a"], ["k", "a", "s"], "deu", "s1"),
]


def test_groups_add_up() -> None:
    scored = score_set(random_results(60), ["one"] * 20 + ["two"] * 40)
    whole = total(scored)
    for kind, names in (("language", ["l00", "l01", "l02"]), ("corpus", ["one", "two"]), ("speaker", None)):
        rows = by_group(scored, kind)
        assert names is None or [row.group for row in rows] == names
        assert sum((row.counts for row in rows), ErrorCounts()) == whole.counts
        assert sum(row.utterances for row in rows) == 60
        for row in [*rows, whole]:
            assert row.rates[0] == row.counts.per
            for rate, interval in zip(row.rates, row.intervals, strict=True):
                assert interval.low <= rate <= interval.high


def test_small_groups() -> None:
    eng, deu = by_group(score_set(SMALL, ["x"] * 3), "language")[::-1]
    assert (eng.utterances, eng.counts) == (2, ErrorCounts(4, 1, 1, 0))
    assert deu.rates[0] == pytest.approx(200 / 3)
    assert not deu.intervals[0].known, "one utterance has no interval"
    assert [row.group for row in by_group(score_set(SMALL, ["x"] * 3), "speaker")] == [NONE, "s1"]


def test_phones() -> None:
    scored = score_set(SMALL, ["x"] * 3)
    rows = {row.phone: row for row in by_phone(scored)}
    assert rows["p"].counts == ErrorCounts(1, 1, 0, 0) and rows["p"].per == 50.0
    assert rows["s"].counts == ErrorCounts(0, 0, 0, 1) and math.isnan(rows["s"].per)
    assert rows["ʰ"].counts == ErrorCounts(0, 0, 1, 0) and rows["ʰ"].in_ref == 0
    assert rows["kʰ"].in_ref == 1 and rows["kʰ"].counts == ErrorCounts()
    assert rows["p"].pfer_mean == pytest.approx(1 / 24 / 2)
    assert rows["p"].pfer_percent == pytest.approx(100 / 24 / 2)
    assert rows["a"].counts.deletions == 1


def test_phones_add_up() -> None:
    scored = score_set(random_results(50, phones="pbtdksmniea"), ["x"] * 50)
    rows, whole = by_phone(scored), total(scored)
    assert sum((row.counts for row in rows), ErrorCounts()) == whole.counts
    distance = sum(row.pfer_percent * row.in_ref / 100 for row in rows if row.in_ref)
    assert all(row.in_ref for row in rows)
    assert distance == pytest.approx(whole.rates[1] * 50, rel=1e-9)
    assert all(row.per_interval.low <= row.per <= row.per_interval.high for row in rows if row.counts.reference_phones)


def test_confusions() -> None:
    counts = confusions(score_set(SMALL, ["x"] * 3))
    assert counts["p", "b"] == 1 and counts["a", None] == 1 and counts[None, "s"] == 1 and counts["ʰ", None] == 1
    assert counts["t", "t"] == 2


def test_features() -> None:
    assert sorted(name for group in FEATURE_GROUPS.values() for name in group) == sorted(inventory().features)
    rows = {(row.group, row.name): row for row in by_feature(score_set(SMALL[:2], ["x"] * 2))}
    assert list(rows)[:2] == [("voice", "any"), ("voice", "voiced")]
    voiced = rows["voice", "voiced"]
    assert (voiced.specified, voiced.wrong, voiced.rate, voiced.of_substitutions) == (5, 1, 20.0, 100.0)
    assert rows["voice", "any"].wrong == 1
    assert rows["manner", "any"].wrong == rows["place", "any"].wrong == 0


def test_nothing() -> None:
    scored = score_set([], [])
    assert by_group(scored, "language") == by_phone(scored) == []
    assert math.isnan(total(scored).rates[0])
    assert all(math.isnan(row.rate) for row in by_feature(scored))
