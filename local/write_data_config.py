"""List the prepared train, dev and test folders of a corpus in a data config."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from local.command import run
from zipformer_crctc.dataconfig import ALIGNABLE_ONLY, DataConfigError, DataSets, load_data_config, write_data_config
from zipformer_crctc.filters import FilterLimits

FILTERS = {"published": FilterLimits(), "alignable": ALIGNABLE_ONLY}

DEFAULT_COMMENT = "Read when no --data-config is given."


def prepared_sets(corpus: str, output: Path, filters: FilterLimits) -> DataSets:
    """The folders of `output` that hold shards; ValueError if none does."""
    made = {
        split: output / split for split in ("train", "dev", "test") if any((output / split).glob("cuts.*.jsonl.gz"))
    }
    if not made:
        raise ValueError(f"{output}: no shards in train, dev or test: run prepare.sh from --stage 1")
    return DataSets(
        train=[made["train"]] if "train" in made else [],
        dev={f"{corpus}-dev": made["dev"]} if "dev" in made else {},
        test={f"{corpus}-test": made["test"]} if "test" in made else {},
        filters=filters,
    )


def write_default(data_config: Path, default: Path, replace: bool) -> None:
    """Copy a data config to the place that is read when none is given, unless another one is there already."""
    sets = load_data_config(data_config)
    comment = f"{DEFAULT_COMMENT}\nCopied from {data_config} by prepare.sh."
    header = "".join(f"# {line}\n" for line in comment.splitlines())
    if default.is_file() and not replace and not _may_replace(default, header):
        logging.info("%s is another data config and stays; --make-default true replaces it", default)
        return
    write_data_config(default, sets, comment)
    logging.info("wrote %s, which is read when no --data-config is given", default)


def _may_replace(default: Path, header: str) -> bool:
    """A copy of the same data config may be renewed, and a copy of one whose folders are gone; nobody's own work."""
    content = default.read_text(encoding="utf-8", errors="replace")
    if content.startswith(header):
        return True
    if not content.startswith(f"# {DEFAULT_COMMENT}\n"):
        return False
    try:
        load_data_config(default)
    except DataConfigError as error:
        logging.warning("replacing %s: %s", default, error)
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--corpus", help="names the sets: CORPUS-dev, CORPUS-test; without it the config is there already"
    )
    parser.add_argument("--output", type=Path, help="folder with train, dev and test")
    parser.add_argument("--filters", choices=sorted(FILTERS), default="published", help="limits for training sets")
    parser.add_argument("--data-config", type=Path, required=True, help="YAML file to be written")
    parser.add_argument("--default", type=Path, help="the place read when no data config is given")
    parser.add_argument("--make-default", choices=("true", "false"), default="false", help="replace another default")
    args = parser.parse_args()
    if args.corpus:
        if args.output is None:
            parser.error("--corpus needs --output")
        sets = prepared_sets(args.corpus, args.output, FILTERS[args.filters])
        write_data_config(args.data_config, sets, f"{args.corpus}, made by prepare.sh")
        logging.info("wrote %s", args.data_config)
    if args.default is not None:
        write_default(args.data_config, args.default, args.make_default == "true")


if __name__ == "__main__":
    run(main)
