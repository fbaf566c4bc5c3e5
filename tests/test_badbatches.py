"""Batches kept for inspection."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from small_models import random_batch
from zipformer_crctc import checkpoint
from zipformer_crctc.badbatches import MAX_FILES, save_bad_batches


def test_features_texts_and_ids_are_kept(tmp_path: Path) -> None:
    batches = [random_batch([30, 20], ["ab", "c"]), random_batch([25], ["d"])]
    path = save_bad_batches(tmp_path, 7, 1, batches)
    assert path == tmp_path / "bad-batch-7-1.pt"
    saved = checkpoint.load(path)
    assert saved["ids"] == ["utt0", "utt1", "utt0"]
    assert [batch["texts"] for batch in saved["batches"]] == [["ab", "c"], ["d"]]
    assert torch.equal(saved["batches"][0]["features"], batches[0].features)


def test_files_are_bounded_and_a_full_disk_is_no_reason_to_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch = [random_batch([20], ["a"])]
    paths = [save_bad_batches(tmp_path, step, 0, batch) for step in range(MAX_FILES + 3)]
    assert [path is None for path in paths] == [False] * MAX_FILES + [True] * 3
    assert save_bad_batches(tmp_path, 1, 1, batch) is not None  # each rank has its own
    (tmp_path / "file").touch()
    with caplog.at_level(logging.WARNING):
        assert save_bad_batches(tmp_path / "file", 1, 0, batch) is None
    assert "utt0" in caplog.text and "could not be written" in caplog.text
