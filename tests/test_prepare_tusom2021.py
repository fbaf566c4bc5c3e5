from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import soundfile

from local.prepare_tusom2021 import prepare, read_split
from zipformer_crctc.shar import find_shards, read_shard

COPY = Path(__file__).parents[2] / "shared/data/tusom2021"


def make_repository(folder: Path) -> Path:
    (folder / "data/wav").mkdir(parents=True)
    for name in ("animals1-1", "verb-2", "verb-3"):
        soundfile.write(folder / f"data/wav/{name}.wav", 0.1 * np.ones(22_050), 22_050)
    (folder / "data/train.yml").write_text(
        "animals1-1.wav:\n  gloss: goat\n  no_tones: ʔu t͡ɕʰi\nverb-2.wav:\n  gloss: run\nverb-4.wav:\n  no_tones: ta\n",
        encoding="utf-8",
    )
    (folder / "data/dev.yml").write_text("verb-3.wav:\n  no_tones: nã\n", encoding="utf-8")
    return folder


def test_a_small_copy(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        stats = prepare(make_repository(tmp_path / "source"), tmp_path / "out")
    assert [(split.split, split.cuts) for split in stats] == [("train", 1), ("dev", 1)]
    (shard,) = find_shards(tmp_path / "out/train")
    (utterance,) = read_shard(shard)
    assert (utterance.id, utterance.text) == ("tusom2021-train-animals1-1", "ʔu tɕʰi")
    assert (utterance.language, utterance.speaker, utterance.num_samples) == ("tusom", "tusom2021", 16_000)
    assert "test.yml does not exist: this split is left out" in caplog.text
    skipped = (tmp_path / "out/skipped.tsv").read_text(encoding="utf-8")
    assert "no field no_tones" in skipped
    assert "no such file" in skipped


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no copy of the tusom2021 repository"):
        prepare(tmp_path, tmp_path / "out")
    source = make_repository(tmp_path / "source")
    (source / "data/dev.yml").write_text("- a list\n")
    with pytest.raises(ValueError, match=r"dev\.yml is no table"):
        prepare(source, tmp_path / "out")
    (source / "data/dev.yml").write_text("a: [\n")
    with pytest.raises(ValueError, match=r"dev\.yml is not valid YAML"):
        prepare(source, tmp_path / "out")


@pytest.mark.parametrize(("split", "count"), [("train", 1578), ("dev", 230)])
def test_the_published_copy(split: str, count: int) -> None:
    if not COPY.is_dir():
        pytest.skip(f"no copy of tusom2021 in {COPY}")
    rows, skipped = read_split(COPY / "data", split)
    assert (len(rows), len({row.id for row in rows}), skipped) == (count, count, [])
    assert all(row.audio.is_file() and row.text for row in rows)
