"""What the command lines of the preparation scripts share."""

from __future__ import annotations

import logging
import sys
from argparse import ArgumentTypeError
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


def load_tokenizer(table: Path | None) -> PhoneTokenizer:
    """The tokenizer of a table of phones; None means the project's own 127 pieces."""
    return PhoneTokenizer.from_table(table)
