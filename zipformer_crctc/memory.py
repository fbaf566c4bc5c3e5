"""How the C library gives memory back: for programs whose arrays come and go in every step."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
"""Parameters of glibc's mallopt, from malloc.h."""
OWN_PAGES_FROM = 1 << 30
"""Bytes of an array that gets pages of its own, which are returned when it is freed."""
ONEDNN_PROGRAMS = 256
"""How many programs oneDNN keeps, one for each operation and shape, of 100 to 200 kB, in place of 1024.

They lie between the arrays of the steps, whose gaps they hold apart: with 1024 the memory of a process still grew after
an hour, with 256 it is the same after a minute, at the same speed.
"""


def keep_freed_memory() -> None:
    """Keep what is freed for what is asked for next, in the whole process; call it before any step.

    glibc returns what is free at the end of its memory to the system and gets it anew, page by page and filled with
    zeros: in training steps on a CPU that was a third of the time. With another C library only oneDNN's programs are
    limited, which the environment can change everywhere.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(ONEDNN_PROGRAMS))
    if (mallopt := _glibc("mallopt")) is not None:
        mallopt(M_MMAP_THRESHOLD, OWN_PAGES_FROM)
        mallopt(M_TRIM_THRESHOLD, -1)
        # Else the thread of the backward pass has a heap of its own and cannot use what the forward pass has freed.
        mallopt(M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Return all whole pages that are free to the system, those between arrays in use as well; once in many steps.

    As arrays come and go in ever other sizes, gaps between them grow: memory that is kept would double in an hour.
    """
    if (malloc_trim := _glibc("malloc_trim")) is not None:
        malloc_trim(0)


def _glibc(name: str) -> Callable[..., int] | None:
    """A function of glibc; None with another C library."""
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # macOS, Windows
        return None
