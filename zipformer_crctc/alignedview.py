"""Reference and hypotheses of an utterance, phone under phone, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from zipformer_crctc.metrics import Alignment
from zipformer_crctc.text import visible

_COLUMNS_IN_A_LINE = 22  # as many as a window of 700 pixels holds

Column = tuple[str | None, ...]
"""The reference phone and the phone of each system in one place; `None` for no phone."""


def columns(aligned: Sequence[Alignment]) -> list[Column]:
    """Alignments of several systems with one reference as one: equal places of the reference stand in one column.

    What systems insert between two reference phones shares columns too, the first insertions in the first.
    """
    sides = [_by_place(alignment) for alignment in aligned]
    ref = [phone for phone, _ in aligned[0] if phone is not None]
    merged: list[Column] = []
    for place in range(len(ref) + 1):
        inserted = [side[place][0] for side in sides]
        for number in range(max(len(phones) for phones in inserted)):
            merged.append((None, *(phones[number] if number < len(phones) else None for phones in inserted)))
        if place < len(ref):
            merged.append((ref[place], *(side[place][1] for side in sides)))
    return merged


def _by_place(alignment: Alignment) -> list[tuple[list[str], str | None]]:
    """For each place of the reference: what was inserted before it, and the phone aligned with it; and what after."""
    places: list[tuple[list[str], str | None]] = []
    inserted: list[str] = []
    for ref, hyp in alignment:
        if ref is not None:
            places.append((inserted, hyp))
            inserted = []
        elif hyp is not None:
            inserted.append(hyp)
    return [*places, (inserted, None)]


def aligned_table(names: Sequence[str], aligned: Sequence[Alignment]) -> str:
    """The reference above the row of each named system, long ones in several lines; errors are coloured by kind."""
    merged = columns(aligned)
    lines = [merged[start : start + _COLUMNS_IN_A_LINE] for start in range(0, len(merged), _COLUMNS_IN_A_LINE)]
    tables = []
    for line in lines:
        rows = [_row("reference", [_reference_cell(column[0]) for column in line])]
        for number, name in enumerate(names, start=1):
            rows.append(_row(name, [_cell(column[0], column[number]) for column in line]))
        tables.append(f'<table class="aligned">{"".join(rows)}</table>')
    return "".join(tables)


def _row(name: str, cells: Sequence[str]) -> str:
    return f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>'


def _reference_cell(ref: str | None) -> str:
    return "<td></td>" if ref is None else f"<td>{escape(visible(ref))}</td>"


def _cell(ref: str | None, hyp: str | None) -> str:
    # Where only another system inserted something, both are `None`: nothing is missing.
    if ref == hyp:
        return "<td></td>" if hyp is None else f"<td>{escape(visible(hyp))}</td>"
    if hyp is None:
        return '<td class="del" title="deleted">∅</td>'
    kind, title = ("ins", "inserted") if ref is None else ("sub", "substituted")
    return f'<td class="{kind}" title="{title}">{escape(visible(hyp))}</td>'
