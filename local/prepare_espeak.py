"""espeak -> shar: synthetic speech in many languages, with the phones and their times; needs no download.

Random words of each language (package wordfreq), spoken by voices of espeak-ng, an external GPL-3 library. Words and
voices of dev and test do not occur in train. The same options give the same bytes, whatever the number of processes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import multiprocessing
import random
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from tqdm import tqdm

from local.command import positive_int, run
from local.espeak_library import Espeak, EspeakError, Speech
from local.espeak_text import Language, WordSource, choose_languages, sentence
from local.espeak_voices import UnclearName, draw_speaker, phones_of
from local.shar import SAMPLING_RATE, Recording, ShardStats, write_shard
from zipformer_crctc.sharwriter import cuts_name
from zipformer_crctc.tokenizer import PhoneTokenizer

SECONDS = (2.0, 10.0)
"""Shortest and longest utterance."""
MEAN_SECONDS = 6.0
SECONDS_PER_WORD_AT_RATE = 75.0
"""A word takes about this over the rate in words per minute."""
OPTIONS_FILE = "espeak.json"
"""In the output folder: what its shards were made with."""
MAX_SHARD = 1000
"""Utterances in a shard."""
MAX_ATTEMPTS = 50
"""Sentences tried for one utterance."""
MAX_PEAK = 0.95
"""Louder utterances are scaled down to it."""
SILENCE_SECONDS = (0.05, 0.3)
"""Silence before and after the speech, drawn for each."""


@dataclass(frozen=True)
class ShardJob:
    """One shard to be made, by a process of its own."""

    split: str
    number: int
    first: int
    """Number of its first utterance in the split."""
    count: int
    languages: tuple[Language, ...]
    seed: int
    folder: Path


@dataclass
class ShardResult:
    """What was made, by language, and the sentences that were drawn anew, by reason."""

    stats: ShardStats
    utterances: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    redrawn: Counter[str] = field(default_factory=Counter)


_SOURCES: dict[tuple[str, str], WordSource] = {}


def word_source(language: Language, split: str) -> WordSource:
    """The words of a language and split, read once per process and inherited by forked ones."""
    key = (language.code, split)
    if key not in _SOURCES:
        _SOURCES[key] = WordSource(language, split)
    return _SOURCES[key]


def make_shard(job: ShardJob) -> ShardResult:
    """Synthesise and write one shard.

    A process makes one shard only: the state of the library would make the samples depend on what came before.
    """
    generator = random.Random(f"espeak {job.seed} {job.split} {job.number}")
    espeak, tokenizer = Espeak(seed=generator.getrandbits(31)), PhoneTokenizer.from_table()
    result = ShardResult(ShardStats(job.number))

    def recordings() -> Iterator[Recording]:
        for index in range(job.first, job.first + job.count):
            language = job.languages[index % len(job.languages)]
            recording = make_utterance(espeak, tokenizer, job.split, index, language, generator, result.redrawn)
            result.utterances[language.code] += 1
            seconds = len(recording.audio) / SAMPLING_RATE
            result.seconds[language.code] = result.seconds.get(language.code, 0.0) + seconds
            yield recording

    result.stats = write_shard(recordings(), job.folder, job.number)
    return result


def make_utterance(
    espeak: Espeak,
    tokenizer: PhoneTokenizer,
    split: str,
    index: int,
    language: Language,
    generator: random.Random,
    redrawn: Counter[str],
) -> Recording:
    """One utterance of a random speaker; sentences of other lengths or with unclear phones are drawn anew.

    Raises ValueError if that does not succeed.
    """
    speaker, voice = draw_speaker(split, generator), generator.choice(language.voices)
    seconds = generator.uniform(*SECONDS)
    for _ in range(MAX_ATTEMPTS):
        words = max(1, round(seconds * speaker.prosody.rate / SECONDS_PER_WORD_AT_RATE))
        text = sentence(word_source(language, split).draw(words, generator), generator)
        speech = espeak.speak(text, voice, speaker.variant, speaker.prosody)
        try:
            audio, alignment = cut_out(speech, espeak.sampling_rate, tokenizer, generator)
        except UnclearName as error:
            redrawn[f"{language.code}: {error}"] += 1
            continue
        length = len(audio) / SAMPLING_RATE
        if alignment and SECONDS[0] <= length <= SECONDS[1]:
            break
        redrawn["too short or too long"] += 1
        seconds = min(max(seconds * min(max(seconds / length, 0.5), 1.5), 1.0), SECONDS[1])
    else:
        raise ValueError(f"language {language.code}: no usable sentence in {MAX_ATTEMPTS}: {dict(redrawn)}")
    return Recording(
        id=f"espeak-{split}-{index:07d}-{language.code}",
        audio=audio,
        text="".join(phones for phones, _, _ in alignment),
        language=language.code,
        speaker=f"espeak-{speaker.variant}",
        alignment=alignment,
        custom={"orthography": text, "voice": voice, **asdict(speaker.prosody)},
    )


def cut_out(
    speech: Speech, rate: int, tokenizer: PhoneTokenizer, generator: random.Random
) -> tuple[np.ndarray, tuple[tuple[str, float, float], ...]]:
    """The audio at 16 kHz with a little silence around it, and its phones as (phones, start, duration) in seconds.

    Marks that espeak-ng names as events of their own are joined to the phone before. Raises UnclearName.
    """
    ends = [event.start for event in speech.events[1:]] + [len(speech.samples)]
    spans: list[tuple[str, int, int]] = []
    for event, end in zip(speech.events, ends, strict=True):
        phones = phones_of(event, tokenizer)
        if not phones:
            continue
        is_mark = unicodedata.category(phones[0]) in ("Mn", "Lm")
        if spans and (is_mark or end <= event.start):
            previous, start, old_end = spans.pop()
            # A palatalised consonant may be followed by an event that marks it as such once more.
            joined = previous if is_mark and previous.endswith(phones) else previous + phones
            spans.append((joined, start, max(old_end, end)))
        else:
            spans.append((phones, event.start, end))
    if not spans:
        return np.zeros(0, dtype=np.float32), ()
    before, after = (int(generator.uniform(*SILENCE_SECONDS) * rate) for _ in range(2))
    samples = speech.samples.astype(np.float32) / 32768.0
    first, last = spans[0][1], spans[-1][2]
    padded = np.concatenate([np.zeros(before, np.float32), samples[first:last], np.zeros(after, np.float32)])
    alignment = tuple((phones, (start - first + before) / rate, (end - start) / rate) for phones, start, end in spans)
    audio = soxr.resample(padded, rate, SAMPLING_RATE).astype(np.float32)
    # The filter swings beyond the samples that it was given; a few voices come close to full scale.
    return audio * min(1.0, MAX_PEAK / max(float(np.abs(audio).max()), MAX_PEAK)), alignment


def plan(split: str, hours: float, languages: tuple[Language, ...], seed: int, output: Path) -> list[ShardJob]:
    """The shards of a split: at least eight of a large one, so that loaders and ranks can share them."""
    count = max(len(languages), round(hours * 3600 / MEAN_SECONDS))
    size = min(MAX_SHARD, max(50, -(-count // 8)))
    return [
        ShardJob(split, number, first, min(size, count - first), languages, seed, output / split)
        for number, first in enumerate(range(0, count, size))
    ]


def package_versions() -> dict[str, str]:
    """The versions of the packages that decide about the result. Raises EspeakError for a missing one."""
    versions = {}
    for package in ("espeakng-loader", "wordfreq"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise EspeakError(
                f"the corpus espeak needs the package {package}, which is not installed: pip install {package}"
            ) from error
    return versions


def keep_options(output: Path, options: dict[str, Any]) -> None:
    """Write the options to output/espeak.json, so that a later run knows whether the shards there are its own.

    Raises ValueError if there are shards made with other options.
    """
    record = output / OPTIONS_FILE
    if any(output.glob("*/cuts.*.jsonl.gz")):
        before = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
        changed = [
            f"{name}: {before.get(name, 'not known')}, now {value}"
            for name, value in options.items()
            if before.get(name) != value
        ]
        if changed:
            raise ValueError(
                f"{output} holds shards that were made with other options ({'; '.join(changed)}): "
                "remove the folder, or choose another --output"
            )
    output.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(options, indent=2) + "\n", encoding="utf-8")


def prepare(
    output: Path, hours: float, dev_minutes: float, test_minutes: float, languages: Sequence[str], jobs: int, seed: int
) -> None:
    """Write output/{train,dev,test}; shards that are there already are kept.

    Raises ValueError for an unknown language and for shards made with other options, EspeakError without espeak-ng.
    """
    chosen = choose_languages(languages)
    keep_options(
        output,
        {
            "hours": hours,
            "dev_minutes": dev_minutes,
            "test_minutes": test_minutes,
            "languages": [language.code for language in chosen],
            "seed": seed,
            **package_versions(),
        },
    )
    lengths = {"train": hours, "dev": dev_minutes / 60, "test": test_minutes / 60}
    planned = [job for split, length in lengths.items() for job in plan(split, length, chosen, seed, output)]
    missing = [job for job in planned if not (job.folder / cuts_name(job.number)).is_file()]
    if len(missing) < len(planned):
        logging.info("%d of %d shards are there already", len(planned) - len(missing), len(planned))
    for split in lengths:
        for language in chosen:
            word_source(language, split)
    # Forked processes share the word lists; the library is loaded in the children only.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    totals = {split: ShardResult(ShardStats(0)) for split in lengths}
    with multiprocessing.get_context(method).Pool(jobs, maxtasksperchild=1) as pool:
        results = pool.imap(make_shard, missing, chunksize=1)
        for job, result in zip(missing, tqdm(results, total=len(missing), desc="shards", disable=None), strict=True):
            total = totals[job.split]
            total.utterances += result.utterances
            total.redrawn += result.redrawn
            for code, seconds in result.seconds.items():
                total.seconds[code] = total.seconds.get(code, 0.0) + seconds
        # Leaving the block ends workers by a signal, which one just being forked can miss: let them finish first.
        pool.close()
        pool.join()
    for split, total in totals.items():
        _report(split, total)


def _report(split: str, total: ShardResult) -> None:
    if not total.utterances:
        return
    by_language = ", ".join(f"{code} {seconds / 60:.1f}" for code, seconds in sorted(total.seconds.items()))
    logging.info(
        "%s: %d utterances, %.2f h (minutes by language: %s)",
        split,
        total.utterances.total(),
        sum(total.seconds.values()) / 3600,
        by_language,
    )
    if total.redrawn:
        reasons = ", ".join(f"{count} x {reason}" for reason, count in total.redrawn.most_common(8))
        logging.info("%s: %d sentences drawn anew: %s", split, total.redrawn.total(), reasons)


def positive_float(text: str) -> float:
    """For argparse."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for train, dev and test")
    parser.add_argument("--hours", type=positive_float, default=6.0, help="hours of training speech (default: 6)")
    parser.add_argument("--dev-minutes", type=positive_float, default=8.0, help="minutes of dev speech (default: 8)")
    parser.add_argument("--test-minutes", type=positive_float, default=8.0, help="minutes of test speech (default: 8)")
    parser.add_argument("--languages", default="", help="codes, comma-separated (default: see espeak_languages.tsv)")
    parser.add_argument("--jobs", type=positive_int, default=1, help="processes")
    parser.add_argument("--seed", type=int, default=42, help="another seed gives other speech")
    args = parser.parse_args()
    codes = [code for code in args.languages.split(",") if code]
    prepare(args.output, args.hours, args.dev_minutes, args.test_minutes, codes, args.jobs, args.seed)


if __name__ == "__main__":
    run(main)
