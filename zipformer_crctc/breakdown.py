"""Error rates by language, speaker, corpus and phone, confusions, and errors by articulatory feature.

Legend: N utterances, G phones, P aligned pairs of segments, F features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.bootstrap import Interval, intervals, resampled_sums
from zipformer_crctc.metrics import Alignment, ErrorCounts, group_by
from zipformer_crctc.scoring import PHONES, RATES, ScoredSet, divide, rates
from zipformer_crctc.segments import inventory

NONE = "(none)"
"""The group of utterances whose language or speaker is not named."""

FEATURE_GROUPS: dict[str, dict[str, str]] = {
    "voice": {"voi": "voiced", "sg": "spread glottis", "cg": "constricted glottis"},
    "place": {"lab": "labial", "cor": "coronal", "ant": "anterior", "distr": "distributed", "velaric": "velaric"},
    "tongue body and lips": {"hi": "high", "lo": "low", "back": "back", "round": "round", "tense": "tense"},
    "manner": {
        "syl": "syllabic",
        "cons": "consonantal",
        "son": "sonorant",
        "cont": "continuant",
        "delrel": "delayed release",
        "nas": "nasal",
        "lat": "lateral",
        "strid": "strident",
    },
    "length and tone": {"long": "long", "hitone": "high tone", "hireg": "high register"},
}
"""Panphon's features by what they describe, with their full names."""


@dataclass(frozen=True)
class GroupRow:
    """The rates of a group of utterances."""

    group: str
    utterances: int
    counts: ErrorCounts
    rates: tuple[float, ...]
    """In the order of `RATES`."""
    intervals: tuple[Interval, ...]
    """Of these."""


def by_group(scored: ScoredSet, kind: str, seed: int = 0) -> list[GroupRow]:
    """A row for each "language", "speaker" or "corpus", names in alphabetical order; intervals are seeded."""
    labels: dict[str, Callable[[int], str]] = {
        "language": lambda i: scored.results[i].language,
        "speaker": lambda i: scored.results[i].speaker,
        "corpus": lambda i: scored.corpora[i],
    }
    groups = group_by(range(len(scored.results)), labels[kind])
    return [_row(name or NONE, scored.columns[members], seed) for name, members in groups.items()]


def total(scored: ScoredSet, seed: int = 0) -> GroupRow:
    """The row of all utterances."""
    return _row("total", scored.columns, seed)


def _row(name: str, columns: NDArray[np.float64], seed: int) -> GroupRow:
    sums = columns.sum(axis=0)
    insertions, deletions, substitutions, phones = (int(n) for n in sums[: PHONES + 1])
    # One utterance is drawn again and again: its spread would be 0, which says nothing.
    spread = intervals(rates(resampled_sums(columns, seed=seed))) if len(columns) > 1 else [Interval()] * len(RATES)
    return GroupRow(
        group=name,
        utterances=len(columns),
        counts=ErrorCounts(phones - substitutions - deletions, substitutions, deletions, insertions),
        rates=tuple(float(rate) for rate in rates(sums)),
        intervals=tuple(spread),
    )


@dataclass(frozen=True)
class PhoneRow:
    """What happened to one phone, and to the segment of the same spelling."""

    phone: str
    counts: ErrorCounts
    """As a phone of the tokenizer; insertions are those of this phone. None of it for a segment of several phones."""
    per: float
    per_interval: Interval
    in_ref: int
    """Occurrences in references as a segment of panphon."""
    pfer_mean: float
    """Feature distance of this segment in an utterance, mean over the utterances with it in the reference."""
    pfer_percent: float
    """Feature distance of this segment, its insertions too, per 100 occurrences in references."""
    pfer_interval: Interval
    """Of the percentage."""


def by_phone(scored: ScoredSet, seed: int = 0) -> list[PhoneRow]:
    """A row for each phone or segment of references and hypotheses, in alphabetical order."""
    phones = _phone_counts(scored.alignments)
    segments = _segment_counts(scored)
    per_spread = _spread({phone: errors_of for phone, (_, errors_of) in phones.items()}, len(scored.results), seed)
    pfer_spread = _spread(segments, len(scored.results), seed)
    rows = []
    for phone in sorted({*phones, *segments}):
        counts = phones[phone][0] if phone in phones else ErrorCounts()
        charged = segments.get(phone, np.empty((0, 3)))
        distance, in_ref = float(charged[:, 1].sum()), int(charged[:, 2].sum())
        utterances = int(np.count_nonzero(charged[:, 2]))
        rows.append(
            PhoneRow(
                phone=phone,
                counts=counts,
                per=counts.per,
                per_interval=per_spread.get(phone, Interval()),
                in_ref=in_ref,
                pfer_mean=distance / utterances if utterances else math.nan,
                pfer_percent=100 * distance / in_ref if in_ref else math.nan,
                pfer_interval=pfer_spread.get(phone, Interval()),
            )
        )
    return rows


def _phone_counts(aligned: Sequence[Alignment]) -> dict[str, tuple[ErrorCounts, NDArray[np.float64]]]:
    """By phone: its counts, and rows (utterance, errors, occurrences in the reference)."""
    events = Counter((row, pair) for row, alignment in enumerate(aligned) for pair in alignment)
    counts: dict[str, list[int]] = {}  # correct, substitutions, deletions, insertions
    rows: dict[str, dict[int, list[int]]] = {}
    for (row, (ref, hyp)), n in events.items():
        kind = 3 if ref is None else 2 if hyp is None else 0 if ref == hyp else 1
        phone = hyp if ref is None else ref
        assert phone is not None
        counts.setdefault(phone, [0, 0, 0, 0])[kind] += n
        place = rows.setdefault(phone, {}).setdefault(row, [0, 0])
        place[0] += n if kind else 0
        place[1] += n if kind < 3 else 0
    return {
        phone: (ErrorCounts(*counts[phone]), np.array([[row, *pair] for row, pair in rows[phone].items()], dtype=float))
        for phone in counts
    }


def _segment_counts(scored: ScoredSet) -> dict[str, NDArray[np.float64]]:
    """By segment: rows (utterance, feature distance, occurrences in the reference)."""
    pairs = scored.segment_pairs
    ref, hyp = pairs.T
    table = inventory()
    vectors = table.vectors.astype(np.int64)
    substituted = np.abs(vectors[ref] - vectors[hyp]).sum(axis=1)
    kept = np.where(ref >= 0, ref, hyp)
    indel = (1 + np.abs(vectors[kept])).sum(axis=1)
    distance = np.where((pairs >= 0).all(axis=1), substituted, indel) / (2 * len(table.features))
    # One number for each segment and utterance.
    places, which = np.unique(kept * len(scored.results) + scored.segment_rows, return_inverse=True)
    numbers, rows = np.divmod(places, max(1, len(scored.results)))
    sums = [np.bincount(which, weights=weights, minlength=len(places)) for weights in (distance, ref >= 0)]
    summed = np.stack([rows, *sums], axis=1)
    return {table.names[number]: summed[numbers == number] for number in np.unique(numbers)}


def _spread(charged: dict[str, NDArray[np.float64]], num_utterances: int, seed: int) -> dict[str, Interval]:
    """The interval of 100 x summed errors / summed occurrences for rows (utterance, errors, occurrences) by phone."""
    if num_utterances < 2:
        return {}
    found: dict[str, Interval] = {}
    names = list(charged)
    step = max(1, (1 << 24) // num_utterances)  # bounds the memory
    for start in range(0, len(names), step):
        here = names[start : start + step]
        columns = np.zeros((num_utterances, 2 * len(here)))
        for column, name in enumerate(here):
            rows = charged[name]
            columns[rows[:, 0].astype(int), 2 * column] = rows[:, 1]
            columns[rows[:, 0].astype(int), 2 * column + 1] = rows[:, 2]
        sums = resampled_sums(columns, seed=seed)
        found.update(zip(here, intervals(100 * divide(sums[:, ::2], sums[:, 1::2])), strict=True))
    return found


def confusions(scored: ScoredSet) -> Counter[tuple[str | None, str | None]]:
    """How often each reference phone was aligned with each hypothesis phone; `None` for no phone on that side."""
    return Counter(pair for alignment in scored.alignments for pair in alignment)


@dataclass(frozen=True)
class FeatureRow:
    """Errors in an articulatory feature, or in any feature of a group."""

    group: str
    """What the feature describes: voice, place, ..."""
    name: str
    """Of the feature in full; "any" for the whole group."""
    specified: int
    """Aligned reference segments with + or - in this feature (in any of the group)."""
    wrong: int
    """Those of them whose hypothesis segment has another value."""
    of_substitutions: float
    """Percentage of all substitutions in which the feature is wrong; NaN without substitutions."""

    @property
    def rate(self) -> float:
        """Percentage of the aligned segments, specified for it, that have the feature wrong."""
        return 100 * self.wrong / self.specified if self.specified else math.nan


def by_feature(scored: ScoredSet) -> list[FeatureRow]:
    """A row for each group, followed by those of its features, in the order of `FEATURE_GROUPS`.

    Deleted and inserted segments are not in it: nothing is aligned with them.
    """
    table = inventory()
    pairs = scored.segment_pairs[(scored.segment_pairs >= 0).all(axis=1)]
    ref, hyp = table.vectors[pairs[:, 0]], table.vectors[pairs[:, 1]]  # (P, F)
    specified = ref != 0
    wrong = specified & (ref != hyp)
    substitutions = np.count_nonzero(pairs[:, 0] != pairs[:, 1])

    def row(group: str, name: str, columns: list[int]) -> FeatureRow:
        num_wrong = int(wrong[:, columns].any(axis=1).sum())
        share = 100 * num_wrong / substitutions if substitutions else math.nan
        return FeatureRow(group, name, int(specified[:, columns].any(axis=1).sum()), num_wrong, share)

    rows = []
    for group, features in FEATURE_GROUPS.items():
        places = {name: table.features.index(name) for name in features}
        rows.append(row(group, "any", list(places.values())))
        rows += [row(group, features[name], [place]) for name, place in places.items()]
    return rows
