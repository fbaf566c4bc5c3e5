"""A decoded set, aligned and counted: what all breakdowns, intervals and comparisons are made from.

PER counts the phones of the tokenizer, in an alignment with the fewest errors that pairs like phones. PFER counts
panphon's segments (`kʰ` is one segment and two phones), in an alignment with the smallest feature distance; so the
distances of all segments add up to the distance of the set.

Legend: N utterances, P aligned pairs of segments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.alignment import alignments
from zipformer_crctc.metrics import Alignment, FeatureDistance, align_all, count_errors, drop_boundary, join_phones
from zipformer_crctc.results import UtteranceResult
from zipformer_crctc.segments import inventory

RATES = ("PER %", "PFER mean", "PFER %")
"""PER; ZIPA's PFER (mean feature distance of an utterance); PFER in percent (distance per reference phone)."""

INSERTIONS, DELETIONS, SUBSTITUTIONS, PHONES, DISTANCE, BARE_DISTANCE, SEGMENTS, ONE = range(8)
"""The columns of `ScoredSet.columns`."""


@dataclass(frozen=True)
class ScoredSet:
    """The utterances of one system that have a reference, with all that is counted in them."""

    results: list[UtteranceResult]
    corpora: list[str]
    """The test set of each utterance."""
    unscorable: list[tuple[str, str]]
    """Corpus and id of utterances without a reference."""
    alignments: list[Alignment]
    """Of the phones."""
    columns: NDArray[np.float64]
    """(N, 8): insertions, deletions, substitutions, reference phones; ZIPA's distance; the percent definition's
    distance and reference segments; 1."""
    segment_pairs: NDArray[np.int64]
    """(P, 2): numbers of aligned segments of reference and hypothesis in panphon's inventory, -1 for none."""
    segment_rows: NDArray[np.int64]
    """(P,), the utterance of each pair."""
    dropped: Counter[str]
    """Symbols that panphon does not know, which PFER leaves out."""

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Corpus and id of each utterance."""
        return [(corpus, result.id) for corpus, result in zip(self.corpora, self.results, strict=True)]

    @property
    def empty_hypotheses(self) -> int:
        return sum(not result.hyp for result in self.results)


def score_set(results: Sequence[UtteranceResult], corpora: Sequence[str]) -> ScoredSet:
    """Align and count; utterances without a reference are put aside."""
    labelled = list(zip(results, corpora, strict=True))
    scored = [result for result, _ in labelled if result.scorable]
    phones = [(drop_boundary(r.ref), drop_boundary(r.hyp)) for r in scored]
    aligned = align_all(phones, by_features=True)
    counts = [count_errors(alignment) for alignment in aligned]
    features = FeatureDistance()
    texts = [(join_phones(hyp, features.dropped), join_phones(ref, features.dropped)) for ref, hyp in phones]
    distances, (bare_distances, num_segments) = features.distances(texts), features.percent_parts(texts)
    columns = np.ones((len(scored), 8))
    columns[:, INSERTIONS] = [c.insertions for c in counts]
    columns[:, DELETIONS] = [c.deletions for c in counts]
    columns[:, SUBSTITUTIONS] = [c.substitutions for c in counts]
    columns[:, PHONES] = [c.reference_phones for c in counts]
    columns[:, DISTANCE], columns[:, BARE_DISTANCE], columns[:, SEGMENTS] = distances, bare_distances, num_segments
    pairs, rows = _segment_pairs(texts)
    return ScoredSet(
        results=scored,
        corpora=[corpus for result, corpus in labelled if result.scorable],
        unscorable=[(corpus, result.id) for result, corpus in labelled if not result.scorable],
        alignments=aligned,
        columns=columns,
        segment_pairs=pairs,
        segment_rows=rows,
        dropped=features.dropped,
    )


def _segment_pairs(texts: Sequence[tuple[str, str]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Aligned segments (P, 2) of (hyp, ref) texts, and the text of each pair (P,)."""
    hyps, refs = (inventory().split([pair[side].replace("g", "ɡ") for pair in texts]).sequences for side in (0, 1))
    costs, numbers, (ref, hyp) = inventory().compact(refs, hyps)
    places = alignments(ref, hyp, costs)
    rows = np.repeat(np.arange(len(texts)), np.array([len(p) for p in places], dtype=np.int64))
    pairs = np.concatenate([np.empty((0, 2), dtype=np.int64), *places])
    for side, sequences in enumerate((ref, hyp)):
        starts = sequences.ends - sequences.lengths
        inside = pairs[:, side] >= 0
        pairs[inside, side] = numbers[sequences.ids[(starts[rows] + pairs[:, side])[inside]]]
    return pairs, rows


def rates(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 3), the `RATES` of sums (..., 8) of columns; NaN where nothing is to divide by."""
    errors = sums[..., INSERTIONS] + sums[..., DELETIONS] + sums[..., SUBSTITUTIONS]
    per = divide(100 * errors, sums[..., PHONES])
    mean = divide(sums[..., DISTANCE], sums[..., ONE])
    percent = divide(100 * sums[..., BARE_DISTANCE], sums[..., SEGMENTS])
    return np.stack([per, mean, percent], axis=-1)


def divide(numerator: NDArray[np.float64], denominator: NDArray[np.float64]) -> NDArray[np.float64]:
    """The quotient, NaN where the denominator is 0."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1), np.nan)
