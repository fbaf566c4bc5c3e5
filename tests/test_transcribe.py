"""The program transcribe.py, above all on bad input."""

from __future__ import annotations

import io
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from random_checkpoint import write_checkpoint
from shar_folder import tone
from zipformer_crctc import transcribe
from zipformer_crctc.tokenizer import PhoneTokenizer

RATE = 16_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("transcribe") / "model.pt")


def run(model: Path | str, *flags: Any) -> int:
    """Exit status."""
    try:
        transcribe.main([str(flag) for flag in ("--model", model, "--device", "cpu", *flags)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def read(folder: Path) -> dict[str, dict[str, Any]]:
    lines = (folder / "transcripts.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["id"]: line for line in map(json.loads, lines)}


def test_text_is_printed_a_line_for_each_recording(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("b", "a"):
        soundfile.write(tmp_path / f"{name}.wav", tone(1.0), RATE)
    (tmp_path / "notes.txt").write_text("no audio")
    assert run(model, tmp_path, "--progress", "False") == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["a", "b"]
    assert lines[0][1] == lines[1][1]


def test_all_formats(model: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a b.wav", tone(1.0), RATE)
    flags = ("--output-dir", tmp_path / "out", "--output-formats", "text,jsonl,ctm,textgrid,srt")
    assert run(model, tmp_path / "a*.wav", *flags) == 0
    found = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*"))
    assert found == [
        "ctm-transcripts.ctm",
        "srt-transcripts/a_b.srt",
        "textgrid-transcripts/a_b.TextGrid",
        "transcripts.jsonl",
        "transcripts.txt",
    ]
    line = read(tmp_path / "out")["a b"]
    assert line["duration"] == 1.0 and line["audio"].endswith("a b.wav")
    assert len(line["phones"]) == len(line["starts"]) == len(line["ends"]) == len(line["confidence"])


def test_a_folder_of_good_and_bad(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every good recording is done, every bad one is named with its reason, and the exit status says so."""
    folder, rng = tmp_path / "in", np.random.default_rng(0)
    folder.mkdir()
    good = {
        "silent": (np.zeros(RATE), RATE),
        "clipped": (np.sign(rng.standard_normal(RATE)), RATE),
        "telephone": (tone(1.0)[::2], 8_000),
        "studio": (rng.standard_normal(192_000) * 0.1, 192_000),
        "seven": (rng.standard_normal((RATE, 7)) * 0.1, RATE),
        "shortest": (np.zeros(1360), RATE),
    }
    for name, (samples, rate) in good.items():
        soundfile.write(folder / f"{name}.wav", samples, rate)
    soundfile.write(folder / "short.wav", np.zeros(RATE // 100), RATE)
    soundfile.write(folder / "no-samples.wav", np.zeros(0), RATE)
    soundfile.write(folder / "nan.wav", np.full(RATE, np.nan), RATE, subtype="FLOAT")
    (folder / "empty.wav").write_bytes(b"")
    (folder / "text.wav").write_text("This is a text.\n" * 100)
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    whole = (folder / "silent.wav").read_bytes()
    (folder / "truncated.wav").write_bytes(whole[: len(whole) // 2])
    (folder / "unreadable.wav").symlink_to("/proc/self/mem")  # not even by root, on Linux
    (folder / "meeting.m4a").write_bytes(b"\0" * 100)
    assert run(model, folder, tmp_path / "missing.wav", "--output-dir", tmp_path, "--output-formats", "jsonl") == 1
    lines = read(tmp_path)
    assert {name for name, line in lines.items() if line["problem"] is None} == set(good)
    reasons = {
        "short": "too short: 160 samples",
        "no-samples": "no samples",
        "nan": "NaN or infinity",
        "empty": "cannot be decoded",
        "text": "cannot be decoded",
        "gone": "no such file",
        "unreadable": "cannot be read" if sys.platform == "linux" else "no such file",
        "missing": "no such file",
        "truncated": "truncated",
        "meeting": "ffmpeg",
    }
    assert set(lines) == set(good) | set(reasons)
    for name, reason in reasons.items():
        assert reason in lines[name]["problem"], name
        assert lines[name]["phones"] == []
    assert lines["studio"]["duration"] == lines["telephone"]["duration"] == lines["seven"]["duration"] == 1.0


def test_two_bad_files_among_a_thousand(model: Path, tmp_path: Path) -> None:
    folder, words = tmp_path / "in", tmp_path / "word.wav"
    folder.mkdir()
    soundfile.write(words, tone(0.1), RATE)
    for number in range(998):
        (folder / f"{number:03d}.wav").hardlink_to(words)
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    (folder / "unreadable.wav").symlink_to("/proc/self/mem")
    assert run(model, folder, "--output-dir", tmp_path, "--output-formats", "jsonl") == 1
    lines = read(tmp_path)
    assert len(lines) == 1000
    assert {name for name, line in lines.items() if line["problem"] is not None} == {"gone", "unreadable"}


def test_a_truncated_mp3_is_transcribed_as_far_as_it_goes(model: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.mp3", tone(4.0), RATE)
    whole = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[: len(whole) // 2])
    assert run(model, tmp_path / "a.mp3", "--output-dir", tmp_path, "--output-formats", "jsonl") == 0
    line = read(tmp_path)["a"]
    assert "seems truncated" in line["warning"] and 1.0 < line["duration"] < 3.0


def test_standard_input(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "a.flac", tone(1.0), RATE)
    assert run(model, tmp_path / "a.flac", "--output-formats", "jsonl") == 0
    want = json.loads(capsys.readouterr().out)
    data = io.BytesIO((tmp_path / "a.flac").read_bytes())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
    assert run(model, "-", "--output-formats", "jsonl") == 0
    got = json.loads(capsys.readouterr().out)
    assert got["phones"] == want["phones"] and got["id"] == "stdin"


def test_m4a_goes_through_ffmpeg(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that stands for ffmpeg: the file given to it is FLAC already."""
    stand_in = tmp_path / "ffmpeg"
    stand_in.write_text('#!/bin/sh\nwhile [ "$1" != -i ]; do shift; done\ncp "$2" "$5"\n')
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    soundfile.write(tmp_path / "a.flac", tone(1.0), RATE)
    (tmp_path / "a.flac").rename(tmp_path / "a.m4a")
    assert run(model, tmp_path / "a.m4a", "--output-dir", tmp_path, "--output-formats", "jsonl") == 0
    assert read(tmp_path)["a"]["duration"] == 1.0


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("evil"),))


def test_models_that_cannot_be_used(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    soundfile.write("a.wav", tone(1.0), RATE)
    Path("text.pt").write_text("no checkpoint")
    torch.save({"weights": torch.zeros(3)}, "other.pt")
    torch.save({"model": _Evil()}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(_Evil(), protocol=2))
    Path("phones.txt").write_text("a\nb\n")
    small = PhoneTokenizer.from_table("phones.txt")
    write_checkpoint(Path("small.pt"), small, tokenizer=None)
    Path("nothing").mkdir()
    messages = {
        "absent.pt": "no such file or folder",
        "text.pt": "not a checkpoint",
        "other.pt": "not the state dict of a Zipformer model",
        "evil.pt": "refused",
        "raw.pt": "refused",
        "small.pt": "of another vocabulary",
        "nothing": "name one file",
    }
    for name, message in messages.items():
        assert run(name, "a.wav") == 2, name
        assert message in capsys.readouterr().err, name
    assert not Path("evil").exists()


def test_flags_that_cannot_be(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(model) == 2
    assert "no audio: name files" in capsys.readouterr().err
    assert run(model, tmp_path, "--output-formats", "textgrid", "--channel", "0") == 2
    problems = capsys.readouterr().err
    assert "give --output-dir" in problems and "--channel 0: must be at least 1" in problems
    assert run(model, tmp_path, "--split", "silence") == 2
    assert "--split silence: must be pauses or windows" in capsys.readouterr().err
    assert run(model, tmp_path) == 2
    assert "no audio files there" in capsys.readouterr().err
    assert run(model, "a.wav", "--print-config", "--beam", "8") == 0
    assert json.loads(capsys.readouterr().out)["transcribe"]["window"] == 30.0
