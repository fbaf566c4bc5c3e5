"""Batches kept for inspection."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from small_models import random_batch
from zipformer_crctc import checkpoint
from zipformer_crctc.badbatches import MAX_FILES, report_infinite, save_bad_batches


def test_features_texts_and_ids_are_kept(tmp_path: Path) -> None:
    batches = [random_batch([30, 20], ["ab", "c"]), random_batch([25], ["d"])]
    path = save_bad_batches(tmp_path, 7, 1, batches)
    assert path == tmp_path / "bad-batch-7-1.pt"
    saved = checkpoint.load(path)
    assert saved["ids"] == ["utt0", "utt1", "utt0"]
    assert [batch["texts"] for batch in saved["batches"]] == [["ab", "c"], ["d"]]
    assert torch.equal(saved["batches"][0]["features"], batches[0].features)


def test_audio_is_kept_where_features_are_made_on_the_device(tmp_path: Path) -> None:
    batch = replace(random_batch([30], ["a"]), features=torch.zeros(1, 0, 80), mirrored=torch.randn(1, 5040))
    path = save_bad_batches(tmp_path, 1, 0, [batch])
    assert path is not None and batch.mirrored is not None
    (saved,) = checkpoint.load(path)["batches"]
    assert torch.equal(saved["mirrored"], batch.mirrored)


def test_modules_and_parameters_that_are_not_finite_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    report_infinite(model)
    with caplog.at_level(logging.WARNING):
        model(torch.ones(1, 2)).sum().backward()
        assert not caplog.text
        model(torch.tensor([[1.0, torch.inf]])).sum().backward()
    assert "the output of 0: 2 of 2 values are not finite" in caplog.text
    assert "the output of the model" in caplog.text and "the gradient of 0.weight" in caplog.text


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
