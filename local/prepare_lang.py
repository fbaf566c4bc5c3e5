"""Table of phones -> tokenizer model and tokens.txt."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from local.command import add_phones, load_tokenizer, run

MODEL = "unigram.model"
TOKENS = "tokens.txt"


def prepare(phones: Path | None, output: Path) -> None:
    """Write output/unigram.model (sentencepiece) and output/tokens.txt, one "piece id" a line."""
    tokenizer = load_tokenizer(phones)
    output.mkdir(parents=True, exist_ok=True)
    (output / MODEL).write_bytes(tokenizer.proto)
    lines = [f"{piece} {number}\n" for number, piece in enumerate(tokenizer.pieces)]
    (output / TOKENS).write_text("".join(lines), encoding="utf-8")
    logging.info("%s: %d pieces", output / MODEL, tokenizer.vocab_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_phones(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for unigram.model and tokens.txt")
    args = parser.parse_args()
    prepare(args.phones, args.output)


if __name__ == "__main__":
    run(main)
