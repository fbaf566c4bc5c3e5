"""From a list of audio files with their texts to the train, dev and test folders of a corpus.

The shared half of the corpora that start from files: reading audio, normalising text, writing shards in parallel,
counting and naming what could not be used.
"""

from __future__ import annotations

import argparse
import csv
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from local.command import add_phones, load_tokenizer, positive_int
from local.shar import Recording, ShardStats, clear_shards, write_shard
from zipformer_crctc.audio import AudioError, load_audio
from zipformer_crctc.sharwriter import remove_shard
from zipformer_crctc.text import UnknownSymbols, normalise
from zipformer_crctc.tokenizer import PhoneTokenizer

SPLITS = ("train", "dev", "test")
CUTS_PER_SHARD = 1_000
SHOWN_SKIPS = 10


@dataclass(frozen=True)
class Row:
    """One audio file and what is said in it."""

    id: str
    audio: Path
    text: str
    language: str = ""
    speaker: str = ""
    custom: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Skipped:
    """Something that could not be used, and why; a line of skipped.tsv."""

    split: str
    id: str
    audio: str
    reason: str


@dataclass
class SplitStats:
    """What was written for one split."""

    split: str
    cuts: int = 0
    seconds: float = 0.0
    stereo: int = 0
    clipped: int = 0
    languages: Counter[str] = field(default_factory=Counter)
    skipped: list[Skipped] = field(default_factory=list)

    def line(self) -> str:
        """One line for a person: cuts, hours, languages."""
        languages = ", ".join(f"{name or 'no language'} {count}" for name, count in self.languages.most_common())
        return f"{self.split}: {self.cuts} cuts, {self.seconds / 3600:.2f} h ({languages or 'nothing'})"


def safe_id(text: str) -> str:
    """An id that can be a file name everywhere: runs of other characters become one underscore.

    Letters of any script stay, so ids made from file names stay readable.
    """
    return re.sub(r"[^\w.-]+", "_", text.replace("/", "-").replace("\\", "-")).strip("._-") or "utterance"


def prepare_from_arguments(prepare: Callable[..., list[SplitStats]], description: str, source: str) -> None:
    """Call prepare(source, output, phones, jobs) with the arguments of a command line; `source` says what that is."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--source", type=Path, required=True, help=source)
    parser.add_argument("--output", type=Path, required=True, help="folder for train, dev and test")
    add_phones(parser)
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes")
    args = parser.parse_args()
    prepare(args.source, args.output, args.phones, args.jobs)


def write_corpus(
    splits: Mapping[str, Sequence[Row]], skipped: Sequence[Skipped], output: Path, phones: Path | None, jobs: int
) -> list[SplitStats]:
    """Write output/{train,dev,test} with the tokenizer of a table of phones, and report.

    splits: rows of each split; of one that is missing, older shards are removed. skipped: rows that were unfit before.
    Raises ValueError when nothing is left.
    """
    tokenizer = load_tokenizer(phones)
    stats = []
    for split in SPLITS:
        if split in splits:
            stats.append(write_split(splits[split], split, output / split, tokenizer, jobs))
        else:
            clear_shards(output / split)
    report(stats, skipped, output)
    return stats


def write_split(
    rows: Sequence[Row],
    split: str,
    folder: Path,
    tokenizer: PhoneTokenizer,
    jobs: int = 1,
    cuts_per_shard: int = CUTS_PER_SHARD,
) -> SplitStats:
    """Write rows to `folder` as shards, replacing the shards that are there.

    The text is normalised; a row whose text has no symbol of the vocabulary, or whose audio cannot be used, is left
    out and named in the result. The bytes written do not depend on `jobs`.
    """
    stats = SplitStats(split)
    unknown = UnknownSymbols()
    usable = [row for row in (_normalised(row, tokenizer, unknown, stats) for row in rows) if row is not None]
    for line in unknown.report().splitlines():
        logging.info("%s: %s", split, line)
    clear_shards(folder)
    chunks = [usable[start : start + cuts_per_shard] for start in range(0, len(usable), cuts_per_shard)]
    for chunk, result in zip(chunks, _write_chunks(chunks, folder, jobs, split), strict=True):
        _add(stats, chunk, result)
    return stats


@dataclass
class _ChunkResult:
    shard: ShardStats
    stereo: int
    failures: dict[str, str]
    """id -> reason"""


def _normalised(row: Row, tokenizer: PhoneTokenizer, unknown: UnknownSymbols, stats: SplitStats) -> Row | None:
    text = normalise(row.text, tokenizer.pieces, unknown.dropped)
    unknown.add(text, tokenizer)
    reason = ""
    if not row.text.strip():
        reason = "empty text"
    elif all(token in (tokenizer.unk_id, tokenizer.boundary_id) for token in tokenizer.encode(text)):
        reason = f"no known phone in the text {row.text!r}"
    if reason:
        stats.skipped.append(Skipped(stats.split, row.id, str(row.audio), reason))
        return None
    return Row(row.id, row.audio, text, row.language, row.speaker, row.custom)


def _write_chunks(chunks: list[list[Row]], folder: Path, jobs: int, split: str) -> Iterator[_ChunkResult]:
    """Results in the order of the chunks; one process per job when there is enough to do."""
    if jobs <= 1 or len(chunks) <= 1:
        for number, chunk in enumerate(chunks):
            yield _write_chunk(chunk, folder, number)
        return
    with ProcessPoolExecutor(max_workers=min(jobs, len(chunks))) as pool:
        futures = [pool.submit(_write_chunk, chunk, folder, number) for number, chunk in enumerate(chunks)]
        for future in tqdm(futures, desc=f"{split} shards", disable=None):
            yield future.result()


def _write_chunk(rows: list[Row], folder: Path, number: int) -> _ChunkResult:
    failures: dict[str, str] = {}
    stereo = 0

    def recordings() -> Iterator[Recording]:
        nonlocal stereo
        for row in rows:
            try:
                audio, channels = load_audio(row.audio)
            except AudioError as error:
                failures[row.id] = str(error)
                continue
            stereo += channels > 1
            yield Recording(row.id, audio, row.text, row.language, row.speaker, custom=row.custom)

    shard = write_shard(recordings(), folder, number)
    failures.update(shard.skipped)
    if shard.cuts == 0:  # a shard of nothing is no use to a reader
        remove_shard(folder, number)
    return _ChunkResult(shard, stereo, failures)


def _add(stats: SplitStats, rows: Sequence[Row], result: _ChunkResult) -> None:
    stats.cuts += result.shard.cuts
    stats.seconds += result.shard.seconds
    stats.clipped += result.shard.clipped
    stats.stereo += result.stereo
    for row in rows:
        reason = result.failures.get(row.id)
        if reason is None:
            stats.languages[row.language] += 1
        else:
            stats.skipped.append(Skipped(stats.split, row.id, str(row.audio), reason))


def report(stats: Sequence[SplitStats], skipped: Sequence[Skipped], output: Path) -> None:
    """Log what was made, list what was not in skipped.tsv, and raise ValueError when nothing is left."""
    for split in stats:
        logging.info("%s", split.line())
        if split.stereo:
            logging.warning("%s: %d recordings had several channels and were mixed down", split.split, split.stereo)
        if split.clipped:
            logging.warning("%s: %d recordings went beyond full scale and were clipped", split.split, split.clipped)
    table = output / "skipped.tsv"
    everything = [*skipped, *(item for split in stats for item in split.skipped)]
    table.unlink(missing_ok=True)
    if everything:
        _write_skipped(table, everything)
    if not any(split.cuts for split in stats):
        raise ValueError(f"{output}: nothing is left of the corpus: {len(everything)} rows were skipped, see {table}")


def _write_skipped(table: Path, skipped: Sequence[Skipped]) -> None:
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(["split", "id", "audio", "reason"])
        writer.writerows([item.split, item.id, item.audio, item.reason] for item in skipped)
    logging.warning("%d rows skipped, all listed in %s:", len(skipped), table)
    for item in skipped[:SHOWN_SKIPS]:
        logging.warning("  %s (%s): %s", item.id, item.audio, item.reason)
    if len(skipped) > SHOWN_SKIPS:
        logging.warning("  ... and %d more", len(skipped) - SHOWN_SKIPS)
