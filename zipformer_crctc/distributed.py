"""Processes that train together: how they start, meet and speak to each other.

One process per GPU (NCCL), or several on CPUs (gloo). Started by `--world-size N` here, or by torchrun, which sets the
environment variables RANK, LOCAL_RANK and WORLD_SIZE.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor


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
    return torch.device("cuda", local_rank)


def launch(run: Callable[..., None], world_size: int, master_port: int, *args: Any) -> None:
    """Call run(process rank, *args) in `world_size` processes; under torchrun, in this one.

    Raises:
        ValueError: torchrun and --world-size disagree.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        there = int(os.environ["WORLD_SIZE"])
        if world_size != there:
            raise ValueError(f"--world-size {world_size}, but torchrun started {there} processes: leave the flag out")
        run(int(os.environ["RANK"]), there, *args)
    elif world_size == 1:
        run(0, 1, *args)
    else:
        os.environ.setdefault("MASTER_ADDR", "localhost")
        os.environ["MASTER_PORT"] = str(master_port)
        # As an exception, the signal lets the processes be ended too.
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        context = mp.spawn(run, args=(world_size, *args), nprocs=world_size, join=False)
        try:
            while not context.join():
                pass
        finally:
            for process in context.processes:
                process.terminate()
            signal.signal(signal.SIGTERM, before)


@contextmanager
def process_group(rank: int, world_size: int, device: str, num_threads: int) -> Iterator[Process]:
    """Join the other processes, and leave them at the end.

    Args:
        rank: of this process.
        world_size: number of processes.
        device: "auto", "cpu" or "cuda".
        num_threads: CPU threads of this process; 0 gives each process on a CPU an equal share of the cores.
    """
    place = choose_device(device, int(os.environ.get("LOCAL_RANK", rank)))
    if num_threads == 0 and place.type == "cpu" and world_size > 1:
        num_threads = max(1, (os.cpu_count() or 1) // world_size)
    if num_threads:
        torch.set_num_threads(num_threads)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size > 1:
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", rank=rank, world_size=world_size)
    try:
        yield Process(rank, world_size, place)
    finally:
        if world_size > 1:
            dist.destroy_process_group()
