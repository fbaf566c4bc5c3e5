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
class Change:
    """The rates of A and of B on the same utterances."""

    utterances: int
    rates: tuple[tuple[float, ...], tuple[float, ...]]
    """The `RATES` of A and of B."""
    differences: tuple[Difference, ...]
    """B less A, for each of the `RATES`; below 0 where B is better."""


@dataclass(frozen=True)
class Comparison:
    """System B against system A on the utterances that both have."""

    total: Change
    languages: dict[str, Change]
    """By the language that A names; "" is the language without a name."""
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
    before, after = a.columns[rows[0]], b.columns[rows[1]]
    languages = group_by(range(len(common)), lambda place: a.results[rows[0][place]].language)
    return Comparison(
        total=_change(before, after, seed),
        languages={name: _change(before[members], after[members], seed) for name, members in languages.items()},
        only=(_missing(places[0], places[1], a), _missing(places[1], places[0], b)),
        common=rows,
    )


def _change(before: NDArray[np.float64], after: NDArray[np.float64], seed: int) -> Change:
    """The change from one row of columns to another, for each of the paired rows."""
    pair = [rates(columns.sum(axis=0)) for columns in (before, after)]
    sums = resampled_sums(np.concatenate([before, after], axis=1), seed=seed)
    width = before.shape[1]
    resampled = rates(sums[:, width:]) - rates(sums[:, :width])
    if len(before) < 2:  # a single utterance has no spread
        resampled = np.full_like(resampled, np.nan)
    changes = zip(pair[1] - pair[0], resampled.T, strict=True)
    return Change(
        utterances=len(before),
        rates=(tuple(pair[0].tolist()), tuple(pair[1].tolist())),
        differences=tuple(difference(float(value), column) for value, column in changes),
    )


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
