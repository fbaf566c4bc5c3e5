"""Where a model's weights come from."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from random_checkpoint import write_checkpoint
from small_models import random_batch
from zipformer_crctc import checkpoint, pretrained
from zipformer_crctc.checkpoint import CheckpointError
from zipformer_crctc.pretrained import find_weights
from zipformer_crctc.recogniser import build_recogniser
from zipformer_crctc.tokenizer import PhoneTokenizer

NAME = "ctc_output.1.bias"


def filled(path: Path, value: float, **others: Any) -> Path:
    """A checkpoint whose last bias is `value` everywhere."""
    write_checkpoint(path)
    payload = checkpoint.load(path)
    payload["model"][NAME].fill_(value)
    checkpoint.save(path, {**payload, **others})
    return path


def bias(*args: Any, **kwargs: Any) -> float:
    values = find_weights(*args, **kwargs).state[NAME]
    assert float(values.min()) == float(values.max())
    return float(values[0])


def running_average(value: float, batches: int) -> dict[str, Any]:
    average = {name: tensor.double() for name, tensor in filled_state(value).items()}
    return {"model_avg": average, "batch_idx_train": batches, "average_period": 10}


def filled_state(value: float) -> dict[str, torch.Tensor]:
    return {NAME: torch.full((127,), value)}


def test_a_folder_of_raw_checkpoints_is_averaged(tmp_path: Path) -> None:
    """Published ones hold no running average once they are stripped."""
    for number, value in ((100, 1.0), (200, 2.0), (1000, 4.0)):
        filled(tmp_path / f"checkpoint-{number}.pt", value)
    assert bias(tmp_path) == 4.0
    assert bias(tmp_path, avg=2) == 3.0
    assert bias(tmp_path, avg=2, iter=200) == 1.5
    assert bias(tmp_path / "checkpoint-100.pt") == 1.0
    with pytest.raises(CheckpointError, match="needs 4 files"):
        find_weights(tmp_path, avg=4)


def test_running_averages_are_used_where_they_are(tmp_path: Path) -> None:
    filled(tmp_path / "checkpoint-100.pt", 1.0, **running_average(6.0, 100))
    assert bias(tmp_path) == bias(tmp_path / "checkpoint-100.pt") == 6.0
    assert bias(tmp_path, use_averaged_model=False) == 1.0
    filled(tmp_path / "checkpoint-200.pt", 2.0, **running_average(7.0, 200))
    assert bias(tmp_path) == pytest.approx(8.0)  # the mean over batches 100 to 200


def test_a_folder_with_one_averaged_file(tmp_path: Path) -> None:
    state = checkpoint.load(write_checkpoint(tmp_path / "model.pt"))["model"]
    (tmp_path / "model.pt").unlink()
    torch.save(state, tmp_path / "averaged.pth")  # a bare state dict, as published
    weights = find_weights(tmp_path)
    assert weights.tokenizer is None and weights.config.encoder_dim == (24, 32, 32, 40, 32, 32)
    torch.save(state, tmp_path / "another.pth")
    with pytest.raises(CheckpointError, match=r"another.pth, averaged.pth; name one file"):
        find_weights(tmp_path)


@pytest.mark.parametrize("tokens", ["tokenizer.model", "tokens.txt"])
@pytest.mark.parametrize("for_transformers", [False, True])
def test_an_exported_folder(tmp_path: Path, tokens: str, for_transformers: bool) -> None:
    """Also as save_pretrained.py writes it: another prefix, and the sizes in a field of their own."""
    prefix = "model." if for_transformers else ""
    payload = checkpoint.load(write_checkpoint(tmp_path / "model.pt"))
    folder = tmp_path / "exported"
    folder.mkdir()
    save_file(
        {prefix + name: tensor.contiguous() for name, tensor in payload["model"].items()}, folder / "model.safetensors"
    )
    sizes = payload["config"]["model"]
    config = {
        "model_type": "zipformer-crctc",
        "architectures": ["X"],
        **({"sizes": sizes} if for_transformers else sizes),
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = PhoneTokenizer.from_bytes(payload["tokenizer"])
    if tokens == "tokens.txt":
        (folder / tokens).write_text("".join(f"{piece} {i}\n" for i, piece in enumerate(tokenizer.pieces)))
    else:
        (folder / tokens).write_bytes(payload["tokenizer"])
    ours, exported = (
        build_recogniser(find_weights(path), {}, device="cpu") for path in (tmp_path / "model.pt", folder)
    )
    assert exported.config == ours.config and exported.tokenizer.pieces == ours.tokenizer.pieces
    assert all(torch.equal(a, b) for a, b in zip(ours.model.parameters(), exported.model.parameters(), strict=True))
    rounded = build_recogniser(find_weights(folder), {}, device="cpu", precision="bf16")
    batch = random_batch([40, 31], ["", ""])
    with torch.inference_mode():
        (near, _), (want, lengths) = rounded.log_probs(batch), ours.log_probs(batch)
    assert near.dtype == torch.float32 and near.shape == want.shape and len(lengths) == 2
    assert 0.0 < float((near - want).abs().max()) < 0.1
    with torch.inference_mode():
        same, _ = build_recogniser(find_weights(folder), {}, device="cpu", precision="auto").log_probs(batch)
    assert torch.equal(same, want)
    with pytest.raises(ValueError, match="precision half: must be auto or fp32"):
        build_recogniser(find_weights(folder), {}, device="cpu", precision="half")
    for text in ("[", "[]", '{"sizes": 1}'):
        (folder / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json: cannot be read"):
            find_weights(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        find_weights(folder)


def test_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the hub's client, which is not there when this is tested, nor is the network."""
    filled(tmp_path / "model.pt", 3.0)

    def download(repository: str, file: str) -> str:
        assert (repository, file) == ("someone/zipa", "exp/model.pt")
        return str(tmp_path / "model.pt")

    def snapshot(repository: str, allow_patterns: list[str]) -> str:
        if repository == "someone/offline":
            raise OSError("no network\ndetails")
        return str(tmp_path)

    hub = SimpleNamespace(hf_hub_download=download, snapshot_download=snapshot)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert bias("someone/zipa/exp/model.pt") == 3.0
    with pytest.raises(CheckpointError, match=r"has no model.safetensors; name one of its checkpoints"):
        find_weights("someone/zipa")
    with pytest.raises(CheckpointError, match=r"cannot be had from the Hugging Face Hub \(no network\)"):
        find_weights("someone/offline")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"pip install 'zipformer-crctc\[hf\]'"):
        find_weights("someone/zipa")
    with pytest.raises(CheckpointError, match="no such file or folder; name a checkpoint"):
        find_weights("absent")
    assert pretrained.NEWEST > 10**9


def test_tokens_that_are_no_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "tokens.txt"
    for text in ("<blk> 0\na b c\n", "<blk> 0\n<unk> 1\na 2\nb 3\nc 4\n", ""):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"tokens.txt"):
            PhoneTokenizer.from_tokens(path)
