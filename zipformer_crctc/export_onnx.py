"""Write a trained model as ONNX files: `python zipformer_crctc/export_onnx.py --exp-dir DIR --iter 2000 --avg 1`.

Files in fp32, fp16 and int8, with free batch and time, for onnxruntime and, with tokens.txt beside them, for
sherpa-onnx. Each is run and compared with the model once it is written. `--help` lists the flags.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from zipformer_crctc.checks import check_full_precision, check_no_search
from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.exportable import AudioGraph
from zipformer_crctc.flags import raise_if_any
from zipformer_crctc.onnx_files import INPUTS, PRECISIONS, example, file_name, write_onnx, write_tokens
from zipformer_crctc.onnx_model import OnnxModel
from zipformer_crctc.recogniser import Recogniser, load_recogniser
from zipformer_crctc.tracking import set_up_logging

logger = logging.getLogger(__name__)

FP32_TOLERANCE = 1e-3
"""Largest difference in log-probability between the model and its fp32 file."""


@dataclass(frozen=True)
class ExportConfig:
    """What is written, and where."""

    precisions: tuple[str, ...] = PRECISIONS
    """Comma list of fp32, fp16 and int8 (weights of 8 bits, activations quantised as they come)."""
    inputs: tuple[str, ...] = ("features",)
    """Comma list of features (log-mel frames, as sherpa-onnx gives) and audio (samples; features are in the graph)."""
    output_dir: Path | None = None
    """Folder for the files; without it the folder onnx beside the checkpoints."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration or an unfit checkpoint ends it with status 2 and one message."""
    about = "Write a trained model as ONNX files."
    run_program("export_onnx.py", lambda: parse_decode_args(argv, ExportConfig, about), run)


def run(args: DecodeArgs) -> None:
    """Write every file asked for and compare it with the model."""
    own: ExportConfig = args.own
    raise_if_any([*check_no_search(args.decode), *check_full_precision(args.decode), *_check(own)])
    recogniser = load_recogniser(args)
    beside = args.decode.exp_dir if args.decode.checkpoint is None else args.decode.checkpoint.parent
    folder = own.output_dir or beside / "onnx"
    set_up_logging(folder / "log", rank=0, world_size=1, name="export")
    for warning in args.warnings:
        logger.warning(warning)
    write_tokens(recogniser, folder / "tokens.txt")
    for inputs in own.inputs:
        for precision in own.precisions:
            path = folder / file_name(inputs, precision)
            write_onnx(recogniser, path, inputs, precision)
            difference = largest_difference(recogniser, path, inputs)
            size = path.stat().st_size / 1e6
            logger.info("%s: %.1f MB, log-probs differ by up to %.1e", path, size, difference)
            if precision == "fp32" and not difference < FP32_TOLERANCE:
                raise ValueError(f"{path}: log-probs differ from the model's by {difference:.1e}; do not use this file")


@torch.inference_mode()
def largest_difference(recogniser: Recogniser, path: Path, inputs: str) -> float:
    """Largest difference in log-probability between the model and a file, over made-up utterances."""
    data, lengths = example(inputs)
    got, num_frames = OnnxModel(path)(data, lengths)
    features, frames = data, lengths
    if inputs == "audio":
        graph = AudioGraph(recogniser.model)
        features, frames = graph.fbank(data, lengths), graph.num_frames(lengths)
    want, _ = replace(recogniser, published_padding=False).log_probs_of(features, frames)
    return max(float((a[:n] - b[:n]).abs().max()) for a, b, n in zip(got, want.cpu(), num_frames, strict=True))


def _check(own: ExportConfig) -> list[str]:
    """A sentence for each unknown name."""
    return [
        f"--{flag} {','.join(unknown)}: must be of {', '.join(known)}."
        for flag, values, known in (("precisions", own.precisions, PRECISIONS), ("inputs", own.inputs, tuple(INPUTS)))
        if (unknown := [value for value in values if value not in known])
    ]


if __name__ == "__main__":
    main()
