"""Training runs in processes that can be stopped and killed, for the scripts of this folder.

Processes are forked from one that has imported everything, so that a run starts within a second; several ranks are
started as torchrun does it, by environment variables.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny_run import train_flags  # noqa: E402
from zipformer_crctc import checkpoint, train  # noqa: E402

VERY_SMALL = (
    *("--downsampling-factor", "1,2", "--encoder-dim", "8", "--encoder-unmasked-dim", "8", "--feedforward-dim", "8"),
    *("--num-heads", "1", "--query-head-dim", "4", "--value-head-dim", "4", "--cnn-module-kernel", "3"),
    *("--frontend-channels", "2,4,4", "--frontend-hidden", "4", "--pos-dim", "8"),
)
"""Sizes that make a step fast."""


@dataclass
class Run:
    """Some ranks of a run."""

    processes: list[Any]
    exp_dir: Path

    def send(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def wait(self, seconds: float = 300.0) -> list[int]:
        """Exit codes of the ranks; what is left after that time is killed."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in self.processes]

    def wait_until(self, condition: Callable[[], bool], seconds: float = 300.0) -> bool:
        """Whether the condition came true while the run was going on."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            if not all(process.is_alive() for process in self.processes):
                return False
            time.sleep(0.01)
        return False

    def wait_for_step(self, step: int) -> bool:
        return self.wait_until(lambda: last_step(self.exp_dir) >= step)


def start(
    data_config: Path,
    exp_dir: Path,
    ranks: int = 1,
    sizes: tuple[str, ...] = (),
    prepare: Callable[[int], None] | None = None,
    **flags: Any,
) -> Run:
    """Start a run with the flags of ``tiny_run.train_flags`` and others; ``prepare`` is called first in each rank."""
    argv = [*train_flags(data_config, exp_dir, **flags), *sizes]
    port = free_port()
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_rank, args=(argv, exp_dir, rank, ranks, port, prepare)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Run(processes, exp_dir)


def _rank(
    argv: list[str], exp_dir: Path, rank: int, world_size: int, port: int, prepare: Callable[[int], None] | None
) -> None:
    exp_dir.mkdir(parents=True, exist_ok=True)
    console = os.open(exp_dir / f"console-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(console, 1)
    os.dup2(console, 2)
    if world_size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if prepare is not None:
        prepare(rank)
    train.main(argv)


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("localhost", 0))
        return int(opened.getsockname()[1])


def records(exp_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of metrics.jsonl."""
    path = exp_dir / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(exp_dir: Path) -> int:
    steps = [record["step"] for record in records(exp_dir) if record["kind"] == "train"]
    return int(steps[-1]) if steps else 0


def console(exp_dir: Path, rank: int = 0) -> str:
    """What a rank wrote to its terminal."""
    return (exp_dir / f"console-{rank}.txt").read_text(encoding="utf-8", errors="replace")


def losses(exp_dir: Path) -> dict[tuple[str, int], dict[str, float]]:
    """Losses by kind ("train", "valid") and step; a step that was told twice must have been told alike."""
    told: dict[tuple[str, int], dict[str, float]] = {}
    for record in records(exp_dir):
        values = {name: value for name, value in record.items() if name.endswith("loss")}
        key = (record["kind"], record["step"])
        if told.setdefault(key, values) != values:
            values = {"told twice, differently": float("nan")}
            told[key] = values
    return told


PARTS = ("model", "model_avg", "scheduler", "sampler", "gradients", "rank_states", "schedule_batch_count")


def same_checkpoint(first: Path, second: Path) -> bool:
    """Whether parameters, averages, optimizer states, random states and places in the data are equal to the bit."""
    states = []
    for path in (first, second):
        payload = checkpoint.load(path)
        # PyTorch adds a setting without effect to the groups of an optimizer that was loaded.
        states.append({name: payload[name] for name in PARTS} | {"optimizer": payload["optimizer"]["state"]})
    return _equal(*states)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if hasattr(a, "dtype"):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return bool(a == b)


def end(run: Run) -> None:
    """Kill what is left of a run."""
    run.send(signal.SIGKILL)
    run.wait()
