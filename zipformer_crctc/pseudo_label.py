"""Label untranscribed speech with several models: `python zipformer_crctc/pseudo_label.py --source DIR ...`.

Decodes shar shards with every model of --checkpoints, measures how far the models agree (PFER between their
hypotheses), and writes shards of the utterances they agree best about, for `unsup` in a data config. A run that was
broken off goes on where it was; another threshold needs no new decoding. `--help` lists the flags.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from zipformer_crctc.agreement import Agreement, AgreementMeter, limit_of_best
from zipformer_crctc.batches import EvalOrder
from zipformer_crctc.checkpoint import choose_checkpoints
from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.config import DataConfig, decoding_precision
from zipformer_crctc.distributed import choose_device
from zipformer_crctc.flags import flag_name, format_value, raise_if_any, to_plain
from zipformer_crctc.loader import BatchLoader, BatchReader
from zipformer_crctc.methods import Search, build_search
from zipformer_crctc.pseudoshards import (
    Selection,
    ShardScores,
    read_report,
    scores_path,
    summarise,
    write_labelled,
)
from zipformer_crctc.recogniser import Recogniser, load_recogniser
from zipformer_crctc.results import write_atomically
from zipformer_crctc.search import naming
from zipformer_crctc.shar import DataError, Shard, Skipped, find_shards
from zipformer_crctc.tracking import set_up_logging

logger = logging.getLogger(__name__)

PUBLISHED_MAX_PFER = 19.309
"""Between the published models (ZIPA, data preparation); named in messages, no default: models differ."""
POLL_SECONDS = 5.0
NOT_FOR_LABELS = ("checkpoint", "epoch", "iter", "test_sets", "output_formats", "time_correction", "nbest")
"""Fields of DecodeConfig that mean nothing here."""
NOT_PART_OF_RESULT = ("device", "num_threads", "exp_dir", *NOT_FOR_LABELS)
"""Fields of DecodeConfig that do not change what comes out."""


@dataclass(frozen=True)
class PseudoLabelConfig:
    """What is labelled by which models, and what is kept."""

    source: Path | None = None
    """Folder of shar shards to label; texts in it are not looked at."""
    output_dir: Path | None = None
    """Folder for the results; the labelled shards go to shar in it."""
    checkpoints: tuple[str, ...] = ()
    """Comma list of two or more models: checkpoint files, or FOLDER@N for the checkpoints of a folder up to batch N,
    averaged as --avg and --use-averaged-model say. Name the best one first."""
    max_pfer: float | None = None
    """Keep utterances whose mean PFER between the models is at most this."""
    keep_percent: float | None = None
    """Keep this many percent of the utterances that have a label, the best ones, instead of --max-pfer."""
    per_phone: bool = False
    """Divide the PFER by the number of phones of the label; whole utterances' PFERs favour short ones."""
    world_size: int | None = None
    """Number of processes that share the shards; default: what torchrun says, else 1."""
    rank: int | None = None
    """The number of this process, from 0; default: what torchrun says, else 0."""
    wait: float = 3600.0
    """Seconds that --keep-percent waits for the scores of the other processes."""


@dataclass(frozen=True)
class Labeller:
    """A model with its search."""

    name: str
    recogniser: Recogniser
    search: Search


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration, missing data or an unfit checkpoint ends it with status 2 and one message."""
    description = "Label untranscribed speech with several models."
    run_program("pseudo_label.py", lambda: parse_decode_args(argv, PseudoLabelConfig, description), run)


def run(args: DecodeArgs) -> None:
    """Score and write this process's shards; the last process to finish writes the summary."""
    own: PseudoLabelConfig = args.own
    rank, world_size = check(args)
    assert own.source is not None and own.output_dir is not None
    shards = find_shards(own.source)
    record_settings(own.output_dir / "config.json", settings(args))
    set_up_logging(own.output_dir / "log", rank, world_size, name="pseudo-label")
    for warning in args.warnings:
        logger.warning(warning)
    mine = shards[rank::world_size]
    score_shards(args, mine)
    selection = choose_selection(own, shards, alone=world_size == 1)
    for shard in mine:
        if read_report(own.output_dir, shard, selection) is None:
            write_labelled(own.output_dir, shard, selection, own.checkpoints)
    summary = summarise(own.output_dir, shards, selection)
    if summary is None:
        logger.info("this process's shards are done; the summary is written when all are")
        return
    write_atomically(own.output_dir / "summary.json", json.dumps(summary, ensure_ascii=False, indent=2) + "\n")
    print(summary_line(summary), flush=True)
    logger.info("labelled shards are in %s", own.output_dir / "shar")
    if not summary["kept"]:
        raise DataError(f"{own.output_dir}: no utterance was kept: {summary_line(summary)}; raise the threshold")


def check(args: DecodeArgs) -> tuple[int, int]:
    """Rank and number of processes. Raises ConfigError with everything that is wrong with the flags."""
    own: PseudoLabelConfig = args.own
    problems = [f"{flag_name(name)}: is missing." for name in ("source", "output_dir") if getattr(own, name) is None]
    if len(own.checkpoints) < 2 or len(set(own.checkpoints)) < len(own.checkpoints):
        given = format_value(own.checkpoints) or "(none)"
        problems.append(f"--checkpoints {given}: agreement needs two or more different ones.")
    if (own.max_pfer is None) == (own.keep_percent is None):
        problems.append(
            f"give either --max-pfer (published: {PUBLISHED_MAX_PFER}, for utterances of several seconds) "
            "or --keep-percent."
        )
    if own.max_pfer is not None and not own.max_pfer >= 0:
        problems.append(f"--max-pfer {own.max_pfer}: must be 0 or more.")
    if own.keep_percent is not None and not 0 < own.keep_percent <= 100:
        problems.append(f"--keep-percent {own.keep_percent}: must be above 0 and at most 100.")
    if not own.wait >= 0:
        problems.append(f"--wait {own.wait}: must be 0 or more.")
    for config, names in ((args.decode, NOT_FOR_LABELS), (args.data, ("remove_diacritics",))):
        problems += [
            f"{flag_name(name)} {format_value(getattr(config, name))}: has no meaning here; leave it out."
            for name in names
            if getattr(config, name) != getattr(type(config)(), name)
        ]
    if own.source and own.output_dir and own.source.resolve() == (own.output_dir / "shar").resolve():
        problems.append(f"--source {own.source}: is where --output-dir {own.output_dir} puts its shards; give another.")
    rank, world_size = place(own, problems)
    raise_if_any(problems)
    return rank, world_size


def place(own: PseudoLabelConfig, problems: list[str]) -> tuple[int, int]:
    """Rank and number of processes, from the flags or from torchrun."""
    values = []
    for name, variable, default in (("rank", "RANK", 0), ("world_size", "WORLD_SIZE", 1)):
        value, there = getattr(own, name), os.environ.get(variable)
        if value is not None and there is not None and int(there) != value:
            problems.append(f"{flag_name(name)} {value}: torchrun says {there}; leave the flag out.")
        values.append(value if value is not None else int(there or default))
    rank, world_size = values
    if not 0 <= rank < world_size:
        problems.append(f"--rank {rank} --world-size {world_size}: ranks go from 0 to the world size less 1.")
    return rank, world_size


def model_args(args: DecodeArgs, name: str) -> DecodeArgs:
    """The configuration that loads one model of --checkpoints; on the CPU first, so that no process fills GPU 0."""
    folder, at, last = name.rpartition("@")
    if at and last.isdecimal() and int(last) > 0:
        decode = replace(args.decode, exp_dir=Path(folder), iter=int(last), device="cpu")
    else:
        decode = replace(args.decode, checkpoint=Path(name), device="cpu")
    return replace(args, decode=decode)


def settings(args: DecodeArgs) -> dict[str, Any]:
    """What the scores depend on, as plain data: with other settings they must not be mixed."""
    own: PseudoLabelConfig = args.own
    assert own.source is not None
    decode = {name: value for name, value in to_plain(args.decode).items() if name not in NOT_PART_OF_RESULT}
    decode["precision"] = decoding_precision(args.decode.precision, choose_device(args.decode.device).type)
    if decode["precision"] == "fp32":
        del decode["precision"]  # as in files from before it was known
    models = {}
    for name in own.checkpoints:
        model = model_args(args, name).decode
        files: Sequence[Path] = (model.checkpoint,) if model.checkpoint is not None else ()
        if not files:
            files = choose_checkpoints(
                model.exp_dir, model.epoch, model.iter, model.avg, model.use_averaged_model
            ).files
        # A file that is missing is reported when it is loaded.
        models[name] = [[file.name, file.stat().st_size, int(file.stat().st_mtime)] for file in files if file.is_file()]
    plain = {"source": str(own.source.resolve()), "models": models, "decode": decode}
    plain["model"], plain["bpe_model"] = dict(args.given_model), to_plain(args.data)["bpe_model"]
    result: dict[str, Any] = json.loads(json.dumps(plain))
    return result


def record_settings(path: Path, wanted: dict[str, Any]) -> None:
    """Write the settings, or compare them with those that are there. Raises ValueError where they differ."""
    if not path.is_file():
        write_atomically(path, json.dumps(wanted, ensure_ascii=False, indent=2) + "\n")
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    if different := sorted(name for name in wanted if wanted[name] != there.get(name)):
        raise ValueError(
            f"{path}: the scores there were made with other settings ({', '.join(different)}): give those, or another "
            "--output-dir, or remove the folder"
        )


def score_shards(args: DecodeArgs, shards: Sequence[Shard]) -> None:
    """Score the shards that have no scores yet; the models are loaded if there is one."""
    own: PseudoLabelConfig = args.own
    assert own.output_dir is not None
    waiting = [shard for shard in shards if not scores_path(own.output_dir, shard).is_file()]
    logger.info("%d shards, %d of them scored before", len(shards), len(shards) - len(waiting))
    if not waiting:
        return
    labellers = load_labellers(args)
    for shard in waiting:
        started = time.monotonic()
        scores = score_shard(shard, labellers, args.data)
        scores.write(scores_path(own.output_dir, shard))
        seconds = sum(utterance.duration for utterance in scores.utterances)
        elapsed = time.monotonic() - started
        logger.info("shard %d: %d utterances, %.0f s in %.1f s", shard.number, len(scores.utterances), seconds, elapsed)


def load_labellers(args: DecodeArgs) -> list[Labeller]:
    """All models on this process's device."""
    device = choose_device(args.decode.device, int(os.environ.get("LOCAL_RANK", 0)))
    labellers = []
    for name in args.own.checkpoints:
        recogniser = load_recogniser(model_args(args, name))
        recogniser.model.to(device)
        search = build_search(args.decode, recogniser.tokenizer, device, recogniser.factor)
        labellers.append(Labeller(name, recogniser, search))
    return labellers


@torch.inference_mode()
def score_shard(shard: Shard, labellers: Sequence[Labeller], data: DataConfig) -> ShardScores:
    """Decode a shard with all models, reading its audio once, and measure their agreement."""
    order = EvalOrder([shard], data.max_duration, need_text=False)
    pinned = labellers[0].recogniser.device.type == "cuda"
    loader = BatchLoader(order, BatchReader(), data.num_workers, pin_memory=pinned, scored=True)
    meter, not_decoded = AgreementMeter(), Skipped(max_examples=None)
    found: dict[str, Agreement] = {}
    for batch in loader:
        if batch.is_empty:
            continue
        ids = [utterance.id for utterance in batch.utterances]
        with naming(ids):
            hypotheses = [_phones(labeller, *labeller.recogniser.log_probs(batch)) for labeller in labellers]
        durations = [utterance.duration for utterance in batch.utterances]
        for utterance in meter.measure(ids, durations, list(zip(*hypotheses, strict=True))):
            if utterance.id in found:
                not_decoded.add("id used twice in the shard", utterance.id)
            else:
                found[utterance.id] = utterance
    for skipped in (order.skipped, loader.skipped):
        for reason, names in skipped.examples.items():
            for name in names:
                not_decoded.add(reason, name)
    if not_decoded.total:
        logger.warning("%s: %s", shard.cuts, not_decoded.report())
    return ShardScores(
        utterances=[found[name] for name in sorted(found)],
        not_decoded=not_decoded.examples,
        unknown_to_panphon=dict(meter.unknown_to_panphon),
        left_out=dict(meter.left_out),
    )


def _phones(labeller: Labeller, log_probs: torch.Tensor, lengths: torch.Tensor) -> list[list[str]]:
    found = labeller.search(log_probs, lengths)
    return [labeller.recogniser.tokenizer.phones(hypotheses[0].tokens) for hypotheses in found]


def choose_selection(own: PseudoLabelConfig, shards: Sequence[Shard], alone: bool) -> Selection:
    """What is kept; a percentile needs the scores of all shards, and waits for those of other processes."""
    if own.max_pfer is not None:
        return Selection(own.max_pfer, own.per_phone)
    assert own.output_dir is not None and own.keep_percent is not None
    deadline = time.monotonic() + (0 if alone else own.wait)
    while missing := [shard for shard in shards if not scores_path(own.output_dir, shard).is_file()]:
        if time.monotonic() >= deadline:
            numbers = ", ".join(str(shard.number) for shard in missing[:10]) + (", ..." if len(missing) > 10 else "")
            raise DataError(
                f"{own.output_dir}: {len(missing)} shards have no scores yet ({numbers}), and --keep-percent needs "
                "all; let the other processes finish, then run this one again: it only writes"
            )
        time.sleep(POLL_SECONDS)
    scores = [
        score
        for shard in shards
        for score in ShardScores.read(scores_path(own.output_dir, shard)).candidates(own.per_phone)
    ]
    limit = limit_of_best(scores, own.keep_percent)
    logger.info("the best %g percent of %d utterances: at most %g", own.keep_percent, len(scores), limit)
    return Selection(limit, own.per_phone)


def summary_line(summary: dict[str, Any]) -> str:
    """One line for a person."""
    name = "pfer_per_phone" if summary["selection"]["per_phone"] else "pfer"
    values = summary[name] or {"p50": float("nan"), "mean": float("nan")}
    line = (
        f"kept {summary['kept']} of {summary['utterances']} utterances ({summary['kept_hours']:.2f} h), "
        f"{name} at most {summary['selection']['limit']:g} (median {values['p50']:.3f}, mean {values['mean']:.3f})"
    )
    return line + "".join(f"; dropped {count}: {reason}" for reason, count in summary["dropped"].items())


if __name__ == "__main__":
    main()
