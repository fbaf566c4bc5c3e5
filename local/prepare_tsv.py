"""Your own recordings -> shar: from a tsv or csv table with the columns audio, text[, language, speaker, split, id]."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from local.command import load_tokenizer, positive_int, run
from local.corpus import SPLITS, SplitStats, report, write_split
from local.table import read_table


def prepare(source: Path, output: Path, phones: Path | None = None, jobs: int = 1) -> list[SplitStats]:
    """Write output/{train,dev,test} from the table `source`; rows that cannot be used are listed in skipped.tsv."""
    splits, skipped = read_table(source)
    tokenizer = load_tokenizer(phones)
    stats = [write_split(splits[split], split, output / split, tokenizer, jobs) for split in SPLITS]
    report(stats, skipped, output)
    for split in stats:
        if not split.cuts:
            logging.warning("%s is empty: a column split (train, dev, test) in %s decides by hand", split.split, source)
    return stats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, required=True, help="table with a header line, tsv or csv")
    parser.add_argument("--output", type=Path, required=True, help="folder for train, dev and test")
    parser.add_argument("--phones", type=Path, help="table of phones (default: the project's own)")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes")
    args = parser.parse_args()
    prepare(args.source, args.output, args.phones, args.jobs)


if __name__ == "__main__":
    run(main)
