"""What the command lines of the preparation scripts share."""

from __future__ import annotations

import hashlib
import logging
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

from zipformer_crctc.tokenizer import PhoneTokenizer


def run(main: Callable[[], None]) -> None:
    """Run a script: log to standard error, and turn an expected error into one line and exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        main()
    except (ValueError, OSError) as error:
        logging.error("%s", error)
        sys.exit(1)


def positive_int(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def add_phones(parser: ArgumentParser) -> None:
    """The option --phones, for `load_tokenizer`."""
    parser.add_argument("--phones", type=Path, help="table of phones (default: the project's own)")


def load_tokenizer(table: Path | None) -> PhoneTokenizer:
    """The tokenizer of a table of phones; None means the project's own 127 pieces."""
    return PhoneTokenizer.from_table(table)


def stable_hash(text: str) -> int:
    """A large number that is the same in every run and on every machine; its remainders divide a corpus at random."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
