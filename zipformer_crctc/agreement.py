"""How far several models agree about what is said in an utterance, and which hypothesis becomes its pseudo-label.

The measure is the mean PFER between the models' hypotheses (Zhu et al. 2025, "ZIPA", pseudo-labelling): the feature
edit distance of panphon, over all pairs of models.

Legend: M models, N utterances, P = M (M - 1) / 2 pairs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from zipformer_crctc.metrics import FeatureDistance, join_phones

_DIGITS = 6  # of a score in files, and so in comparisons
QUANTILES = (0, 5, 10, 25, 50, 75, 90, 95, 100)
"""Percentiles that describe a distribution."""


@dataclass(frozen=True)
class Agreement:
    """What several models make of one utterance."""

    id: str
    label: str
    """The hypothesis that is closest to the others on average, its phones joined; of equals, the first model's."""
    label_of: int
    """The number of its model, from 0."""
    pfer: float
    """Mean feature edit distance over all pairs of hypotheses; 0 where all models say the same."""
    pfer_per_phone: float
    """The same divided by the number of phones of the label."""
    duration: float
    """Seconds of audio."""
    hypotheses: list[str]
    """Of every model, in their order."""

    def score(self, per_phone: bool) -> float:
        """The value that decides: the smaller, the better."""
        return self.pfer_per_phone if per_phone else self.pfer


class AgreementMeter:
    """Measures the agreement of utterances, many at a time."""

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        """`<unk>` and its like in hypotheses, which become no part of a label."""
        self._distance = FeatureDistance()

    @property
    def unknown_to_panphon(self) -> Counter[str]:
        """Symbols that the distance does not see; they stay in the labels."""
        return self._distance.dropped

    def measure(
        self, ids: Sequence[str], durations: Sequence[float], hypotheses: Sequence[Sequence[Sequence[str]]]
    ) -> list[Agreement]:
        """The agreement of each of N utterances.

        hypotheses: N times the phones (without `▁`) of each of M models. Raises ValueError for fewer than two models.
        """
        texts = [[join_phones(phones, self.left_out) for phones in row] for row in hypotheses]
        if not texts:
            return []
        models = len(texts[0])
        if models < 2 or any(len(row) != models for row in texts):
            raise ValueError(
                f"hypotheses of {models} models, or not of all: agreement needs the same two or more of each"
            )
        pairs = list(combinations(range(models), 2))
        values = self._distance.distances([(row[i], row[j]) for row in texts for i, j in pairs])
        found = []
        for n, distances in enumerate(values.reshape(len(texts), len(pairs))):  # (P,)
            between = np.zeros((models, models))
            for (i, j), distance in zip(pairs, distances, strict=True):
                between[i, j] = between[j, i] = distance
            best = int(np.round(between.sum(axis=1), _DIGITS).argmin())
            mean = float(distances.mean())
            found.append(
                Agreement(
                    id=ids[n],
                    label=texts[n][best],
                    label_of=best,
                    pfer=round(mean, _DIGITS),
                    pfer_per_phone=round(mean / max(1, len(hypotheses[n][best])), _DIGITS),
                    duration=durations[n],
                    hypotheses=texts[n],
                )
            )
        return found


def limit_of_best(scores: Sequence[float], percent: float) -> float:
    """The largest score among the best so many percent, rounded up to whole utterances; equals are all within."""
    if not scores:
        raise ValueError("no utterance has a label, so there is no best part of them; are the checkpoints trained?")
    return sorted(scores)[max(1, math.ceil(len(scores) * percent / 100)) - 1]


def distribution(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and percentiles, rounded; nothing for no values."""
    if not values:
        return {}
    levels = {f"p{q}": float(level) for q, level in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)}
    parts = {"mean": float(np.mean(values)), "std": float(np.std(values)), **levels}
    return {name: round(value, _DIGITS) for name, value in parts.items()}
