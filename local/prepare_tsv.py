"""Your own recordings -> shar: from a tsv or csv table with the columns audio, text[, language, speaker, split, id]."""

from __future__ import annotations

import logging
from pathlib import Path

from local.command import run
from local.corpus import SplitStats, prepare_from_arguments, write_corpus
from local.table import read_table


def prepare(source: Path, output: Path, phones: Path | None = None, jobs: int = 1) -> list[SplitStats]:
    """Write output/{train,dev,test} from the table `source`; rows that cannot be used are listed in skipped.tsv."""
    stats = write_corpus(*read_table(source), output, phones, jobs)
    for split in stats:
        if not split.cuts:
            logging.warning("%s is empty: a column split (train, dev, test) in %s decides by hand", split.split, source)
    return stats


def main() -> None:
    prepare_from_arguments(prepare, __doc__, "table with a header line, tsv or csv")


if __name__ == "__main__":
    run(main)
