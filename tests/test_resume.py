"""Which checkpoint --resume auto takes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from zipformer_crctc import checkpoint
from zipformer_crctc.config import TrainConfig
from zipformer_crctc.resume import named_checkpoint, newest_checkpoint, set_aside

WEIGHT = torch.randn(50, generator=torch.Generator().manual_seed(0))


def write(folder: Path, name: str, batches: int) -> None:
    checkpoint.save(folder / name, {"batch_idx_train": batches, "model": {"weight": WEIGHT}})


def newest(folder: Path) -> str | None:
    found = newest_checkpoint(folder)
    return found[0].name if found is not None else None


def test_flags_name_a_file() -> None:
    assert named_checkpoint(TrainConfig()) is None
    assert named_checkpoint(TrainConfig(start_epoch=3)) == Path("zipformer/exp/epoch-2.pt")
    assert named_checkpoint(TrainConfig(start_epoch=3, start_batch=20)) == Path("zipformer/exp/checkpoint-20.pt")


def test_the_one_with_most_batches_is_taken(tmp_path: Path) -> None:
    assert newest(tmp_path / "nowhere") is None
    assert newest(tmp_path) is None
    write(tmp_path, "checkpoint-900.pt", 900)
    write(tmp_path, "checkpoint-1000.pt", 1000)
    write(tmp_path, "best-valid-loss.pt", 5000)
    write(tmp_path, "bad-model-0.pt", 6000)
    assert newest(tmp_path) == "checkpoint-1000.pt"
    write(tmp_path, "epoch-3.pt", 1000)
    assert newest(tmp_path) == "epoch-3.pt"
    write(tmp_path, "preempted.pt", 1017)
    assert newest(tmp_path) == "preempted.pt"
    write(tmp_path, "checkpoint-1100.pt", 1100)
    assert newest(tmp_path) == "checkpoint-1100.pt"


@pytest.mark.parametrize("damage", ["cut off", "empty", "a byte"])
def test_damaged_ones_are_named_and_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str) -> None:
    names = ("checkpoint-20.pt", "epoch-2.pt", "checkpoint-30.pt", "preempted.pt")
    for number, name in enumerate(names):
        write(tmp_path, name, 10 * number + 10)
    write(tmp_path, "checkpoint-20.pt", 20)
    for name in names[1:]:
        content = bytearray((tmp_path / name).read_bytes())
        if damage == "a byte":
            content[content.index(WEIGHT.numpy().tobytes()) + 100] ^= 1
        (tmp_path / name).write_bytes(
            {"cut off": bytes(content[:-200]), "empty": b"", "a byte": bytes(content)}[damage]
        )
    with caplog.at_level(logging.ERROR):
        assert newest(tmp_path) == "checkpoint-20.pt"
    assert all(name in caplog.text for name in names[1:])


def test_a_run_that_goes_back_sets_later_checkpoints_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, batches in (("checkpoint-10.pt", 10), ("checkpoint-20.pt", 20), ("epoch-2.pt", 25), ("preempted.pt", 27)):
        write(tmp_path, name, batches)
    write(tmp_path, "best-valid-loss.pt", 20)
    set_aside(tmp_path, 10)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "best-valid-loss.pt",
        "checkpoint-10.pt",
        "checkpoint-20.pt.undone",
        "epoch-2.pt.undone",
        "preempted.pt.undone",
    ]
    assert newest(tmp_path) == "checkpoint-10.pt" and "epoch-2.pt.undone" in caplog.text
