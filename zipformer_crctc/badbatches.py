"""What was not finite: batches saved for inspection, and where in the model it came from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_crctc import checkpoint
from zipformer_crctc.loader import Batch

logger = logging.getLogger(__name__)

MAX_FILES = 10
"""Files of one process in a folder; later batches are named in the log only."""


def save_bad_batches(folder: Path, step: int, rank: int, batches: Sequence[Batch]) -> Path | None:
    """Write the batches of a step to bad-batch-STEP-RANK.pt and name their utterances in the log.

    Of batches whose features are made on the device the audio is written, see ``Batch.mirrored``.

    Returns the file, or None where there are MAX_FILES already, or the disk is full.
    """
    ids = [utterance.id for batch in batches for utterance in batch.utterances]
    path: Path | None = folder / f"bad-batch-{step}-{rank}.pt"
    assert path is not None
    if len(list(folder.glob(f"bad-batch-*-{rank}.pt"))) >= MAX_FILES:
        path = None
    else:
        saved = [
            {"features": b.features, "mirrored": b.mirrored, "num_frames": b.num_frames, "texts": b.texts}
            for b in batches
        ]
        try:
            checkpoint.save(path, {"batches": saved, "ids": ids})
        except checkpoint.SaveError as error:
            logger.error("%s", error)
            path = None
    logger.warning("batch %d, rank %d, saved to %s: utterances %s", step, rank, path or "no file", ids)
    return path


def report_infinite(model: nn.Module) -> None:
    """From now on, log each module whose output and each parameter whose gradient is not finite. Every check waits."""
    for name, module in model.named_modules():
        module.register_forward_hook(partial(_check_output, f"the output of {name or 'the model'}"))
    for name, parameter in model.named_parameters():
        parameter.register_hook(partial(_check, f"the gradient of {name}"))


def _check_output(what: str, module: nn.Module, args: Any, output: Any) -> None:
    for part in output if isinstance(output, tuple | list) else (output,):
        if isinstance(part, Tensor) and part.is_floating_point():
            _check(what, part)


def _check(what: str, values: Tensor) -> None:
    if count := int(values.numel() - torch.isfinite(values).sum()):
        logger.warning("%s: %d of %d values are not finite", what, count, values.numel())
