"""Two systems on the same utterances: differences of their rates by a paired bootstrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.bootstrap import Difference, difference, resampled_sums
from zipformer_crctc.metrics import group_by
from zipformer_crctc.scoring import ScoredSet, rates


@dataclass(frozen=True)
class Comparison:
    """System B against system A on the utterances that both have."""

    utterances: int
    rates: tuple[tuple[float, ...], tuple[float, ...]]
    """The `RATES` of A and of B."""
    differences: tuple[Difference, ...]
    """B less A, for each of the `RATES`; below 0 where B is better."""
    only: tuple[list[tuple[str, str]], list[tuple[str, str]]]
    """Corpus and id of scored utterances that only A has, and only B."""
    common: tuple[list[int], list[int]]
    """Positions of the common utterances in A and in B, in the order of A."""


def compare(a: ScoredSet, b: ScoredSet, seed: int = 0) -> Comparison:
    """Compare two systems utterance by utterance (paired bootstrap).

    Utterances are matched by corpus and id; where both sides have a single corpus, by id alone.

    Raises:
        ValueError: an id occurs twice, the references differ, or no utterance is common.
    """
    by_id = len({*a.corpora}) == 1 == len({*b.corpora})
    places = [_places(side, by_id) for side in (a, b)]
    common = [key for key in places[0] if key in places[1]]
    if not common:
        raise ValueError("the two systems have no scored utterance in common; compare decodes of the same test set")
    rows = [places[0][key] for key in common], [places[1][key] for key in common]
    for key, i, j in zip(common, *rows, strict=True):
        if a.results[i].ref != b.results[j].ref:
            raise ValueError(
                f"utterance {key[1]}: the two systems were scored against different references, "
                f"{' '.join(a.results[i].ref)!r} and {' '.join(b.results[j].ref)!r}; decode both in the same way"
            )
    columns = a.columns[rows[0]], b.columns[rows[1]]
    before, after = (_floats(rates(c.sum(axis=0))) for c in columns)
    return Comparison(
        utterances=len(common),
        rates=(before, after),
        differences=_differences(*columns, seed),
        only=(_missing(places[0], places[1], a), _missing(places[1], places[0], b)),
        common=rows,
    )


def compare_languages(
    a: ScoredSet, b: ScoredSet, found: Comparison, seed: int = 0
) -> dict[str, tuple[Difference, ...]]:
    """The differences by language, for the common utterances of a comparison; "" is the language without a name."""
    pairs = list(zip(*found.common, strict=True))
    groups = group_by(pairs, lambda pair: a.results[pair[0]].language)
    return {
        language: _differences(a.columns[[i for i, _ in members]], b.columns[[j for _, j in members]], seed)
        for language, members in groups.items()
    }


def _differences(before: NDArray[np.float64], after: NDArray[np.float64], seed: int) -> tuple[Difference, ...]:
    """Differences of the `RATES` between paired rows of columns."""
    values = rates(after.sum(axis=0)) - rates(before.sum(axis=0))
    sums = resampled_sums(np.concatenate([before, after], axis=1), seed=seed)
    width = before.shape[1]
    resampled = rates(sums[:, width:]) - rates(sums[:, :width])
    if len(before) < 2:  # a single utterance has no spread
        resampled = np.full_like(resampled, np.nan)
    return tuple(difference(float(value), column) for value, column in zip(values, resampled.T, strict=True))


def _places(scored: ScoredSet, by_id: bool) -> dict[tuple[str, str], int]:
    places: dict[tuple[str, str], int] = {}
    for position, (corpus, name) in enumerate(scored.keys):
        key = ("" if by_id else corpus, name)
        if key in places:
            raise ValueError(f"{corpus}: utterance {name} occurs twice, so it cannot be compared; decode the set again")
        places[key] = position
    return places


def _missing(here: dict[Any, int], there: dict[Any, int], scored: ScoredSet) -> list[tuple[str, str]]:
    return [scored.keys[position] for key, position in here.items() if key not in there]


def _floats(values: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)
