"""CTM, TextGrid and SRT files."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from zipformer_crctc.timefiles import TimedUtterance, ctm, join_marks, srt, textgrid, write_time_files
from zipformer_crctc.times import Segment

SEGMENTS = [
    Segment("t", 0.1, 0.2, 0.9),
    Segment("ʰ", 0.2, 0.25, 0.4),
    Segment("a", 0.25, 0.3, 0.8),
    Segment("ː", 0.3, 0.45, 1.0),
    Segment("\u0303", 0.45, 0.5, 0.7),
    Segment("s", 0.7, 0.8, 0.6),
]
UTTERANCE = TimedUtterance("b", 1.0, SEGMENTS)


def test_marks_are_joined_to_the_phone_before() -> None:
    assert join_marks(SEGMENTS) == [
        Segment("tʰ", 0.1, 0.25, 0.4),
        Segment("aː\u0303", 0.25, 0.5, 0.7),
        Segment("s", 0.7, 0.8, 0.6),
    ]


def test_a_mark_without_a_phone_before_it_stays() -> None:
    alone = [Segment("ʰ", 0.0, 0.1, 0.5), Segment("a", 0.1, 0.2, 0.5), Segment("ː", 0.6, 0.7, 0.5)]
    assert join_marks(alone) == alone


def test_ctm() -> None:
    text = ctm([UTTERANCE, TimedUtterance("a 1", 1.0, SEGMENTS[-1:]), TimedUtterance("c", 1.0, [])])
    assert text.splitlines() == [
        "a_1 1 0.7000 0.1000 s 0.6000",
        "b 1 0.1000 0.1500 tʰ 0.4000",
        "b 1 0.2500 0.2500 aː\u0303 0.7000",
        "b 1 0.7000 0.1000 s 0.6000",
    ]


def test_textgrid() -> None:
    lines = textgrid(TimedUtterance("x", 0.5, [Segment('"', 0.1, 0.5, 1.0)])).splitlines()
    assert lines[:2] == ['File type = "ooTextFile"', 'Object class = "TextGrid"']
    assert [line.strip() for line in lines[-8:]] == [
        "intervals [1]:",
        "xmin = 0.0",
        "xmax = 0.1",
        'text = ""',
        "intervals [2]:",
        "xmin = 0.1",
        "xmax = 0.5",
        'text = """"',
    ]


def test_textgrids_are_read_by_praatio(tmp_path: Path) -> None:
    praatio = pytest.importorskip("praatio.textgrid")
    quoted = TimedUtterance('q "x"', 0.9, [Segment('"', 0.0, 0.5, 1.0)])
    write_time_files(tmp_path, "dev", ("textgrid",), [UTTERANCE, quoted, TimedUtterance("silent", 2.5, [])])
    folder = tmp_path / "textgrid-dev"
    grid = praatio.openTextgrid(str(folder / "b.TextGrid"), includeEmptyIntervals=True)
    assert (grid.minTimestamp, grid.maxTimestamp, grid.tierNames) == (0.0, 1.0, ("phones",))
    assert [(e.start, e.end, e.label) for e in grid.getTier("phones").entries] == [
        (0.0, 0.1, ""),
        (0.1, 0.25, "tʰ"),
        (0.25, 0.5, "aː\u0303"),
        (0.5, 0.7, ""),
        (0.7, 0.8, "s"),
        (0.8, 1.0, ""),
    ]
    grid = praatio.openTextgrid(str(folder / "silent.TextGrid"), includeEmptyIntervals=True)
    assert [(e.start, e.end, e.label) for e in grid.getTier("phones").entries] == [(0.0, 2.5, "")]
    grid = praatio.openTextgrid(str(folder / "q_x_.TextGrid"), includeEmptyIntervals=False)
    assert [e.label.replace('""', '"') for e in grid.getTier("phones").entries] == ['"']


def test_ids_become_file_names_and_changed_ones_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    utterances = [TimedUtterance(name, 1.0, []) for name in ("a/b", "a b", "A_B", "fine")]
    with caplog.at_level(logging.WARNING):
        write_time_files(tmp_path, "dev", ("jsonl", "ctm", "textgrid"), utterances)
    names = sorted(path.name for path in (tmp_path / "textgrid-dev").iterdir())
    assert names == ["A_B.TextGrid", "a_b-2.TextGrid", "a_b-3.TextGrid", "fine.TextGrid"]
    assert "2 ids have another form in the CTM or as file names: a b, a/b" in caplog.text


def test_only_what_is_asked_for_is_written(tmp_path: Path) -> None:
    write_time_files(tmp_path, "dev", ("jsonl",), [UTTERANCE])
    assert list(tmp_path.iterdir()) == []
    write_time_files(tmp_path, "dev", ("ctm",), [UTTERANCE])
    assert [path.name for path in tmp_path.iterdir()] == ["ctm-dev.ctm"]


def test_subtitles_end_with_silences_and_before_six_seconds() -> None:
    spoken = [Segment("a", 0.5 * i, 0.5 * (i + 1), 0.9) for i in range(14)]
    spoken += [Segment("t", 3661.0, 3661.25, 0.9), Segment("ʰ", 3661.25, 3661.5, 0.9)]
    entries = srt(TimedUtterance("u", 4000.0, spoken)).split("\n\n")
    assert entries == [
        "1\n00:00:00,000 --> 00:00:06,000\n" + " ".join("a" * 12),
        "2\n00:00:06,000 --> 00:00:07,000\na a",
        "3\n01:01:01,000 --> 01:01:01,500\ntʰ",
        "",
    ]
    assert srt(TimedUtterance("u", 1.0, [])) == ""
