"""Decode test sets with a trained model and score them: `python zipformer_crctc/decode.py --exp-dir DIR --iter 2000`.

Writes transcripts, error statistics and JSON lines to a folder in --exp-dir and prints tables of PER and PFER by
language. `--help` lists the flags.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.nn import functional as F

from zipformer_crctc import checkpoint
from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, resolve_model
from zipformer_crctc.config import DecodeConfig, ModelConfig, config_from_dict, model_from_published
from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.distributed import choose_device
from zipformer_crctc.features import LOG_EPS
from zipformer_crctc.filters import alignment_problem
from zipformer_crctc.loader import BatchLoader, build_eval_loader
from zipformer_crctc.methods import Search, build_search, search_suffix
from zipformer_crctc.model import CtcModel, build_model
from zipformer_crctc.model_sizes import sizes_from_state_dict
from zipformer_crctc.results import UtteranceResult, file_suffix, write_atomically, write_results
from zipformer_crctc.table import score_table
from zipformer_crctc.text import UnknownSymbols, normalise, remove_diacritics
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.tracking import set_up_logging

logger = logging.getLogger(__name__)

CAUSAL_PADDING = 30
"""Feature frames of silence appended for a causal model, so that its last chunk sees the end of the speech."""


@dataclass(frozen=True)
class Recogniser:
    """A model ready to decode, and the tokenizer it was trained with."""

    model: CtcModel
    tokenizer: PhoneTokenizer
    config: ModelConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration, missing data or an unfit checkpoint ends it with status 2 and one message."""
    try:
        args = parse_decode_args(argv)
        if args.print_config:
            print(args.to_json())
            return
        run(args)
    except ValueError as error:  # configuration, data and checkpoint errors
        print(f"decode.py: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: DecodeArgs) -> None:
    """Decode every test set, write its files and print its table."""
    decode = args.decode
    folder = _results_folder(decode)
    sets = choose_test_sets(decode.test_sets, args.data.data_config)
    device = choose_device(decode.device)
    if decode.num_threads:
        torch.set_num_threads(decode.num_threads)
    recogniser = load_recogniser(args, device)
    search = build_search(decode, recogniser.tokenizer, device, recogniser.config.output_downsampling_factor)
    set_up_logging(folder / "log", rank=0, world_size=1, name="decode")
    for warning in args.warnings:
        logger.warning(warning)
    loaders = {
        name: build_eval_loader(
            [path],
            max_duration=args.data.max_duration,
            num_workers=args.data.num_workers,
            need_text=False,
            pin_memory=device.type == "cuda",
        )
        for name, path in sets.items()
    }
    suffix = _suffix(decode, recogniser.config) + search_suffix(decode)
    for name, loader in loaders.items():
        results = decode_set(recogniser, loader, device, args.data.remove_diacritics, search)
        write_results(folder, name, suffix, decode.decoding_method, results)
        table = score_table(results)
        write_atomically(folder / f"config-{name}-{suffix}.json", args.to_json() + "\n")
        write_atomically(folder / f"summary-{name}-{suffix}.md", f"# {name}\n\n{table.markdown()}\n")
        print(f"\n{name}\n{table.plain()}", flush=True)
    logger.info("results are in %s", folder)


def load_recogniser(args: DecodeArgs, device: torch.device) -> Recogniser:
    """The averaged model that the flags name, with its tokenizer.

    Raises:
        CheckpointError, ConfigError: files that are missing or do not fit together.
    """
    decode = args.decode
    if decode.checkpoint is not None:
        path = decode.checkpoint
        payload = checkpoint.load(path)
        state = checkpoint.model_state(payload, path)
        if decode.use_averaged_model and payload.get("model_avg") is not None:
            averaged = checkpoint.strip_module_prefix(payload["model_avg"])
            state = {
                name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in averaged.items()
            }
    else:
        choice = checkpoint.choose_checkpoints(
            decode.exp_dir, decode.epoch, decode.iter, decode.avg, decode.use_averaged_model
        )
        path = choice.files[-1]
        payload = checkpoint.load(path)
        state = checkpoint.average_checkpoints(choice)
    config = resolve_model(stored_model_config(payload, state, path), args.given_model)
    tokenizer = _tokenizer(args.data.bpe_model, payload)
    model = build_model(config, tokenizer.vocab_size)
    checkpoint.load_model(model, state, path)
    return Recogniser(model.eval().to(device), tokenizer, config)


def stored_model_config(payload: dict[str, Any], state: checkpoint.State, path: Path) -> ModelConfig:
    """The sizes of a checkpoint's model: from its configuration, its published flags, or its tensors.

    Tensors do not tell all (a number of heads is known as a product only), so they come last.
    """
    if payload.get("config"):
        return config_from_dict(payload["config"]).model
    if "encoder_dim" in payload:
        return model_from_published(payload)
    try:
        sizes = sizes_from_state_dict(state)
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{path}: {error}") from error
    names = {field.name for field in fields(ModelConfig)}
    return ModelConfig(**{name: value for name, value in sizes.items() if name in names})


def _tokenizer(path: Path | None, payload: dict[str, Any]) -> PhoneTokenizer:
    if path is not None:
        return PhoneTokenizer.from_model(path)
    if payload.get("tokenizer"):
        return PhoneTokenizer.from_bytes(payload["tokenizer"])
    return PhoneTokenizer.from_table()


def choose_test_sets(wanted: Sequence[str], data_config: Path) -> dict[str, Path]:
    """Name and folder of each set to decode.

    Args:
        wanted: shar folders (with a slash in their name), names of sets of the data config, or the words "dev" and
            "test" for all its sets of that kind; none means "test".
        data_config: read where it is needed.

    Raises:
        ValueError: a name that is none of these, or nothing to decode.
    """
    chosen: dict[str, Path] = {}
    names = [name for name in wanted or ("test",) if "/" not in name]
    if names:
        sets = load_data_config(data_config)
        kinds = {"dev": sets.dev, "test": sets.test}
        known = {**sets.dev, **sets.test}
        if unknown := [name for name in names if name not in kinds and name not in known]:
            raise ValueError(
                f"--test-sets {','.join(unknown)}: neither a folder nor a set of {data_config}, which has: "
                f"{', '.join(known) or 'none'}"
            )
        for name in names:
            chosen |= kinds[name] if name in kinds else {name: known[name]}
        if not chosen:
            sets.require(*[name for name in names if name in kinds])
    # Two parts of a path tell sets of several corpora apart.
    return chosen | {"-".join(Path(name).parts[-2:]).strip("/"): Path(name) for name in wanted if "/" in name}


@torch.inference_mode()
def decode_set(
    recogniser: Recogniser,
    loader: BatchLoader,
    device: torch.device,
    without_diacritics: bool = False,
    search: Search | None = None,
) -> list[UtteranceResult]:
    """Decode every utterance of a loader.

    Args:
        recogniser: the model.
        loader: of a set that is scored.
        device: of the model.
        without_diacritics: delete diacritics from the references.
        search: from log-probs to hypotheses; None is the greedy one.
    """
    results, unalignable = [], []
    unknown = UnknownSymbols()
    tokenizer, factor = recogniser.tokenizer, recogniser.config.output_downsampling_factor
    search = search or build_search(DecodeConfig(), tokenizer, device, factor)
    started, seconds = time.monotonic(), 0.0
    for batch in loader:
        if batch.is_empty:
            continue
        features, num_frames = batch.features.to(device), batch.num_frames.to(device)
        if recogniser.config.causal:
            features = F.pad(features, (0, 0, 0, CAUSAL_PADDING), value=LOG_EPS)
            num_frames = num_frames + CAUSAL_PADDING
        log_probs, lengths = recogniser.model(features, num_frames)
        for utterance, hypotheses in zip(batch.utterances, search(log_probs, lengths), strict=True):
            text = normalise(utterance.text, tokenizer.pieces, unknown.dropped)
            text = remove_diacritics(text) if without_diacritics else text
            unknown.add(text, tokenizer)
            if alignment_problem(tokenizer.encode(text), utterance.num_samples, factor) is not None:
                unalignable.append(utterance.id)
            results.append(
                UtteranceResult.of(
                    utterance.id, text, hypotheses[0], tokenizer, utterance.language, utterance.speaker, hypotheses
                )
            )
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


def _suffix(decode: DecodeConfig, config: ModelConfig) -> str:
    if decode.checkpoint is not None:
        return decode.checkpoint.stem
    return file_suffix(
        avg=decode.avg,
        iteration=decode.iter,
        epoch=decode.epoch,
        chunk_size=config.chunk_size[0] if config.causal else None,
        left_context_frames=config.left_context_frames[0] if config.causal else None,
        use_averaged_model=decode.use_averaged_model,
    )


if __name__ == "__main__":
    main()
