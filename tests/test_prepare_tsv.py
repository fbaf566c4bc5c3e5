from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse import CutSet

from local.prepare_tsv import prepare
from local.table import hashed_split, read_table


def write_audio(path: Path, seconds: float = 0.5, rate: int = 16_000, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = 0.1 * np.random.default_rng(0).standard_normal((round(seconds * rate), channels))
    soundfile.write(path, samples, rate)


def write_table(folder: Path, *lines: str, name: str = "table.tsv") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / name


def cuts(folder: Path) -> CutSet:
    return CutSet.from_shar(
        fields={"cuts": sorted(folder.glob("cuts.*")), "recording": sorted(folder.glob("recording.*"))}
    )


def test_a_table_becomes_three_sets(tmp_path: Path) -> None:
    for name, rate in (("a.wav", 16_000), ("sub/b.flac", 44_100), ("c.mp3", 22_050), ("d.ogg", 48_000)):
        write_audio(tmp_path / name, rate=rate)
    table = write_table(
        tmp_path,
        "audio\ttext\tlanguage\tspeaker\tsplit",
        "a.wav\tpã t͡ʃa˥\tfra\tAnn\ttrain",
        "sub/b.flac\tɡa\tfra\tBob\tdev",
        "c.mp3\tta\tfra\tBob\tvalidation",
        f"{tmp_path}/d.ogg\tma\t\t\ttest",
    )
    stats = prepare(table, tmp_path / "out")
    assert [(split.split, split.cuts) for split in stats] == [("train", 1), ("dev", 2), ("test", 1)]
    (train,) = cuts(tmp_path / "out/train")
    assert train.supervisions[0].text == "pa\u0303 tʃa"
    assert (train.supervisions[0].language, train.supervisions[0].speaker) == ("fra", "Ann")
    assert [(cut.id, cut.supervisions[0].text) for cut in cuts(tmp_path / "out/dev")] == [("sub-b", "ga"), ("c", "ta")]
    (test,) = cuts(tmp_path / "out/test")
    assert test.supervisions[0].language is None
    assert test.duration == pytest.approx(0.5, abs=1e-3)
    assert not (tmp_path / "out/skipped.tsv").exists()


def test_bad_rows_are_counted_listed_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_audio(tmp_path / "good.wav")
    write_audio(tmp_path / "stereo.wav", channels=2)
    write_audio(tmp_path / "cut.wav")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:2000])
    (tmp_path / "junk.wav").write_text("no audio")
    table = write_table(
        tmp_path,
        "audio\ttext\tsplit",
        "good.wav\tpa\ttrain",
        "stereo.wav\tpa\ttrain",
        "absent.wav\tpa\ttrain",
        "cut.wav\tpa\ttrain",
        "junk.wav\tpa\ttrain",
        "good.wav\t\ttrain",
        "good.wav\t人口\ttrain",
        "good.wav\tpa\ttset",
        "good.wav\tpa",
        "\tpa\ttrain",
    )
    with caplog.at_level(logging.INFO):
        stats = prepare(table, tmp_path / "out")
    assert stats[0].cuts == 2
    assert stats[0].stereo == 1
    lines = (tmp_path / "out/skipped.tsv").read_text(encoding="utf-8").splitlines()
    reasons = [line.split("\t")[3] for line in lines[1:]]
    for part in (
        "line 9: split 'tset'",
        "line 10 has 2 cells, the header 3",
        "line 11 has no audio",
        "empty text",
        "no known phone in the text '人口'",
        "no such file",
        "truncated",
        "cannot be decoded",
    ):
        assert len([reason for reason in reasons if part in reason]) == 1, part
    assert len(reasons) == 8
    assert "8 rows skipped" in caplog.text
    assert "1 recordings had several channels and were mixed down" in caplog.text


def test_unknown_symbols_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_audio(tmp_path / "a.wav")
    with caplog.at_level(logging.INFO):
        prepare(write_table(tmp_path, "audio\ttext\tsplit", "a.wav\tpa人\ttrain"), tmp_path / "out")
    assert "人" in caplog.text


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    table = write_table(tmp_path, "audio\ttext", "absent.wav\tpa")
    with pytest.raises(ValueError, match=r"nothing is left of the corpus: 1 rows were skipped, see .*skipped\.tsv"):
        prepare(table, tmp_path / "out")


def test_the_number_of_processes_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        write_audio(tmp_path / f"{number}.wav", seconds=0.2 + 0.1 * number)
    table = write_table(tmp_path, "audio\ttext\tsplit", *(f"{number}.wav\tpa\ttrain" for number in range(5)))
    monkeypatch.setattr("local.corpus.write_split.__defaults__", (1, 2))
    for jobs in (1, 2):
        prepare(table, tmp_path / f"out{jobs}", jobs=jobs)
    first, second = (sorted((tmp_path / f"out{jobs}/train").iterdir()) for jobs in (1, 2))
    assert [path.name for path in first] == [path.name for path in second]
    assert len(first) == 6
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))


def test_fewer_rows_leave_no_old_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("local.corpus.write_split.__defaults__", (1, 1))
    write_audio(tmp_path / "a.wav")
    rows = ["a.wav\tpa\ttrain", "a.wav\tta\ttrain"]
    prepare(write_table(tmp_path, "audio\ttext\tsplit", *rows), tmp_path / "out")
    prepare(write_table(tmp_path, "audio\ttext\tsplit", rows[0]), tmp_path / "out")
    assert len(list((tmp_path / "out/train").glob("cuts.*"))) == 1


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("t.csv", ["audio,text", 'a.wav,"p,a"']),
        ("t.csv", ["audio;text", "a.wav;p,a"]),
        ("t.txt", ["audio\ttext", "a.wav\tp,a"]),
        ("t.tsv", ["\ufeffAudio\tText", "a.wav\tp,a"]),
    ],
)
def test_delimiters(tmp_path: Path, name: str, lines: list[str]) -> None:
    rows, skipped = read_table(write_table(tmp_path, *lines, name=name))
    (row,) = [row for split in rows.values() for row in split]
    assert (row.text, row.audio, skipped) == ("p,a", tmp_path / "a.wav", [])


def test_quotation_marks_in_tsv_are_text(tmp_path: Path) -> None:
    rows, _ = read_table(write_table(tmp_path, "audio\ttext", 'a.wav\t"pa', 'b.wav\tta"'))
    assert sorted(row.text for split in rows.values() for row in split) == ['"pa', 'ta"']


def test_ids_are_unique(tmp_path: Path) -> None:
    rows, _ = read_table(
        write_table(tmp_path, "audio\ttext\tsplit", *(["x/a b.wav\tpa\ttrain"] * 3), "x/a b.mp3\tp\tdev")
    )
    assert [row.id for split in rows.values() for row in split] == ["x-a_b", "x-a_b-2", "x-a_b-3", "x-a_b-4"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file\ttext\na\tb\n", "has no column audio; its first line gives 'file', 'text'"),
        ("audio\ttext\n", "has no rows"),
        ("", "has no rows"),
        ("audio\ttext\ttext\na\tb\tc\n", "the column text 2 times"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "t.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "t.tsv")


def test_missing_table_and_another_encoding(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        read_table(tmp_path / "t.tsv")
    (tmp_path / "t.tsv").write_bytes("audio\ttext\na\tã\n".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-8"):
        read_table(tmp_path / "t.tsv")


def test_splits_by_hash(tmp_path: Path) -> None:
    lines = [f"{number}.wav\tpa\ts{number % 200}" for number in range(2000)]
    rows, _ = read_table(write_table(tmp_path, "audio\ttext\tspeaker", *lines))
    speakers = {split: {row.speaker for row in rows[split]} for split in rows}
    assert not speakers["train"] & speakers["dev"]
    assert not speakers["train"] & speakers["test"]
    assert not speakers["dev"] & speakers["test"]
    assert all(0.02 < len(rows[split]) / 2000 < 0.08 for split in ("dev", "test"))
    # With one speaker, recordings are split; the same file never comes into two sets.
    lines = [f"{number % 500}.wav\tpa\tann" for number in range(1000)]
    rows, _ = read_table(write_table(tmp_path, "audio\ttext\tspeaker", *lines))
    files = {split: {row.audio for row in rows[split]} for split in rows}
    assert all(files.values())
    assert not files["train"] & (files["dev"] | files["test"])
    assert hashed_split("0.wav") == hashed_split("0.wav")
