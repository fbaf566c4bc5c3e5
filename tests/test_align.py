"""The alignment program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile

from shar_folder import RATE, cut, flac, tone, write_shard
from tiny_run import SIZES
from zipformer_crctc import align, checkpoint
from zipformer_crctc.commandline import parse_train_args
from zipformer_crctc.config import config_to_dict
from zipformer_crctc.model import build_model
from zipformer_crctc.tokenizer import PhoneTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights."""
    path = tmp_path_factory.mktemp("align") / "model.pt"
    config = parse_train_args(["--preset", "tiny", *SIZES]).config
    tokenizer = PhoneTokenizer.from_table()
    state = build_model(config.model, tokenizer.vocab_size).state_dict()
    checkpoint.save(path, {"model": state, "config": config_to_dict(config), "tokenizer": tokenizer.proto})
    return path


def run(model: Path, *flags: Any) -> None:
    base = ("--checkpoint", model, "--num-workers", 0, "--num-threads", 1, "--device", "cpu")
    align.main([str(flag) for flag in (*base, *flags)])


def read(folder: Path) -> dict[str, dict[str, Any]]:
    (path,) = folder.glob("alignment-*.jsonl")
    return {line["id"]: line for line in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def write_set(folder: Path, texts: dict[str, str | None], seconds: float = 1.0) -> Path:
    data = flac(tone(seconds))
    cuts = [cut(name, round(seconds * RATE), text, language="xx") for name, text in texts.items() if text is not None]
    cuts += [cut(name, round(seconds * RATE), None) for name, text in texts.items() if text is None]
    write_shard(folder, 0, cuts, [(f"{entry['id']}.flac", data) for entry in cuts])
    return folder


def test_a_shar_set(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_set(tmp_path / "set" / "test", {"one": "kʰa ta", "two": "s"})
    output = tmp_path / "out"
    run(model, "--test-sets", folder, "--output-dir", output, "--output-formats", "ctm,textgrid")
    lines = read(output)
    one = lines["one"]
    assert one["phones"] == ["k", "ʰ", "a", "t", "a"] and one["problem"] is None
    assert one["score"] < 0 and one["duration"] == 1.0 and one["language"] == "xx"
    assert all(start < end for start, end in zip(one["starts"], one["ends"], strict=True))
    assert all(end <= start for end, start in zip(one["ends"], one["starts"][1:], strict=False))
    assert one["starts"][0] >= 0 and one["ends"][-1] <= 1.0
    assert lines["two"]["phones"] == ["s"]
    ctm = (output / "ctm-set-test-model.ctm").read_text(encoding="utf-8").splitlines()
    assert [line.split()[0] for line in ctm].count("one") in (4, 5)  # kʰ is one phone unless a pause parts it
    grids = sorted(path.name for path in (output / "textgrid-set-test-model").iterdir())
    assert grids == ["one.TextGrid", "two.TextGrid"]
    assert "set-test: 2 of 2 utterances aligned, 6 phones" in capsys.readouterr().out


def test_what_cannot_be_aligned_is_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"good": "ta", "long": 60 * "ta", "empty": " ", "none": None, "unknown": "t本a", "alien": "本"}
    folder = write_set(tmp_path / "set" / "test", texts)
    run(model, "--test-sets", folder, "--output-dir", tmp_path, "--output-formats", "ctm")
    printed = capsys.readouterr()
    lines = read(tmp_path)
    assert lines["good"]["problem"] is None
    assert "121 tokens need 121 output frames" in lines["long"]["problem"]
    assert lines["empty"]["problem"] == lines["none"]["problem"] == "no text"
    assert lines["alien"]["problem"] == "no known phone in the text" and lines["alien"]["phones"] == []
    assert lines["unknown"]["phones"] == ["t", "a"] and lines["unknown"]["unknown"] == ["本"]
    assert "2 x '本'" in printed.err
    assert "text longer than the audio allows (long)" in printed.err
    assert "set-test: 2 of 6 utterances aligned, 4 phones; 2 not: no text" in printed.out
    ctm = (tmp_path / "ctm-set-test-model.ctm").read_text(encoding="utf-8")
    assert {line.split()[0] for line in ctm.splitlines()} == {"good", "unknown"}


def test_a_table_gives_the_same_as_a_set(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_set(tmp_path / "set" / "test", {"one": "ata", "two": "sat"})
    run(model, "--test-sets", folder, "--output-dir", tmp_path / "shar")
    for name in ("one", "two"):
        soundfile.write(tmp_path / f"{name}.wav", tone(1.0), RATE, subtype="PCM_16")
    table = tmp_path / "mine.tsv"
    table.write_text("audio\ttext\none.wav\tata\ntwo.wav\tsat\nabsent.wav\ta\n", encoding="utf-8")
    run(model, "--table", table, "--output-dir", tmp_path / "table")
    assert "not aligned: 1 skipped: 1 no such file (absent" in capsys.readouterr().err
    by_shar, by_table = read(tmp_path / "shar"), read(tmp_path / "table")
    assert list(by_table) == ["one", "two"]
    for name in by_table:
        assert by_table[name]["phones"] == by_shar[name]["phones"]
        for key in ("starts", "ends"):  # rounded to 0.1 ms
            assert by_table[name][key] == pytest.approx(by_shar[name][key], abs=1.01e-4), (name, key)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--table", "t.tsv", "--test-sets", "dev"), "give one of them"),
        (("--table", "t.tsv", "--beam", "8"), "--beam 8: only decode.py searches"),
        (("--table", "absent.tsv"), "absent.tsv does not exist"),
        (("--table", "absent.tsv", "--output-formats", "vtt"), "--output-formats vtt: unknown"),
    ],
)
def test_bad_input_ends_with_one_message(
    model: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(model, *flags)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
