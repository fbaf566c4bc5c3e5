from __future__ import annotations

import logging
from pathlib import Path

import pytest

from local.prepare_lang import prepare as prepare_lang
from local.report_sets import report_all
from local.write_data_config import prepared_sets, write_default
from shar_folder import RATE, cut, flac, tone, write_folder, write_shard
from zipformer_crctc.dataconfig import (
    ALIGNABLE_ONLY,
    DataConfigError,
    DataSets,
    load_data_config,
    write_data_config,
)
from zipformer_crctc.filters import PSEUDO_LABEL_LIMITS, FilterLimits
from zipformer_crctc.tokenizer import PhoneTokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_written_and_read_again(tmp_path: Path) -> None:
    for name in ("corpus/train", "corpus/dev", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
    sets = DataSets(
        train=[tmp_path / "corpus/train"],
        dev={"a-dev": tmp_path / "corpus/dev"},
        unsup=[tmp_path / "elsewhere"],
        filters=ALIGNABLE_ONLY,
        unsup_filters=FilterLimits(min_tokens=2),
    )
    write_data_config(tmp_path / "corpus/data.yaml", sets, "a comment")
    text = (tmp_path / "corpus/data.yaml").read_text()
    assert text.startswith("# a comment\n")
    assert "- train\n" in text  # relative, so that the folder can be moved
    read = load_data_config(tmp_path / "corpus/data.yaml")
    assert (read.train, read.dev, read.test, read.unsup) == (sets.train, sets.dev, {}, sets.unsup)
    assert (read.filters, read.unsup_filters) == (sets.filters, sets.unsup_filters)
    (tmp_path / "corpus").rename(tmp_path / "moved")
    assert load_data_config(tmp_path / "moved/data.yaml").train == [tmp_path / "moved/train"]


def test_weights(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    text = "train: [a, {folder: b, weight: 2.5}]\nunsup: {folder: c, weight: 3}\n"
    sets = load_data_config(write(tmp_path / "data.yaml", text))
    assert sets.train == [tmp_path / "a", tmp_path / "b"] and sets.unsup == [tmp_path / "c"]
    assert sets.weights == {tmp_path / "b": 2.5, tmp_path / "c": 3.0}
    write_data_config(tmp_path / "again.yaml", sets)
    assert load_data_config(tmp_path / "again.yaml").weights == sets.weights
    wrong = "train: [{folder: a, weight: 0}, {folder: b}, {folder: c, weight: true}]\n"
    with pytest.raises(DataConfigError, match=r"(?s)weight 0 is no.*two keys.*weight True is no"):
        load_data_config(write(tmp_path / "wrong.yaml", wrong))


def test_limits_that_are_not_given_are_the_published_ones(tmp_path: Path) -> None:
    sets = load_data_config(write(tmp_path / "a.yaml", "filters: {min_duration: 0.5}\n"))
    assert sets.filters == FilterLimits(min_duration=0.5)
    assert sets.unsup_filters == PSEUDO_LABEL_LIMITS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty or no table"),
        ("- a\n", "is empty or no table"),
        ("train: [\n", "is not valid YAML"),
        ("trian: [train]\n", "unknown key 'trian' .known: train, dev, test, unsup"),
        ("train: [absent]\n", "train: folder .*absent does not exist: make it with ./prepare.sh"),
        ("train: 3\n", "train: 3 is no list of folders"),
        ("train: [3]\n", "train: 3 is no folder name"),
        ("dev: [dev]\n", "dev: .* is no table of name: folder"),
        ("dev: {a b: train}\n", "'a b' cannot name a set"),
        ("train: [train]\ntest: {a: ./train}\n", "test: a: folder .* is trained on as well"),
        ("filters: {min_length: 1}\n", "filters: unknown 'min_length' .known: min_duration"),
        ("filters: {min_duration: long}\n", "filters: min_duration is 'long', expected a number or null"),
        ("filters: {min_tokens: null}\n", "filters: min_tokens is None, expected a number"),
        ("unsup_filters: {frame_share: 2}\n", "unsup_filters: frame_share: 2"),
        ("filters: 3\n", "filters: 3 is no table"),
    ],
)
def test_each_problem_has_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(DataConfigError, match=message) as caught:
        load_data_config(write(tmp_path / "a.yaml", text))
    assert str(tmp_path / "a.yaml") in str(caught.value)


def test_all_problems_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataConfigError, match=r"(?s)unknown key 'a'.*folder .*b does not exist.*filters: 1"):
        load_data_config(write(tmp_path / "a.yaml", "a: 1\ntrain: b\nfilters: 1\n"))


def test_missing_file_and_missing_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataConfigError, match=r"data/shar\.yaml does not exist: make it with \./prepare\.sh"):
        load_data_config()
    sets = load_data_config(write(tmp_path / "a.yaml", "train: []\n"))
    with pytest.raises(DataConfigError, match=r"a\.yaml: no folder under train, dev"):
        sets.require("train", "dev")


def test_only_folders_with_shards_are_listed(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0])
    (tmp_path / "dev").mkdir()
    sets = prepared_sets("mine", tmp_path, FilterLimits())
    assert (sets.train, sets.dev, sets.test) == ([tmp_path / "train"], {}, {})
    with pytest.raises(ValueError, match="no shards in train, dev or test"):
        prepared_sets("mine", tmp_path / "dev", FilterLimits())


def test_the_default_place_keeps_another_config(tmp_path: Path) -> None:
    default = tmp_path / "shar.yaml"
    for corpus in ("first", "second"):
        (tmp_path / corpus / "train").mkdir(parents=True)
        write_data_config(tmp_path / corpus / "data.yaml", DataSets(train=[tmp_path / corpus / "train"]))

    def trained() -> str:
        return load_data_config(default).train[0].parent.name

    write_default(tmp_path / "first/data.yaml", default, replace=False)
    write_default(tmp_path / "second/data.yaml", default, replace=False)
    assert trained() == "first"
    write_default(tmp_path / "second/data.yaml", default, replace=True)
    assert trained() == "second"
    (tmp_path / "second/train").rmdir()  # what it lists is gone, so it is worth nothing
    write_default(tmp_path / "first/data.yaml", default, replace=False)
    assert trained() == "first"
    own = write(default, "# mine\ntrain: [gone]\n").read_text()
    write_default(tmp_path / "first/data.yaml", default, replace=False)
    assert default.read_text() == own


def test_tokenizer_files(tmp_path: Path) -> None:
    prepare_lang(None, tmp_path / "lang")
    assert PhoneTokenizer.from_model(tmp_path / "lang/unigram.model").vocab_size == 127
    lines = (tmp_path / "lang/tokens.txt").read_text(encoding="utf-8").splitlines()
    assert lines[:5] == ["<blk> 0", "<sos/eos> 1", "<unk> 2", "▁ 3", "a 4"]
    assert len(lines) == 127


def test_report_counts_every_filter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [("short", 0.5, "papapa"), ("few", 2.0, "pa"), ("dense", 1.0, "papa" * 20), ("good", 2.0, "pa人pa pa")]
    for split in ("train", "dev"):
        cuts = [cut(f"{split}-{name}", round(seconds * RATE), text, language="xx") for name, seconds, text in texts]
        audio = [(f"{split}-{name}.flac", flac(tone(seconds))) for name, seconds, _ in texts]
        write_shard(tmp_path / split, 0, cuts, audio)
    write(tmp_path / "data.yaml", "train: [train]\ndev: {mine: dev}\n")
    with caplog.at_level(logging.INFO):
        report_all(load_data_config(tmp_path / "data.yaml"), PhoneTokenizer.from_table())
    log = caplog.text
    assert "train: 4 cuts, 0.00 h; xx 4" in log
    assert "filters keep 1 cuts" in log
    for name, reason in (
        ("short", "shorter than 1 s"),
        ("few", "fewer than 5 tokens"),
        ("dense", "more than 0.9 tokens"),
    ):
        assert any(f"1 left out: {reason}" in line and f"train-{name}" in line for line in log.splitlines())
    assert "dev mine: 4 cuts" in log
    assert "dev mine: 1 cannot be recognised in full, though they are scored" in log
    assert "dev-dense" in log
    assert "人" in log


def test_report_refuses_an_empty_training_set(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [0.5, 0.5])
    config = write(tmp_path / "data.yaml", "train: [train]\n")
    with pytest.raises(ValueError, match="nothing is left of train after the filters"):
        report_all(load_data_config(config), PhoneTokenizer.from_table())
    write(config, "train: [train]\nfilters: {min_duration: null, min_tokens: 1}\n")
    report_all(load_data_config(config), PhoneTokenizer.from_table())
