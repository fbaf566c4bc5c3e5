"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from zipformer_crctc.preemption import REQUEUE, SIGNALS, Preemption


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_handlers_are_put_back(number: int) -> None:
    before = signal.getsignal(number)
    with Preemption() as preemption:
        assert not preemption.asked
        os.kill(os.getpid(), number)
        assert preemption.asked
    assert signal.getsignal(number) == before


def test_the_status_is_that_of_a_temporary_failure() -> None:
    assert os.EX_TEMPFAIL == REQUEUE


WORKER = """
import os, signal, sys
from zipformer_crctc import preemption
preemption.WORKER_GRACE = 1
with preemption.Preemption():
    child = os.fork()
    if not child:
        preemption.outlive_preemption(0)
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
        os.write(1, b"still here ")
        while True:
            signal.pause()
    print(os.WEXITSTATUS(os.waitpid(child, 0)[1]))
"""


def test_loader_workers_outlive_the_signals_for_a_while_and_leave_in_peace() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", WORKER], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["still", "here", "0"], done.stderr
