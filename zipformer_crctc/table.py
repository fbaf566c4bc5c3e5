"""The table of PER and PFER by language (or any other group), as plain text and as Markdown."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from zipformer_crctc.metrics import ErrorCounts, FeatureDistance, PferSummary, group_by, join_phones, score
from zipformer_crctc.results import UtteranceResult, describe_unscorable, split_scorable
from zipformer_crctc.text import name_symbols

_HEADER = ("utterances", "phones", "PER %", "ins", "del", "sub", "PFER mean", "PFER %")


@dataclass(frozen=True)
class ScoreRow:
    """The error rates of one group of utterances."""

    group: str
    utterances: int
    counts: ErrorCounts
    pfer: PferSummary
    """ZIPA's definition, over utterances."""
    pfer_percent: float
    """Summed feature distance over reference phones (panphon segments), in percent."""

    def cells(self) -> tuple[str, ...]:
        """The values under the header of the table."""
        c = self.counts
        numbers = (str(n) for n in (c.insertions, c.deletions, c.substitutions))
        rates = f"{c.per:.2f}", f"{self.pfer.mean:.3f}", f"{self.pfer_percent:.2f}"
        per, mean, percent = (rate if rate != "nan" else "-" for rate in rates)
        return (self.group, str(self.utterances), str(c.reference_phones), per, *numbers, mean, percent)


@dataclass(frozen=True)
class ScoreTable:
    """Error rates by group and in total, with what was left out."""

    groups: list[ScoreRow]
    total: ScoreRow
    notes: list[str]
    """What could not be scored, and the symbols that the feature distance left out."""
    title: str = "language"

    def plain(self) -> str:
        """The table for a terminal."""
        header, rows = (self.title, *_HEADER), [row.cells() for row in self._rows()]
        widths = [max(_width(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [_plain_line(row, widths) for row in [header, *rows]]
        lines.insert(1, "-" * _width(lines[0]))
        if self.groups:
            lines.insert(-1, lines[1])
        return "\n".join([*lines, *self.notes])

    def markdown(self) -> str:
        """The table for a README."""
        rows = [(self.title, *_HEADER), ("---", *len(_HEADER) * ["---:"]), *(row.cells() for row in self._rows())]
        table = "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
        return "\n\n".join([table, *self.notes])

    def _rows(self) -> list[ScoreRow]:
        return [*self.groups, self.total]


def score_table(
    results: Iterable[UtteranceResult],
    key: Callable[[UtteranceResult], str] = lambda result: result.language,
    title: str = "language",
) -> ScoreTable:
    """Score results by group; utterances without a reference are left out and named in the notes."""
    scored, unscorable = split_scorable(results)
    features = FeatureDistance()
    unread = features.dropped
    pfers = _pfer(scored, features)

    def row(name: str, members: Sequence[UtteranceResult]) -> ScoreRow:
        parts = [pfers[id(r)] for r in members]
        distance, phones = sum(p[1] for p in parts), sum(p[2] for p in parts)
        return ScoreRow(
            group=name,
            utterances=len(members),
            counts=score((r.ref, r.hyp) for r in members),
            pfer=PferSummary.of([p[0] for p in parts]),
            pfer_percent=100.0 * distance / phones if phones else math.nan,
        )

    groups = [row(name or "(none)", members) for name, members in group_by(scored, key).items()]
    notes = [describe_unscorable(unscorable)] if unscorable else []
    if unread:
        notes.append(f"PFER leaves out what panphon does not know: {name_symbols(unread)}")
    return ScoreTable(groups, row("total", scored), notes, title)


def _pfer(results: Sequence[UtteranceResult], features: FeatureDistance) -> dict[int, tuple[float, float, int]]:
    """By `id`: ZIPA's distance, the percent definition's distance, and its number of reference phones."""
    pairs = [(join_phones(r.hyp, features.dropped), join_phones(r.ref, features.dropped)) for r in results]
    parts = features.distances(pairs), *features.percent_parts(pairs)
    return dict(zip(map(id, results), zip(*(part.tolist() for part in parts), strict=True), strict=True))


def _width(text: str) -> int:
    """Columns on a terminal: combining marks take none, wide letters two."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _plain_line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *rest = (" " * (width - _width(cell)) for cell, width in zip(row, widths, strict=True))
    return "  ".join([row[0] + first, *(pad + cell for pad, cell in zip(rest, row[1:], strict=True))])
