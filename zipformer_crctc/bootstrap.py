"""Confidence intervals of error rates, and the comparison of two systems, by resampling utterances.

An utterance is drawn as a whole, since errors within one depend on each other; sums over the drawn utterances give the
rate of a resampled set, and percentiles over many such sets the interval. Two systems are compared on the same draws.
Source: Bisani & Ney 2004, "Bootstrap estimates for confidence intervals in ASR performance evaluation".

Legend: N utterances, K columns (counts that sum to the numerators and denominators of rates), B resampled sets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NUM_SETS = 1000
LEVEL = 0.95
_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A confidence interval; NaN where there is none, such as for a single utterance."""

    low: float = math.nan
    high: float = math.nan

    @property
    def known(self) -> bool:
        return not math.isnan(self.low)


@dataclass(frozen=True)
class Difference:
    """A rate of system B less that of system A on the same utterances."""

    value: float
    interval: Interval
    p_value: float
    """Two-sided: twice the share of resampled sets in which the difference is 0 or has the other sign; at most 1."""


def resampled_sums(columns: NDArray[Any], num_sets: int = NUM_SETS, seed: int = 0) -> NDArray[np.float64]:
    """(B, K): the sums of `columns` (N, K) over B sets of N utterances drawn with replacement.

    Of one seed and N, set b is always the same, whatever the columns are.
    """
    num_utterances = len(columns)
    columns = np.asarray(columns, dtype=np.float64)
    rng = np.random.default_rng(seed)
    sums = np.zeros((num_sets, columns.shape[1]))
    step = max(1, _DRAWS_AT_ONCE // max(1, num_utterances))
    for start in range(0, num_sets, step):
        here = min(step, num_sets - start)
        drawn = (
            rng.integers(num_utterances, size=(here, num_utterances)) if num_utterances else np.empty((here, 0), int)
        )
        places = drawn + num_utterances * np.arange(here)[:, None]
        times = np.bincount(places.ravel(), minlength=here * num_utterances).reshape(here, num_utterances)
        sums[start : start + here] = times.astype(np.float64) @ columns
    return sums


def intervals(rates: NDArray[np.float64], level: float = LEVEL) -> list[Interval]:
    """The interval of each column of `rates` (B, G); sets in which a rate does not exist (NaN) are left out of its."""
    tail = 100 * (1 - level) / 2
    found = []
    for column in rates.T:
        known = column[~np.isnan(column)]
        found.append(
            Interval(*(float(q) for q in np.percentile(known, (tail, 100 - tail)))) if len(known) else Interval()
        )
    return found


def difference(value: float, resampled: NDArray[np.floating], level: float = LEVEL) -> Difference:
    """The difference `value` with what it is in the resampled sets (B,)."""
    known = resampled[~np.isnan(resampled)]
    if not len(known):
        return Difference(value, Interval(), math.nan)
    # One is added on both sides, the observed set itself: no number of sets shows a probability of 0.
    tail = (1 + min(np.count_nonzero(known <= 0), np.count_nonzero(known >= 0))) / (1 + len(known))
    return Difference(value, intervals(known[:, None], level)[0], min(1.0, 2 * tail))
