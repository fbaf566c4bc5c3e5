"""A checkpoint of ours with random weights, for tests of the programs that use a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny_run import SIZES
from zipformer_crctc import checkpoint
from zipformer_crctc.commandline import parse_train_args
from zipformer_crctc.config import config_to_dict
from zipformer_crctc.model import build_model
from zipformer_crctc.tokenizer import PhoneTokenizer


def write_checkpoint(
    path: Path, vocabulary: PhoneTokenizer | None = None, flags: Sequence[str] = (), **others: Any
) -> Path:
    """Write it, for other training flags, with other entries or without those that are None."""
    config = parse_train_args(["--preset", "tiny", *SIZES, *flags]).config
    tokenizer = vocabulary or PhoneTokenizer.from_table()
    state = build_model(config.model, tokenizer.vocab_size).state_dict()
    payload = {"model": state, "config": config_to_dict(config), "tokenizer": tokenizer.proto, **others}
    checkpoint.save(path, {name: value for name, value in payload.items() if value is not None})
    return path
