"""Freed memory is kept."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from zipformer_crctc.memory import keep_freed_memory
if {keep}: keep_freed_memory()
for _ in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [torch.ones(5_000_000) for _ in range(8)]
    del arrays
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_arrays_come_back_without_new_pages() -> None:
    def faults(keep: bool) -> int:
        command = [sys.executable, "-c", PROGRAM.format(keep=keep)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert faults(keep=True) <= faults(keep=False) // 10
