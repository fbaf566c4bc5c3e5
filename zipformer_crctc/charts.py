"""Charts as SVG text: bars with intervals, a heat map, and lines. No scripts, no outside files; all labels are escaped.

Sizes are in CSS pixels. Every chart grows with its rows, so that 90 of them are as readable as 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from zipformer_crctc.bootstrap import Interval
from zipformer_crctc.reportcolours import SYSTEM_COLOURS, colour

_INK, _GREY, _LINE = colour("ink"), colour("grey"), colour("line")
_SHORTEST_AXIS = 1.0  # of rates that are all 0
_LABEL_LETTERS = 26
_BAR_WIDTH = 660  # fits into a window of 700 pixels and on a printed page
_FIGURES = _BAR_WIDTH - 124.0  # where the figures begin
_TOP = 42.0  # what title and axis take
_ROWS_TO_AXIS = 25  # farther away, no figure of the axis is in sight


@dataclass(frozen=True)
class Bar:
    """One row of a bar chart: a value for each series, NaN for none."""

    label: str
    values: Sequence[float]
    intervals: Sequence[Interval] = ()
    note: str = ""
    """Shown when the pointer rests on the row."""
    colours: Sequence[str] = SYSTEM_COLOURS
    gap: bool = False
    """Whether some space separates the row from the one above."""


@dataclass(frozen=True)
class HeatMap:
    """Cells of a square with a row and a column of their own for what is missing."""

    rows: Sequence[str]
    columns: Sequence[str]
    shares: dict[tuple[int, int], float]
    """Colour of a cell (row, column) from 0 to 1; cells that are not in it stay blank."""
    notes: dict[tuple[int, int], str] = field(default_factory=dict)
    correct: frozenset[tuple[int, int]] = frozenset()
    """Cells in grey: they are no errors."""
    row_title: str = ""
    column_title: str = ""


@dataclass(frozen=True)
class Line:
    """Points joined in the order of x."""

    label: str
    points: Sequence[tuple[float, float]]
    """x and y, none below 0"""
    colour: str = SYSTEM_COLOURS[0]
    dashed: bool = False


def line_chart(lines: Sequence[Line], title: str, x_title: str, width: float = 330, height: float = 230) -> str:
    """Lines over axes that begin at 0, with a legend below the title."""
    left, top, right, bottom = 44.0, 48.0, width - 14, height - 38
    x_ticks = _ticks(max(x for line in lines for x, _ in line.points))
    y_ticks = _ticks(max(y for line in lines for _, y in line.points))
    x_scale, y_scale = (right - left) / x_ticks[-1], (bottom - top) / y_ticks[-1]
    parts = [
        _text(width / 2, 14, title, anchor="middle"),
        _text((left + right) / 2, height - 6, x_title, anchor="middle", size=11, colour=_GREY),
    ]
    for tick in y_ticks:
        y = bottom - tick * y_scale
        parts += [_line(left, y, right, y, _LINE), _text(left - 5, y + 4, f"{tick:g}", "end", 11, _GREY)]
    for tick in x_ticks:
        parts.append(_text(left + tick * x_scale, bottom + 15, f"{tick:g}", "middle", 11, _GREY))
    for number, line in enumerate(lines):
        places = [(left + x * x_scale, bottom - y * y_scale) for x, y in sorted(line.points)]
        stroke = f'stroke="{line.colour}"' + (' stroke-dasharray="5 4"' if line.dashed else ' stroke-width="2"')
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{joined}" fill="none" {stroke}/>')
        if not line.dashed:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{line.colour}"/>' for x, y in places]
        start = left + number * (right - left) / len(lines)
        parts.append(f'<line x1="{start:.1f}" y1="29" x2="{start + 22:.1f}" y2="29" {stroke}/>')
        parts.append(_text(start + 27, 33, line.label, size=11, colour=_GREY))
    return _svg(width, height, parts, title)


def bar_chart(bars: Sequence[Bar], title: str) -> str:
    """Horizontal bars with whiskers for intervals, and the figures beside them.

    Long charts are cut into parts of about 25 rows, each an SVG with an axis of its own, that fit on a printed page.
    """
    thickness = 13.0 if max((len(bar.values) for bar in bars), default=1) == 1 else 14.0
    left = 14 + 7.2 * min(_LABEL_LETTERS, max((len(bar.label) for bar in bars), default=0))
    ticks = _ticks(max((v for bar in bars for v in _reach(bar)), default=0.0))
    scale = (_FIGURES - 10 - left) / ticks[-1]
    marks = [(left + tick * scale, f"{tick:g}") for tick in ticks]
    num_parts = max(1, round(len(bars) / _ROWS_TO_AXIS))
    cuts = [part * len(bars) // num_parts for part in range(num_parts + 1)]
    return "".join(
        _bars(
            bars[start:end],
            title if num_parts == 1 else f"{title}, {part} of {num_parts}",
            left,
            thickness,
            scale,
            marks,
        )
        for part, (start, end) in enumerate(pairwise(cuts), start=1)
    )


def _bars(
    bars: Sequence[Bar], title: str, left: float, thickness: float, scale: float, marks: Sequence[tuple[float, str]]
) -> str:
    """SVG of a part of the rows, with the axis above and below; marks: place and text of each of its ticks."""
    parts = [_text((left + _FIGURES) / 2, 13, title, anchor="middle", colour=_GREY)]
    y, rows = _TOP, []
    for bar in bars:
        y += 8 if bar.gap else 0
        rows.append(_bar_row(bar, y, left, thickness, scale))
        y += len(bar.values) * thickness + 8
    for x, mark in marks:
        parts += [_text(x, place, mark, anchor="middle", size=11, colour=_GREY) for place in (_TOP - 9, y + 13)]
        parts.append(_line(x, _TOP - 5, x, y, _LINE))
    return _svg(_BAR_WIDTH, y + 20, [*parts, *rows], title)


def _bar_row(bar: Bar, y: float, left: float, thickness: float, scale: float) -> str:
    label = bar.label if len(bar.label) <= _LABEL_LETTERS else bar.label[: _LABEL_LETTERS - 1] + "…"
    parts = [_text(left - 8, y + len(bar.values) * thickness / 2 + 4, label, anchor="end")]
    for place, value in enumerate(bar.values):
        interval = bar.intervals[place] if place < len(bar.intervals) else Interval()
        top, centre = y + place * thickness, y + (place + 0.5) * thickness
        if not math.isnan(value):
            parts.append(
                f'<rect x="{left:.1f}" y="{top + 1:.1f}" width="{max(0.5, value * scale):.1f}" '
                f'height="{thickness - 2}" fill="{bar.colours[place % len(bar.colours)]}" fill-opacity="0.8"/>'
            )
        if interval.known:
            low, high = left + interval.low * scale, left + interval.high * scale
            parts += [_line(x, centre - 3, x, centre + 3, _INK) for x in (low, high)]
            parts.append(_line(low, centre, high, centre, _INK))
        figure = "–" if math.isnan(value) else f"{value:.1f}"
        parts.append(_text(_FIGURES + 32, centre + 4, figure, anchor="end", size=11, colour=_GREY))
        if interval.known:
            spread = f"[{interval.low:.1f}, {interval.high:.1f}]"
            parts.append(_text(_FIGURES + 38, centre + 4, spread, size=11, colour=_GREY))
    note = f"<title>{escape(bar.note)}</title>" if bar.note else ""
    return f"<g>{note}{''.join(parts)}</g>"


def _reach(bar: Bar) -> list[float]:
    reached = [*bar.values, *(interval.high for interval in bar.intervals)]
    return [value for value in reached if not math.isnan(value)]


def _ticks(high: float) -> list[float]:
    """Round values from 0 to at least `high`, five to ten of them."""
    high = max(high, _SHORTEST_AXIS)
    step = 10.0 ** math.floor(math.log10(high))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if high / (step * part) <= 8)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def heat_map(content: HeatMap, title: str, cell: int = 20) -> str:
    """Cells shaded by their share, each with its note for the pointer and, where there is room, its percentage.

    The names of the rows stand on both sides, those of the columns above and below.
    """
    beside, above = (10 + 8.0 * max(map(len, labels), default=0) for labels in (content.rows, content.columns))
    left, top = 18 + beside, 18 + above
    right, bottom = left + cell * len(content.columns), top + cell * len(content.rows)
    parts = [
        _text((left + right) / 2, 12, content.column_title, anchor="middle", colour=_GREY),
        _text(12, (top + bottom) / 2, content.row_title, anchor="middle", colour=_GREY, turn=-90),
    ]
    for row, label in enumerate(content.rows):
        y = top + (row + 0.5) * cell + 4.5
        parts += [_text(left - 6, y, label, anchor="end", size=13), _text(right + 6, y, label, size=13)]
    for column, label in enumerate(content.columns):
        x = left + (column + 0.5) * cell
        if len(label) <= 2:  # single letters stand upright; words are turned
            parts += [_text(x, y, label, anchor="middle", size=13) for y in (top - 6, bottom + 16)]
        else:
            parts.append(_text(x + 4.5, top - 6, label, size=13, turn=-90))
            parts.append(_text(x + 4.5, bottom + 6, label, size=13, anchor="end", turn=-90))
    for row in range(len(content.rows) + 1):
        parts.append(_line(left, top + row * cell, right, top + row * cell, _LINE))
    for column in range(len(content.columns) + 1):
        parts.append(_line(left + column * cell, top, left + column * cell, bottom, _LINE))
    for (row, column), share in content.shares.items():
        parts.append(_cell(content, row, column, share, left + column * cell, top + row * cell, cell))
    return _svg(right + beside, bottom + above, parts, title)


def _cell(content: HeatMap, row: int, column: int, share: float, x: float, y: float, cell: int) -> str:
    correct = (row, column) in content.correct
    # Roots of the shares: most confusions are rare, and would all look white.
    strength = math.sqrt(min(1.0, max(0.0, share))) * (0.45 if correct else 1.0)
    square = (
        f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1}" height="{cell - 1}" '
        f'fill="{colour("correct" if correct else "wrong")}" fill-opacity="{strength:.2f}"/>'
    )
    figure = ""
    if share >= 0.005:
        ink = colour("paper") if strength > 0.6 else _INK
        figure = _text(x + cell / 2, y + cell / 2 + 3.5, f"{100 * share:.0f}", anchor="middle", size=9.5, colour=ink)
    note = escape(content.notes.get((row, column), ""))
    return f"<g><title>{note}</title>{square}{figure}</g>"


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}"/>'


def _text(
    x: float, y: float, text: str, anchor: str = "start", size: float = 12, colour: str = _INK, turn: int = 0
) -> str:
    turned = f' transform="rotate({turn} {x:.1f} {y:.1f})"' if turn else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"{turned}>'
        f"{escape(text)}</text>"
    )


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    )
