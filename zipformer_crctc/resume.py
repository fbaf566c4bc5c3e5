"""Which checkpoint a run goes on from."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from zipformer_crctc import checkpoint
from zipformer_crctc.config import TrainConfig

logger = logging.getLogger(__name__)

PREEMPTED = "preempted.pt"
"""Name of the checkpoint that a run saves when it is asked to end; there is one at most."""


def named_checkpoint(train: TrainConfig) -> Path | None:
    """The file that --start-batch or --start-epoch names, if any."""
    if train.start_batch > 0:
        return train.exp_dir / f"checkpoint-{train.start_batch}.pt"
    return train.exp_dir / f"epoch-{train.start_epoch - 1}.pt" if train.start_epoch > 1 else None


def newest_checkpoint(exp_dir: Path) -> tuple[Path, dict[str, Any]] | None:
    """The loadable checkpoint of a folder with most batches, and its content; None where there is none.

    Files that cannot be loaded are named in the log, and the one before is taken.
    """
    for path in _most_batches_first(exp_dir):
        try:
            checkpoint.verify(path)
            return path, checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            logger.error("%s. The checkpoint before it is taken", error)
    return None


def set_aside(exp_dir: Path, batch: int) -> None:
    """Rename the checkpoints after more than ``batch`` batches to *.undone.

    For a run that goes back by name: pruning, averaging and --resume auto would else take them for its own.
    """
    for count, path in _by_batches(exp_dir):
        if count > batch:
            path.replace(path.with_name(f"{path.name}.undone"))
            logger.warning("%s: of a run that batch %d undoes, renamed to %s.undone", path, batch, path.name)


def _most_batches_first(exp_dir: Path) -> list[Path]:
    # With as many batches, the file of an epoch is the later one.
    found = sorted(_by_batches(exp_dir), key=lambda item: (item[0], item[1].name.startswith("epoch")))
    return [path for _, path in found[::-1]]


def _by_batches(exp_dir: Path) -> list[tuple[int, Path]]:
    """All checkpoints that a run can go on from, each with its number of batches."""
    found = checkpoint.find_checkpoints(exp_dir)
    others = [path for path in exp_dir.glob("epoch-*.pt") if re.fullmatch(r"epoch-\d+\.pt", path.name)]
    for path in [*others, exp_dir / PREEMPTED]:
        try:
            if path.is_file():
                found.append((int(checkpoint.load(path, mmap=True)["batch_idx_train"]), path))
        except (checkpoint.CheckpointError, KeyError) as error:
            logger.error("%s tells no number of batches, so it is passed over: %s", path, error)
    return found
