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
    assert found.total.utterances == 80
    for place, change in enumerate(found.total.differences):
        assert change.value == pytest.approx(found.total.rates[1][place] - found.total.rates[0][place])
        assert change.interval.low <= change.value <= change.interval.high < 0
        assert change.p_value < 0.01
    assert found.total.rates[0] == pytest.approx(rates(worse.columns.sum(axis=0)))
    back = compare(better, worse)
    values = [d.value for d in found.total.differences]
    assert [-d.value for d in back.total.differences] == pytest.approx(values)


def test_languages_add_up() -> None:
    found = compare(scored(0.4), scored(0.1))
    assert list(found.languages) == ["l00", "l01", "l02"]
    assert sum(change.utterances for change in found.languages.values()) == 80
    first, second = (score_set(random_results(80, rate)[::3], ["x"] * 27) for rate in (0.4, 0.1))
    assert found.languages["l00"] == compare(first, second).total


def test_a_system_equals_itself() -> None:
    for change in compare(scored(0.3), scored(0.3)).total.differences:
        assert (change.value, change.interval.low, change.interval.high, change.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_a_difference_of_chance_is_not_significant() -> None:
    found = compare(scored(0.3), scored(0.3001))
    assert found.total.differences[0].interval.low < 0 < found.total.differences[0].interval.high
    assert found.total.differences[0].p_value > 0.05


def test_only_common_utterances_are_compared() -> None:
    few = score_set(random_results(10, 0.2)[::-1], ["y"] * 10)
    found = compare(scored(0.4), few)
    assert found.total.utterances == 10
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
