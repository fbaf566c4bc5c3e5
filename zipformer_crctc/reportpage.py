"""The parts of `report.html`: sections with charts and tables, and the page around them.

All text from data goes through `escape`, here or in the modules that draw.
"""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from zipformer_crctc.alignedview import aligned_table
from zipformer_crctc.breakdown import FeatureRow, GroupRow
from zipformer_crctc.charts import GROUP_COLOURS, SYSTEM_COLOURS, Bar, HeatMap, bar_chart, heat_map
from zipformer_crctc.comparison import Comparison
from zipformer_crctc.metrics import Alignment, ErrorCounts, segment_number
from zipformer_crctc.reportdata import Clip
from zipformer_crctc.reporttables import Table, p_value
from zipformer_crctc.results import UtteranceResult
from zipformer_crctc.segments import inventory
from zipformer_crctc.spectrogram import spectrogram
from zipformer_crctc.text import visible

MOST_PHONES = 40
"""Rows and columns of the confusion map."""
_LONGEST_CLIP = 40.0  # seconds; longer audio would make the page too large
_CONFUSIONS_LISTED = 25

_STYLE = """
body { font: 15px/1.45 system-ui, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; color: #222;
  max-width: 1080px; margin: 0 auto; padding: 0 20px 60px; background: #fff }
h1 { font-size: 25px; margin: 26px 0 4px } h2 { font-size: 20px; margin: 42px 0 8px; border-bottom: 1px solid #ddd }
h3 { font-size: 16px; margin: 22px 0 6px } h3 small { font-weight: 400; color: #666; margin-left: 6px }
nav { position: sticky; top: 0; background: #fff; border-bottom: 1px solid #ddd; padding: 8px 0; z-index: 1 }
nav a { margin-right: 16px; color: #3b6ea8; text-decoration: none }
h2 { scroll-margin-top: 44px } p, ul { max-width: 820px } .note { color: #666; font-size: 13.5px }
.wide { overflow-x: auto; margin: 10px 0 } svg text, .aligned td { font-family: "Noto Sans", "DejaVu Sans", sans-serif }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #eee; white-space: nowrap }
tbody th { text-align: left; font-weight: 500 }
thead th { color: #666; font-weight: 600; border-bottom: 1px solid #bbb }
thead th:first-child { text-align: left } summary { cursor: pointer; color: #3b6ea8; margin: 8px 0 }
.aligned { font-size: 17px; margin-bottom: 10px }
.aligned td { padding: 2px 7px; text-align: center; min-width: 13px; border: 0 }
.aligned th { font-size: 13px; font-weight: 500; color: #666; text-align: left; border: 0; position: sticky; left: 0;
  background: #fff }
.sub { background: #ffe3a8 } .del { background: #f9c5bf; color: #a33 } .ins { background: #c9def5 }
.key span { padding: 1px 8px; margin-right: 6px } .swatch { display: inline-block; width: 11px; height: 11px;
  margin: 0 5px 0 12px } audio { height: 34px; display: block; margin: 4px 0 }
article { border-top: 1px solid #e5e5e5; padding-bottom: 10px }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    html: str


@dataclass(frozen=True)
class ShownUtterance:
    """An utterance for the aligned view, of one system or of two."""

    corpus: str
    results: Sequence[UtteranceResult]
    alignments: Sequence[Alignment]
    counts: Sequence[ErrorCounts]
    clip: Clip | None = None


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The whole file; `lead` is HTML."""
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    body = "".join(f'<h2 id="{section.anchor}">{escape(section.title)}</h2>{section.html}' for section in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body><h1>{escape(title)}</h1>{lead}<nav>{links}</nav>{body}</body></html>\n"
    )


def paragraph(text: str, kind: str = "") -> str:
    """Escaped text as a paragraph."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """Escaped texts as a list; nothing for none."""
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>" if texts else ""


def folded(summary: str, html: str) -> str:
    """HTML that opens by a click."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def legend(names: Sequence[str], colours: Sequence[str]) -> str:
    """Names with their colours."""
    items = [
        f'<i class="swatch" style="background:{colour}"></i>{escape(name)}'
        for name, colour in zip(names, colours, strict=False)
    ]
    return f'<p class="note">{"".join(items)}</p>'


def rate_bars(groups: Sequence[Sequence[GroupRow]], rate: int, title: str) -> str:
    """A chart of one of the `RATES` by group, the highest first; one list of rows for each system."""
    tables = [{row.group: row for row in rows} for rows in groups]
    names = sorted({name for table in tables for name in table})

    def height(name: str) -> float:
        found = [table[name].rates[rate] for table in tables if name in table]
        return -max((value for value in found if not math.isnan(value)), default=-1.0)

    bars = []
    for name in sorted(names, key=lambda name: (height(name), name)):
        rows = [table.get(name) for table in tables]
        utterances = ", ".join(str(row.utterances) for row in rows if row)
        bars.append(
            Bar(
                name,
                [row.rates[rate] if row else math.nan for row in rows],
                [row.intervals[rate] for row in rows if row] if all(rows) else (),
                f"{name}: {utterances} utterances",
            )
        )
    return f'<div class="wide">{bar_chart(bars, title)}</div>'


def feature_bars(systems: Sequence[Sequence[FeatureRow]]) -> str:
    """A chart of errors by articulatory feature, in groups; one list of rows for each system."""
    groups = list(dict.fromkeys(row.group for row in systems[0]))
    colours = dict(zip(groups, GROUP_COLOURS, strict=True))
    bars = []
    for rows in zip(*systems, strict=True):
        first = rows[0]
        whole = first.name == "any"
        note = "; ".join(f"{row.wrong} of {row.specified} wrong" for row in rows)
        bars.append(
            Bar(
                f"any: {first.group}" if whole else first.name,
                [row.rate for row in rows],
                (),
                note,
                [colours[first.group]] if len(systems) == 1 else SYSTEM_COLOURS,
                gap=whole,
            )
        )
    return f'<div class="wide">{bar_chart(bars, "percent of aligned segments with the feature wrong")}</div>'


def confusion_map(counts: Counter[tuple[str | None, str | None]]) -> str:
    """The map of the phones with most errors, and what it leaves out; a note where nothing was confused."""
    in_ref, in_hyp, errors = _margins(counts)
    if not errors:
        return paragraph("No errors.")
    chosen = _alike_together([phone for phone, _ in errors.most_common(MOST_PHONES)])
    place: dict[str | None, int] = {phone: number for number, phone in enumerate(chosen)}
    place[None] = len(chosen)  # the last column: deleted; the last row: inserted
    shares, notes = {}, {}
    for (ref, hyp), n in counts.items():
        if ref not in place or hyp not in place:
            continue
        whole = in_ref[ref] if ref is not None else in_hyp[hyp or ""]
        cell = place[ref], place[hyp]
        shares[cell] = n / whole
        notes[cell] = (
            f"{hyp} inserted: {n} ({100 * n / whole:.1f} % of all {hyp} in hypotheses)"
            if ref is None
            else f"{ref} → {hyp or 'deleted'}: {n} ({100 * n / whole:.1f} % of {ref})"
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
    left_out = len(errors) - len(chosen)
    rest = f" {left_out} phones with fewer errors are not shown." if left_out else ""
    explanation = (
        "Figures are percent of the reference phone (in the last row: of the hypothesis phone); grey is correct, red "
        f"an error. Phones are in the order of their features, so that like ones are neighbours.{rest}"
    )
    return f'{paragraph(explanation, "note")}<div class="wide">{heat_map(content)}</div>'


def confusion_table(counts: Counter[tuple[str | None, str | None]]) -> Table:
    """The most frequent errors."""
    in_ref, _, _ = _margins(counts)
    wrong = Counter({pair: n for pair, n in counts.items() if pair[0] != pair[1]})
    ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0][0] or "", item[0][1] or ""))
    rows = [
        [visible(ref or "∅"), visible(hyp or "∅"), str(n), f"{100 * n / in_ref[ref]:.1f}" if ref else "–"]
        for (ref, hyp), n in ordered[:_CONFUSIONS_LISTED]
    ]
    return Table(["reference", "hypothesis", "count", "% of reference phone"], rows, num_names=2)


def _margins(counts: Counter[tuple[str | None, str | None]]) -> tuple[Counter[str], Counter[str], Counter[str]]:
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


def verdict(found: Comparison, names: Sequence[str]) -> str:
    """The comparison in a sentence."""
    change = found.differences[0]
    if not change.interval.known:
        return f"{found.utterances} common utterances are too few to compare."
    spread = f"{change.value:+.2f} points [{change.interval.low:+.2f}, {change.interval.high:+.2f}]"
    better = names[1] if change.value < 0 else names[0]
    if change.interval.low <= 0 <= change.interval.high:
        return f"PER differs by {spread} (p = {p_value(change.p_value)}): no clear difference between the systems."
    return f"{better} has the lower PER, by {spread} (p = {p_value(change.p_value)})."


ERROR_KEY = (
    '<p class="note key"><span class="sub">substituted</span><span class="del">∅ deleted</span>'
    '<span class="ins">inserted</span></p>'
)


def utterance_view(shown: ShownUtterance) -> str:
    """Head line, audio, aligned phones and spectrogram of one utterance; two systems are called A and B."""
    names = ["A", "B"] if len(shown.results) > 1 else ["hypothesis"]
    first = shown.results[0]
    where = " · ".join(part for part in (shown.corpus, first.language, first.speaker) if part)
    figures = "; ".join(
        (f"{name}: " if len(names) > 1 else "") + f"PER {c.per:.0f} % ({c.errors} errors, {c.reference_phones} phones)"
        for name, c in zip(names, shown.counts, strict=True)
    )
    parts = [f"<h3>{escape(first.id)}<small>{escape(where)} · {escape(figures)}</small></h3>"]
    clip = shown.clip
    if clip is not None and len(clip.samples) <= _LONGEST_CLIP * clip.rate:
        source = base64.b64encode(clip.flac).decode()
        parts.append(f'<audio controls preload="none" src="data:audio/flac;base64,{source}"></audio>')
    elif clip is not None:
        parts.append(paragraph(f"Audio of {len(clip.samples) / clip.rate:.0f} s is not embedded.", "note"))
    parts.append(aligned_table(names, shown.alignments))
    if clip is not None:
        short = ["A", "B"] if len(names) > 1 else [""]
        timed = [
            (name, colour, result.hyp, result.times)
            for name, colour, result in zip(short, ("#b22a1b", "#1d4f91"), shown.results, strict=False)
        ]
        parts.append(f'<div class="wide">{spectrogram(clip.samples, clip.rate, timed)}</div>')
    return f"<article>{''.join(parts)}</article>"
