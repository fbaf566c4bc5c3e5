"""ONNX files against PyTorch: size, agreement, error rate, and speed in onnxruntime on a CPU.

    python benchmarks/bench_onnx.py --exp-dir exp/espeak --iter 1000000 --avg 2 --data-config data/espeak/data.yaml
    python benchmarks/bench_onnx.py --random-preset small ...      # random weights, the same test sets

Takes the flags of decode.py and writes a row for each precision to benchmarks/results/onnx.json: seconds of audio per
second, onnxruntime as ours and PyTorch as the peer, both in batches of --max-duration seconds and with --num-threads
threads, best of --repeats passes; features are made beforehand. PyTorch gives each utterance what it gets alone, as the
files do.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.decode import decode_set
from zipformer_crctc.loader import Batch
from zipformer_crctc.model import build_model
from zipformer_crctc.onnx_files import PRECISIONS, file_name, write_onnx
from zipformer_crctc.onnx_model import OnnxModel
from zipformer_crctc.presets import PRESETS
from zipformer_crctc.recogniser import Recogniser, choose_test_sets, eval_loader, load_recogniser
from zipformer_crctc.shar import Skipped
from zipformer_crctc.table import score_table
from zipformer_crctc.tokenizer import PhoneTokenizer


@dataclass(frozen=True)
class BenchConfig:
    """What is measured."""

    random_preset: str = ""
    """Random weights of this preset instead of checkpoints."""
    precisions: tuple[str, ...] = PRECISIONS
    """Comma list of fp32, fp16 and int8."""
    max_batches: int = 0
    """Measure this many batches; 0 is all."""
    repeats: int = 3
    """Passes over the batches."""
    output: Path = Path("benchmarks/results/onnx.json")
    """JSON file of rows; rows of other cases in it stay."""


@dataclass(frozen=True)
class OnnxRecogniser:
    """A file in the place of a Recogniser."""

    log_probs: Callable[[Batch], tuple[Tensor, Tensor]]
    tokenizer: PhoneTokenizer
    factor: int
    device: str = "cpu"


def main() -> None:
    run_program("bench_onnx.py", lambda: parse_decode_args(None, BenchConfig, "Measure ONNX files."), run)


def run(args: DecodeArgs) -> None:
    own: BenchConfig = args.own
    torch.set_num_threads(args.decode.num_threads or torch.get_num_threads())
    name = own.random_preset or args.decode.exp_dir.name
    recogniser = random_recogniser(own.random_preset) if own.random_preset else load_recogniser(args)
    sets = choose_test_sets(args.decode.test_sets, args.data.data_config)
    loaders = [eval_loader(args, path) for path in sets.values()]
    batches = [batch for loader in loaders for batch in loader if not batch.is_empty][: own.max_batches or None]
    want, per, speed = measure(recogniser, batches, own.repeats)
    rows = [] if not own.output.is_file() else json.loads(own.output.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        for precision in own.precisions:
            path = Path(folder) / file_name("features", precision)
            write_onnx(recogniser, path, "features", precision)
            model = OnnxModel(path, args.decode.num_threads)
            stand_in = OnnxRecogniser(model.log_probs, recogniser.tokenizer, recogniser.factor)
            got, onnx_per, onnx_speed = measure(stand_in, batches, own.repeats)
            case = f"{name}, {precision}: {path.stat().st_size / 1e6:.1f} MB"
            if not own.random_preset:
                case += f", PER {onnx_per:.2f} %, PyTorch {per:.2f} %"
            row = {
                "case": case,
                "device": f"cpu, {torch.get_num_threads()} threads",
                "unit": "audio s/s",
                "ours": round(onnx_speed, 1),
                "peer": {"name": f"PyTorch {torch.__version__}, fp32", "speed": round(speed, 1)},
                "ratio": round(onnx_speed / speed, 2),
                "command": shlex.join(["python", "benchmarks/bench_onnx.py", *sys.argv[1:]]),
                "date": date.today().isoformat(),
                **agreement(got, want),
            }
            print(json.dumps(row, ensure_ascii=False), flush=True)
            rows = [old for old in rows if not old["case"].startswith(f"{name}, {precision}:")] + [row]
    own.output.parent.mkdir(parents=True, exist_ok=True)
    own.output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def random_recogniser(preset: str) -> Recogniser:
    """A model that was not trained."""
    if preset not in PRESETS:
        raise ValueError(f"--random-preset {preset}: must be {' or '.join(PRESETS)}")
    config, tokenizer = PRESETS[preset]().model, PhoneTokenizer.from_table()
    torch.manual_seed(0)
    return Recogniser(build_model(config, tokenizer.vocab_size).eval(), tokenizer, config)


class Batches(list[Batch]):
    """Batches in the place of a loader, which has skipped nothing."""

    skipped = Skipped()
    order = SimpleNamespace(skipped=skipped)


@torch.inference_mode()
def measure(recogniser: Any, batches: list[Batch], repeats: int) -> tuple[list[tuple[Tensor, Tensor]], float, float]:
    """Log-probs of each batch, PER in percent, and seconds of audio per second."""
    audio = sum(batch.seconds for batch in batches)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        outputs = [recogniser.log_probs(batch) for batch in batches]
        seconds.append(time.perf_counter() - started)
    per = score_table(decode_set(recogniser, Batches(batches))).total.counts.per
    return outputs, per, audio / min(seconds)


def agreement(got: list[tuple[Tensor, Tensor]], want: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Largest difference in log-probability, and the share of frames with the same best symbol."""
    largest, same, frames = 0.0, 0, 0
    for (ours, lengths), (theirs, _) in zip(got, want, strict=True):
        valid = torch.arange(ours.shape[1]) < lengths[:, None]
        largest = max(largest, float((ours - theirs)[valid].abs().max()))
        same += int((ours.argmax(dim=2) == theirs.argmax(dim=2))[valid].sum())
        frames += int(valid.sum())
    return {"largest_difference": float(f"{largest:.2g}"), "same_best_symbol": round(same / frames, 5)}


if __name__ == "__main__":
    main()
