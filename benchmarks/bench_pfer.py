"""Feature edit distance: pairs of texts per second, ours in one call against panphon pair by pair.

    python benchmarks/bench_pfer.py       # writes benchmarks/results/pfer.json

Both score the same pairs in the same run, and have to agree to 1e-9. Panphon gets a part of the pairs (`--peer-pairs`),
as its time per pair is the same for all; ours is the best of `--repeats` calls, panphon's one pass over its part.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from panphon.distance import Distance

from benchmarks.results_file import result_path, row, write_rows
from zipformer_crctc.metrics import FeatureDistance
from zipformer_crctc.segments import inventory
from zipformer_crctc.tokenizer import read_table

OUTPUT = result_path("pfer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=10_000)
    parser.add_argument("--phones", type=int, default=30, help="phones of each text")
    parser.add_argument("--peer-pairs", type=int, default=10_000, help="pairs that panphon scores, at most --pairs")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT, help=f"JSON file of rows; default: {OUTPUT}")
    args = parser.parse_args()
    pairs = random_pairs(args.pairs, args.phones)
    distance, panphon = FeatureDistance(), Distance()
    distance.distances(pairs[:10])  # reads the inventory

    seconds = []
    for _ in range(args.repeats):
        started = time.perf_counter()
        ours = distance.distances(pairs)
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    theirs = [panphon.feature_edit_distance(hyp, ref) for hyp, ref in pairs[: args.peer_pairs]]
    peer_seconds = time.perf_counter() - started

    largest = max(abs(a - b) for a, b in zip(ours, theirs, strict=False))
    if largest > 1e-9:
        sys.exit(f"bench_pfer.py: the distances differ by up to {largest}")
    rate, peer_rate = len(pairs) / min(seconds), len(theirs) / peer_seconds
    print(f"largest difference {largest:.1e}")
    case = f"{args.pairs} pairs of {args.phones} phones"
    write_rows(
        args.output,
        [
            row(
                case,
                "pairs/s",
                round(rate, 1),
                {"name": "panphon, pair by pair", "speed": round(peer_rate, 1)},
                round(rate / peer_rate, 1),
            )
        ],
    )


def random_pairs(count: int, num_phones: int) -> list[tuple[str, str]]:
    """Texts of random phones of the tokenizer's table; half of a hypothesis is that of its reference."""
    rng = random.Random(0)
    phones = [phone for phone in read_table() if phone in inventory().numbers]
    pairs = []
    for _ in range(count):
        ref = rng.choices(phones, k=num_phones)
        hyp = [phone if rng.random() < 0.5 else rng.choice(phones) for phone in ref]
        pairs.append(("".join(hyp), "".join(ref)))
    return pairs


if __name__ == "__main__":
    main()
