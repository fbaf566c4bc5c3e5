"""Phone error rate and phone feature error rate.

PER: Levenshtein distance over phones with unit costs, pooled: 100 (S + D + I) / R for R reference phones.
PFER in two definitions, both on panphon's feature edit distance (Mortensen et al. 2016, "PanPhon"): ZIPA's, the
distance of an utterance, not divided by anything, with its mean over utterances (Zhu et al. 2025, "ZIPA", section 4);
and the percent one, 100 times the summed distance over the number of reference phones, as panphon's feature error rate.

Legend: R reference phones, H hypothesis phones.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.tokenizer import BOUNDARY, FIXED_PIECES

Row = TypeVar("Row")
Alignment = list[tuple[str | None, str | None]]
"""Pairs (reference phone, hypothesis phone); `None` stands for no phone on that side."""


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


def _fill(substitute: NDArray[np.int64], delete: NDArray[np.int64], insert: NDArray[np.int64]) -> NDArray[np.int64]:
    """The edit-distance table (R+1, H+1) for integer costs of substitution (R, H), deletion (R,), insertion (H,).

    Within a row, insertions chain: cost[j] = min over k <= j of candidate[k] + inserted[k+1..j]. With the running sum
    of insertion costs taken off, that is a running minimum, so each row is a few array operations.
    """
    inserted = np.concatenate(([0], np.cumsum(insert)))  # (H+1,)
    table = np.empty((len(delete) + 1, len(insert) + 1), dtype=np.int64)
    table[0] = inserted
    for i, cost in enumerate(delete):
        candidate = table[i] + cost
        np.minimum(candidate[1:], table[i, :-1] + substitute[i], out=candidate[1:])
        table[i + 1] = np.minimum.accumulate(candidate - inserted) + inserted
    return table


def _unit_table(ref: Sequence[str], hyp: Sequence[str]) -> NDArray[np.int64]:
    ids: dict[str, int] = {}
    r = np.array([ids.setdefault(phone, len(ids)) for phone in ref], dtype=np.int64)
    h = np.array([ids.setdefault(phone, len(ids)) for phone in hyp], dtype=np.int64)
    return _fill((r[:, None] != h).astype(np.int64), np.ones_like(r), np.ones_like(h))


def edit_distance(ref: Sequence[str], hyp: Sequence[str]) -> int:
    """Levenshtein distance of two phone sequences."""
    return int(_unit_table(ref, hyp)[-1, -1])


def align(ref: Sequence[str], hyp: Sequence[str]) -> Alignment:
    """One alignment with the fewest errors.

    Of several, the one that, read from the end, takes a pair before a deletion and a deletion before an insertion.
    """
    table = _unit_table(ref, hyp)
    i, j = len(ref), len(hyp)
    pairs: Alignment = []
    while i or j:
        if i and j and table[i, j] == table[i - 1, j - 1] + (ref[i - 1] != hyp[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((ref[i], hyp[j]))
        elif i and table[i, j] == table[i - 1, j] + 1:
            i -= 1
            pairs.append((ref[i], None))
        else:
            j -= 1
            pairs.append((None, hyp[j]))
    return pairs[::-1]


def count_errors(alignment: Alignment) -> ErrorCounts:
    """The counts of one alignment."""
    deletions = sum(hyp is None for _, hyp in alignment)
    insertions = sum(ref is None for ref, _ in alignment)
    correct = sum(ref == hyp for ref, hyp in alignment)
    return ErrorCounts(correct, len(alignment) - correct - deletions - insertions, deletions, insertions)


def score(pairs: Iterable[tuple[Sequence[str], Sequence[str]]]) -> ErrorCounts:
    """Pooled counts of (reference, hypothesis) phone sequences; `▁` is dropped on both sides."""
    return sum((count_errors(align(drop_boundary(ref), drop_boundary(hyp))) for ref, hyp in pairs), ErrorCounts())


def drop_boundary(phones: Iterable[str]) -> list[str]:
    """The phones without `▁`."""
    return [phone for phone in phones if phone != BOUNDARY]


def group_by(rows: Iterable[Row], key: Callable[[Row], str]) -> dict[str, list[Row]]:
    """Rows by a key (language, speaker, ...), keys in alphabetical order, rows in theirs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return dict(sorted(groups.items()))


@cache
def _feature_table() -> Any:
    # Imported late: it takes a second or two, and training scores by PER alone.
    from panphon.featuretable import FeatureTable

    return FeatureTable()


# What panphon reads as the tone letters ˩ to ˥.
_TONE_DIGITS = str.maketrans("¹²³⁴⁵", "˩˨˧˦˥")
_SCRIPT_G = str.maketrans("g", "ɡ")
_NO_PUNCTUATION = dict.fromkeys(map(ord, string.punctuation))


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

    A substitution costs the summed difference of the features, an insertion or deletion 1 for each specified and 0.5
    for each unspecified feature, all divided by the number of features (24).
    """

    dropped: Counter[str] = field(default_factory=Counter)
    """Symbols that panphon has no segment for and the distance leaves out; `▁` and white space are not counted."""
    _segments: dict[str, list[str]] = field(default_factory=dict, repr=False)
    _vectors: dict[str, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def segments(self, text: str) -> list[str]:
        """The panphon segments of a text: the longest that fit, from the left, without what panphon does not know."""
        return [s for s in self._split(text) if s in _feature_table().seg_dict]

    def distance(self, hyp: str, ref: str) -> float:
        """ZIPA's PFER of an utterance: `g` is read as `ɡ` on both sides; not divided by the length."""
        hyp, ref = hyp.translate(_SCRIPT_G), ref.translate(_SCRIPT_G)
        self._count_dropped(hyp, ref)
        return self._distance(self.segments(hyp), self.segments(ref))

    def percent(self, pairs: Iterable[tuple[str, str]]) -> float:
        """The percent PFER of (hyp, ref) texts: 100 times the summed distance over the number of reference phones.

        White space and ASCII punctuation are dropped first and `g` is read as `ɡ`. NaN without reference phones.
        """
        total, num_phones = 0.0, 0
        for hyp, ref in pairs:
            self._count_dropped(_bare(hyp), _bare(ref))
            distance, phones = self.percent_parts(hyp, ref)
            total += distance
            num_phones += phones
        return 100.0 * total / num_phones if num_phones else float("nan")

    def percent_parts(self, hyp: str, ref: str) -> tuple[float, int]:
        """Distance and number of reference phones of one utterance under the rules of `percent`.

        Counts no dropped symbols, so that a report may call it beside `distance`.
        """
        hyp_segments, ref_segments = self.segments(_bare(hyp)), self.segments(_bare(ref))
        return self._distance(hyp_segments, ref_segments), len(ref_segments)

    def _split(self, text: str) -> list[str]:
        if text not in self._segments:
            plain = unicodedata.normalize("NFD", text.translate(_TONE_DIGITS))
            self._segments[text] = _feature_table().segs_safe(plain)
        return self._segments[text]

    def _count_dropped(self, *texts: str) -> None:
        known = _feature_table().seg_dict
        for text in texts:
            self.dropped.update(s for s in self._split(text) if s not in known and s != BOUNDARY and not s.isspace())

    def _distance(self, hyp: list[str], ref: list[str]) -> float:
        h, r = self._matrix(hyp), self._matrix(ref)
        num_features = len(_feature_table().names)
        # In units of half a feature all costs are whole numbers, so the sum is exact.
        substitute = np.abs(r[:, None] - h).sum(axis=2)  # (R, H)
        delete, insert = (1 + np.abs(r)).sum(axis=1), (1 + np.abs(h)).sum(axis=1)
        return int(_fill(substitute, delete, insert)[-1, -1]) / (2 * num_features)

    def _matrix(self, segments: list[str]) -> NDArray[np.int64]:
        """Features of segments, one row each, with values -1, 0, +1."""
        table = _feature_table()
        for segment in segments:
            if segment not in self._vectors:
                self._vectors[segment] = np.array(table.fts(segment, False).numeric(), dtype=np.int64)
        rows = [self._vectors[segment] for segment in segments]
        return np.stack(rows) if rows else np.empty((0, len(table.names)), dtype=np.int64)


def _bare(text: str) -> str:
    text = unicodedata.normalize("NFD", "".join(text.split()).translate(_NO_PUNCTUATION))
    return text.translate(_SCRIPT_G)


def join_phones(phones: Iterable[str], left_out: Counter[str] | None = None) -> str:
    """Phones as one text for the feature distance, without `▁`.

    `<unk>` and its like are left out too (panphon would read the letters u, n, k), and counted in `left_out`.
    """
    phones = drop_boundary(phones)
    if left_out is not None:
        left_out.update(phone for phone in phones if phone in FIXED_PIECES)
    return "".join(phone for phone in phones if phone not in FIXED_PIECES)
