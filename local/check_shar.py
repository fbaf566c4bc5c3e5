"""Check folders of shards before training: python -m local.check_shar DIR... [--json FILE]

Reads every manifest and tar header, with --audio also every FLAC, and makes the shards' indexes on the way. Prints a
table and, with --json, writes the figures: hours, languages, speakers, durations, symbols that the tokenizer does not
know, what training would leave out, and what is damaged. The exit status is 1 when training on a folder would fail: it
cannot be read, or nothing of it is left; with --strict also when anything is damaged.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from local.command import load_tokenizer, positive_int, run
from local.report_sets import SetReport, count_utterance
from zipformer_crctc.audio import AudioError
from zipformer_crctc.dataconfig import ALIGNABLE_ONLY
from zipformer_crctc.filters import FilterLimits, TrainingFilter, frames_needed, num_output_frames
from zipformer_crctc.loader import AudioReader
from zipformer_crctc.objective import TargetEncoder
from zipformer_crctc.shar import DataError, Shard, find_shards, read_shard
from zipformer_crctc.tokenizer import PhoneTokenizer

EDGES = (1, 2, 4, 8, 12, 16, 20, 24, 30)
"""Seconds between the classes of the duration histogram."""
SHARES = (0.25, 0.5, 0.75, 0.9, 1.0)
"""Bounds between the classes of output frames needed per output frame there is; CTC cannot do with more than 1."""
SHOWN = 20


@dataclass
class Check:
    """Figures of a shard, or of several added up."""

    report: SetReport = field(default_factory=SetReport)
    speakers: set[str] = field(default_factory=set)
    durations: Counter[str] = field(default_factory=Counter)
    density: Counter[str] = field(default_factory=Counter)
    """output frames that CTC needs, over those there are"""

    def add(self, other: Check) -> None:
        self.report.add(other.report)
        self.speakers |= other.speakers
        self.durations += other.durations
        self.density += other.density


def check_shard(shard: Shard, tokenizer: PhoneTokenizer, limits: FilterLimits, audio: bool, factor: int) -> Check:
    """Figures of one shard; a damaged item is counted and named in `report.unreadable`."""
    check, encode, reader = Check(), TargetEncoder(tokenizer), AudioReader()
    judge = TrainingFilter(encode, limits, factor)
    for utterance in read_shard(shard, check.report.unreadable):
        if audio:
            try:
                reader(utterance)
            except AudioError as error:
                check.report.unreadable.add(str(error), utterance.id)
                continue
        count_utterance(check.report, utterance, judge(utterance))
        check.speakers.add(utterance.speaker)
        check.durations[_class(utterance.duration, EDGES, "s")] += 1
        frames = num_output_frames(utterance.num_samples, factor)
        tokens = tokenizer.encode(encode.text(utterance.text))
        check.density[_class(frames_needed(tokens) / max(1, frames), SHARES, "")] += 1
    check.speakers.discard("")
    check.report.unknown = encode.unknown
    reader.close()
    return check


def check_folder(folder: Path, work: Any, jobs: int, index_dir: Path | None) -> Check:
    """Figures of a folder. Raises DataError where it has no shards that can be read."""
    shards = find_shards(folder, index_dir)
    total = Check()
    # Processes start with the first task, so that one job runs in this one.
    with ProcessPoolExecutor(min(jobs, len(shards))) as pool:
        parts = map(work, shards) if jobs == 1 else pool.map(work, shards)
        for part in tqdm(parts, desc=str(folder), total=len(shards), disable=None):
            total.add(part)
    return total


def figures(check: Check) -> dict[str, Any]:
    """What --json writes about a folder."""
    report = check.report
    return {
        "cuts": report.cuts,
        "hours": round(report.seconds / 3600, 4),
        "trained_cuts": report.kept,
        "trained_hours": round(report.kept_seconds / 3600, 4),
        "languages": dict(report.languages.most_common()),
        "speakers": len(check.speakers),
        "durations": {name: check.durations[name] for name in _classes(EDGES, "s")},
        "frames_needed": {name: check.density[name] for name in _classes(SHARES, "")},
        "unknown_symbols": dict(report.unknown.unknown.most_common()),
        "left_out": dict(report.filtered.counts),
        "damaged": dict(report.unreadable.counts),
        "damaged_examples": dict(report.unreadable.examples),
    }


def table(name: str, found: dict[str, Any]) -> list[str]:
    """Lines about a folder."""
    listed = (
        ("languages", found["languages"]),
        ("durations", found["durations"]),
        ("output frames needed", found["frames_needed"]),
        ("unknown symbols", found["unknown_symbols"]),
        ("left out of training", found["left_out"]),
        ("damaged", found["damaged"]),
    )
    lines = [
        name,
        f"  {'utterances':<22}{found['cuts']:>12,}  {found['hours']:>10.2f} h",
        f"  {'trained on':<22}{found['trained_cuts']:>12,}  {found['trained_hours']:>10.2f} h",
        f"  {'speakers':<22}{found['speakers']:>12,}",
    ]
    for title, counts in listed:
        lines.append(f"  {title + (':' if counts else ': none')}")
        lines += [f"    {key or '(none)':<54}{count:>12,}" for key, count in list(counts.items())[:SHOWN]]
        if len(counts) > SHOWN:
            lines.append(f"    ... and {len(counts) - SHOWN} more")
    for reason, names in found["damaged_examples"].items():
        lines.append(f"    {reason}: {', '.join(names)}")
    return lines


def _classes(edges: Sequence[float], unit: str) -> list[str]:
    pairs = zip((0, *edges), edges, strict=False)
    return [*(f"{low:g} to {high:g} {unit}".strip() for low, high in pairs), f"above {edges[-1]:g} {unit}".strip()]


def _class(value: float, edges: Sequence[float], unit: str) -> str:
    return _classes(edges, unit)[sum(value > edge for edge in edges)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--audio", action="store_true", help="decode all audio; slow")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when anything is damaged")
    parser.add_argument("--filters", choices=("published", "alignable"), default="published", help="limits of training")
    parser.add_argument("--output-downsampling-factor", type=positive_int, default=1, help="of the model, 1 or 2")
    parser.add_argument("--phones", type=Path, help="table of phones (default: the project's own)")
    parser.add_argument("--index-dir", type=Path, help="for indexes of shards that lie where nothing can be written")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes")
    args = parser.parse_args()
    work = partial(
        check_shard,
        tokenizer=load_tokenizer(args.phones),
        limits=FilterLimits() if args.filters == "published" else ALIGNABLE_ONLY,
        audio=args.audio,
        factor=args.output_downsampling_factor,
    )
    results: dict[str, Any] = {}
    failed = []
    for folder in args.folders:
        try:
            found = figures(check_folder(folder, work, args.jobs, args.index_dir))
        except DataError as error:
            results[str(folder)] = {"error": str(error)}
            failed.append(str(error))
            continue
        results[str(folder)] = found
        print("\n".join(table(str(folder), found)))
        if not found["trained_cuts"]:
            failed.append(f"{folder}: nothing is left to train on")
        elif args.strict and found["damaged"]:
            failed.append(f"{folder}: {sum(found['damaged'].values())} damaged items")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for message in failed:
        logging.error("%s", message)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run(main)
