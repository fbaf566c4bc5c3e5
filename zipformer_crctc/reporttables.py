"""Tables of a report, as Markdown and as HTML, made from the same cells; and what a comparison says, in words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from zipformer_crctc.bootstrap import Difference, Interval
from zipformer_crctc.breakdown import NONE, FeatureRow, GroupRow, PhoneRow
from zipformer_crctc.comparison import Change, Comparison
from zipformer_crctc.reportpage import wide
from zipformer_crctc.scoring import RATES
from zipformer_crctc.text import visible

_MARKDOWN_SPECIALS = str.maketrans({c: f"\\{c}" for c in "\\|*_`<>#~&$"})


def markdown(text: str) -> str:
    """Text as it is, in one line of Markdown: what has a meaning there is escaped."""
    # Brackets stay, since intervals are full of them; without what follows they make no link.
    return " ".join(text.split()).translate(_MARKDOWN_SPECIALS).replace("](", "]\\(")


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

    def html(self, label: str) -> str:
        """The table in HTML, with a label for those who hear it; all text is escaped."""
        head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in self.header)
        body = "".join(f"<tr>{self._html_row(row)}</tr>" for row in self.rows)
        return wide(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", label)

    def _html_row(self, row: Sequence[str]) -> str:
        return "".join(
            f'<th scope="row">{escape(cell)}</th>' if column < self.num_names else f"<td>{escape(cell)}</td>"
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


def with_interval(value: float, interval: Interval, places: int, sign: str = "") -> str:
    """`12.3 [11.0, 13.9]`; `–` for no value; sign: "+" writes it before positive numbers too."""
    if math.isnan(value):
        return "–"
    kind = f"{sign}.{places}f"
    return f"{value:{kind}}" + (f" [{interval.low:{kind}}, {interval.high:{kind}}]" if interval.known else "")


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


def comparison_table(found: Change, names: Sequence[str]) -> Table:
    """Both systems' rates on the common utterances, the difference with its interval, and the p-value."""
    rows = [[rate, *_change(found, place)] for place, rate in enumerate(RATES)]
    return Table(["", *names, *_CHANGE], rows)


def language_comparison_table(languages: Mapping[str, Change], names: Sequence[str]) -> Table:
    """The same of PER, by language."""
    rows = [[name or NONE, str(found.utterances), *_change(found, 0)] for name, found in languages.items()]
    return Table(["language", "utterances", *(f"PER % {name}" for name in names), *_CHANGE], rows)


_CHANGE = ("difference [95 %]", "p")


def _change(found: Change, place: int) -> list[str]:
    """A rate of both systems, its difference and p-value."""
    decimals, change = _PLACES[place], found.differences[place]
    sides = [with_interval(side[place], Interval(), decimals) for side in found.rates]
    return [*sides, with_interval(change.value, change.interval, decimals, "+"), p_value(change.p_value)]


def p_value(value: float) -> str:
    """Three decimals; `–` for none."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def verdict(found: Comparison, names: Sequence[str]) -> str:
    """Which system is better, by how much and how surely, in sentences."""
    total = found.total
    change = total.differences[0]
    if not change.interval.known:
        return f"Common utterances: {total.utterances}, too few to compare the systems."
    gains = change.value, change.interval.low, change.interval.high
    better = int(change.value < 0)
    gain, low, high = (-gains[0], -gains[2], -gains[1]) if better else gains
    rates = f"a PER of {total.rates[better][0]:.2f} % against {total.rates[1 - better][0]:.2f} %"
    spread = f"95 % interval {low:.2f} to {high:.2f}, p = {p_value(change.p_value)}"
    where = f"on the {total.utterances} utterances that both have"
    if low > 0:
        told = f"{names[better]} is better: {rates}, lower by {gain:.2f} points ({spread}), {where}."
    elif gain:
        told = (
            f"No clear difference: {names[better]} has {rates}, lower by {gain:.2f} points, but the interval of the "
            f"difference includes 0 ({spread}), {where}."
        )
    else:
        return f"No difference: both have a PER of {total.rates[0][0]:.2f} % ({spread}), {where}."
    told = f"{told} {_features_agree(total.differences[RATES.index('PFER %')], better)}"
    if len(found.languages) < 2:
        return told
    signs = [change.differences[0].value * (-1 if better else 1) for change in found.languages.values()]
    lower, higher = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    equal = len(signs) - lower - higher
    return f"{told} By language its PER is lower in {lower}, higher in {higher} and equal in {equal}."


def _features_agree(change: Difference, better: int) -> str:
    """Whether PFER says the same as PER."""
    low, high = change.interval.low, change.interval.high
    if not (low > 0 or high < 0):
        return "PFER shows no clear difference."
    return "Its PFER is lower too." if (high < 0) == bool(better) else "But its PFER is higher."
