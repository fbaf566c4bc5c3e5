"""Whether training in bfloat16 follows training in float32: loss curves of short runs of train.py.

    python benchmarks/precision.py --data-config data/espeak/data.yaml
    python benchmarks/precision.py --data-config data/espeak/data.yaml --device cuda -- --preset small

Four runs: two seeds in each precision. The row compares the mean distance of the curves of the two precisions (same
seed, mean of both) with that of the curves of the two seeds in fp32, the noise; `ratio` above 1 says that the precision
matters less than the seed. The curves, smoothed as in the log, are in the row. What follows `--` goes to train.py.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from benchmarks.results_file import result_path, row, write_rows

SEEDS = (42, 43)
POINT = 25
"""Batches from one point of a curve to the next."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-config", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--output", type=Path, default=result_path("precision"))
    parser.add_argument("more", nargs="*", help="flags of train.py, after --")
    args = parser.parse_args()
    runs = list(itertools.product(("fp32", "bf16"), SEEDS))
    # A GPU has room for all of them side by side.
    with ThreadPoolExecutor(len(runs) if args.device == "cuda" else 1) as pool:
        curves = dict(zip(runs, pool.map(lambda run: curve(args, *run), runs), strict=True))
    gap = mean(distance(curves["fp32", seed], curves["bf16", seed]) for seed in SEEDS)
    noise = distance(*(curves["fp32", seed] for seed in SEEDS))
    item = row(
        f"loss in bf16 against fp32, {args.steps} batches",
        "mean distance in nats per frame",
        round(gap, 4),
        {"name": "two seeds in fp32", "speed": round(noise, 4)},
        round(noise / gap, 2),
        device=args.device,
        curves={f"{precision}, seed {seed}": values for (precision, seed), values in curves.items()},
    )
    write_rows(args.output, [item])


def curve(args: argparse.Namespace, precision: str, seed: int) -> list[float]:
    """The loss in nats per frame, at every POINT batches."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "zipformer_crctc/train.py",
            "--preset",
            "tiny",
            "--plain-ctc-batches",
            args.steps // 3,
        ]
        command += ["--data-config", args.data_config, "--exp-dir", folder, "--num-steps", args.steps]
        command += ["--log-interval", POINT, "--device", args.device, "--precision", precision, "--seed", seed]
        subprocess.run([*map(str, command), *args.more], cwd=ROOT, check=True)
        lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        return [round(line["loss"], 4) for line in lines if line["kind"] == "train" and line["step"] >= POINT]


def distance(first: list[float], second: list[float]) -> float:
    """Mean distance of two curves."""
    return mean(abs(a - b) for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    main()
