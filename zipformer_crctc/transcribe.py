"""Transcribe recordings: `python zipformer_crctc/transcribe.py --model MODEL FILE_OR_FOLDER ...`.

Takes audio files of any length, rate and number of channels, folders, patterns and `-` for standard input. Prints the
phones, or writes them to files with --output-dir. Exit status 1 says that some recordings could not be used; they are
named on standard error. `--help` lists the flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from zipformer_crctc.commandline import run_program
from zipformer_crctc.recognizerflags import ModelFlags, RecognizerArgs, parse_recognizer_args
from zipformer_crctc.results import write_atomically
from zipformer_crctc.shar import Skipped
from zipformer_crctc.sources import find_sources
from zipformer_crctc.timefiles import ctm, join_marks, write_time_files
from zipformer_crctc.times import TimeCorrection
from zipformer_crctc.transcriber import PAUSES, SPLITS, PhoneRecognizer, Transcription

logger = logging.getLogger(__name__)

DECODE_FIELDS = (
    *("decoding_method", "beam", "lm", "lm_weight", "insertion_bonus", "top_tokens", "blank_skip", "inventory"),
    *("blank_penalty", "published_padding", "time_correction", "device", "precision", "num_threads"),
)
"""The fields of DecodeConfig that are flags here too."""
PRINTED = ("text", "jsonl", "ctm")
FORMATS = (*PRINTED, "textgrid", "srt")
NAME = "transcripts"


@dataclass(frozen=True)
class TranscribeConfig(ModelFlags):
    """Which model transcribes, how recordings are cut, and where the results go."""

    program = "transcribe"
    use_averaged_model: bool = True
    """Average all batches between two checkpoints, by their running averages, where they hold them."""
    bpe_model: Path | None = None
    """SentencePiece model file of the tokenizer; without it the model's own, else the built-in table."""
    chunk_size: int | None = None
    """Causal models: chunk in frames of 20 ms; without it the widest of the training, -1 is no limit."""
    left_context_frames: int | None = None
    """Causal models: left context in frames of 20 ms; without it the widest of the training, -1 is no limit."""
    channel: int | None = None
    """Channel to take, from 1; without it the mean of all."""
    window: float = 30.0
    """Longest stretch in seconds that the model gets at once; longer recordings are cut."""
    overlap: float = 4.0
    """Overlap of two windows in seconds."""
    split: str = PAUSES
    """How longer recordings are cut: pauses (windows only where there is none), or windows wherever they fall."""
    min_pause: float = 0.25
    """Shortest pause in seconds that a recording is cut in."""
    batch_seconds: float = 240.0
    """Audio in a batch in seconds, padding included."""
    output_dir: Path | None = None
    """Folder for the results; without it they are printed."""
    output_formats: tuple[str, ...] = ("text",)
    """Comma list of text, jsonl, ctm, textgrid and srt; the last two need --output-dir, which takes several."""
    progress: bool = True
    """Show a progress bar where standard error is a terminal."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; status 2 for a bad configuration or model, 1 where some recordings could not be used."""
    run_program("transcribe.py", lambda: parse_args(argv), run)


def parse_args(argv: Sequence[str] | None = None) -> RecognizerArgs[TranscribeConfig]:
    """The checked configuration. Raises ConfigError; exits with status 2 for unknown flags and with 0 for --help."""
    parser = argparse.ArgumentParser(description="Transcribe recordings to IPA phones.", allow_abbrev=False)
    parser.add_argument("inputs", nargs="*", metavar="AUDIO", help="files, folders, patterns; - is standard input")
    return parse_recognizer_args(parser, TranscribeConfig, DECODE_FIELDS, argv, _problems)


def _problems(config: TranscribeConfig, inputs: Sequence[str]) -> list[str]:
    problems = []
    if not inputs:
        problems.append("no audio: name files, folders or patterns, or - for standard input.")
    if unknown := [name for name in config.output_formats if name not in FORMATS]:
        problems.append(f"--output-formats {','.join(unknown)}: unknown; give any of {','.join(FORMATS)}.")
    elif config.output_dir is None and (len(config.output_formats) > 1 or config.output_formats[0] not in PRINTED):
        problems.append(
            f"--output-formats {','.join(config.output_formats)}: without --output-dir one of {','.join(PRINTED)} is "
            "printed; give --output-dir."
        )
    if config.channel is not None and config.channel < 1:
        problems.append(f"--channel {config.channel}: must be at least 1.")
    if config.split not in SPLITS:
        problems.append(f"--split {config.split}: must be {' or '.join(SPLITS)}.")
    return problems


def run(args: RecognizerArgs[TranscribeConfig]) -> None:
    """Transcribe everything; exits with status 1 where some recordings could not be used."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    for warning in args.warnings:
        logger.warning(warning)
    config = args.config
    sources = find_sources(args.inputs, channel=config.channel)
    if not sources:
        raise ValueError(f"{' '.join(args.inputs)}: no audio files there; name others")
    skipped, results = Skipped(max_examples=None), []
    for result in _recognizer(args).stream(sources, config.progress):
        if result.problem is not None:
            skipped.add(result.problem, result.audio)
        if config.output_dir is not None:
            results.append(result)
        elif result.problem is None or config.output_formats[0] == "jsonl":
            print(formatted(result, config.output_formats[0]), end="", flush=True)
    if config.output_dir is not None:
        write_transcriptions(config.output_dir, config.output_formats, results)
        logger.info("results are in %s", config.output_dir)
    if skipped.total:
        logger.warning("not transcribed, %d of %d recordings: %s", skipped.total, len(sources), skipped.report())
        sys.exit(1)


def _recognizer(args: RecognizerArgs[TranscribeConfig]) -> PhoneRecognizer:
    config, decode = args.config, args.decode
    return args.load(
        use_averaged_model=config.use_averaged_model,
        bpe_model=config.bpe_model,
        published_padding=decode.published_padding,
        chunk_size=config.chunk_size,
        left_context_frames=config.left_context_frames,
        correction=TimeCorrection.read(decode.time_correction) if decode.time_correction else None,
        window=config.window,
        overlap=config.overlap,
        split=config.split,
        min_pause=config.min_pause,
        batch_seconds=config.batch_seconds,
    )


def formatted(result: Transcription, kind: str) -> str:
    """One result as text (id, a tab, the phones with spaces between them), as a line of JSON, or as CTM lines."""
    if kind == "jsonl":
        return json.dumps(asdict(result), ensure_ascii=False) + "\n"
    if kind == "ctm":
        return ctm([result.timed()])
    return f"{result.id}\t{' '.join(segment.phone for segment in join_marks(result.segments))}\n"


def write_transcriptions(folder: Path, formats: Sequence[str], results: Sequence[Transcription]) -> None:
    """Write `transcripts.txt`, `transcripts.jsonl` and the files of `write_time_files`: those that `formats` lists.

    Recordings that could not be used stand in the JSON lines only.
    """
    good = [result for result in results if result.problem is None]
    if "text" in formats:
        write_atomically(folder / f"{NAME}.txt", "".join(formatted(result, "text") for result in good))
    if "jsonl" in formats:
        write_atomically(folder / f"{NAME}.jsonl", "".join(formatted(result, "jsonl") for result in results))
    write_time_files(folder, NAME, formats, [result.timed() for result in good])


if __name__ == "__main__":
    main()
