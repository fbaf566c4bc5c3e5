"""Cells of the tables in tests/faults, which are run as a whole by hand."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "faults"))

import fault_table
import resume_matrix

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return resume_matrix.write_data(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", ["one rank", "two ranks, mixed"])
def test_a_killed_run_goes_on_to_the_bit(data: Path, tmp_path: Path, name: str) -> None:
    (case,) = (case for case in resume_matrix.CASES if case.name == name)
    row = resume_matrix.check(case, data, tmp_path, steps=10, num_stops=1, number=signal.SIGKILL, seed=0)
    assert row[-1] == "equal", row


@pytest.mark.parametrize("what", ["SIGTERM to a process and its loader workers"])
def test_a_fault(data: Path, tmp_path: Path, what: str) -> None:
    good, did = dict(fault_table.DAMAGES)[what](data, tmp_path / "run")
    assert good, did
