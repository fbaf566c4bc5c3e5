from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from local import check_shar
from shar_folder import RATE, cut, flac, tone, write_shard


def check(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit status."""
    monkeypatch.setattr(sys, "argv", ["check_shar", *map(str, arguments)])
    try:
        check_shar.main()
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


def write(folder: Path) -> None:
    """Five cuts: two good ones, one of an unknown symbol, one too dense, one whose audio is damaged."""
    good = flac(tone(1.5))
    texts = ["pataka", "mamama", "pataQQka", "pa" * 60, "pataka"]
    cuts = [
        cut(f"u{i}", round(1.5 * RATE), text, language="xx" if i else "yy", speaker=f"s{i % 2}")
        for i, text in enumerate(texts)
    ]
    write_shard(folder, 0, cuts, [(f"u{i}.flac", good if i < 4 else b"junk") for i in range(5)])


def test_figures_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "train")
    assert check(monkeypatch, tmp_path / "train", "--audio", "--json", tmp_path / "check.json") == 0
    found = json.loads((tmp_path / "check.json").read_text())[str(tmp_path / "train")]
    assert (found["cuts"], found["trained_cuts"], found["speakers"]) == (4, 3, 2)
    assert found["hours"] == round(4 * 1.5 / 3600, 4)
    assert found["languages"] == {"xx": 3, "yy": 1}
    assert found["durations"]["1 to 2 s"] == 4 and sum(found["durations"].values()) == 4
    assert found["frames_needed"] == {
        "0 to 0.25": 3, "0.25 to 0.5": 0, "0.5 to 0.75": 0, "0.75 to 0.9": 0, "0.9 to 1": 0, "above 1": 1,
    }  # fmt: skip
    assert found["unknown_symbols"] == {"Q": 2}
    assert list(found["left_out"].values()) == [1]
    assert found["damaged"] == {"damaged audio": 1} and found["damaged_examples"] == {"damaged audio": ["u4"]}
    printed = capsys.readouterr().out
    assert "damaged audio: u4" in printed and "1 to 2 s" in printed


def test_exit_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "train")
    assert check(monkeypatch, tmp_path / "train") == 0
    assert check(monkeypatch, tmp_path / "train", "--audio", "--strict") == 1
    assert check(monkeypatch, tmp_path / "nowhere", tmp_path / "train", "--json", tmp_path / "check.json") == 1
    assert "no such folder" in (tmp_path / "check.json").read_text()
    write_shard(tmp_path / "short", 0, [cut("a", RATE // 2)], [("a.flac", flac(tone(0.5)))])
    assert check(monkeypatch, tmp_path / "short") == 1
    assert check(monkeypatch, tmp_path / "short", "--filters", "alignable") == 0
