"""Resampling."""

from __future__ import annotations

import math

import numpy as np
import pytest

from zipformer_crctc import bootstrap
from zipformer_crctc.bootstrap import Interval, difference, intervals, resampled_sums


def test_sums_are_those_of_drawn_utterances() -> None:
    columns = np.array([[1.0, 1.0], [10.0, 1.0], [100.0, 1.0]])
    sums = resampled_sums(columns, num_sets=200, seed=1)
    assert sums.shape == (200, 2)
    assert (sums[:, 1] == 3).all()
    possible = {a + b + c for a in (1, 10, 100) for b in (1, 10, 100) for c in (1, 10, 100)}
    assert set(sums[:, 0]) <= possible and len(set(sums[:, 0])) > 5


def test_seeded_and_the_same_for_all_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(0).random((50, 3))
    sums = resampled_sums(columns, num_sets=40, seed=3)
    assert (resampled_sums(columns, num_sets=40, seed=3) == sums).all()
    assert resampled_sums(columns[:, 1:2], num_sets=40, seed=3)[:, 0] == pytest.approx(sums[:, 1])
    assert (resampled_sums(columns, num_sets=40, seed=4) != sums).any()
    monkeypatch.setattr(bootstrap, "_DRAWS_AT_ONCE", 120)
    assert resampled_sums(columns, num_sets=40, seed=3) == pytest.approx(sums)


def test_interval_of_a_mean_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(5.0, 2.0, size=(400, 1))
    (interval,) = intervals(resampled_sums(values) / len(values))
    half = 1.96 * values.std() / 20
    assert interval.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_intervals_leave_out_what_does_not_exist() -> None:
    rates = np.array([[1.0, math.nan], [2.0, math.nan], [math.nan, math.nan]])
    first, second = intervals(rates, level=0.5)
    assert first == Interval(1.25, 1.75)
    assert not second.known


def test_difference() -> None:
    clear = difference(-1.0, np.linspace(-2, -0.5, 999))
    assert clear.p_value == pytest.approx(2 / 1000)
    assert -2 < clear.interval.low < clear.interval.high < -0.5
    assert difference(0.0, np.zeros(99)).p_value == 1.0
    assert math.isnan(difference(1.0, np.full(3, math.nan)).p_value)
