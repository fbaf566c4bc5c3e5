"""What a run does when something breaks: `python tests/faults/fault_table.py`

First a run that saves after each step is killed (SIGKILL) at random moments, while it writes a checkpoint among others;
after each kill every checkpoint of the folder must be loadable and none that was reported as saved may be missing.
Then each kind of damage is done once to a run of its own. Prints Markdown tables; the exit status is 1 if a run did
something else than it should.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from resume_matrix import write_data
from runs import VERY_SMALL, Run, console, end, last_step, start

from zipformer_crctc import checkpoint, distributed, objective
from zipformer_crctc.preemption import REQUEUE
from zipformer_crctc.resume import newest_checkpoint

SHORT: dict[str, Any] = {"num_steps": 24, "max_duration": 4, "save_every_n": 2, "valid_interval": 4, "resume": "auto"}
"""More than an epoch, so that every utterance is read."""
LONG: dict[str, Any] = {**SHORT, "num_steps": 100_000, "valid_interval": 1000, "process_timeout": 60}
FULL_DISK_BYTES = 50_000
"""Largest file while the disk is "full": logs fit, checkpoints do not."""

Row = tuple[bool, str]


# Kills


def slow_writes(rank: int) -> None:
    """Let each write take so long that some of the kills fall into one."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.05)
        fsync(descriptor)

    os.fsync = slow  # type: ignore[assignment]


def kill_many(data: Path, folder: Path, kills: int, rng: random.Random) -> bool:
    """The first table; returns whether no checkpoint was lost."""
    exp_dir = folder / "killed"
    flags: dict[str, Any] = {**LONG, "save_every_n": 1, "keep_last_k": 4}
    in_writes = lost = unreadable = stale_left = 0
    for _ in range(kills):
        stale_before = set(exp_dir.glob(".*.tmp"))
        before = last_step(exp_dir)
        run = start(data, exp_dir, 1, VERY_SMALL, slow_writes, **flags)
        try:
            run.wait_for_step(before + 1)
            time.sleep(rng.uniform(0.0, 0.3))
        finally:
            end(run)
        stale = set(exp_dir.glob(".*.pt.*.tmp"))
        in_writes += bool(stale)
        stale_left += bool(stale & stale_before)  # the next start removes them
        newest = newest_checkpoint(exp_dir)
        saved = [int(number) for number in re.findall(r"saved \S*checkpoint-(\d+)\.pt", console(exp_dir))]
        lost += bool(saved) and (newest is None or newest[1]["batch_idx_train"] < max(saved))
        for _, path in checkpoint.find_checkpoints(exp_dir):
            try:
                checkpoint.load(path)
            except checkpoint.CheckpointError:
                unreadable += 1
    print(
        "| kills | while writing a checkpoint | batches done | lost checkpoints | unreadable files | stale files kept |"
    )
    print("|---:|---:|---:|---:|---:|---:|")
    print(f"| {kills} | {in_writes} | {last_step(exp_dir)} | {lost} | {unreadable} | {stale_left} |\n", flush=True)
    return not (lost or unreadable or stale_left)


# Damages: each returns whether the run did what it should, and what it did


def finished(run: Run, exp_dir: Path, text: str, said: str) -> Row:
    """Whether the run went to its end and its log has ``text``."""
    codes = run.wait()
    steps = last_step(exp_dir)
    fine = set(codes) == {0} and steps == SHORT["num_steps"] and re.search(text, console(exp_dir)) is not None
    return fine, f"{said}; {steps} batches, exit status {codes[0]}"


def full_disk(data: Path, exp_dir: Path) -> Row:
    def small_files_only(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (FULL_DISK_BYTES, resource.RLIM_INFINITY))

    run = start(data, exp_dir, 1, VERY_SMALL, small_files_only, **{**LONG, "num_steps": 400})
    try:
        reported = run.wait_until(lambda: "could not be written" in console_so_far(exp_dir))
        none = newest_checkpoint(exp_dir) is None
        resource.prlimit(run.processes[0].pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        saved = run.wait_until(lambda: newest_checkpoint(exp_dir) is not None)
        run.send(signal.SIGTERM)
        codes = run.wait()
    finally:
        end(run)
    fine = reported and none and saved and codes == [REQUEUE]
    return fine, "reported, trained on, saved at the next save when there was room"


def dead_rank(data: Path, exp_dir: Path) -> Row:
    run = start(data, exp_dir, 1, VERY_SMALL, **{**LONG, "world_size": 2, "master_port": 29_881})
    try:
        run.wait_for_step(3)
        parent = run.processes[0].pid
        children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        trainers = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        began = time.monotonic()
        os.kill(trainers[-1], signal.SIGKILL)
        codes = run.wait()
        seconds = time.monotonic() - began
    finally:
        end(run)
    named = re.search(r"rank 1 \(process \d+\) was killed by SIGKILL", console(exp_dir))
    fine = codes == [1] and named is not None and seconds < distributed.DEATH_GRACE
    whole = newest_checkpoint(exp_dir) is not None
    said = named[0] if named else "not named"
    return fine and whole, f'"{said}"; all had ended within {distributed.DEATH_GRACE} s, status {codes[0]}'


def killed_launcher(data: Path, exp_dir: Path) -> Row:
    run = start(data, exp_dir, 1, VERY_SMALL, **{**LONG, "world_size": 2, "master_port": 29_883})
    run.wait_for_step(2)
    parent = run.processes[0].pid
    children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
    end(run)
    until = time.monotonic() + 60
    while any(is_running(pid) for pid in children) and time.monotonic() < until:
        time.sleep(0.1)
    left = [pid for pid in children if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left, "no rank is left behind" if not left else f"{len(left)} processes left behind"


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def damaged_flac(data: Path, exp_dir: Path) -> Row:
    tar = sorted((data.parent / "train").glob("recording.*.tar"))[0]
    content = bytearray(tar.read_bytes())
    place = content.index(b"fLaC")
    content[place : place + 400] = bytes(400)
    tar.write_bytes(content)
    said = "the utterance left out and named"
    return finished(start(data, exp_dir, 1, VERY_SMALL, **SHORT), exp_dir, "skipped train-0000: damaged audio", said)


def damaged_line(data: Path, exp_dir: Path) -> Row:
    cuts = sorted((data.parent / "train").glob("cuts.*.jsonl.gz"))[0]
    lines = gzip.decompress(cuts.read_bytes()).splitlines(keepends=True)
    lines[1] = lines[1][: len(lines[1]) // 2] + b"\n"
    cuts.write_bytes(gzip.compress(b"".join(lines)))
    said = "the line left out, counted and named"
    return finished(start(data, exp_dir, 1, VERY_SMALL, **SHORT), exp_dir, "1 damaged line|1 .*damaged", said)


def damaged_shard(data: Path, exp_dir: Path) -> Row:
    tar = sorted((data.parent / "train").glob("recording.*.tar"))[0]
    content = tar.read_bytes()
    tar.write_bytes(content[: len(content) // 2])
    said = "the utterances after the break left out, counted"
    return finished(start(data, exp_dir, 1, VERY_SMALL, **SHORT), exp_dir, "truncated|breaks off", said)


def long_text(data: Path, exp_dir: Path) -> Row:
    cuts = sorted((data.parent / "train").glob("cuts.*.jsonl.gz"))[0]
    text = gzip.decompress(cuts.read_bytes()).replace(b'"text": "aba"', b'"text": "' + b"aba" * 200 + b'"', 1)
    cuts.write_bytes(gzip.compress(text))
    said = "an utterance with more tokens than frames left out, counted"
    return finished(start(data, exp_dir, 1, VERY_SMALL, **SHORT), exp_dir, "tokens", said)


def poisoned(value: float, first: int, last: int) -> Callable[[int], None]:
    """Multiplies the loss of some calls, counted from 1, by a number."""

    def prepare(rank: int) -> None:
        original, calls = objective.Objective.train_loss, [0]

        def train_loss(self: objective.Objective, *args: Any) -> objective.Loss:
            loss = original(self, *args)
            calls[0] += 1
            return objective.Loss(loss.total * (value if first <= calls[0] <= last else 1.0), loss.sums)

        objective.Objective.train_loss = train_loss  # type: ignore[method-assign, assignment]

    return prepare


def nan_loss(data: Path, exp_dir: Path) -> Row:
    run = start(data, exp_dir, 2, VERY_SMALL, poisoned(float("nan"), 3, 4), **SHORT)
    fine, did = finished(run, exp_dir, "2 optimizer steps were skipped", "both ranks skipped 2 steps, batches saved")
    return fine and len(list(exp_dir.glob("bad-batch-*.pt"))) == 4, did


def inf_loss(data: Path, exp_dir: Path) -> Row:
    run = start(data, exp_dir, 1, VERY_SMALL, poisoned(float("inf"), 2, 2), **SHORT)
    return finished(run, exp_dir, "1 optimizer steps were skipped", "step skipped, batch saved")


def nan_for_ever(data: Path, exp_dir: Path) -> Row:
    flags = {**LONG, "max_skipped_steps": 12}
    codes = start(data, exp_dir, 1, VERY_SMALL, poisoned(float("nan"), 3, 10**9), **flags).wait()
    saved = len(list(exp_dir.glob("bad-batch-*.pt")))
    fine = codes == [1] and "--max-skipped-steps" in console(exp_dir) and saved == 10
    return fine, f"stopped after 12 skipped steps in a row; {saved} batches saved"


def out_of_memory(data: Path, exp_dir: Path) -> Row:
    def prepare(rank: int) -> None:
        original, calls = objective.Objective.train_loss, [0]

        def train_loss(self: objective.Objective, *args: Any) -> objective.Loss:
            calls[0] += 1
            if calls[0] == 5:
                raise torch.OutOfMemoryError("simulated")
            return original(self, *args)

        objective.Objective.train_loss = train_loss  # type: ignore[method-assign, assignment]

    codes = start(data, exp_dir, 1, VERY_SMALL, prepare, **SHORT).wait()
    said = re.search(r"out of memory with a batch of \d+ utterances", console(exp_dir))
    fine = codes == [1] and said is not None and "lower --max-duration" in console(exp_dir)
    return fine, f'stopped: "{said[0] if said else ""} ...: lower --max-duration ..."; last checkpoint whole'


def damaged_checkpoint(data: Path, exp_dir: Path) -> Row:
    start(data, exp_dir, 1, VERY_SMALL, **SHORT).wait()
    last = SHORT["num_steps"]
    newest = exp_dir / f"checkpoint-{last}.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    run = start(data, exp_dir, 1, VERY_SMALL, **SHORT)
    said = "named, and the one before it taken"
    return finished(run, exp_dir, rf"resumed from \S*checkpoint-{last - SHORT['save_every_n']}\.pt", said)


def signal_to_workers(data: Path, exp_dir: Path) -> Row:
    run = start(data, exp_dir, 1, VERY_SMALL, **{**LONG, "num_workers": 2})
    try:
        run.wait_for_step(2)
        trainer = run.processes[0].pid
        workers = [int(pid) for pid in Path(f"/proc/{trainer}/task/{trainer}/children").read_text().split()]
        for pid in [*workers, trainer]:
            os.kill(pid, signal.SIGTERM)
        codes = run.wait()
    finally:
        end(run)
    fine = codes == [REQUEUE] and (exp_dir / "preempted.pt").is_file()
    return fine, f"saved, exit status {codes[0]}; {len(workers)} workers outlived the signal"


def killed_worker(data: Path, exp_dir: Path) -> Row:
    run = start(data, exp_dir, 1, VERY_SMALL, **{**LONG, "num_workers": 2})
    try:
        run.wait_for_step(3)
        trainer = run.processes[0].pid
        workers = [int(pid) for pid in Path(f"/proc/{trainer}/task/{trainer}/children").read_text().split()]
        os.kill(workers[0], signal.SIGKILL)
        codes = run.wait()
    finally:
        end(run)
    fine = codes == [1] and "DataLoader worker" in console(exp_dir) and newest_checkpoint(exp_dir) is not None
    return fine, "stopped with a message that names the worker; last checkpoint whole"


def console_so_far(exp_dir: Path) -> str:
    return console(exp_dir) if (exp_dir / "console-0.txt").is_file() else ""


DAMAGES: tuple[tuple[str, Callable[[Path, Path], Row]], ...] = (
    ("disk full for a while", full_disk),
    ("one of two ranks killed", dead_rank),
    ("launcher of two ranks killed", killed_launcher),
    ("SIGTERM to a process and its loader workers", signal_to_workers),
    ("loader worker killed", killed_worker),
    ("damaged FLAC", damaged_flac),
    ("damaged JSON line", damaged_line),
    ("shard cut off in the middle", damaged_shard),
    ("text longer than the audio allows", long_text),
    ("NaN loss on two ranks, twice", nan_loss),
    ("infinite loss, once", inf_loss),
    ("NaN loss for ever", nan_for_ever),
    ("out of memory (simulated)", out_of_memory),
    ("newest checkpoint damaged", damaged_checkpoint),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--damage", default="", help="only damages whose name holds this")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data")
        fine = kill_many(data, folder, args.kills, random.Random(args.seed)) if args.kills else True
        print("| damage | what the run did | as it should |\n|---|---|---|")
        for number, (what, damage) in enumerate(DAMAGES):
            if args.damage in what:
                own = shutil.copytree(data.parent, folder / f"data-{number}") / data.name
                good, did = damage(own, folder / f"run-{number}")
                fine &= good
                print(f"| {what} | {did} | {'yes' if good else 'NO'} |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
