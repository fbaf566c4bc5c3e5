"""Utterances to look at and listen to: aligned phones, player and spectrogram, as HTML."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from zipformer_crctc.alignedview import aligned_table
from zipformer_crctc.metrics import Alignment, ErrorCounts
from zipformer_crctc.reportcolours import SYSTEM_COLOURS
from zipformer_crctc.reportdata import Clip
from zipformer_crctc.reportpage import Section, paragraph, wide
from zipformer_crctc.results import UtteranceResult
from zipformer_crctc.spectrogram import Tier, spectrogram

_LONGEST_CLIP = 40.0  # seconds; longer audio would make the page too large
_ERROR_KEY = (
    '<p class="note key"><span class="sub">substituted</span><span class="del">∅ deleted</span>'
    '<span class="ins">inserted</span></p>'
)


@dataclass(frozen=True)
class ShownUtterance:
    """An utterance as one system heard it, or two."""

    corpus: str
    results: Sequence[UtteranceResult]
    alignments: Sequence[Alignment]
    counts: Sequence[ErrorCounts]

    @property
    def key(self) -> tuple[str, str]:
        return self.corpus, self.results[0].id


def utterance_sections(
    lists: Mapping[str, Sequence[ShownUtterance]], clips: Mapping[tuple[str, str], Clip], names: Sequence[str]
) -> list[Section]:
    """A section for each list of utterances by its title; audio stands where an utterance is shown first."""
    anchors: dict[tuple[str, str], str] = {}
    sections = []
    for number, (title, shown) in enumerate(lists.items()):
        parts = [_ERROR_KEY if shown else paragraph("None.")]
        if len(names) > 1 and shown:
            parts.append(paragraph(f"A: {names[0]}; B: {names[1]}", "note"))
        for one in shown:
            clip = clips.get(one.key)
            if one.key in anchors:
                parts.append(_view(one, above=_link(anchors[one.key]) if clip else ""))
            else:
                anchors[one.key] = f"utterance-{len(anchors)}"
                parts.append(_view(one, *_heard(one, clip), anchors[one.key]))
        sections.append(Section(f"utterances-{number}", title, "".join(parts)))
    return sections


def _view(shown: ShownUtterance, above: str = "", below: str = "", anchor: str = "") -> str:
    """Head line and aligned phones, with HTML above and below these; two systems are called A and B."""
    first = shown.results[0]
    systems = _systems(shown)
    where = [part for part in (shown.corpus, first.language, first.speaker) if part]
    figures = "; ".join(
        f"{name} PER {c.per:.0f} % ({c.errors} of {c.reference_phones})".strip()
        for name, c in zip(systems, shown.counts, strict=True)
    )
    head = f"<bdi>{escape(first.id)}</bdi><small>{escape(' · '.join([*where, figures]))}</small>"
    names = [f"hypothesis {name}".strip() for name in systems]
    table = wide(aligned_table(names, shown.alignments), f"aligned phones of {first.id}")
    identity = f' id="{anchor}"' if anchor else ""
    return f"<article><h3{identity}>{head}</h3>{above}{table}{below}</article>"


def _heard(shown: ShownUtterance, clip: Clip | None) -> tuple[str, str]:
    """The player and the spectrogram; nothing without audio."""
    if clip is None:
        return "", ""
    seconds = len(clip.samples) / clip.rate
    if seconds <= _LONGEST_CLIP:
        source = base64.b64encode(clip.flac).decode()
        label = escape(f"audio of {shown.results[0].id}")
        player = f'<audio controls aria-label="{label}" src="data:audio/flac;base64,{source}"></audio>'
    else:
        player = paragraph(f"Audio of {seconds:.0f} s is not embedded.", "note")
    tiers = [
        Tier(name, colour, spans)
        for name, colour, result in zip(_systems(shown), SYSTEM_COLOURS, shown.results, strict=False)
        if (spans := _spans(result))
    ]
    return player, f'<div class="fluid">{spectrogram(clip.samples, clip.rate, tiers)}</div>'


def _spans(result: UtteranceResult) -> list[tuple[str, float, float]]:
    """Phones with start and end, or with their one time twice; none where times do not pair up with phones."""
    starts, ends = (result.starts, result.ends) if result.starts else (result.times, result.times)
    if not len(result.hyp) == len(starts) == len(ends):
        return []
    return list(zip(result.hyp, starts, ends, strict=True))


def _systems(shown: ShownUtterance) -> list[str]:
    return ["A", "B"] if len(shown.results) > 1 else [""]


def _link(anchor: str) -> str:
    return f'<p class="note"><a href="#{anchor}">Audio and spectrogram</a></p>'
