"""Files of phones in time: NIST CTM, and a Praat TextGrid or subtitles (SRT) for each utterance.

Marks and modifier letters (ʰ, ː, a tilde) are tokens of their own to the model; in these files they are joined to the
phone that they modify. Formats: the CTM of NIST's sctk (file, channel, start, duration, token, confidence), and "Text
files" in the Praat manual (the long format).
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zipformer_crctc.results import write_atomically
from zipformer_crctc.times import DIGITS, Segment

logger = logging.getLogger(__name__)

TIER = "phones"
SUBTITLE_SECONDS = 6.0
"""A subtitle ends with the last phone before this, or before a silence."""


@dataclass(frozen=True)
class TimedUtterance:
    """What these files need of an utterance."""

    id: str
    duration: float
    """Seconds of audio."""
    segments: Sequence[Segment]
    """In order of time, without overlap."""


def join_marks(segments: Iterable[Segment]) -> list[Segment]:
    """Segments with combining marks and modifier letters joined to the one before; the lowest confidence counts.

    A mark that opens the utterance, or that silence parts from the phone before, stays by itself.
    """
    joined: list[Segment] = []
    for segment in segments:
        is_mark = unicodedata.category(segment.phone[0]) in ("Mn", "Lm", "Sk")
        if is_mark and joined and joined[-1].end == segment.start:
            base = joined.pop()
            confidence = min(base.confidence, segment.confidence)
            joined.append(Segment(base.phone + segment.phone, base.start, segment.end, confidence))
        else:
            joined.append(segment)
    return joined


def ctm(utterances: Iterable[TimedUtterance]) -> str:
    """CTM lines, utterances in order of their ids. White space in an id becomes `_`, as the fields are parted by it."""
    lines = []
    for utterance in sorted(utterances, key=lambda u: u.id):
        name = re.sub(r"\s+", "_", utterance.id)
        lines += [
            f"{name} 1 {s.start:.{DIGITS}f} {s.end - s.start:.{DIGITS}f} {s.phone} {s.confidence:.{DIGITS}f}\n"
            for s in join_marks(utterance.segments)
        ]
    return "".join(lines)


def textgrid(utterance: TimedUtterance) -> str:
    """A TextGrid with one interval tier; silence becomes intervals without text."""
    segments = join_marks(utterance.segments)
    end = round(max([utterance.duration, *(s.end for s in segments)]), DIGITS)
    intervals: list[tuple[float, float, str]] = []
    time = 0.0
    for s in segments:
        if s.start > time:
            intervals.append((time, s.start, ""))
        intervals.append((s.start, s.end, s.phone))
        time = s.end
    if time < end or not intervals:
        intervals.append((time, end, ""))
    lines = [
        'File type = "ooTextFile"',
        'Object class = "TextGrid"',
        "",
        "xmin = 0",
        f"xmax = {end}",
        "tiers? <exists>",
        "size = 1",
        "item []:",
        "    item [1]:",
        '        class = "IntervalTier"',
        f'        name = "{TIER}"',
        "        xmin = 0",
        f"        xmax = {end}",
        f"        intervals: size = {len(intervals)}",
    ]
    for number, (start, stop, phone) in enumerate(intervals, start=1):
        text = phone.replace('"', '""')
        lines += [
            f"        intervals [{number}]:",
            f"            xmin = {start}",
            f"            xmax = {stop}",
            f'            text = "{text}"',
        ]
    return "\n".join(lines) + "\n"


def srt(utterance: TimedUtterance) -> str:
    """SubRip subtitles: the phones between two silences, or of some seconds, with spaces between them."""
    groups: list[list[Segment]] = []
    for s in join_marks(utterance.segments):
        if groups and groups[-1][-1].end == s.start and s.end - groups[-1][0].start <= SUBTITLE_SECONDS:
            groups[-1].append(s)
        else:
            groups.append([s])
    return "".join(
        f"{number}\n{_srt_time(group[0].start)} --> {_srt_time(group[-1].end)}\n{' '.join(s.phone for s in group)}\n\n"
        for number, group in enumerate(groups, start=1)
    )


def _srt_time(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest // 1000:02d},{rest % 1000:03d}"


SINGLE_FILES = {"textgrid": (textgrid, "TextGrid"), "srt": (srt, "srt")}
"""Formats of one file for each utterance: what makes it, and its suffix."""


def write_time_files(folder: Path, name: str, formats: Sequence[str], utterances: Sequence[TimedUtterance]) -> None:
    """Write `ctm-{name}.ctm`, `textgrid-{name}/{id}.TextGrid`, `srt-{name}/{id}.srt`: those that `formats` lists.

    Ids become file names, with `_` for what cannot stand in one; those that are changed are counted in the log. Of
    several ids with one file name, the later ones get -2, -3, ... behind it.
    """
    changed = []
    if "ctm" in formats:
        write_atomically(folder / f"ctm-{name}.ctm", ctm(utterances))
        changed += [u.id for u in utterances if re.search(r"\s", u.id)]
    for kind, (make, suffix) in SINGLE_FILES.items():
        if kind not in formats:
            continue
        taken: set[str] = set()
        for utterance in sorted(utterances, key=lambda u: u.id):
            stem = _free_name(re.sub(r"[^\w.-]+", "_", utterance.id), taken)
            if stem != utterance.id:
                changed.append(utterance.id)
            write_atomically(folder / f"{kind}-{name}" / f"{stem}.{suffix}", make(utterance))
    if changed := sorted(set(changed)):
        logger.warning("%d ids have another form in the CTM or as file names: %s", len(changed), ", ".join(changed))


def _free_name(name: str, taken: set[str]) -> str:
    number, free = 1, name
    while free.lower() in taken:  # some file systems do not tell Ä from ä
        number += 1
        free = f"{name}-{number}"
    taken.add(free.lower())
    return free
