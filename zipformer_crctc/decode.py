"""Decode test sets with a trained model and score them: `python zipformer_crctc/decode.py --exp-dir DIR --iter 2000`.

Writes transcripts, error statistics and JSON lines to a folder in --exp-dir and prints tables of PER and PFER by
language. `--help` lists the flags.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.config import DecodeConfig
from zipformer_crctc.filters import alignment_problem
from zipformer_crctc.loader import BatchLoader
from zipformer_crctc.methods import Search, build_search, search_suffix
from zipformer_crctc.recogniser import Recogniser, choose_test_sets, eval_loader, load_recogniser, result_suffix
from zipformer_crctc.results import UtteranceResult, write_atomically, write_results
from zipformer_crctc.search import naming
from zipformer_crctc.table import score_table
from zipformer_crctc.text import UnknownSymbols, normalise
from zipformer_crctc.timefiles import TimedUtterance, write_time_files
from zipformer_crctc.times import TimeCorrection, hypothesis_segments
from zipformer_crctc.tracking import set_up_logging

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration, missing data or an unfit checkpoint ends it with status 2 and one message."""
    run_program("decode.py", lambda: parse_decode_args(argv), run)


def run(args: DecodeArgs) -> None:
    """Decode every test set, write its files and print its table."""
    decode = args.decode
    folder = _results_folder(decode)
    sets = choose_test_sets(decode.test_sets, args.data.data_config)
    correction = TimeCorrection.read(decode.time_correction) if decode.time_correction else None
    recogniser = load_recogniser(args)
    search = build_search(decode, recogniser.tokenizer, recogniser.device, recogniser.factor)
    set_up_logging(folder / "log", rank=0, world_size=1, name="decode")
    for warning in args.warnings:
        logger.warning(warning)
    loaders = {name: eval_loader(args, path) for name, path in sets.items()}
    suffix = result_suffix(decode, recogniser.config) + search_suffix(decode)
    for name, loader in loaders.items():
        results = decode_set(recogniser, loader, args.data.remove_diacritics, search, correction)
        write_results(folder, name, suffix, decode.decoding_method, results)
        timed = [TimedUtterance(result.id, result.duration or 0.0, result.segments()) for result in results]
        write_time_files(folder, f"{name}-{suffix}", decode.output_formats, timed)
        table = score_table(results)
        write_atomically(folder / f"config-{name}-{suffix}.json", args.to_json() + "\n")
        write_atomically(folder / f"summary-{name}-{suffix}.md", f"# {name}\n\n{table.markdown()}\n")
        print(f"\n{name}\n{table.plain()}", flush=True)
    logger.info("results are in %s", folder)


@torch.inference_mode()
def decode_set(
    recogniser: Recogniser,
    loader: BatchLoader,
    without_diacritics: bool = False,
    search: Search | None = None,
    correction: TimeCorrection | None = None,
) -> list[UtteranceResult]:
    """Decode every utterance of a loader.

    Args:
        recogniser: the model.
        loader: of a set that is scored.
        without_diacritics: delete diacritics from the references.
        search: from log-probs to hypotheses; None is the greedy one.
        correction: of the times; None is the default one.
    """
    results, unalignable = [], []
    unknown = UnknownSymbols()
    tokenizer, factor = recogniser.tokenizer, recogniser.factor
    search = search or build_search(DecodeConfig(), tokenizer, recogniser.device, factor)
    started, seconds = time.monotonic(), 0.0
    for batch in loader:
        if batch.is_empty:
            continue
        log_probs, lengths = recogniser.log_probs(batch)
        with naming([utterance.id for utterance in batch.utterances]):
            found = search(log_probs, lengths)
        best = [hypotheses[0] for hypotheses in found]
        durations = [utterance.duration for utterance in batch.utterances]
        segments = hypothesis_segments(log_probs, lengths, best, durations, tokenizer, factor, correction)
        for utterance, hypotheses, timed in zip(batch.utterances, found, segments, strict=True):
            text = normalise(utterance.text, tokenizer.pieces, unknown.dropped, without_diacritics)
            unknown.add(text, tokenizer)
            if alignment_problem(tokenizer.encode(text), utterance.num_samples, factor) is not None:
                unalignable.append(utterance.id)
            result = UtteranceResult.of(
                utterance.id, text, hypotheses[0], tokenizer, utterance.language, utterance.speaker, hypotheses
            )
            results.append(result.with_segments(timed, utterance.duration))
        seconds += batch.seconds
    elapsed = time.monotonic() - started
    logger.info("%d utterances, %.0f s of audio in %.1f s", len(results), seconds, elapsed)
    for what in (loader.order.skipped, loader.skipped):
        if what.total:
            logger.warning("not decoded: %s", what.report())
    if unalignable:
        logger.warning("references with more phones than frames (scored all the same): %s", ", ".join(unalignable))
    if report := unknown.report():
        logger.warning("references: %s", report)
    return results


def _results_folder(decode: DecodeConfig) -> Path:
    base = decode.exp_dir if decode.checkpoint is None else decode.checkpoint.parent
    return base / decode.decoding_method


if __name__ == "__main__":
    main()
