"""What transcribe.py and demo.py share: the flags that name a model and set its search, and how it is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Generic, TypeVar

import torch

from zipformer_crctc.checks import check_decode
from zipformer_crctc.commandline import search_warnings
from zipformer_crctc.config import DataConfig, DecodeConfig
from zipformer_crctc.flags import add_flags, raise_if_any, read_flags, to_plain
from zipformer_crctc.memory import keep_freed_memory
from zipformer_crctc.transcriber import PhoneRecognizer


@dataclass(frozen=True)
class ModelFlags:
    """Which model is used."""

    program: ClassVar[str]
    """What the flags are called in the configuration that --print-config shows."""
    model: str | None = None
    """Checkpoint of ours or a published one (.pt, .pth), a folder of them, a folder with config.json and
    model.safetensors, or a Hugging Face id."""
    avg: int = 1
    """Number of checkpoints of a folder to average."""
    iter: int = 0
    """Last of the checkpoint-N.pt files to average; 0 is the newest."""

    def problems(self) -> list[str]:
        """A sentence for each value that cannot be."""
        problems = []
        if not self.model:
            problems.append("--model is missing: name a checkpoint, a folder of them, or a Hugging Face id.")
        if self.avg < 1:
            problems.append(f"--avg {self.avg}: must be at least 1.")
        return problems


Own = TypeVar("Own", bound=ModelFlags)


@dataclass(frozen=True)
class RecognizerArgs(Generic[Own]):
    """What a program was asked to do."""

    config: Own
    decode: DecodeConfig
    searching: Collection[str]
    """The fields of DecodeConfig that are flags of the program."""
    inputs: tuple[str, ...]
    warnings: tuple[str, ...]
    print_config: bool

    def to_json(self) -> str:
        """The whole configuration, for --print-config."""
        decode = {name: value for name, value in to_plain(self.decode).items() if name in self.searching}
        inputs = {"inputs": list(self.inputs)} if self.inputs else {}
        parts = {**inputs, self.config.program: to_plain(self.config), "decode": decode}
        return json.dumps(parts, indent=2, ensure_ascii=False)

    def load(self, **more: Any) -> PhoneRecognizer:
        """The model; ``more`` goes to `PhoneRecognizer.from_pretrained`."""
        assert self.config.model is not None
        keep_freed_memory()
        if self.decode.num_threads:
            torch.set_num_threads(self.decode.num_threads)
        return PhoneRecognizer.from_pretrained(
            self.config.model,
            device=self.decode.device,
            precision=self.decode.precision,
            avg=self.config.avg,
            iter=self.config.iter,
            decode=self.decode,
            **more,
        )


def parse_recognizer_args(
    parser: argparse.ArgumentParser,
    own: type[Own],
    searching: Collection[str],
    argv: Sequence[str] | None,
    check: Callable[[Own, Sequence[str]], list[str]],
) -> RecognizerArgs[Own]:
    """The checked configuration.

    Args:
        parser: of the program; may have an argument ``inputs`` already.
        own: the program's own flags.
        searching: the fields of DecodeConfig that are flags too.
        argv: the command line; None is the process's.
        check: a sentence for each problem of the own flags and the inputs, those of `ModelFlags` apart.

    Raises ConfigError; exits with status 2 for unknown flags and with 0 for --help.
    """
    add_flags(parser, own, (own.__doc__ or "").splitlines()[0])
    add_flags(parser, DecodeConfig, "The search, as of decode.py.", searching)
    parser.add_argument("--print-config", action="store_true", help="check all flags, print them as JSON and exit")
    given: dict[str, Any] = vars(parser.parse_args(argv))
    inputs = tuple(given.get("inputs", ()))
    problems: list[str] = []
    config = own(**read_flags(given, own, problems))
    names = {field.name for field in fields(own)}
    decode = DecodeConfig(
        **read_flags({name: value for name, value in given.items() if name not in names}, DecodeConfig, problems)
    )
    problems += check_decode(decode, DataConfig(), {})
    problems += [*config.problems(), *check(config, inputs)]
    raise_if_any(problems)
    warnings = tuple(search_warnings(decode, given))
    return RecognizerArgs(config, decode, searching, inputs, warnings, given["print_config"])
