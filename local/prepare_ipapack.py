"""IPAPack++ -> a data config: downloaded shar folders are used in place, nothing is copied.

Every folder below the source that holds cuts.NNNNNN.jsonl.gz is a set. Its path below the source decides its use, by
the published rule of names: one that contains "test", "doreco" or "magicdata" is a test set, else one that contains
"dev" a dev set; of the others, one that contains "pseudo" or "unsup" is pseudo-labelled, the rest is trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

from local.command import run
from local.corpus import safe_id
from local.write_data_config import FILTERS
from zipformer_crctc.dataconfig import DataSets, write_data_config
from zipformer_crctc.filters import FilterLimits
from zipformer_crctc.shar import find_shards

# In this order: scored sets first, so that no path with such a name can be trained on.
KINDS = (
    ("test", ("test", "doreco", "magicdata")),
    ("dev", ("dev",)),
    ("unsup", ("pseudo", "unsup")),
)


def kind_of(path: str) -> str:
    """ "train", "dev", "test" or "unsup" for the path of a set below the source."""
    lower = path.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "train")


def find_sets(source: Path) -> DataSets:
    """All sets below `source`, or `source` itself; ValueError if there is none, or a shard has lost its partner."""
    if not source.is_dir():
        raise ValueError(f"{source} does not exist: --source names the folder of downloaded IPAPack++ shards")
    folders = sorted(
        {path.parent for pattern in ("cuts.*.jsonl.gz", "recording.*.tar") for path in source.rglob(pattern)}
    )
    if not folders:
        raise ValueError(f"{source}: no cuts.NNNNNN.jsonl.gz in it or below: is it the folder of the download?")
    sets = DataSets()
    for folder in folders:
        shards = find_shards(folder)
        path = source.resolve().name if folder == source else folder.relative_to(source).as_posix()
        kind = kind_of(path)
        logging.info("%s: %s, %d shards", kind, path, len(shards))
        if kind in ("train", "unsup"):
            getattr(sets, kind).append(folder)
        else:
            getattr(sets, kind)[safe_id(path)] = folder
    return sets


def prepare(source: Path, data_config: Path, filters: FilterLimits | None = None) -> DataSets:
    """Check the shards' pairing and write the data config; `filters` are limits for the labelled training sets."""
    sets = dataclasses.replace(find_sets(source), filters=filters or FilterLimits())
    for kind in ("train", "dev"):
        if not getattr(sets, kind):
            logging.warning("%s: no %s set found; edit %s to add one", source, kind, data_config)
    write_data_config(data_config, sets, f"IPAPack++ in {source}, made by prepare.sh; edit as you like")
    logging.info("wrote %s", data_config)
    return sets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with the downloaded shards")
    parser.add_argument("--data-config", type=Path, required=True, help="YAML file to be written")
    parser.add_argument("--filters", choices=sorted(FILTERS), default="published", help="limits for training sets")
    args = parser.parse_args()
    prepare(args.source, args.data_config, FILTERS[args.filters])


if __name__ == "__main__":
    run(main)
