"""Two systems on the same utterances."""

from __future__ import annotations

from dataclasses import replace

import pytest

from scored_results import random_results
from zipformer_crctc.comparison import compare
from zipformer_crctc.scoring import ScoredSet, rates, score_set


def scored(error_rate: float, count: int = 80) -> ScoredSet:
    return score_set(random_results(count, error_rate), ["x"] * count)


def test_a_clear_difference() -> None:
    worse, better = scored(0.4), scored(0.1)
    found = compare(worse, better)
    assert found.utterances == 80
    for place, change in enumerate(found.differences):
        assert change.value == pytest.approx(found.rates[1][place] - found.rates[0][place])
        assert change.interval.low <= change.value <= change.interval.high < 0
        assert change.p_value < 0.01
    assert found.rates[0] == pytest.approx(rates(worse.columns.sum(axis=0)))
    back = compare(better, worse)
    assert [d.value for d in back.differences] == pytest.approx([-d.value for d in found.differences])


def test_a_system_equals_itself() -> None:
    for change in compare(scored(0.3), scored(0.3)).differences:
        assert (change.value, change.interval.low, change.interval.high, change.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_difference_of_chance_is_not_significant() -> None:
    found = compare(scored(0.3), scored(0.3001))
    assert found.differences[0].interval.low < 0 < found.differences[0].interval.high
    assert found.differences[0].p_value > 0.05


def test_only_common_utterances_are_compared() -> None:
    few = score_set(random_results(10, 0.2)[::-1], ["y"] * 10)
    found = compare(scored(0.4), few)
    assert found.utterances == 10
    assert found.common == (list(range(10)), list(range(9, -1, -1)))
    assert len(found.only[0]) == 70 and found.only[1] == []


def test_what_cannot_be_compared() -> None:
    results = random_results(4)
    other = [replace(results[0], ref=["a"]), *results[1:]]
    with pytest.raises(ValueError, match=r"utterance u0000: .* different references"):
        compare(score_set(results, ["x"] * 4), score_set(other, ["x"] * 4))
    with pytest.raises(ValueError, match="no scored utterance in common"):
        compare(score_set(results, ["x"] * 4), score_set(random_results(4, prefix="v"), ["x"] * 4))
    with pytest.raises(ValueError, match="u0000 occurs twice"):
        compare(score_set(results + results[:1], ["x"] * 5), score_set(results, ["x"] * 4))
