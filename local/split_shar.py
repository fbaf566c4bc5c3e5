"""Split a folder of shards into parts of about equal size, utterance by utterance: OUTPUT/1, OUTPUT/2, ...

A hash of its id alone decides about an utterance, so the parts are the same in every run and on every machine.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from local.command import positive_int, run, stable_hash
from local.shar import clear_shards
from zipformer_crctc.shar import Skipped, find_shards
from zipformer_crctc.sharcopy import copy_shard


def part_of(utterance_id: str, parts: int) -> int:
    """The part, from 1, that an utterance belongs to."""
    return stable_hash(f"part {utterance_id}") % parts + 1


def split(source: Path, output: Path, parts: int = 2) -> list[int]:
    """Write the parts, replacing older ones; returns the number of cuts in each. Cuts that cannot be read are counted.

    Raises ValueError where a part would be empty.
    """
    shards = find_shards(source)
    skipped = Skipped()
    counts = []
    for part in range(1, parts + 1):
        folder = output / str(part)

        def choose(cut: Mapping[str, Any], part: int = part) -> Mapping[str, Any] | None:
            return cut if part_of(cut["id"], parts) == part else None

        clear_shards(folder)
        report = skipped if part == 1 else None
        counts.append(sum(copy_shard(shard, folder, choose, report) for shard in shards))
        logging.info("%s: %d cuts", folder, counts[-1])
    if skipped.total:
        logging.warning("%s: %s", source, skipped.report())
    if not all(counts):
        raise ValueError(f"{source}: {sum(counts)} cuts are too few for {parts} parts")
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder of shards")
    parser.add_argument("--output", type=Path, required=True, help="folder for the parts")
    parser.add_argument("--parts", type=positive_int, default=2, help="number of parts (default: 2)")
    args = parser.parse_args()
    split(args.source, args.output, args.parts)


if __name__ == "__main__":
    run(main)
