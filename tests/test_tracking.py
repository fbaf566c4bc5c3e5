"""metrics.jsonl of runs that were stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zipformer_crctc.config import TrainConfig
from zipformer_crctc.tracking import MetricsWriter


def writer(folder: Path, resumed_at: int = 0) -> MetricsWriter:
    return MetricsWriter(TrainConfig(exp_dir=folder, tensorboard=False), True, {}, resumed_at)


def test_a_run_that_goes_on_takes_later_records_and_broken_lines_back(tmp_path: Path) -> None:
    first = writer(tmp_path)
    for step in (1, 2, 3):
        first.write("train", step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    second = writer(tmp_path, resumed_at=2)
    second.write("train", 3, {"loss": 30.0})
    second.close()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_records_that_cannot_be_taken_back_are_reported_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = writer(tmp_path)
    first.write("train", 1, {"loss": 1.0})
    first.close()
    (tmp_path / ".metrics.jsonl.tmp").mkdir()  # as good as a full disk
    second = writer(tmp_path, resumed_at=1)
    second.write("train", 2, {"loss": 2.0})
    second.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert "numbers of batches after 1 stay in it" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_reported_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    full = writer(tmp_path)
    full.write("train", 7, {"loss": 1.0})
    full.close()
    assert "batch 7 could not be written" in caplog.text
