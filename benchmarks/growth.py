"""How time and memory of a training step grow with the length of utterances and with the size of the batch.

    python benchmarks/growth.py --axis length --size small --audio 60 --threads 1
    python benchmarks/growth.py --axis batch --size tiny --audio 20 60 150 300 600 --threads 1
    python benchmarks/growth.py --axis length --audio 600 --device cuda --bf16

The steps are those of bench_train.py, all with the same random numbers. On a CPU the time is that of all threads of the
process, which other work on the machine hardly changes; on a GPU it is the clock's. Memory is that of a step's arrays.
Beside each point stands what the arithmetic says. Time: the floating-point operations of products and convolutions at
the machine's matrix rate, and the bytes that all operations read and write at its bandwidth, both measured, scaled to
the first point. Memory: above that of a step on one second in proportion to the audio, and to the square of the length
for attention weights. What grows faster is named. Rows go to benchmarks/results/growth.json, and docs/growth.svg is
drawn from all that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import torch

from benchmarks import speed
from benchmarks.bench_train import make
from benchmarks.results_file import result_path, row
from benchmarks.speed import OURS, Case, Worker
from zipformer_crctc.charts import Line, line_chart
from zipformer_crctc.presets import PRESETS
from zipformer_crctc.reportcolours import SYSTEM_COLOURS, colour

LENGTHS = (5.0, 10.0, 15.0, 20.0, 30.0)
AXES = {"length": "seconds of an utterance", "batch": "seconds of audio in a batch"}
MEASURES = ("time", "memory")


@dataclass(frozen=True)
class Point:
    """What was measured for one batch."""

    case: Case
    time: float
    """seconds of a step, the median"""
    memory: float
    """GiB"""
    operations: float
    """floating-point operations of products and convolutions in a step"""
    traffic: float
    """bytes that the operations of a step read and write"""


@dataclass(frozen=True)
class Machine:
    """What it can do at most."""

    matrix_rate: float
    """floating-point operations per second"""
    bandwidth: float
    """bytes per second"""

    def seconds(self, point: Point) -> float:
        """Of a step, if operations and memory traffic did not overlap."""
        return point.operations / self.matrix_rate + point.traffic / self.bandwidth


def main() -> None:
    args = _parser().parse_args()
    second = Case("growth", args.size, 1, 1.0, args.device, args.bf16, args.threads)
    if args.axis == "length":
        cases = [replace(second, utterances=round(args.audio[0] / s), seconds=s) for s in args.lengths or LENGTHS]
    else:
        length = (args.lengths or [10.0])[0]
        cases = [replace(second, utterances=round(audio / length), seconds=length) for audio in args.audio]
    speed.limit_threads(args.threads)
    machine = Machine(speed.matrix_rate(args.device, args.bf16), speed.bandwidth(args.device))
    least_memory = measured(second, args.steps, args.warmup).memory
    points: list[Point] = []
    for case in cases:
        points.append(measured(case, args.steps, args.warmup))
        rows = [_row(args.axis, point, points[0], least_memory, machine) for point in points]
        speed.write(args.output, rows)  # what is measured is kept where a longer batch does not fit
    for measure in MEASURES:
        print(f"{measure}: {verdict(rows, measure, least_memory, args.tolerance)}")
    args.plot.write_text(plot(json.loads(args.output.read_text(encoding="utf-8"))), encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--axis", choices=AXES, required=True)
    made.add_argument("--size", choices=list(PRESETS), default="small")
    made.add_argument("--audio", type=float, nargs="+", default=[60.0], help="seconds in a batch; length: the first")
    made.add_argument("--lengths", type=float, nargs="+", help="of utterances, seconds; batch: the first, 10 if none")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    made.add_argument("--threads", type=int, default=0, help="CPU threads; 0 keeps torch's own choice")
    made.add_argument("--steps", type=int, default=2, help="timed steps; the median counts")
    made.add_argument("--warmup", type=int, default=1, help="steps before that")
    made.add_argument("--tolerance", type=float, default=0.1, help="share by which points may lie above the arithmetic")
    made.add_argument("--output", type=Path, default=result_path("growth"))
    made.add_argument("--plot", type=Path, default=ROOT / "docs" / "growth.svg")
    return made


def measured(case: Case, steps: int, warmup: int) -> Point:
    """Steps on one batch, in a process of its own."""
    worker = Worker(make, case, OURS)
    clock = "step on the CPU" if torch.device(case.device).type == "cpu" else "step"

    def ask(what: str) -> Any:
        worker.ask("seed")
        return worker.ask(what)

    times = [ask(clock) for _ in range(warmup + steps)][warmup:]
    memory, traffic, operations = ask("arrays"), ask("traffic"), ask("operations")
    worker.close()
    return Point(case, statistics.median(times), memory, operations, traffic)


def attention_memory(case: Case) -> float:
    """GiB of attention for two views of each utterance, when most is there: as the last layer computes its weights.

    Those of all layers are kept; the last ones are still scores, and their positional part is there by offset, an array
    twice as wide.
    """
    model = PRESETS[case.size]().model
    frames = (round(case.seconds * 100) - 7) // 2
    stacks = zip(model.downsampling_factor, model.num_encoder_layers, model.num_heads, strict=True)
    layers = [heads * (-(-frames // factor)) ** 2 for factor, count, heads in stacks for _ in range(count)]
    values = sum(layers) + 2 * layers[-1]
    return 2 * case.utterances * values * (2 if case.bf16 else 4) / 2**30


def _row(axis: str, point: Point, first: Point, least_memory: float, machine: Machine) -> dict[str, Any]:
    """One row, with what the arithmetic makes of the axis's first point."""
    attention = attention_memory(point.case)
    linear = first.memory - least_memory - attention_memory(first.case)
    on_cpu = torch.device(point.case.device).type == "cpu"
    device = f"CPU, {point.case.threads} thread(s)" if on_cpu else torch.cuda.get_device_name()
    return row(
        f"{axis}: {point.case.name.removeprefix('growth, ')}",
        "CPU s a step" if on_cpu else "s a step",
        round(point.time, 3),
        device=device,
        axis=axis,
        size=point.case.size,
        x=point.case.seconds if axis == "length" else point.case.audio,
        gflop=round(point.operations / 1e9, 1),
        gbyte=round(point.traffic / 1e9, 1),
        gflop_per_second=round(machine.matrix_rate / 1e9, 1),
        gbyte_per_second=round(machine.bandwidth / 1e9, 1),
        time=round(point.time, 3),
        time_by_arithmetic=round(first.time * machine.seconds(point) / machine.seconds(first), 3),
        memory=round(point.memory, 3),
        memory_by_arithmetic=round(least_memory + linear * point.case.audio / first.case.audio + attention, 3),
    )


def verdict(rows: list[dict[str, Any]], measure: str, least_memory: float, tolerance: float) -> str:
    """Whether a measure grows faster than the arithmetic says: from the cheapest of the points before, not the first.

    A first point with much overhead would hide what follows.
    """
    offset = least_memory if measure == "memory" else 0.0
    shares = [(item[measure] - offset) / (item[f"{measure}_by_arithmetic"] - offset) for item in rows]
    faster = [
        f"{item['case']} {100 * (share / min(shares[:number]) - 1):.0f} % above"
        for number, (item, share) in enumerate(zip(rows, shares, strict=True))
        if number and share > (1 + tolerance) * min(shares[:number])
    ]
    return "; ".join(faster) or f"nothing grows faster than the arithmetic by over {100 * tolerance:.0f} %"


def plot(rows: list[dict[str, Any]]) -> str:
    """SVG: a row of panels for each axis and size and device, time on the left and memory on the right."""
    width, height = 330, 230
    groups = list(dict.fromkeys((item["axis"], item["size"], item["device"]) for item in rows))
    panels = [
        f'<g transform="translate({width * column} {height * line})">{_panel(rows, group, measure, width, height)}</g>'
        for line, group in enumerate(groups)
        for column, measure in enumerate(MEASURES)
    ]
    size = f'width="{2 * width}" height="{height * len(groups)}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">'
        f'<rect {size} fill="{colour("paper")}"/>{"".join(panels)}</svg>\n'
    )


def _panel(rows: list[dict[str, Any]], group: tuple[str, str, str], measure: str, width: int, height: int) -> str:
    axis, size, device = group
    chosen = [item for item in rows if (item["axis"], item["size"], item["device"]) == group]
    unit = "GiB at most" if measure == "memory" else chosen[0]["unit"]
    lines = [
        Line("measured", [(item["x"], item[measure]) for item in chosen]),
        Line("arithmetic", [(item["x"], item[f"{measure}_by_arithmetic"]) for item in chosen], SYSTEM_COLOURS[1], True),
    ]
    return line_chart(lines, f"{size}, {device}: {unit}", AXES[axis], width, height)


if __name__ == "__main__":
    main()
