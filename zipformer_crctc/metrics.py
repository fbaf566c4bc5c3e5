"""Phone error rate and phone feature error rate.

PER: Levenshtein distance over phones with unit costs, pooled: 100 (S + D + I) / R for R reference phones.
PFER in two definitions, both on panphon's feature edit distance (Mortensen et al. 2016, "PanPhon"): ZIPA's, the
distance of an utterance, not divided by anything, with its mean over utterances (Zhu et al. 2025, "ZIPA", section 4);
and the percent one, 100 times the summed distance over the number of reference phones, as panphon's feature error rate.

Legend: N utterances, R reference phones.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.alignment import Costs, Sequences, alignments, distances
from zipformer_crctc.segments import inventory
from zipformer_crctc.tokenizer import BOUNDARY, FIXED_PIECES

Row = TypeVar("Row")
Alignment = list[tuple[str | None, str | None]]
"""Pairs (reference phone, hypothesis phone); `None` stands for no phone on that side."""

_ERROR = 1 << 32  # outweighs the feature distance of any utterance
_PAIRS_AT_ONCE = 20_000  # bounds the memory of a call with millions of pairs
_PUNCTUATION = re.compile(rf"[\s{re.escape(string.punctuation)}]+")


@dataclass(frozen=True)
class ErrorCounts:
    """Counts of an alignment, or their sum over many: `a + b`."""

    correct: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def reference_phones(self) -> int:
        return self.correct + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def per(self) -> float:
        """Phone error rate in percent; NaN without reference phones."""
        return 100.0 * self.errors / self.reference_phones if self.reference_phones else float("nan")

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.correct + other.correct,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


def edit_distance(ref: Sequence[str], hyp: Sequence[str]) -> int:
    """Levenshtein distance of two phone sequences."""
    (refs, hyps), phones = _numbered([(ref, hyp)])
    return int(distances(refs, hyps, Costs.unit(len(phones)))[0])


def align(ref: Sequence[str], hyp: Sequence[str]) -> Alignment:
    """One alignment with the fewest errors.

    Of several, the one that, read from the end, takes a pair before a deletion and a deletion before an insertion.
    """
    return align_all([(ref, hyp)])[0]


def align_all(pairs: Sequence[tuple[Sequence[str], Sequence[str]]], by_features: bool = False) -> list[Alignment]:
    """An alignment with the fewest errors for each (reference, hypothesis), many at a time.

    by_features: of several, take the one with the smallest feature distance, so that `t` is paired with `d` rather than
    with `a`; else (and among several of these) the rule of `align`. The number of errors is the same, their split into
    substitutions, deletions and insertions may differ.
    """
    (refs, hyps), phones = _numbered(pairs)
    costs = _costs_of_phones(phones) if by_features else Costs.unit(len(phones))
    return [
        [(ref[i] if i >= 0 else None, hyp[j] if j >= 0 else None) for i, j in places.tolist()]
        for (ref, hyp), places in zip(pairs, alignments(refs, hyps, costs), strict=True)
    ]


def _numbered(pairs: Sequence[tuple[Sequence[str], Sequence[str]]]) -> tuple[tuple[Sequences, Sequences], list[str]]:
    """References and hypotheses as numbers of phones, and the phones."""
    numbers: dict[str, int] = {}
    refs, hyps = (
        Sequences.of([[numbers.setdefault(phone, len(numbers)) for phone in pair[side]] for pair in pairs])
        for side in (0, 1)
    )
    return (refs, hyps), list(numbers)


def _costs_of_phones(phones: Sequence[str]) -> Costs:
    """Costs by which fewest errors come first and the feature distance second."""
    known = {i: n for i, phone in enumerate(phones) if (n := segment_number(phone)) is not None}
    rows = np.array(list(known), dtype=np.int64)
    features = inventory().costs(np.array(list(known.values()), dtype=np.int64))
    # What panphon does not know is a mark alone (`ʰ`) or `<unk>`: rather left out than paired with another phone.
    substitute = np.full((len(phones), len(phones)), 4 * len(inventory().features), dtype=np.int64)
    substitute[np.ix_(rows, rows)] = features.substitute
    substitute += _ERROR
    np.fill_diagonal(substitute, 0)
    indel = np.zeros(len(phones), dtype=np.int64)
    indel[rows] = features.indel
    return Costs(substitute, indel + _ERROR)


def segment_number(phone: str) -> int | None:
    """The number of a phone in panphon's inventory; None where it is not exactly one of its segments."""
    return inventory().numbers.get(unicodedata.normalize("NFD", _with_script_g(phone)))


def count_errors(alignment: Alignment) -> ErrorCounts:
    """The counts of one alignment."""
    deletions = sum(hyp is None for _, hyp in alignment)
    insertions = sum(ref is None for ref, _ in alignment)
    correct = sum(ref == hyp for ref, hyp in alignment)
    return ErrorCounts(correct, len(alignment) - correct - deletions - insertions, deletions, insertions)


def score(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> ErrorCounts:
    """Pooled counts of (reference, hypothesis) phone sequences; `▁` is dropped on both sides."""
    bare = [(drop_boundary(ref), drop_boundary(hyp)) for ref, hyp in pairs]
    return sum(map(count_errors, align_all(bare)), ErrorCounts())


def drop_boundary(phones: Iterable[str]) -> list[str]:
    """The phones without `▁`."""
    return [phone for phone in phones if phone != BOUNDARY]


def group_by(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by a key (language, speaker, ...), keys in alphabetical order, rows in theirs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return dict(sorted(groups.items()))


@dataclass(frozen=True)
class PferSummary:
    """Distribution of ZIPA's PFER (feature edit distance per utterance) over utterances; NaN for none."""

    mean: float
    median: float
    iqr: float
    """75th less 25th percentile, linear between values."""
    std: float
    """Population standard deviation."""

    @classmethod
    def of(cls, distances: Sequence[float]) -> PferSummary:
        if not distances:
            return cls(*4 * [float("nan")])
        low, median, high = (float(q) for q in np.percentile(distances, (25, 50, 75)))
        return cls(float(np.mean(distances)), median, high - low, float(np.std(distances)))

    def as_published(self) -> dict[str, float]:
        """The four values under ZIPA's names, with its three decimals."""
        names = {"PFER mean": self.mean, "PFER median": self.median, "PFER IQR": self.iqr, "PFER std": self.std}
        return {name: round(value, 3) for name, value in names.items()}


@dataclass
class FeatureDistance:
    """Feature edit distance over panphon's segments, with a count of what panphon does not know.

    A substitution costs half the summed difference of the features, an insertion or deletion 1 for each specified and
    0.5 for each unspecified feature, all divided by the number of features (24). Equal to panphon's
    `feature_edit_distance`.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    """Symbols that panphon has no segment for and the distance leaves out; `▁` and white space are not counted."""

    def segments(self, text: str) -> list[str]:
        """The panphon segments of a text: the longest that fit, from the left, without what panphon does not know."""
        return [inventory().names[i] for i in inventory().split([text]).sequences.ids]

    def distance(self, hyp: str, ref: str) -> float:
        """ZIPA's PFER of an utterance: `g` is read as `ɡ` on both sides; not divided by the length."""
        return float(self.distances([(hyp, ref)])[0])

    def distances(self, pairs: Iterable[tuple[str, str]]) -> NDArray[np.float64]:
        """(N,), ZIPA's PFER of each of N (hyp, ref) texts: `distance`, many at a time."""
        return self._measure([(_with_script_g(hyp), _with_script_g(ref)) for hyp, ref in pairs])[0]

    def percent(self, pairs: Iterable[tuple[str, str]]) -> float:
        """The percent PFER of (hyp, ref) texts: 100 times the summed distance over the number of reference phones.

        White space and ASCII punctuation are dropped first and `g` is read as `ɡ`. NaN without reference phones.
        """
        distances, phones = self._measure([(_bare(hyp), _bare(ref)) for hyp, ref in pairs])
        return 100.0 * float(distances.sum()) / int(phones.sum()) if phones.any() else float("nan")

    def percent_parts(self, pairs: Iterable[tuple[str, str]]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distance and number of reference phones of each of N utterances under the rules of `percent`: (N,), (N,).

        Counts no dropped symbols, so that a report may call it beside `distances`.
        """
        return self._measure([(_bare(hyp), _bare(ref)) for hyp, ref in pairs], count=False)

    def _measure(
        self, pairs: Sequence[tuple[str, str]], count: bool = True
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Distances and numbers of reference segments of (hyp, ref) texts as they stand."""
        values = np.zeros(len(pairs))
        lengths = np.zeros(len(pairs), dtype=np.int64)
        for start in range(0, len(pairs), _PAIRS_AT_ONCE):
            here = slice(start, start + _PAIRS_AT_ONCE)
            hyps, refs = (inventory().split([pair[side] for pair in pairs[here]]) for side in (0, 1))
            if count:
                self._count(hyps.dropped + refs.dropped)
            costs, _, (ref, hyp) = inventory().compact(refs.sequences, hyps.sequences)
            # Whole numbers of half features, divided once: the sum is exact.
            values[here] = distances(ref, hyp, costs) / (2 * len(inventory().features))
            lengths[here] = ref.lengths
        return values, lengths

    def _count(self, dropped: Counter[str]) -> None:
        self.dropped.update({s: n for s, n in dropped.items() if s != BOUNDARY and not s.isspace()})


def _bare(text: str) -> str:
    return _with_script_g(_PUNCTUATION.sub("", unicodedata.normalize("NFD", text)))


def _with_script_g(text: str) -> str:
    return text.replace("g", "ɡ")


def join_phones(phones: Iterable[str], left_out: Counter[str] | None = None) -> str:
    """Phones as one text for the feature distance, without `▁`.

    `<unk>` and its like are left out too (panphon would read the letters u, n, k), and counted in `left_out`.
    """
    phones = drop_boundary(phones)
    if left_out is not None:
        left_out.update(phone for phone in phones if phone in FIXED_PIECES)
    return "".join(phone for phone in phones if phone not in FIXED_PIECES)
