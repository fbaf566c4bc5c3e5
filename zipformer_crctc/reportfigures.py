"""The figures of a report, made from its breakdowns: bars by group and by feature, and the map of confusions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from html import escape

from zipformer_crctc.bootstrap import Interval
from zipformer_crctc.breakdown import FEATURE_GROUPS, FeatureRow, GroupRow
from zipformer_crctc.charts import Bar, HeatMap, bar_chart, heat_map
from zipformer_crctc.metrics import segment_number
from zipformer_crctc.reportcolours import SYSTEM_COLOURS, colour
from zipformer_crctc.reportpage import paragraph, wide
from zipformer_crctc.reporttables import Table
from zipformer_crctc.segments import inventory
from zipformer_crctc.text import visible

MOST_PHONES = 40
"""Rows and columns of the confusion map."""
_CONFUSIONS_LISTED = 25
_GROUP_COLOURS = [colour(name) for name in ("voice", "place", "tongue", "manner", "tone")]

Confusions = Counter[tuple[str | None, str | None]]
"""How often each reference phone was aligned with each hypothesis phone; `None` for no phone."""


def legend(names: Sequence[str]) -> str:
    """Systems with their colours."""
    items = [
        f'<i class="swatch" style="background:{colour}"></i>{escape(name)}'
        for name, colour in zip(names, SYSTEM_COLOURS, strict=True)
    ]
    return f'<p class="note">{"".join(items)}</p>'


def rate_bars(groups: Sequence[Sequence[GroupRow]], rate: int, title: str) -> str:
    """A chart of one of the `RATES` by group, the highest first; one list of rows for each system."""
    tables = [{row.group: row for row in rows} for rows in groups]
    bars = []
    for name in sorted({name for table in tables for name in table}):
        rows = [table.get(name) for table in tables]
        utterances = ", ".join(str(row.utterances) if row else "no" for row in rows)
        bars.append(
            Bar(
                name,
                [row.rates[rate] if row else math.nan for row in rows],
                [row.intervals[rate] if row else Interval() for row in rows],
                f"{name}: {utterances} utterances",
            )
        )
    bars.sort(key=lambda bar: max((value for value in bar.values if not math.isnan(value)), default=-1), reverse=True)
    return wide(bar_chart(bars, title), title)


def feature_bars(systems: Sequence[Sequence[FeatureRow]]) -> str:
    """A chart of errors by articulatory feature, in groups; one list of rows for each system."""
    colours = dict(zip(FEATURE_GROUPS, _GROUP_COLOURS, strict=True))
    bars = []
    for rows in zip(*systems, strict=True):
        first = rows[0]
        whole = first.name == "any"
        label = f"any: {first.group}" if whole else first.name
        bars.append(
            Bar(
                label,
                [row.rate for row in rows],
                note=f"{label}: {'; '.join(f'{row.wrong} of {row.specified} wrong' for row in rows)}",
                colours=[colours[first.group]] if len(systems) == 1 else SYSTEM_COLOURS,
                gap=whole,
            )
        )
    title = "percent of aligned segments with the feature wrong"
    return wide(bar_chart(bars, title), title)


def confused_phones(systems: Sequence[Confusions]) -> list[str]:
    """The phones with most errors in all systems together, like ones side by side: rows and columns of their maps."""
    errors: Counter[str] = Counter()
    for counts in systems:
        errors.update(_margins(counts)[2])
    return _alike_together([phone for phone, _ in errors.most_common(MOST_PHONES)])


def confusion_map(counts: Confusions, chosen: Sequence[str], title: str) -> str:
    """The map of the chosen phones, and how many it leaves out; a note where nothing was confused."""
    in_ref, in_hyp, errors = _margins(counts)
    if not errors:
        return paragraph("No errors.")
    place: dict[str | None, int] = {phone: number for number, phone in enumerate(chosen)}
    place[None] = len(chosen)  # the last column: deleted; the last row: inserted
    shares, notes = {}, {}
    for (ref, hyp), n in counts.items():
        if ref not in place or hyp not in place:
            continue
        cell = place[ref], place[hyp]
        whole = in_hyp[hyp or ""] if ref is None else in_ref[ref]
        shares[cell] = n / whole
        shown = visible(ref or ""), visible(hyp or "")
        notes[cell] = (
            f"{shown[1]} inserted: {n} ({100 * n / whole:.1f} % of all {shown[1]} in hypotheses)"
            if ref is None
            else f"{shown[0]} → {shown[1] or 'deleted'}: {n} ({100 * n / whole:.1f} % of {shown[0]})"
        )
    content = HeatMap(
        rows=[*map(visible, chosen), "inserted"],
        columns=[*map(visible, chosen), "deleted"],
        shares=shares,
        notes=notes,
        correct=frozenset((i, i) for i in range(len(chosen))),
        row_title="reference",
        column_title="hypothesis",
    )
    left_out = len({*errors} - {*chosen})
    rest = paragraph(f"Phones with fewer errors, not shown: {left_out}.", "note") if left_out else ""
    return wide(heat_map(content, title), title) + rest


def confusion_table(counts: Confusions) -> Table:
    """The most frequent errors."""
    in_ref, _, _ = _margins(counts)
    wrong = Counter({pair: n for pair, n in counts.items() if pair[0] != pair[1]})
    ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0][0] or "", item[0][1] or ""))
    rows = [
        [visible(ref or "∅"), visible(hyp or "∅"), str(n), f"{100 * n / in_ref[ref]:.1f}" if ref else "–"]
        for (ref, hyp), n in ordered[:_CONFUSIONS_LISTED]
    ]
    return Table(["reference", "hypothesis", "count", "% of reference phone"], rows, num_names=2)


def _margins(counts: Confusions) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Occurrences in references and in hypotheses, and errors on either side, by phone."""
    in_ref: Counter[str] = Counter()
    in_hyp: Counter[str] = Counter()
    errors: Counter[str] = Counter()
    for (ref, hyp), n in counts.items():
        if ref is not None:
            in_ref[ref] += n
        if hyp is not None:
            in_hyp[hyp] += n
        if ref != hyp:
            errors.update({phone: n for phone in (ref, hyp) if phone is not None})
    return in_ref, in_hyp, errors


def _alike_together(phones: Sequence[str]) -> list[str]:
    """Phones in the order of their features, the coarse ones first; what panphon does not know comes last."""
    table = inventory()
    order = ("syl", "son", "cont", "nas", "lat", "lab", "cor", "ant", "strid", "hi", "lo", "back", "round", "voi")
    columns = [table.features.index(name) for name in order]

    def key(phone: str) -> tuple[bool, list[int], str]:
        number = segment_number(phone)
        return number is None, [] if number is None else table.vectors[number, columns].tolist(), phone

    return sorted(phones, key=key)
