"""What reports read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from scored_results import random_results
from shar_folder import flac, tone, write_folder
from zipformer_crctc.reportdata import read_clips, read_system
from zipformer_crctc.results import json_lines


def write(path: Path, count: int = 2) -> Path:
    path.write_text(json_lines(random_results(count)), encoding="utf-8")
    return path


def test_file_and_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "results-mine-test-iter-5-avg-1-use-averaged-model.jsonl")
    write(tmp_path / "results-mine-dev-iter-5-avg-1-use-averaged-model.jsonl", 3)
    one = read_system(file)
    assert one.name == "mine-test-iter-5-avg-1-use-averaged-model" and one.corpora == ["mine-test"] * 2
    both = read_system(tmp_path)
    assert both.corpora == ["mine-dev"] * 3 + ["mine-test"] * 2
    assert [r.id for r in both.results] == ["u0000", "u0001", "u0002", "u0000", "u0001"]


def test_a_folder_with_several_decodes(tmp_path: Path) -> None:
    write(tmp_path / "results-dev-iter-5-avg-1.jsonl")
    write(tmp_path / "results-dev-iter-9-avg-1.jsonl", 3)
    with pytest.raises(ValueError, match=r"several decodes of dev; .*iter-5-avg-1, iter-9-avg-1"):
        read_system(tmp_path)
    assert len(read_system(tmp_path, "iter-9-avg-1").results) == 3
    with pytest.raises(ValueError, match=r"holds no results-\*-iter-7\.jsonl"):
        read_system(tmp_path, "iter-7")


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such file or folder"):
        read_system(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no results-\*\.jsonl"):
        read_system(tmp_path)
    file = tmp_path / "results-dev.jsonl"
    whole = json_lines(random_results(3))
    for text, words in {
        "": "holds no results",
        whole[:-20]: r"results-dev\.jsonl, line 3: is not a decoding result",
        whole + whole: "utterance u0000 occurs more than once",
        '{"id": "a", "ref": "ab", "hyp": []}\n': "line 1: .*ref is 'ab', not a list",
        '{"id": "a", "ref": [], "hyp": [3]}\n': "line 1: .*3 stands where a text belongs",
        '{"id": "a", "ref": ["a"]}\n': "line 1: .*hyp",
        "[]\n": "line 1: .*no JSON object",
    }.items():
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            read_system(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"results-dev\.jsonl: is not UTF-8"):
        read_system(file)


def test_missing_references_are_empty_ones(tmp_path: Path) -> None:
    file = tmp_path / "results-dev.jsonl"
    lines = [{"id": "a", "hyp": ["p"]}, {"id": "b", "ref": None, "hyp": []}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [result.ref for result in read_system(file).results] == [[], []]


def test_clips(tmp_path: Path) -> None:
    write_folder(tmp_path / "test", [0.5, 1.0, 0.5], per_shard=2)
    config = tmp_path / "data.yaml"
    config.write_text("test: {mine-test: test}\n", encoding="utf-8")
    wanted = [("mine-test", "utt-0001"), ("mine-test-odd-name", "utt-0002"), ("mine-test", "gone"), ("other", "x")]
    clips, notes = read_clips(config, wanted)
    assert list(clips) == [("mine-test", "utt-0001"), ("mine-test-odd-name", "utt-0002")]
    clip = clips["mine-test", "utt-0001"]
    assert clip.rate == 16_000 and clip.samples.shape == (16_000,)
    assert clip.flac == flac(tone(1.0, seed=1))
    assert np.abs(clip.samples - tone(1.0, seed=1)).max() < 1e-4
    assert any("mine-test, gone: not in" in note for note in notes)
    assert any("No audio of other, x: not in" in note for note in notes)
    assert list(read_clips(config, [("any name", "utt-0000")])[0]) == [("any name", "utt-0000")]
