"""Decoding with checkpoints of several kinds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from local import train_phone_lm
from shar_folder import write_folder
from tiny_run import train_flags, write_corpus
from zipformer_crctc import checkpoint, decode, train
from zipformer_crctc.config import DecodeConfig, ModelConfig
from zipformer_crctc.methods import search_suffix
from zipformer_crctc.model import build_model
from zipformer_crctc.results import read_json_lines
from zipformer_crctc.tokenizer import PhoneTokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Data config and folder of a run of a few batches."""
    folder = tmp_path_factory.mktemp("decode")
    corpus = write_corpus(folder / "corpus")
    train.main(train_flags(corpus, folder / "run"))
    return corpus, folder / "run"


def flags(data_config: Path, exp_dir: Path, *more: Any) -> list[str]:
    base = ("--data-config", data_config, "--exp-dir", exp_dir, "--num-workers", 0, "--max-duration", 10, *more)
    return [str(part) for part in (*base, "--device", "cpu")]


def test_it_writes_all_files_and_prints_a_table(trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    corpus, run = trained
    decode.main(flags(corpus, run, "--iter", 6, "--avg", 1))
    suffix = "tones-test-iter-6-avg-1-use-averaged-model"
    folder = run / "ctc-greedy-search"
    for name in (f"recogs-{suffix}.txt", f"errs-{suffix}.txt", f"wer-summary-{suffix}.txt", f"summary-{suffix}.md"):
        assert (folder / name).is_file(), name
    results = read_json_lines(folder / f"results-{suffix}.jsonl")
    assert [result.id for result in results] == ["test-0000", "test-0001", "test-0002"]
    assert all(result.ref == ["a", "b", "a"] for result in results)
    printed = capsys.readouterr().out
    assert "PER %" in printed and "PFER" in printed and "xx" in printed


def test_times_go_to_all_formats(trained: tuple[Path, Path]) -> None:
    corpus, run = trained
    decode.main(flags(corpus, run, "--iter", 6, "--avg", 1, "--output-formats", "jsonl,ctm,textgrid"))
    suffix = "tones-test-iter-6-avg-1-use-averaged-model"
    folder = run / "ctc-greedy-search"
    assert (folder / f"ctm-{suffix}.ctm").is_file()
    assert len(list((folder / f"textgrid-{suffix}").glob("*.TextGrid"))) == 3
    for result in read_json_lines(folder / f"results-{suffix}.jsonl"):
        assert result.duration is not None
        assert len(result.starts) == len(result.ends) == len(result.confidence) == len(result.hyp)


def test_sets_by_name_kind_and_folder(trained: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, _ = trained
    write_folder(tmp_path / "other" / "dev", [1.0])
    chosen = decode.choose_test_sets(("dev", "tones-test", str(tmp_path / "other" / "dev")), corpus)
    assert list(chosen) == ["tones-dev", "tones-test", "other-dev"]
    assert list(decode.choose_test_sets((), corpus)) == ["tones-test"]
    with pytest.raises(ValueError, match="tones-dev, tones-test"):
        decode.choose_test_sets(("nonsense",), corpus)


def test_two_folders_of_one_name_are_refused(tmp_path: Path) -> None:
    one, two, other = (str(tmp_path / name) for name in ("a/swa/test", "b/swa/test", "b/swh/test"))
    assert list(decode.choose_test_sets((one, other, one), tmp_path)) == ["swa-test", "swh-test"]
    with pytest.raises(ValueError, match=r"b/swa/test: is named swa-test like .*a/swa/test"):
        decode.choose_test_sets((one, two), tmp_path)


def test_every_utterance_is_decoded_once_whatever_the_workers(trained: tuple[Path, Path]) -> None:
    corpus, run = trained
    decode.main([*flags(corpus, run, "--iter", 6, "--avg", 1, "--test-sets", "dev"), "--num-workers", "2"])
    results = read_json_lines(next((run / "ctc-greedy-search").glob("results-tones-dev*.jsonl")))
    assert [result.id for result in results] == ["dev-0000", "dev-0001"]


def published_small(folder: Path) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(ModelConfig(), 127).state_dict()


def test_published_checkpoints_load_by_flags_and_by_tensors(trained: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, _ = trained
    state = published_small(tmp_path)
    torch.save(state, tmp_path / "averaged.pth")
    raw = {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "exp_dir": Path("zipformer/exp")}
    raw |= {"encoder_dim": "192,256,384,512,384,256", "batch_idx_train": 8, "average_period": 4, "sampler": None}
    torch.save(raw | {"model_avg": state}, tmp_path / "checkpoint-8.pt")
    torch.save(raw | {"model_avg": state, "batch_idx_train": 4}, tmp_path / "checkpoint-4.pt")
    decode.main(flags(corpus, tmp_path, "--checkpoint", tmp_path / "averaged.pth"))
    decode.main(flags(corpus, tmp_path, "--iter", 8, "--avg", 1, "--num-heads", "4,4,4,8,4,4"))
    folder = tmp_path / "ctc-greedy-search"
    bare = (folder / "results-tones-test-averaged.jsonl").read_text()
    nested = (folder / "results-tones-test-iter-8-avg-1-use-averaged-model.jsonl").read_text()
    assert [json.loads(line)["hyp"] for line in bare.splitlines()] == [
        json.loads(line)["hyp"] for line in nested.splitlines()
    ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--iter", 6, "--avg", 9), "--avg 9"),
        (("--iter", 6, "--avg", 1, "--encoder-dim", "64"), "--encoder-dim"),
        (("--checkpoint", "nowhere.pt"), "nowhere.pt"),
        (("--iter", 6, "--avg", 1, "--output-formats", "vtt"), "--output-formats vtt"),
        (("--iter", 6, "--avg", 1, "--time-correction", "nowhere.json"), "nowhere.json"),
        (("--iter", 6, "--avg", 1, "--test-sets", "nonsense"), "nonsense"),
        (("--iter", 6, "--avg", 1, "--decoding-method", "nbest"), "--decoding-method"),
    ],
)
def test_bad_input_ends_with_one_message(
    trained: tuple[Path, Path], capsys: pytest.CaptureFixture[str], more: tuple[Any, ...], words: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        decode.main(flags(*trained, *more))
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_of_another_vocabulary_is_refused(trained: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, run = trained
    payload = checkpoint.load(run / "checkpoint-6.pt")
    payload["model"] = {
        name: tensor[:50] if name.startswith("ctc_output") else tensor for name, tensor in payload["model"].items()
    }
    payload["model_avg"] = None
    checkpoint.save(tmp_path / "cut.pt", payload)
    with pytest.raises(SystemExit):
        decode.main(flags(corpus, run, "--checkpoint", tmp_path / "cut.pt"))


def test_beam_search_with_everything(trained: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, run = trained
    tokenizer = PhoneTokenizer.from_table()
    train_phone_lm.train(corpus, tmp_path / "lm.arpa", tokenizer, order=2)
    (tmp_path / "few.txt").write_text("a b\n", encoding="utf-8")
    base = (*("--iter", 6, "--avg", 1, "--decoding-method", "ctc-prefix-beam-search"), "--blank-penalty", 3)
    more = ("--lm", tmp_path / "lm.arpa", "--lm-weight", 0.3, "--insertion-bonus", 2, "--nbest", 3, "--beam", 8)
    decode.main(flags(corpus, run, *base, *more, "--inventory", tmp_path / "few.txt"))
    folder = run / "ctc-prefix-beam-search"
    suffix = "iter-6-avg-1-use-averaged-model-beam-8-lm-lm-0.3-insertion-bonus-2-inventory-few-blank-penalty-3"
    results = read_json_lines(folder / f"results-tones-test-{suffix}.jsonl")
    assert len(results) == 3
    for result in results:
        assert 1 < len(result.nbest) <= 3
        assert result.nbest[0]["hyp"] == result.hyp and result.nbest[0]["score"] == result.score
        assert result.nbest[0]["times"] == result.times and len(result.times) == len(result.hyp)
        scores = [entry["score"] for entry in result.nbest]
        assert scores == sorted(scores, reverse=True) and scores[0] != result.nbest[0]["acoustic"]
        assert {phone for entry in result.nbest for phone in entry["hyp"]} <= {"a", "b"}
    assert any(result.hyp for result in results)
    config = json.loads((folder / f"config-tones-test-{suffix}.json").read_text())
    assert config["decode"]["lm_weight"] == 0.3 and config["decode"]["beam"] == 8


def test_blank_penalty_and_inventory_in_greedy_search(trained: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, run = trained
    (tmp_path / "few.txt").write_text("s u", encoding="utf-8")
    base = ("--iter", 6, "--avg", 1, "--inventory", tmp_path / "few.txt", "--blank-penalty", 20)
    decode.main(flags(corpus, run, *base))
    suffix = "iter-6-avg-1-use-averaged-model-inventory-few-blank-penalty-20"
    results = read_json_lines(run / "ctc-greedy-search" / f"results-tones-test-{suffix}.jsonl")
    assert {phone for result in results for phone in result.hyp} <= {"s", "u"}
    assert any(result.hyp for result in results)
    assert all(result.nbest == [] for result in results)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [("--inventory", "a PH", "PH (line 1)"), ("--lm", "\\data\\\nngram 1=1\n", "the file is cut")],
)
def test_files_of_the_search_that_cannot_be_used(
    trained: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    text: str,
    words: str,
) -> None:
    (tmp_path / "file").write_text(text, encoding="utf-8")
    more = ("--iter", 6, "--avg", 1, "--decoding-method", "ctc-prefix-beam-search", name, tmp_path / "file")
    with pytest.raises(SystemExit) as stopped:
        decode.main(flags(*trained, *more))
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_search_suffixes_tell_runs_apart() -> None:
    beam = DecodeConfig(decoding_method="ctc-prefix-beam-search")
    assert search_suffix(DecodeConfig()) == ""
    assert search_suffix(beam) == "-beam-16"
    variants: list[dict[str, Any]] = [
        *({"beam": 4}, {"lm": Path("x/a.arpa.gz")}, {"lm": Path("b.arpa")}, {"lm": Path("b.arpa"), "lm_weight": 0.1}),
        *({"insertion_bonus": 1.0}, {"insertion_bonus": -1.0}, {"top_tokens": 9}, {"blank_skip": 0.99}),
        *({"inventory": Path("swa.txt")}, {"inventory": Path("phones.swa.txt")}, {"inventory": Path("phones.deu.txt")}),
        *({"blank_penalty": 0.5}, {"lm": Path("c.3gram.arpa.gz")}, {"lm": Path("c.4gram.arpa")}),
    ]
    suffixes = [search_suffix(replace(beam, **values)) for values in variants]
    assert len(set(suffixes)) == len(variants)
    assert "-lm-a-0.3" in suffixes[1] and suffixes[-2].endswith("-lm-c.3gram-0.3")
