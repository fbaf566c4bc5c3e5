"""Signals by which a batch system takes a machine back: they are noted, and the run ends itself at its next step.

SIGTERM and SIGUSR1 count; torchrun passes SIGTERM on and waits 30 s, but SIGUSR1 ends it (so with Slurm
``--signal=B:USR1@120``, to a script that sends SIGTERM). A run that ended for that reason has the exit status of
``REQUEUE``: start it again with ``--resume auto``.
"""

from __future__ import annotations

import os
import signal
from types import FrameType, TracebackType
from typing import Any

REQUEUE = 75
"""Exit status that asks for another start: EX_TEMPFAIL of sysexits.h."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

WORKER_GRACE = 60
"""Seconds that a loader worker goes on after SIGTERM, so that its process can end the step and save."""


class Preemption:
    """While it is entered, SIGTERM and SIGUSR1 set ``asked`` and do nothing else."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Preemption:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True  # no more: the signal may have come in the middle of anything, a log line included


def is_noted() -> bool:
    """Whether this program notes the signals, in place of being ended by them."""
    return isinstance(getattr(signal.getsignal(signal.SIGTERM), "__self__", None), Preemption)


def outlive_preemption(worker: int) -> None:
    """For loader workers, which batch systems signal too: go on for WORKER_GRACE seconds, then leave in peace.

    A worker that dies at once takes its process along before that can save.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))
    signal.signal(signal.SIGTERM, _leave_later)


def _leave_later(number: int, frame: FrameType | None) -> None:
    signal.alarm(WORKER_GRACE)
