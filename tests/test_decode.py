"""Decoding with checkpoints of several kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shar_folder import write_folder
from tiny_run import train_flags, write_corpus
from zipformer_crctc import checkpoint, decode, train
from zipformer_crctc.config import ModelConfig
from zipformer_crctc.model import build_model
from zipformer_crctc.results import read_json_lines


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


def test_sets_by_name_kind_and_folder(trained: tuple[Path, Path], tmp_path: Path) -> None:
    corpus, _ = trained
    write_folder(tmp_path / "other" / "dev", [1.0])
    chosen = decode.choose_test_sets(("dev", "tones-test", str(tmp_path / "other" / "dev")), corpus)
    assert list(chosen) == ["tones-dev", "tones-test", "other-dev"]
    assert list(decode.choose_test_sets((), corpus)) == ["tones-test"]
    with pytest.raises(ValueError, match="tones-dev, tones-test"):
        decode.choose_test_sets(("nonsense",), corpus)


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
