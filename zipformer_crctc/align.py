"""Align given IPA transcriptions with audio: `python zipformer_crctc/align.py --exp-dir DIR --iter 2000 --table FILE`.

Takes the texts of shar sets (--test-sets, as decode.py) or of a table of audio files (--table), and writes JSON lines,
CTM and Praat TextGrids with the start, the end and the confidence of every phone. `--help` lists the flags.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from zipformer_crctc.audiotable import read_audio_table, table_batches
from zipformer_crctc.checks import check_no_search
from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.config import DecodeConfig
from zipformer_crctc.flags import raise_if_any
from zipformer_crctc.forced_alignment import force_align
from zipformer_crctc.loader import Batch
from zipformer_crctc.recogniser import Recogniser, choose_test_sets, eval_loader, load_recogniser, result_suffix
from zipformer_crctc.results import write_atomically
from zipformer_crctc.shar import Skipped, Utterance
from zipformer_crctc.text import UnknownSymbols, normalise
from zipformer_crctc.timefiles import TimedUtterance, write_time_files
from zipformer_crctc.times import Segment, TimeCorrection, phone_segments
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.tracking import set_up_logging

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class AlignConfig:
    """What is aligned besides sets, and where the results go."""

    table: Path | None = None
    """Table (tsv or csv) with the columns audio and text (and id, language, speaker if there), not --test-sets."""
    output_dir: Path | None = None
    """Folder for the results; without it the folder alignment beside the checkpoints."""


@dataclass(frozen=True)
class AlignedUtterance:
    """A transcription in time; a line of the JSON lines."""

    id: str
    text: str
    """The transcription as it was aligned: normalised."""
    phones: list[str] = field(default_factory=list)
    """Its phones without word boundaries and unknown symbols; empty where there is a problem."""
    starts: list[float] = field(default_factory=list)
    """Where each phone begins, in seconds from the start of the audio."""
    ends: list[float] = field(default_factory=list)
    """Where each phone ends, in seconds."""
    confidence: list[float] = field(default_factory=list)
    """The mean posterior of each phone over its frames."""
    score: float | None = None
    """Log-probability of the best path through the text, in nats."""
    duration: float = 0.0
    """Seconds of audio."""
    language: str = ""
    speaker: str = ""
    unknown: list[str] = field(default_factory=list)
    """Symbols of the text without a piece; they were left out."""
    problem: str | None = None
    """Why the text could not be aligned; None where it was."""

    def timed(self) -> TimedUtterance:
        """What CTM and TextGrid need."""
        values = zip(self.phones, self.starts, self.ends, self.confidence, strict=True)
        return TimedUtterance(self.id, self.duration, [Segment(*value) for value in values])


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration, missing data or an unfit checkpoint ends it with status 2 and one message."""
    run_program(
        "align.py", lambda: parse_decode_args(argv, AlignConfig, "Align given IPA transcriptions with audio."), run
    )


def run(args: DecodeArgs) -> None:
    """Align every set, or the table, and write the files of each."""
    decode, own = args.decode, args.own
    _check(decode, own)
    skipped = Skipped(max_examples=None)
    rows = read_audio_table(own.table, skipped) if own.table else []
    sets = {} if own.table else choose_test_sets(decode.test_sets, args.data.data_config)
    correction = TimeCorrection.read(decode.time_correction) if decode.time_correction else TimeCorrection()
    recogniser = load_recogniser(args)
    beside = decode.exp_dir if decode.checkpoint is None else decode.checkpoint.parent
    folder = own.output_dir or beside / "alignment"
    set_up_logging(folder / "log", rank=0, world_size=1, name="align")
    for warning in args.warnings:
        logger.warning(warning)
    suffix = result_suffix(decode, recogniser.config)
    batches: dict[str, Iterable[Batch]] = {name: eval_loader(args, path) for name, path in sets.items()}
    if own.table:
        batches[own.table.stem] = table_batches(rows, args.data.max_duration, skipped)
    for name, source in batches.items():
        aligned = align_set(recogniser, source, args.data.remove_diacritics, correction)
        # The loader logs what it skips; a table's reader only counts it.
        if own.table and skipped.total:
            logger.warning("%s: not aligned: %s", name, skipped.report())
        write_aligned(folder, f"{name}-{suffix}", decode.output_formats, aligned)
        print(summary(name, aligned), flush=True)
    logger.info("results are in %s", folder)


def _check(decode: DecodeConfig, own: AlignConfig) -> None:
    """Raise ValueError for flags that contradict what this program does."""
    if own.table and decode.test_sets:
        raise ValueError(
            f"--table {own.table} with --test-sets {','.join(decode.test_sets)}: give one of them; "
            "run the program twice for both"
        )
    raise_if_any(check_no_search(decode))


@torch.inference_mode()
def align_set(
    recogniser: Recogniser,
    batches: Iterable[Batch],
    without_diacritics: bool = False,
    correction: TimeCorrection | None = None,
) -> list[AlignedUtterance]:
    """Align the text of every utterance; those that cannot be are there too, with the reason.

    Args:
        recogniser: the model.
        batches: features and texts.
        without_diacritics: delete diacritics from the texts.
        correction: of the times; None is the default one.
    """
    results: list[AlignedUtterance] = []
    unknown = UnknownSymbols()
    tokenizer, factor = recogniser.tokenizer, recogniser.factor
    for batch in batches:
        if batch.is_empty:
            continue
        texts = [normalise(text, tokenizer.pieces, unknown.dropped, without_diacritics) for text in batch.texts]
        for text in texts:
            unknown.add(text, tokenizer)
        targets = [known_tokens(text, tokenizer) for text in texts]
        log_probs, lengths = recogniser.log_probs(batch)
        alignments = force_align(log_probs, lengths, targets)
        for n, (utterance, text, alignment) in enumerate(zip(batch.utterances, texts, alignments, strict=True)):
            problem = text_problem(text, targets[n], tokenizer) or alignment.problem
            segments: list[Segment] = []
            if problem is None:
                frames = log_probs[n, : lengths[n]]
                segments = phone_segments(frames, alignment, utterance.duration, tokenizer, factor, correction)
            score = alignment.score if problem is None else None
            results.append(_result(utterance, text, segments, score, unknown_symbols(text, tokenizer), problem))
    if report := unknown.report():
        logger.warning("texts (unknown symbols are left out of the alignment): %s", report)
    failed = failures(results)
    if failed.total:
        logger.warning("not aligned: %s", failed.report())
    return results


def known_tokens(text: str, tokenizer: PhoneTokenizer) -> list[int]:
    """The tokens of a normalised text without `<unk>`, which no model gives: its place would be chance."""
    return [token for token in tokenizer.encode(text) if token != tokenizer.unk_id]


def unknown_symbols(text: str, tokenizer: PhoneTokenizer) -> list[str]:
    """The stretches of a normalised text that have no piece, in its order."""
    pairs = zip(tokenizer.encode(text), tokenizer.surfaces(text), strict=True)
    return [surface for token, surface in pairs if token == tokenizer.unk_id]


def text_problem(text: str, tokens: Sequence[int], tokenizer: PhoneTokenizer) -> str | None:
    """Why there is nothing to align in a normalised text with these known tokens; None if there is."""
    if not text:
        return "no text"
    if not set(tokens) - {tokenizer.boundary_id}:
        return "no known phone in the text"
    return None


def _result(
    utterance: Utterance,
    text: str,
    segments: Sequence[Segment],
    score: float | None,
    unknown: list[str],
    problem: str | None,
) -> AlignedUtterance:
    return AlignedUtterance(
        id=utterance.id,
        text=text,
        phones=[segment.phone for segment in segments],
        starts=[segment.start for segment in segments],
        ends=[segment.end for segment in segments],
        confidence=[segment.confidence for segment in segments],
        score=score,
        duration=utterance.duration,
        language=utterance.language,
        speaker=utterance.speaker,
        unknown=unknown,
        problem=problem,
    )


def failures(results: Iterable[AlignedUtterance]) -> Skipped:
    """The utterances that could not be aligned, by reason."""
    failed = Skipped(max_examples=None)
    for result in results:
        if result.problem is not None:
            failed.add(result.problem.split(":")[0], result.id)
    return failed


def summary(name: str, results: Sequence[AlignedUtterance]) -> str:
    """One line for a person."""
    good = [result for result in results if result.problem is None]
    phones = sum(len(result.phones) for result in good)
    line = f"{name}: {len(good)} of {len(results)} utterances aligned, {phones} phones"
    reasons = failures(results).counts
    return line + "".join(f"; {count} not: {reason}" for reason, count in reasons.most_common())


def write_aligned(folder: Path, name: str, formats: Sequence[str], results: Sequence[AlignedUtterance]) -> None:
    """Write `alignment-{name}.jsonl` with all utterances, and CTM and TextGrids of those that were aligned."""
    ordered = sorted(results, key=lambda result: result.id)
    lines = "".join(json.dumps(asdict(result), ensure_ascii=False) + "\n" for result in ordered)
    write_atomically(folder / f"alignment-{name}.jsonl", lines)
    write_time_files(folder, name, formats, [result.timed() for result in ordered if result.problem is None])


if __name__ == "__main__":
    main()
