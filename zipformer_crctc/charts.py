"""Charts as SVG text: bars with intervals, and a heat map. No scripts, no outside files; all labels are escaped.

Sizes are in CSS pixels. Every chart grows with its rows, so that 90 of them are as readable as 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from zipformer_crctc.bootstrap import Interval

SYSTEM_COLOURS = ("#3b6ea8", "#d9822b")
GROUP_COLOURS = ("#3b6ea8", "#b5543c", "#4f8a4a", "#7d5ba6", "#9a7b1f")
_INK, _GREY, _GRID = "#222", "#666", "#e3e3e3"
_SHORTEST_AXIS = 1.0  # of rates that are all 0
_LABEL_LETTERS = 30


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


def bar_chart(bars: Sequence[Bar], title: str, width: int = 880) -> str:
    """Horizontal bars with whiskers for intervals, and the figures beside them; the axis stands above and below."""
    num_series = max((len(bar.values) for bar in bars), default=1)
    thickness = 12 if num_series == 1 else 9
    row_height = num_series * thickness + 7
    letters = min(_LABEL_LETTERS, max((len(bar.label) for bar in bars), default=0))
    left, right, top = 14 + 7.2 * letters, 150.0, 38.0
    span = width - left - right
    high = max((v for bar in bars for v in _reach(bar)), default=0.0)
    ticks = _ticks(high)
    scale = span / ticks[-1]
    places, y = [], top
    for bar in bars:
        y += 8 if bar.gap else 0
        places.append(y)
        y += row_height
    height = y + 22
    parts = [_text(left + span / 2, 13, title, anchor="middle", size=12, colour=_GREY)]
    for tick in ticks:
        x = left + tick * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
        parts += [_text(x, at, f"{tick:g}", anchor="middle", size=11, colour=_GREY) for at in (top - 8, y + 14)]
    for bar, place in zip(bars, places, strict=True):
        parts.append(_bar_row(bar, place, left, width - right + 8, thickness, scale))
    return _svg(width, height, parts, title)


def _bar_row(bar: Bar, y: float, left: float, figures: float, thickness: int, scale: float) -> str:
    label = bar.label if len(bar.label) <= _LABEL_LETTERS else bar.label[: _LABEL_LETTERS - 1] + "…"
    middle = y + len(bar.values) * thickness / 2
    parts = [_text(left - 8, middle + 4, label, anchor="end")]
    for place, value in enumerate(bar.values):
        interval = bar.intervals[place] if place < len(bar.intervals) else Interval()
        top, centre = y + place * thickness, y + (place + 0.5) * thickness
        if not math.isnan(value):
            colour = bar.colours[place % len(bar.colours)]
            parts.append(
                f'<rect x="{left:.1f}" y="{top + 0.5:.1f}" width="{max(0.5, value * scale):.1f}" '
                f'height="{thickness - 1}" fill="{colour}" fill-opacity="0.82"/>'
            )
        if interval.known:
            low, high = left + interval.low * scale, left + interval.high * scale
            ends = "".join(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{centre - 3:.1f}" y2="{centre + 3:.1f}"/>' for x in (low, high)
            )
            line = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{centre:.1f}" y2="{centre:.1f}"/>'
            parts.append(f'<g stroke="{_INK}" stroke-width="1.2">{line}{ends}</g>')
        parts.append(_text(figures, centre + 3.5, _figure(value, interval), size=10.5, colour=_GREY))
    note = f"<title>{escape(bar.note)}</title>" if bar.note else ""
    return f"<g>{note}{''.join(parts)}</g>"


def _reach(bar: Bar) -> list[float]:
    reached = [*bar.values, *(interval.high for interval in bar.intervals)]
    return [value for value in reached if not math.isnan(value)]


def _figure(value: float, interval: Interval) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.1f}" + (f"  [{interval.low:.1f}, {interval.high:.1f}]" if interval.known else "")


def _ticks(high: float) -> list[float]:
    """Round values from 0 to at least `high`, five to ten of them."""
    high = max(high, _SHORTEST_AXIS)
    step = 10.0 ** math.floor(math.log10(high))
    step = next(step * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if high / (step * part) <= 8)
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def heat_map(content: HeatMap, cell: int = 19) -> str:
    """Cells shaded by their share, each with its note for the pointer and, where there is room, its percentage."""
    left = 26 + 8.0 * max((len(label) for label in content.rows), default=0)
    top = 26 + 8.0 * max((len(label) for label in content.columns), default=0)
    width, height = left + cell * len(content.columns) + 8, top + cell * len(content.rows) + 8
    parts = [
        _text(left + cell * len(content.columns) / 2, 12, content.column_title, anchor="middle", size=12, colour=_GREY),
        _text(
            12, top + cell * len(content.rows) / 2, content.row_title, anchor="middle", size=12, colour=_GREY, turn=-90
        ),
    ]
    for row, label in enumerate(content.rows):
        parts.append(_text(left - 6, top + (row + 0.5) * cell + 4.5, label, anchor="end", size=13))
    for column, label in enumerate(content.columns):
        x = left + (column + 0.5) * cell
        # Single letters stand upright; words are turned.
        upright = len(label) <= 2
        place = {"anchor": "middle"} if upright else {"anchor": "start", "turn": -90}
        parts.append(_text(x if upright else x + 4.5, top - 6, label, size=13, **place))
    across, down = left + cell * len(content.columns), top + cell * len(content.rows)
    for row in range(len(content.rows) + 1):
        y = top + row * cell
        parts.append(f'<line x1="{left:.1f}" x2="{across:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="{_GRID}"/>')
    for column in range(len(content.columns) + 1):
        x = left + column * cell
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{down:.1f}" stroke="{_GRID}"/>')
    for (row, column), share in content.shares.items():
        parts.append(_cell(content, row, column, share, left + column * cell, top + row * cell, cell))
    return _svg(width, height, parts, f"{content.row_title}, {content.column_title}")


def _cell(content: HeatMap, row: int, column: int, share: float, x: float, y: float, cell: int) -> str:
    # Roots of the shares: most confusions are rare, and would all look white.
    strength = math.sqrt(min(1.0, max(0.0, share)))
    far = (120, 120, 120) if (row, column) in content.correct else (165, 30, 20)
    reach = 0.45 if (row, column) in content.correct else 1.0
    colour = "#" + "".join(f"{round(255 + (part - 255) * strength * reach):02x}" for part in far)
    note = escape(content.notes.get((row, column), ""))
    figure = ""
    if share >= 0.005:
        ink = "#fff" if strength * reach > 0.6 else _INK
        figure = _text(x + cell / 2, y + cell / 2 + 3, f"{100 * share:.0f}", anchor="middle", size=8.5, colour=ink)
    square = f'<rect x="{x + 0.5:.1f}" y="{y + 0.5:.1f}" width="{cell - 1}" height="{cell - 1}" fill="{colour}"/>'
    return f"<g><title>{note}</title>{square}{figure}</g>"


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
