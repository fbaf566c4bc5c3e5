"""Processes that train together: how they start, meet and speak to each other.

One process per GPU (NCCL), or several on CPUs (gloo). Started by `--world-size N` here, or by torchrun, which sets the
environment variables RANK, LOCAL_RANK and WORLD_SIZE.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from zipformer_crctc.preemption import REQUEUE, SIGNALS

logger = logging.getLogger(__name__)

BUCKET_BYTES = 1 << 26
"""Of gradients that are exchanged at a time."""
DEATH_GRACE = 30
"""Seconds after the end of a process that failed until the others on its machine are killed."""

_groups: list[Any] = []
"""All that this process was in, for good. DDP, which may be there for longer than its group, must not be the last to
hold one: it would wait for the group's threads without letting go of the interpreter, for which one of them may be
waiting to forget the last exchange. See also `_run_and_end`."""


class ProcessDied(RuntimeError):
    """One of the processes that train together failed; the text names it."""


@dataclass(frozen=True)
class Process:
    """This process among those that train together."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether it is the one that logs and saves."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all processes; x itself is left alone."""
        if self.world_size == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total

    def average_(self, arrays: Sequence[Tensor]) -> None:
        """Replace each array by its mean over all processes, about BUCKET_BYTES of them at a time."""
        waiting = list(arrays)
        while self.world_size > 1 and waiting:
            some: list[Tensor] = []
            size = 0
            while waiting and (not some or size + waiting[-1].nbytes <= BUCKET_BYTES):
                some.append(waiting.pop())
                size += some[-1].nbytes
            joined = torch.cat([x.reshape(-1) for x in some])
            dist.all_reduce(joined)
            parts = joined.div_(self.world_size).split([x.numel() for x in some])
            torch._foreach_copy_(some, [part.view(x.shape) for x, part in zip(some, parts, strict=True)])

    def take_from_main_(self, arrays: Iterable[Tensor]) -> None:
        """Replace each array by that of the main process."""
        for x in arrays if self.world_size > 1 else ():
            dist.broadcast(x, 0)

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, plain data or tensors on the CPU, by rank."""
        values: list[Any] = [value]
        if self.world_size > 1:
            values = [None] * self.world_size
            dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The main process's value, on all processes."""
        values = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


def choose_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        ValueError: a GPU is wanted that is not there.
    """
    gpus = torch.cuda.device_count()
    if wanted == "cpu" or (wanted == "auto" and gpus == 0):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise ValueError(
            f"--world-size asks for a GPU number {local_rank}, this machine has {gpus}: lower --world-size, or give "
            "--device cpu"
        )
    # Products of float32 arrays are exact by default, convolutions are not.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", local_rank)


def autocast_to(precision: str, device_type: str) -> torch.autocast:
    """What forward passes run in for a precision, "fp32", "bf16" or "fp16", on a device type ("cpu" or "cuda")."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device_type, dtype=dtype, enabled=precision != "fp32")


def launch(run: Callable[..., None], world_size: int, master_port: int, *args: Any) -> None:
    """Call run(process rank, *args) in `world_size` processes; under torchrun, in this one, which it ends.

    SIGTERM and SIGUSR1 are passed on to the processes. Exits with REQUEUE if that ended them.

    Raises:
        ValueError: torchrun and --world-size disagree.
        ProcessDied: one of several processes failed; under torchrun that process ends with status 1.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        there = int(os.environ["WORLD_SIZE"])
        if world_size != there:
            raise ValueError(f"--world-size {world_size}, but torchrun started {there} processes: leave the flag out")
        _run_and_end(run, int(os.environ["RANK"]), there, *args)
    elif world_size == 1:
        run(0, 1, *args)
    else:
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ["MASTER_PORT"] = str(master_port)
        received: list[int] = []
        processes: list[BaseProcess] = []

        def pass_on(number: int, frame: FrameType | None) -> None:
            received.append(number)
            for process in processes:
                if process.pid is not None and process.exitcode is None:
                    with suppress(ProcessLookupError):
                        os.kill(process.pid, number)

        before = {number: signal.signal(number, pass_on) for number in SIGNALS}
        try:
            context = mp.spawn(_call, args=(run, world_size, *args), nprocs=world_size, join=False)
            processes += context.processes
            for number in received[:1]:  # it came before there was a process to pass it on to
                pass_on(number, None)
            _watch(processes, asked_to_end=received)
        finally:
            for process in processes:
                process.kill()
            for number, handler in before.items():
                signal.signal(number, handler)


def _call(rank: int, run: Callable[..., None], *args: Any) -> NoReturn:
    """What a new process does."""
    # spawn lets a process have SIGINT when its parent dies; in background jobs of a shell that would be ignored.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _run_and_end(run, rank, *args)


def _run_and_end(run: Callable[..., None], *args: Any) -> NoReturn:
    """Call run(*args), tell what went wrong here, where it is known best, and end this process.

    It ends by `os._exit`: threads of process groups may need the interpreter to forget the last exchange, and one that
    asks for it while the interpreter ends kills the process.
    """
    status = 0
    try:
        run(*args)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError, OSError):  # there is none, or none that still takes anything
            stream.flush()
    os._exit(status)


def _watch(processes: Sequence[BaseProcess], asked_to_end: Sequence[int]) -> None:
    """Wait for the end of all processes; where one fails, the others get DEATH_GRACE seconds."""
    first, deadline = "", math.inf
    while alive := [process for process in processes if process.is_alive()]:
        connection.wait([process.sentinel for process in alive], timeout=1.0)
        if not first and (first := _failure(processes)):
            logger.error("%s; the other processes have %d s to end", first, DEATH_GRACE)
            deadline = time.monotonic() + DEATH_GRACE
        if time.monotonic() > deadline:
            for process in alive:
                process.kill()
    codes = {process.exitcode for process in processes}
    # A process that had no handler yet dies of the signal itself, and perhaps takes others along: no harm is done.
    if (REQUEUE in codes and codes <= {0, REQUEUE}) or (asked_to_end and any((code or 0) < 0 for code in codes)):
        sys.exit(REQUEUE)
    if failure := first or _failure(processes):
        raise ProcessDied(f"{failure}, so training has ended; its last checkpoint is whole: --resume auto goes on")


def _failure(processes: Sequence[BaseProcess]) -> str:
    """Names the processes that failed; empty if none has."""
    parts = []
    for rank, process in enumerate(processes):
        code = process.exitcode  # asked once: each look polls the process, which may end in between
        if code is not None and code < 0:
            parts.append(f"rank {rank} (process {process.pid}) was killed by {signal.Signals(-code).name}")
        elif code not in (None, 0, REQUEUE):
            parts.append(f"rank {rank} (process {process.pid}) failed with status {code}")
    return ", ".join(parts)


@contextmanager
def process_group(
    rank: int, world_size: int, device: str, num_threads: int, timeout: float = 600.0
) -> Iterator[Process]:
    """Join the other processes, and leave them at the end.

    Args:
        rank: of this process.
        world_size: number of processes.
        device: "auto", "cpu" or "cuda".
        num_threads: CPU threads of this process; 0 gives each process on a CPU an equal share of the cores.
        timeout: seconds after which an exchange that some process does not come to fails on the others.
    """
    place = choose_device(device, int(os.environ.get("LOCAL_RANK", rank)))
    if num_threads == 0 and place.type == "cpu" and world_size > 1:
        num_threads = max(1, (os.cpu_count() or 1) // world_size)
    if num_threads:
        torch.set_num_threads(num_threads)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if place.type == "cuda" else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        _groups.append(dist.group.WORLD)
    try:
        yield Process(rank, world_size, place)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
