"""Freed memory is kept until it is asked to go back."""

from __future__ import annotations

import os
import platform
import resource
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

GAPS = """
import torch
from pathlib import Path
from zipformer_crctc.memory import keep_freed_memory, return_freed_memory
keep_freed_memory()
pages = lambda: int(Path("/proc/self/statm").read_text().split()[1])
arrays = [torch.ones(500_000) for _ in range(200)]
arrays = arrays[::10]
before = pages()
return_freed_memory()
print(before - pages())
"""

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def printed(program: str) -> int:
    """The number that a program prints, which runs with pages of the usual size."""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def test_gaps_between_arrays_go_back_when_asked() -> None:
    returned = printed(GAPS)
    assert returned * resource.getpagesize() > 150 * 500_000 * 4


def test_arrays_come_back_without_new_pages() -> None:
    assert printed(PROGRAM.format(keep=True)) <= printed(PROGRAM.format(keep=False)) // 10
