"""Reading of training data in one worker: seconds of audio per CPU second, ours against lhotse, on the same shards.

    python benchmarks/bench_loader.py --folder data/espeak/train     # writes benchmarks/results/loader.json

Rows `decode`, `decode + fbank` and `decode + fbank + augment` (volume perturbation). The peer is plain lhotse as ZIPA
uses it: `CutSet.from_shar`, `DynamicBucketingSampler` and, from the second row on, `K2SpeechRecognitionDataset` with
`OnTheFlyFeatures(Fbank())`. Both make batches of `--max-duration`, both in this process with one thread (`--threads`
for both), as a loader worker works, a batch of ours and one of the peer's in turn; CPU seconds, as other work may go on
beside them. The first batches are not timed. The row `FLAC decoder alone` decodes data that lie in memory, the peer
with `soundfile`, as lhotse does: no reader can be faster than its decoder.

lhotse zero-pads each batch before the filterbank, ours mirrors each utterance at its own ends (`--zero-padded` does as
lhotse does). Before the rows, the features of some cuts are compared with lhotse's, one by one; they have to agree to
`--tolerance`. The rows `spread` and `padding` say, for --world-size ranks, how far the seconds of the ranks' batches of
one step lie apart (largest over smallest, mean over steps) and how much of the batches is padding.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import soundfile
import torch

from benchmarks.results_file import result_path, row, write_rows
from zipformer_crctc.features import SAMPLING_RATE, Fbank
from zipformer_crctc.flac import decode
from zipformer_crctc.loader import AudioReader, BatchReader
from zipformer_crctc.shar import Shard, find_shards, read_shard
from zipformer_crctc.trainorder import OrderSettings, TrainOrder

CASES = ("decode", "decode + fbank", "decode + fbank + augment")
UNIT = "audio s per CPU s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("data/espeak/train"), help="of shar shards")
    parser.add_argument("--max-duration", type=float, default=120.0)
    parser.add_argument("--batches", type=int, default=20, help="timed in each case")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--zero-padded", action="store_true")
    parser.add_argument("--tolerance", type=float, default=1e-3)
    parser.add_argument("--world-size", type=int, default=8, help="of the rows spread and padding")
    parser.add_argument("--no-peer", action="store_true", help="ours only, for profiling")
    parser.add_argument("--output", type=Path, default=result_path("loader"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shards = find_shards(args.folder)
    difference = None if args.no_peer else largest_difference(shards)
    if difference is not None and difference > args.tolerance:
        sys.exit(f"bench_loader.py: the features differ by up to {difference}")
    rows = [decoder_row(shards)]
    for case in CASES:
        sides = {"ours": our_batches(shards, case, args.max_duration, args.zero_padded)}
        if not args.no_peer:
            sides["lhotse"] = lhotse_batches(shards, case, args.max_duration)
        rows.append(speed_row(case, rates(sides, args.batches), largest_difference=difference))
    rows += balance(shards, args.max_duration, args.world_size)
    write_rows(args.output, rows)


def speed_row(case: str, speeds: Mapping[str, float], **more: Any) -> dict[str, Any]:
    """A row of `rates`; the peer is the second one, if there is one."""
    (_, ours), *others = speeds.items()
    if not others:
        return row(case, UNIT, round(ours, 1), **more)
    (name, theirs), *_ = others
    return row(case, UNIT, round(ours, 1), {"name": name, "speed": round(theirs, 1)}, round(ours / theirs, 2), **more)


def rates(sides: Mapping[str, Iterator[float]], count: int) -> dict[str, float]:
    """Seconds of audio per CPU second of each side, over `count` batches of each, in turn, after the first ones."""
    seconds, spent = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    for number in range(count + 1):
        for name, batches in sides.items():
            started = time.process_time()
            batch = next(batches, None)
            if batch is None:
                sys.exit(f"bench_loader.py: {number} batches instead of {count + 1}: lower --batches or --max-duration")
            if number:
                seconds[name] += batch
                spent[name] += time.process_time() - started
    return {name: seconds[name] / spent[name] for name in sides}


def decoder_row(shards: list[Shard], count: int = 400) -> dict[str, Any]:
    """The decoders alone, on the same data in memory."""
    utterances = list(islice(read_shard(shards[0]), count))
    data = []
    for utterance in utterances:
        with Path(utterance.tar).open("rb") as tar:
            tar.seek(utterance.offset)
            data.append(tar.read(utterance.size))

    def decoded(decoder: Callable[[bytes], tuple[np.ndarray, int]]) -> Iterator[float]:
        return (len(decoder(item)[0]) / SAMPLING_RATE for item in data)

    sides = {
        "ours": decoded(decode),
        "soundfile": decoded(lambda item: soundfile.read(io.BytesIO(item), dtype="float32")),
    }
    return speed_row("FLAC decoder alone", rates(sides, len(data) - 1))


def our_batches(shards: list[Shard], case: str, max_duration: float, zero_padded: bool) -> Iterator[float]:
    """The seconds of audio of each batch, once it is read."""
    read, reader = AudioReader(), BatchReader(1 if case == CASES[2] else None, zero_padded=zero_padded)
    order = TrainOrder(shards, OrderSettings(max_duration=max_duration))
    epoch = 0
    while True:
        epoch += 1
        for request in order.epoch(epoch):
            if case == CASES[0]:
                yield sum(len(read(utterance)) for utterance in request.utterances) / SAMPLING_RATE
            else:
                yield reader[request].seconds


def lhotse_batches(shards: list[Shard], case: str, max_duration: float) -> Iterator[float]:
    """The same of lhotse, set up as ZIPA does."""
    from lhotse import CutSet
    from lhotse import Fbank as LhotseFbank
    from lhotse.dataset import DynamicBucketingSampler, K2SpeechRecognitionDataset, PerturbVolume
    from lhotse.dataset.input_strategies import OnTheFlyFeatures

    fields = {"cuts": [str(shard.cuts) for shard in shards], "recording": [str(shard.recording) for shard in shards]}
    cuts = CutSet.from_shar(
        fields=fields, split_for_dataloading=True, shuffle_shards=True, stateful_shuffle=True, seed=42
    ).repeat()
    sampler = DynamicBucketingSampler(
        cuts, max_duration=max_duration, shuffle=True, num_buckets=10, buffer_size=500, shuffle_buffer_size=1000,
        drop_last=True, world_size=1, rank=0,
    )  # fmt: skip
    transforms = [PerturbVolume(p=0.5, scale_low=0.125, scale_high=2.0)] if case == CASES[2] else []
    dataset = K2SpeechRecognitionDataset(
        cut_transforms=transforms, input_strategy=OnTheFlyFeatures(LhotseFbank()), return_cuts=True
    )
    for batch in sampler:
        if case == CASES[0]:
            yield sum(cut.load_audio().shape[1] for cut in batch) / SAMPLING_RATE
        else:
            made = dataset[batch]
            yield sum(cut.duration for cut in made["supervisions"]["cut"])


def largest_difference(shards: list[Shard], count: int = 20) -> float:
    """Between our features and lhotse's, over the first utterances, each by itself."""
    from lhotse import Fbank as LhotseFbank

    read, ours, theirs = AudioReader(), Fbank(), LhotseFbank()
    worst = 0.0
    for utterance in islice(read_shard(shards[0]), count):
        samples = read(utterance)
        other = torch.as_tensor(theirs.extract(samples, SAMPLING_RATE))
        worst = max(worst, float((ours(torch.from_numpy(samples)) - other).abs().max()))
    return worst


def balance(shards: list[Shard], max_duration: float, world_size: int) -> list[dict[str, Any]]:
    """Rows on how alike the batches of a step are, and how full."""
    order = TrainOrder(shards, OrderSettings(max_duration=max_duration, world_size=world_size))
    spreads, speech, padded = [], 0.0, 0.0
    for _, batches, _ in order.steps(1):
        costs = [[item.cost for item in batch] for batch in batches if batch]
        sizes = [max(batch) * len(batch) for batch in costs]
        spreads.append(max(sizes) / min(sizes))
        speech += sum(sum(batch) for batch in costs)
        padded += sum(sizes)
    case = f"{world_size} ranks, {len(spreads)} steps"
    return [
        row(f"spread of a step, {case}", "largest / smallest", round(sum(spreads) / len(spreads), 3)),
        row(f"padding, {case}", "percent", round(100 * (1 - speech / padded), 2)),
    ]


if __name__ == "__main__":
    main()
