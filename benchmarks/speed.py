"""What the speed benchmarks of the model share: cases, the processes that are timed in turn, and the rows of results.

Ours and the peer each run in a process of their own, which also gives the peak memory; both are kept alive and take
their steps in turn, so that a busy machine hits them alike.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import peer
from benchmarks.results_file import row, write_rows
from zipformer_crctc import native, products

OURS = "ours"
BATCH_COUNT = 20_000.0
"""The adjusted batch count at which every schedule and regulariser is on."""


@dataclass(frozen=True)
class Case:
    """What is timed."""

    kind: str
    """of the work: a key of the steps that the benchmark knows"""
    size: str
    """preset"""
    utterances: int
    seconds: float
    """length of each utterance"""
    device: str
    bf16: bool
    threads: int
    """CPU threads; 0 keeps torch's own choice"""
    peer_path: str | None = None
    """folder or wheel of the peer; None is the installed package"""

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.size}, {self.utterances} x {self.seconds:g} s, {'bf16' if self.bf16 else 'fp32'}"

    @property
    def on_gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def audio(self) -> float:
        """Seconds of audio in a step."""
        return self.utterances * self.seconds


@dataclass(frozen=True)
class Work:
    """What a process does again and again."""

    step: Callable[[], Any]
    model: torch.nn.Module
    forwards: float
    """Passes through the encoder in a step: a backward pass counts for two, two views double all."""
    forward: Callable[[], Any]
    """One pass, to count operations."""
    besides: Callable[[], float] = lambda: 0.0
    """Seconds for each step that the steps do not show: the share of what is done once in many."""


Maker = Callable[[Case, str], Work]
"""From a case, and `ours` or the name of the peer, to the work."""


class Worker:
    """A process that takes steps when asked to.

    Args:
        make: what makes its work; a function of a module.
        case: what is timed.
        who: ours, or the peer's name.
    """

    def __init__(self, make: Maker, case: Case, who: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(make, case, who, other), daemon=True)
        self.process.start()
        other.close()

    def ask(self, what: str) -> Any:
        """The answer to a key of the answers in `_serve`."""
        self.pipe.send(what)
        return self.pipe.recv()

    def close(self) -> None:
        self.pipe.send("end")
        self.process.join()


def _serve(make: Maker, case: Case, who: str, pipe: Connection) -> None:
    limit_threads(case.threads)
    _seed()
    work = make(case, who)
    answers: dict[str, Callable[[], Any]] = {
        "seed": _seed,
        "step": lambda: _seconds(work.step, case.device),
        "step on the CPU": lambda: _cpu_seconds(work.step),
        "memory": lambda: _peak_memory(case.device),
        "arrays": lambda: _most_allocated(work.step, case.device),
        "operations": lambda: _operations(work.forward) * work.forwards,
        "traffic": lambda: _traffic(work.step),
        "profile": lambda: _profile(work, case.device),
        "besides": work.besides,
    }
    while (asked := pipe.recv()) != "end":
        pipe.send(answers[asked]())


def _seed() -> None:
    """Steps after it draw the same numbers, so that the same regularisers act."""
    torch.manual_seed(0)
    random.seed(0)


def _seconds(step: Callable[[], Any], device: str) -> float:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _cpu_seconds(step: Callable[[], Any]) -> float:
    """Of all threads of this process; other work on the machine hardly changes them."""
    start = time.process_time()
    step()
    return time.process_time() - start


def _peak_memory(device: str) -> float:
    """GiB: on a GPU what torch has allocated at most, on a CPU the resident memory of the process."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _most_allocated(step: Callable[[], Any], device: str) -> float:
    """GiB of arrays at most that there are at a time in a step, without the model and its optimizer's state.

    Unlike the resident memory it has no gaps between arrays.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    now = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most / 2**30


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the arrays that operations read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func.__name__.startswith(("empty", "new_empty", "detach")):
            self.add(args, kwargs, result)
        return result

    def add(self, *used: Any) -> None:
        """Count the arrays among these; what is expanded is read from where it stands once."""
        arrays = [item for item in tree_leaves(used) if isinstance(item, torch.Tensor)]
        self.bytes += sum(min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in arrays)


def _traffic(step: Callable[[], Any]) -> float:
    """Bytes that the operations and the kernels of a step read and write."""
    run = native.Kernel.__call__

    def counted(kernel: native.Kernel, *arguments: Any) -> None:
        traffic.add(arguments)
        run(kernel, *arguments)

    with _Traffic() as traffic, mock.patch.object(native.Kernel, "__call__", counted):
        step()
    return float(traffic.bytes)


def _operations(forward: Callable[[], Any]) -> float:
    """Floating-point operations of the matrix products and convolutions of a pass."""
    available, products.HAS_ONEDNN = products.HAS_ONEDNN, False  # its operator is not known to the counter
    with FlopCounterMode(display=False) as counter, native.disabled():  # nor are the kernels
        forward()
    products.HAS_ONEDNN = available
    return float(counter.get_total_flops())


def _profile(work: Work, device: str) -> dict[str, float]:
    from benchmarks.parts import seconds_by_part

    return seconds_by_part(work.model, work.step, device)


def limit_threads(threads: int) -> None:
    """CPU threads of this process; 0 keeps torch's own choice."""
    if threads:
        torch.set_num_threads(threads)


def matrix_rate(device: str, bf16: bool) -> float:
    """Operations per second of a large matrix product, the best of some."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    x, weight = torch.randn(2, size, size, device=device, dtype=torch.bfloat16 if bf16 else torch.float32)
    with torch.no_grad():
        return 2 * size**3 / min(_seconds(lambda: products.linear(x, weight), device) for _ in range(20))


def bandwidth(device: str) -> float:
    """Bytes per second that a large copy reads and writes, the best of some."""
    source = torch.ones(1 << 28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(_seconds(lambda: target.copy_(source), device) for _ in range(5))


def measure(make: Maker, case: Case, steps: int, warmup: int, profile: bool, unit: str) -> list[dict[str, Any]]:
    """Rows of speed and memory of one case, ours against the peer."""
    workers = {OURS: Worker(make, case, OURS)}
    absent = peer.why_absent(case.peer_path) if case.size in peer.SIZES else "has no such size"
    if absent is None:
        workers[peer.NAME] = Worker(make, case, peer.NAME)
    else:
        print(f"{case.name}: no peer: {peer.NAME} {absent}", flush=True)
    times: dict[str, list[float]] = {who: [] for who in workers}
    for number in range(warmup + steps):
        for who, worker in workers.items():
            seconds = worker.ask("step")
            if number >= warmup:
                times[who].append(seconds)
    memory = {who: worker.ask("memory") for who, worker in workers.items()}
    besides = {who: worker.ask("besides") for who, worker in workers.items()}
    operations = workers[OURS].ask("operations")  # after the memory: they are counted without kernels
    if profile:
        for who, worker in workers.items():
            _print_parts(case, who, worker.ask("profile"))
    for worker in workers.values():
        worker.close()
    limit_threads(case.threads)
    rate = matrix_rate(case.device, case.bf16)
    median = {who: statistics.median(values) + besides[who] for who, values in times.items()}
    speed = {who: case.audio / value for who, value in median.items()}
    details = {
        "step_seconds": {who: [round(f(times[who]), 4) for f in (min, statistics.median, max)] for who in workers},
        "seconds_besides": round(besides[OURS], 4),
        "matrix_rate": round(rate / 1e9, 1),
        "share_of_matrix_rate": round(operations / median[OURS] / rate, 3),
    }
    return [
        _row(case, unit, speed, details, higher_is_better=True),
        _row(replace(case, kind=f"{case.kind}, memory"), "GiB", memory, {}, higher_is_better=False),
    ]


def _row(
    case: Case, unit: str, values: dict[str, float], details: dict[str, Any], higher_is_better: bool
) -> dict[str, Any]:
    """One row of a results file. The ratio is above 1 where ours is faster or smaller."""
    threads = case.threads or torch.get_num_threads()
    device = torch.cuda.get_device_name() if case.on_gpu else f"CPU, {threads} thread(s)"
    ours, other = values[OURS], values.get(peer.NAME)
    ratio = None if other is None else round(ours / other if higher_is_better else other / ours, 2)
    timed = None if other is None else {"name": peer.NAME, "speed": round(other, 3)}
    return row(case.name, unit, round(ours, 3), timed, ratio, device=device, **details)


def _print_parts(case: Case, who: str, parts: dict[str, float]) -> None:
    total = sum(parts.values())
    print(f"{case.name}, {who}: one step of {total:.3f} s by part", flush=True)
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"  {part:24} {seconds:8.3f} s {100 * seconds / total:5.1f} %", flush=True)


def parser(description: str | None, default_sizes: list[str], output: Path) -> argparse.ArgumentParser:
    """The flags of every speed benchmark."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--sizes", nargs="+", choices=["tiny", "small", "large"], default=default_sizes)
    made.add_argument(
        "--utterances", type=int, nargs="+", default=[4], help="in a batch; training has two views of each"
    )
    made.add_argument("--seconds", type=float, default=10.0, help="length of each utterance")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    made.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's own choice")
    made.add_argument("--steps", type=int, default=5, help="timed steps of each; the median counts")
    made.add_argument("--warmup", type=int, default=2, help="steps before that")
    made.add_argument("--peer", metavar="PATH", help="folder or wheel of the peer; default: the installed package")
    made.add_argument("--profile", action="store_true", help="print the time of a step by part of the model")
    made.add_argument("--output", type=Path, default=output, help="JSON file; rows of other cases in it are kept")
    return made


def cases(args: argparse.Namespace, kinds: list[str]) -> list[Case]:
    """The cases that the flags name."""
    return [
        Case(kind, size, utterances, args.seconds, args.device, args.bf16, args.threads, args.peer)
        for kind in kinds
        for size in args.sizes
        for utterances in args.utterances
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Put rows into a results file, in place of those of the same case and device."""

    def key(item: dict[str, Any]) -> tuple[str, ...]:
        return item["case"], item["device"], item["unit"]

    old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    new = {key(item) for item in rows}
    write_rows(path, [item for item in old if key(item) not in new] + rows)
