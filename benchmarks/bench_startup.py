"""Start of training: seconds to the first batch, and to the first batch after a resume, by the number of shards.

    python benchmarks/bench_startup.py     # writes benchmarks/results/startup.json

Rows with 10, 1,000 and 10,000 synthetic shards: `first batch, no index` (shards as they were published),
`first batch` (their indexes were made by an earlier run) and `resume` in the middle of the epoch. Each is timed from
the call that finds the shards to the batch of features, with no worker processes, as a run with workers would only hide
part of it. Where lhotse is installed, `first batch` of its sampler over the same shards is timed beside it; it keeps no
place in a shar data set that it could resume from faster than by reading on.

The two do not do the same work before a batch: lhotse estimates its buckets from 10,000 cuts (with few shards the same
ones again and again, as the data repeat) and reads their audio on the way; ours samples up to 10,000 and reads none.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import soundfile

from benchmarks.results_file import result_path, row, write_rows
from zipformer_crctc.filters import FilterLimits, TrainingFilter
from zipformer_crctc.loader import BatchLoader, build_train_loader
from zipformer_crctc.objective import TargetEncoder
from zipformer_crctc.tokenizer import PhoneTokenizer

RATE = 16_000
DURATIONS = (2.0, 3.0, 4.5, 7.0)
TEXT = "ðəkwɪkbɹaʊnfɒksdʒʌmps"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[10, 1000, 10_000])
    parser.add_argument("--cuts", type=int, default=20, help="in each shard")
    parser.add_argument("--max-duration", type=float, default=120.0)
    parser.add_argument(
        "--folder", type=Path, help="where the shards are written, and removed; default: a temporary one"
    )
    parser.add_argument("--output", type=Path, default=result_path("startup"))
    args = parser.parse_args()
    rows = []
    for count in args.shards:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name) / "train"
            write_shards(folder, count, args.cuts)
            rows += measure(folder, count, args.cuts, args.max_duration)
    write_rows(args.output, rows)


def measure(folder: Path, count: int, cuts: int, max_duration: float) -> list[dict[str, Any]]:
    """The rows of one number of shards."""
    where = f"{count} shards of {cuts} cuts"

    def load(state: dict[str, Any] | None = None) -> BatchLoader:
        accept = TrainingFilter(TargetEncoder(PhoneTokenizer.from_table()), FilterLimits())
        loader = build_train_loader([folder], accept=accept, max_duration=max_duration, num_workers=0)
        if state is not None:
            loader.load_state_dict(state)
        return loader

    load()  # the tokenizer, once
    unindexed, _ = timed(lambda: next(iter(load())))
    indexed, _ = timed(lambda: next(iter(load())))
    step, half = middle(load(), count)
    resumed, batch = timed(lambda: next(iter(load(half))))
    if (batch.epoch, batch.step) != (1, step):
        sys.exit(f"bench_startup.py: resumed at step {batch.step} instead of {step}")
    peer = peer_seconds(folder, max_duration)
    named = None if peer is None else f"lhotse DynamicBucketingSampler {peer:.2f} s"
    return [
        row(f"first batch, no index, {where}", "s", round(unindexed, 2), named, peer and round(peer / unindexed, 2)),
        row(f"first batch, {where}", "s", round(indexed, 2), named, peer and round(peer / indexed, 2)),
        row(f"resume at step {step}, {where}", "s", round(resumed, 2)),
    ]


def middle(loader: BatchLoader, count: int) -> tuple[int, dict[str, Any]]:
    """A step by which half of the shards are opened, and the loader's state there; no audio is read on the way."""
    step, state = 0, None
    for request in loader.order.epoch(1):
        if request.state is not None:
            if state is not None and request.state["opened"] > count / 2:
                break
            state = request.state
        step = request.step
    return step, {**loader.state_dict(), "step": step, "state": state}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def peer_seconds(folder: Path, max_duration: float) -> float | None:
    """Seconds to lhotse's first batch of cuts and their audio; None without lhotse."""
    try:
        from lhotse import CutSet
        from lhotse.dataset import DynamicBucketingSampler
    except ImportError:
        return None

    def first() -> Any:
        fields = {
            "cuts": sorted(map(str, folder.glob("cuts.*"))),
            "recording": sorted(map(str, folder.glob("recording.*"))),
        }
        cuts = CutSet.from_shar(fields=fields, split_for_dataloading=True, shuffle_shards=True, stateful_shuffle=True)
        sampler = DynamicBucketingSampler(
            cuts.repeat(), max_duration=max_duration, shuffle=True, num_buckets=10, buffer_size=500,
            shuffle_buffer_size=1000, world_size=1, rank=0,
        )  # fmt: skip
        return [cut.load_audio() for cut in next(iter(sampler))]

    return timed(first)[0]


def write_shards(folder: Path, count: int, cuts: int) -> None:
    """Shards of noise. The tars are hard links to one, so all have the same ids."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    tar, manifest = folder / "recording.000000.tar", folder / "cuts.000000.jsonl.gz"
    lines = []
    with tarfile.open(tar, "w") as archive:
        for number in range(cuts):
            seconds, name = DURATIONS[number % len(DURATIONS)], f"utterance-{number:05d}"
            buffer = io.BytesIO()
            noise = 0.1 * rng.standard_normal(math.floor(seconds * RATE))
            soundfile.write(buffer, noise, RATE, format="FLAC", subtype="PCM_16")
            entry = cut(name, seconds)
            lines.append(json.dumps(entry, ensure_ascii=False))
            for member, data in (
                (f"{name}.flac", buffer.getvalue()),
                (f"{name}.json", json.dumps(entry["recording"]).encode()),
            ):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    manifest.write_bytes(gzip.compress("\n".join(lines).encode()))
    for number in range(1, count):
        for path in (tar, manifest):
            link(path, path.with_name(path.name.replace("000000", f"{number:06d}")))


def link(path: Path, other: Path) -> None:
    try:
        os.link(path, other)
    except OSError:  # too many links to one file, or none in this file system
        shutil.copyfile(path, other)


def cut(name: str, seconds: float) -> dict[str, Any]:
    """A manifest entry as lhotse writes it."""
    shared = {"id": name, "duration": seconds}
    recording = {
        **shared,
        "sources": [{"type": "shar", "channels": [0], "source": ""}],
        "sampling_rate": RATE,
        "num_samples": math.floor(seconds * RATE),
        "channel_ids": [0],
    }
    supervision = {**shared, "recording_id": name, "start": 0.0, "channel": 0, "text": TEXT, "language": "en"}
    return {
        **shared,
        "start": 0.0,
        "channel": 0,
        "supervisions": [supervision],
        "recording": recording,
        "type": "MonoCut",
    }


if __name__ == "__main__":
    main()
