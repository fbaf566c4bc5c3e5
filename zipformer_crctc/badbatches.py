"""Batches whose loss or gradient was not finite, saved for inspection."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from zipformer_crctc import checkpoint
from zipformer_crctc.loader import Batch

logger = logging.getLogger(__name__)

MAX_FILES = 10
"""Files of one process in a folder; later batches are named in the log only."""


def save_bad_batches(folder: Path, step: int, rank: int, batches: Sequence[Batch]) -> Path | None:
    """Write the batches of a step to bad-batch-STEP-RANK.pt and name their utterances in the log.

    Returns the file, or None where there are MAX_FILES already, or the disk is full.
    """
    ids = [utterance.id for batch in batches for utterance in batch.utterances]
    path: Path | None = folder / f"bad-batch-{step}-{rank}.pt"
    assert path is not None
    if len(list(folder.glob(f"bad-batch-*-{rank}.pt"))) >= MAX_FILES:
        path = None
    else:
        saved = [{"features": b.features, "num_frames": b.num_frames, "texts": b.texts} for b in batches]
        try:
            checkpoint.save(path, {"batches": saved, "ids": ids})
        except checkpoint.SaveError as error:
            logger.error("%s", error)
            path = None
    logger.warning("batch %d, rank %d, saved to %s: utterances %s", step, rank, path or "no file", ids)
    return path
