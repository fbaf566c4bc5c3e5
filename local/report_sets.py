"""Read every set of a data config once: its size, its languages, and what training leaves out, with each count.

Training applies the same filters when it reads the shards; this shows beforehand what they will do.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from local.command import add_phones, load_tokenizer, positive_int, run
from zipformer_crctc.dataconfig import DataSets, load_data_config
from zipformer_crctc.filters import FilterLimits, TrainingFilter, alignment_problem
from zipformer_crctc.objective import TargetEncoder
from zipformer_crctc.shar import Shard, Skipped, Utterance, find_shards, read_shard
from zipformer_crctc.text import UnknownSymbols
from zipformer_crctc.tokenizer import PhoneTokenizer

SHOWN_LANGUAGES = 40


@dataclass
class SetReport:
    """Counts of a shard, or of several added up."""

    cuts: int = 0
    seconds: float = 0.0
    kept: int = 0
    kept_seconds: float = 0.0
    languages: Counter[str] = field(default_factory=Counter)
    unreadable: Skipped = field(default_factory=Skipped)
    filtered: Skipped = field(default_factory=Skipped)
    """left out of training; in sets that are scored, what CTC could never emit in full"""
    unknown: UnknownSymbols = field(default_factory=UnknownSymbols)

    def add(self, other: SetReport) -> None:
        self.cuts += other.cuts
        self.seconds += other.seconds
        self.kept += other.kept
        self.kept_seconds += other.kept_seconds
        self.languages += other.languages
        for mine, theirs in ((self.unreadable, other.unreadable), (self.filtered, other.filtered)):
            mine.counts += theirs.counts
            for reason, names in theirs.examples.items():
                mine.examples[reason] = [*mine.examples.get(reason, []), *names][: mine.max_examples]
        self.unknown.unknown += other.unknown.unknown
        self.unknown.dropped += other.unknown.dropped
        self.unknown.num_texts += other.unknown.num_texts
        self.unknown.num_affected += other.unknown.num_affected


def read_one(shard: Shard, tokenizer: PhoneTokenizer, limits: FilterLimits | None) -> SetReport:
    """Counts of one shard; `limits` are those of a training set, None for a set that is scored."""
    result = SetReport()
    encode = TargetEncoder(tokenizer)
    judge = TrainingFilter(encode, limits)
    for utterance in read_shard(shard, result.unreadable):
        if limits is None:
            reason = alignment_problem(encode(utterance.text), utterance.num_samples)
        else:
            reason = judge(utterance)
        count_utterance(result, utterance, reason)
    result.unknown = encode.unknown
    return result


def count_utterance(result: SetReport, utterance: Utterance, reason: str | None) -> None:
    """Add an utterance that is left out for `reason`, or kept where it is None."""
    result.cuts += 1
    result.seconds += utterance.duration
    result.languages[utterance.language] += 1
    if reason is None:
        result.kept += 1
        result.kept_seconds += utterance.duration
    else:
        result.filtered.add(reason, utterance.id)


def report_set(folder: Path, tokenizer: PhoneTokenizer, limits: FilterLimits | None, jobs: int = 1) -> SetReport:
    """Counts of a folder of shards."""
    shards = find_shards(folder)
    work = partial(read_one, tokenizer=tokenizer, limits=limits)
    total = SetReport()
    if jobs <= 1 or len(shards) == 1:
        _sum(total, map(work, shards), folder, len(shards))
        return total
    with ProcessPoolExecutor(min(jobs, len(shards))) as pool:
        _sum(total, pool.map(work, shards), folder, len(shards))
    return total


def _sum(total: SetReport, parts: Iterable[SetReport], folder: Path, count: int) -> None:
    for part in tqdm(parts, desc=str(folder), total=count, disable=None):
        total.add(part)


def log_report(kind: str, name: str, result: SetReport, scored: bool) -> None:
    """Log one set."""
    where = f"{kind} {name}"
    languages = result.languages.most_common(SHOWN_LANGUAGES)
    names = ", ".join(f"{language or 'no language'} {count}" for language, count in languages)
    more = f", ... ({len(result.languages)} languages)" if len(result.languages) > SHOWN_LANGUAGES else ""
    logging.info("%s: %d cuts, %.2f h; %s%s", where, result.cuts, result.seconds / 3600, names or "nothing", more)
    if result.unreadable.total:
        logging.warning("%s: unreadable: %s", where, result.unreadable.report())
    if scored:
        if result.filtered.total:
            listed = result.filtered.report().replace(
                "skipped", "cannot be recognised in full, though they are scored", 1
            )
            logging.warning("%s: %s", where, listed)
    else:
        logging.info("%s: filters keep %d cuts, %.2f h", where, result.kept, result.kept_seconds / 3600)
        for reason, count in result.filtered.counts.most_common():
            logging.info("%s: %d left out: %s (%s)", where, count, reason, ", ".join(result.filtered.examples[reason]))
    for line in result.unknown.report().splitlines():
        logging.info("%s: %s", where, line)


def report_all(sets: DataSets, tokenizer: PhoneTokenizer, jobs: int = 1) -> None:
    """Log every set; ValueError if the filters leave a training set empty."""
    work: list[tuple[str, str, Path, FilterLimits | None]] = [
        *(("train", str(folder), folder, sets.filters) for folder in sets.train),
        *(("unsup", str(folder), folder, sets.unsup_filters) for folder in sets.unsup),
        *(("dev", name, folder, None) for name, folder in sets.dev.items()),
        *(("test", name, folder, None) for name, folder in sets.test.items()),
    ]
    kept: Counter[str] = Counter()
    for kind, name, folder, limits in work:
        result = report_set(folder, tokenizer, limits, jobs)
        log_report(kind, name, result, limits is None)
        kept[kind] += result.kept
    if empty := [kind for kind in ("train", "unsup") if getattr(sets, kind) and not kept[kind]]:
        raise ValueError(
            f"{sets.source}: nothing is left of {' and '.join(empty)} after the filters: change the limits under "
            "filters there (for single words, prepare.sh --filters alignable), or correct the data"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-config", type=Path, required=True, help="YAML file that lists the sets")
    add_phones(parser)
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes")
    args = parser.parse_args()
    report_all(load_data_config(args.data_config), load_tokenizer(args.phones), args.jobs)


if __name__ == "__main__":
    run(main)
