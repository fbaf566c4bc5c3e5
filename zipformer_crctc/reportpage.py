"""The page of a report: its style, its sections and the simple things in them. All text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from zipformer_crctc.reportcolours import definitions

# The fonts are those with many IPA symbols; what one lacks is taken from the next.
_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 "Noto Sans", "DejaVu Sans", "Segoe UI", "Lucida Grande", "Charis SIL", "Doulos SIL",
  "Gentium Plus", "Lucida Sans Unicode", "Arial Unicode MS", sans-serif; color: var(--ink);
  max-width: 1080px; margin: 0 auto; padding: 0 20px 60px; background: var(--paper) }
h1 { font-size: 25px; margin: 26px 0 8px; overflow-wrap: anywhere }
h2 { font-size: 20px; margin: 42px 0 8px; border-bottom: 1px solid var(--line); scroll-margin-top: 44px }
h3 { font-size: 16px; margin: 22px 0 6px; overflow-wrap: anywhere; scroll-margin-top: 50px }
h3 small { font-weight: 400; color: var(--grey); margin-left: 6px }
nav { position: sticky; top: 0; background: var(--paper); border-bottom: 1px solid var(--line); padding: 8px 0;
  z-index: 1; display: flex; flex-wrap: wrap; gap: 2px 16px }
a, summary { color: var(--link) } nav a { text-decoration: none } a:focus-visible, summary:focus-visible,
.wide:focus-visible { outline: 2px solid var(--link) }
p, ul { max-width: 820px; overflow-wrap: anywhere } .note { color: var(--grey); font-size: 13.5px }
.verdict { font-size: 17px; border-left: 4px solid var(--second); padding: 2px 0 2px 12px }
.wide { overflow-x: auto; margin: 10px 0 } .wide > svg { display: block } svg + svg { margin-top: 10px }
.fluid > svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; margin-bottom: 12px }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap;
  unicode-bidi: isolate }
thead th:first-child, tbody th { text-align: left } tbody th { font-weight: 500 }
thead th { color: var(--grey); font-weight: 600; border-bottom: 1px solid var(--grey); vertical-align: bottom }
summary { cursor: pointer; margin: 8px 0 }
.aligned { font-size: 17px }
.aligned td { padding: 2px 7px; text-align: center; min-width: 14px; border: 0 }
.aligned th { font-size: 13px; color: var(--grey); border: 0; position: sticky; left: 0; background: var(--paper) }
.sub { background: var(--substituted) } .del { background: var(--deleted) } .ins { background: var(--inserted) }
.key span { padding: 1px 8px; margin-right: 6px; color: var(--ink) }
.swatch { display: inline-block; width: 11px; height: 11px; margin: 0 5px 0 12px }
audio { height: 34px; display: block; margin: 4px 0; max-width: 100% }
article { border-top: 1px solid var(--line); padding-bottom: 10px }
@media screen and (prefers-color-scheme: dark) { svg image { filter: invert(1) } }
@media print, (max-width: 760px) { table { font-size: 11.5px } th, td { padding: 3px 5px }
  .aligned { font-size: 15px } .aligned td { padding: 2px 5px } .aligned th { font-size: 11.5px } }
@media (max-width: 760px) { body { padding: 0 12px 40px } nav { position: static } }
@media print { body { max-width: none; padding: 0 } nav, audio { display: none } .wide { overflow: visible }
  svg { max-width: 100%; max-height: 94vh; height: auto } svg, table, tr { break-inside: avoid }
  h2, h3, summary, section > .note { break-after: avoid }
  svg, .swatch, .sub, .del, .ins { print-color-adjust: exact; -webkit-print-color-adjust: exact } }
"""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    anchor: str
    title: str
    html: str


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole file."""
    links = "".join(f'<a href="#{section.anchor}">{escape(section.title)}</a>' for section in sections)
    body = "".join(
        f'<section aria-labelledby="{section.anchor}"><h2 id="{section.anchor}">{escape(section.title)}</h2>'
        f"{section.html}</section>"
        for section in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{definitions()}{_STYLE}</style></head>'
        f'<body><h1>{escape(title)}</h1><nav aria-label="sections">{links}</nav><main>{body}</main></body></html>\n'
    )


def paragraph(text: str, kind: str = "") -> str:
    """Escaped text as a paragraph."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def bullets(texts: Sequence[str]) -> str:
    """Escaped texts as a list; nothing for none."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="note">{items}</ul>' if texts else ""


def folded(summary: str, html: str) -> str:
    """HTML that opens by a click."""
    return f"<details><summary>{escape(summary)}</summary>{html}</details>"


def wide(html: str, label: str) -> str:
    """HTML that may be wider than the window, and then scrolls by itself, by the keyboard too."""
    return f'<div class="wide" role="group" tabindex="0" aria-label="{escape(label)}">{html}</div>'
