"""Is a run that was stopped many times the same as one that never was? `python tests/faults/resume_matrix.py`

For one rank and two gloo ranks, with and without pseudo-labelled data, with and without gradient accumulation: a run
without a stop, one stopped at random steps by SIGTERM to one of its ranks, and one by SIGKILL, each start with another
number of loader workers. Losses of all batches and validations, and the last checkpoint, must be equal to the bit.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from runs import VERY_SMALL, end, last_step, losses, same_checkpoint, start

from shar_folder import write_folder
from zipformer_crctc.preemption import REQUEUE

WORKERS = (0, 1, 2)


@dataclass(frozen=True)
class Case:
    """A kind of run."""

    name: str
    world_size: int = 1
    mixed: bool = False
    accumulation: int = 1


CASES = (
    Case("one rank"),
    Case("two ranks", world_size=2),
    Case("one rank, mixed", mixed=True),
    Case("two ranks, mixed", world_size=2, mixed=True),
    Case("two ranks, mixed, accumulation 3", world_size=2, mixed=True, accumulation=3),
)


def write_data(folder: Path) -> Path:
    """Labelled, pseudo-labelled and validation sets of different sizes; returns the data config."""
    write_folder(folder / "train", [1.0, 1.9, 1.4, 1.1] * 8, per_shard=8, prefix="train")
    write_folder(folder / "unsup", [1.2, 1.8, 1.3] * 7, per_shard=7, prefix="unsup")
    write_folder(folder / "dev", [1.0, 1.3], prefix="dev")
    path = folder / "data.yaml"
    path.write_text(
        "train: [train]\nunsup: [unsup]\ndev: {dev: dev}\nfilters: {min_tokens: 1}\nunsup_filters: {min_tokens: 1}\n"
    )
    return path


def flags(case: Case, steps: int, workers: int) -> dict[str, Any]:
    return {
        "num_steps": steps,
        "max_duration": 4,
        "num_workers": workers,
        "use_unsup_cr_ctc": case.mixed,
        "grad_accumulation": case.accumulation,
        "plain_ctc_batches": 7,
        "save_every_n": 5,
        "valid_interval": 10,
        "keep_last_k": 3,
        "resume": "auto",
        "process_timeout": 120,
    }


def stopped_run(
    case: Case, data: Path, exp_dir: Path, steps: int, stops: list[int], number: int, rng: random.Random
) -> tuple[int, str]:
    """Run to the end through the stops; returns how many there were, and what went wrong."""
    done = 0
    for attempt, stop in enumerate([*stops, 0]):
        run = start(data, exp_dir, case.world_size, VERY_SMALL, **flags(case, steps, WORKERS[attempt % len(WORKERS)]))
        try:
            if stop and run.wait_for_step(max(stop, last_step(exp_dir) + 1)):
                run.send(number, rng.randrange(case.world_size) if number == signal.SIGTERM else None)
                done += 1
            codes = run.wait()
        finally:
            end(run)
        expected = {0, REQUEUE} if number == signal.SIGTERM else {0, -signal.SIGKILL}
        if not set(codes) <= expected or (not stop and set(codes) != {0}):
            return done, f"exit codes {codes} in start {attempt + 1}"
    return done, ""


def compare(reference: Path, other: Path, steps: int) -> tuple[int, int, bool]:
    """Losses that are equal, losses in all, and whether the last checkpoints are equal."""
    wanted, got = losses(reference), losses(other)
    equal = sum(got.get(key) == values for key, values in wanted.items())
    last = f"checkpoint-{steps}.pt"
    return equal, len(wanted), same_checkpoint(reference / last, other / last)


def check(case: Case, data: Path, folder: Path, steps: int, num_stops: int, number: int, seed: int) -> list[str]:
    """A row of the table; the uninterrupted run is made where it is not there yet."""
    reference = folder / f"{case.name} reference"
    if not (reference / f"checkpoint-{steps}.pt").is_file():
        codes = start(data, reference, case.world_size, VERY_SMALL, **flags(case, steps, 0)).wait()
        if set(codes) != {0}:
            return [case.name, "none", "", "", "", f"exit codes {codes}"]
    rng = random.Random(seed)
    stops = sorted(rng.sample(range(1, steps - 1), num_stops))
    name = signal.Signals(number).name
    exp_dir = folder / f"{case.name} {name}"
    done, problem = stopped_run(case, data, exp_dir, steps, stops, number, rng)
    if problem:
        return [case.name, name, str(done), "", "", problem]
    equal, total, same = compare(reference, exp_dir, steps)
    verdict = "equal" if equal == total and same else "DIFFERENT"
    return [case.name, name, str(done), f"{equal} of {total}", "equal" if same else "DIFFERENT", verdict]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--case", default="", help="only cases whose name holds this")
    args = parser.parse_args()
    began = time.monotonic()
    print("| run | stopped by | stops | equal losses | last checkpoint | verdict |\n|---|---|---:|---:|---|---|")
    bad = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder / "data")
        for case in (case for case in CASES if args.case in case.name):
            for number in (signal.SIGTERM, signal.SIGKILL):
                row = check(case, data, folder, args.steps, args.stops, number, args.seed)
                bad += row[-1] != "equal"
                print("| " + " | ".join(row) + " |", flush=True)
    print(f"\n{time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
