"""Tables of a report, as Markdown and as HTML, made from the same cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from zipformer_crctc.bootstrap import Interval
from zipformer_crctc.breakdown import FeatureRow, GroupRow, PhoneRow
from zipformer_crctc.comparison import Comparison
from zipformer_crctc.scoring import RATES
from zipformer_crctc.text import visible

_MARKDOWN_SPECIALS = str.maketrans({c: f"\\{c}" for c in "\\|*_`<>#"})


def markdown(text: str) -> str:
    """Text as it is, in Markdown: what has a meaning there is escaped."""
    return text.translate(_MARKDOWN_SPECIALS)


@dataclass(frozen=True)
class Table:
    """A header and rows of cells; the first `num_names` columns are names, the others figures."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_names: int = 1

    def markdown(self) -> str:
        """The table in Markdown; what has a meaning there is escaped."""
        rules = ["---" if column < self.num_names else "---:" for column in range(len(self.header))]
        header, *body = ([markdown(cell) for cell in row] for row in (self.header, *self.rows))
        lines = [header, rules, *body]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def html(self) -> str:
        """The table in HTML; all text is escaped."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.header)
        body = "".join(f"<tr>{self._html_row(row)}</tr>" for row in self.rows)
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="wide">{table}</div>'

    def _html_row(self, row: Sequence[str]) -> str:
        return "".join(
            f"<th>{escape(cell)}</th>" if column < self.num_names else f"<td>{escape(cell)}</td>"
            for column, cell in enumerate(row)
        )


def group_table(title: str, rows: Sequence[GroupRow], named: str = "") -> Table:
    """Rates of groups with their intervals and error counts; `named` is the system, in a column of its own if given."""
    header = [title, "utterances", "phones", *_rate_header(), "ins", "del", "sub"]
    cells = [
        [
            row.group,
            str(row.utterances),
            str(row.counts.reference_phones),
            *(
                with_interval(rate, interval, places)
                for rate, interval, places in zip(row.rates, row.intervals, _PLACES, strict=True)
            ),
            *(str(n) for n in (row.counts.insertions, row.counts.deletions, row.counts.substitutions)),
        ]
        for row in rows
    ]
    if named:
        return Table(["system", *header], [[named, *row] for row in cells], num_names=2)
    return Table(header, cells)


_PLACES = (2, 3, 2)  # decimals of the RATES


def _rate_header() -> list[str]:
    return [f"{rate} [95 %]" for rate in RATES]


def with_interval(value: float, interval: Interval, places: int) -> str:
    """`12.3 [11.0, 13.9]`; `–` for no value."""
    if math.isnan(value):
        return "–"
    spread = f" [{interval.low:.{places}f}, {interval.high:.{places}f}]" if interval.known else ""
    return f"{value:.{places}f}{spread}"


def phone_table(rows: Sequence[PhoneRow]) -> Table:
    """Rates of phones, the one with most errors first."""
    ordered = sorted(rows, key=lambda row: (-row.counts.errors, -row.in_ref, row.phone))
    header = ["phone", "in ref", "PER % [95 %]", "ins", "del", "sub", "segments", "PFER mean", "PFER % [95 %]"]
    return Table(
        header,
        [
            [
                visible(row.phone),
                str(row.counts.reference_phones),
                with_interval(row.per, row.per_interval, 1),
                *(str(n) for n in (row.counts.insertions, row.counts.deletions, row.counts.substitutions)),
                str(row.in_ref),
                with_interval(row.pfer_mean, Interval(), 3),
                with_interval(row.pfer_percent, row.pfer_interval, 1),
            ]
            for row in ordered
        ],
    )


def feature_table(rows: Sequence[FeatureRow]) -> Table:
    """Errors by articulatory feature."""
    header = ["", "feature", "specified", "wrong", "wrong %", "% of substitutions"]
    cells = [
        [row.group, row.name, str(row.specified), str(row.wrong), _number(row.rate), _number(row.of_substitutions)]
        for row in rows
    ]
    return Table(header, cells, num_names=2)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"


def comparison_table(found: Comparison, names: tuple[str, str]) -> Table:
    """Both systems' rates on the common utterances, the difference with its interval, and the p-value."""
    header = ["", *names, "difference [95 %]", "p"]
    rows = []
    for place, rate in enumerate(RATES):
        change, decimals = found.differences[place], _PLACES[place]
        spread = change.interval
        interval = f" [{spread.low:+.{decimals}f}, {spread.high:+.{decimals}f}]" if spread.known else ""
        rows.append(
            [
                rate,
                *(with_interval(side[place], Interval(), decimals) for side in found.rates),
                "–" if math.isnan(change.value) else f"{change.value:+.{decimals}f}{interval}",
                p_value(change.p_value),
            ]
        )
    return Table(header, rows)


def p_value(value: float) -> str:
    """Three decimals; `–` for none."""
    return "–" if math.isnan(value) else f"{value:.3f}"
