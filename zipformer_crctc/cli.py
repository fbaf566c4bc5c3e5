"""The command `zipa`: the programs of this project under one name, `zipa PROGRAM FLAGS`.

A program and the packages it needs are imported when it is called, so that an installation for inference is enough for
inference.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = {
    "transcribe": "recordings to phones: text, JSON lines, CTM, TextGrid, SRT",
    "demo": "a page in the browser: record or upload, phones in time, TextGrid",
    "align": "given transcriptions to phones in time",
    "decode": "decode test sets and score them",
    "train": "train a model",
    "report": "a page of scores from the results of decode",
    "time_errors": "errors of times against known ones",
    "tune_search": "weights of the language model on dev data",
    "pseudo_label": "labels for untranscribed shards by several models",
    "export_onnx": "ONNX files, for sherpa-onnx and others",
    "save_pretrained": "a folder for transformers",
}
"""The programs that are modules of this package, and what they do."""
ALIASES = {"export": "export_onnx"}
PREPARE = "prepare"
PREPARE_SCRIPT = Path(__file__).resolve().parents[1] / "prepare.sh"
EXTRAS = {
    "lhotse": "train",
    "yaml": "train",
    "panphon": "train",
    "tensorboard": "train",
    "onnxruntime": "onnx",
    "onnx": "onnx",
    "safetensors": "hf",
    "transformers": "hf",
    "huggingface_hub": "hf",
    "k2": "k2",
    "gradio": "demo",
}
"""The extra of this package that brings what a program found missing."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; status 2 for a program that does not exist or that cannot run here."""
    given = list(sys.argv[1:] if argv is None else argv)
    if not given or given[0] in ("-h", "--help"):
        print(usage())
        return
    name, flags = given[0].replace("-", "_"), given[1:]
    name = ALIASES.get(name, name)
    if name == PREPARE:
        _prepare(flags)
    elif name in PROGRAMS:
        sys.argv[0] = f"zipa {given[0]}"  # what --help shows
        _run(name, flags)
    else:
        _stop(f"no program {given[0]!r}\n\n{usage()}")


def usage() -> str:
    """The list of programs."""
    rows = {**PROGRAMS, PREPARE: "prepare data (prepare.sh; in a checkout of the project only)"}
    lines = [f"  {name:<15} {what}" for name, what in rows.items()]
    return "\n".join(["usage: zipa PROGRAM FLAGS; zipa PROGRAM --help lists the flags", "", *lines])


def _run(name: str, flags: list[str]) -> None:
    try:
        program = importlib.import_module(f"{__package__}.{name}")
        program.main(flags)
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        _stop(f"{name} needs the package {package}; pip install 'zipformer-crctc[{EXTRAS[package]}]'")


def _prepare(flags: list[str]) -> None:
    if not PREPARE_SCRIPT.is_file():
        _stop("prepare runs prepare.sh, which only a checkout of the project has; clone it and call ./prepare.sh there")
    sys.exit(subprocess.run([str(PREPARE_SCRIPT), *flags]).returncode)


def _stop(message: str) -> None:
    print(f"zipa: {message}", file=sys.stderr)
    sys.exit(2)
