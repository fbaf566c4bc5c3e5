"""Train a phone recogniser: `python zipformer_crctc/train.py --world-size 2 --exp-dir exp/my-run`.

Reads the shar folders that the data config lists, and writes checkpoints, logs and metrics to --exp-dir. `--help` lists
the flags, `--print-config` shows the whole configuration.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zipformer_crctc import checkpoint
from zipformer_crctc.averaging import RunningAverage
from zipformer_crctc.commandline import TrainArgs, parse_train_args, run_program
from zipformer_crctc.config import Config, config_to_dict
from zipformer_crctc.dataconfig import DataSets, load_data_config
from zipformer_crctc.distributed import Process, launch, process_group
from zipformer_crctc.filters import FilterLimits, TrainingFilter
from zipformer_crctc.loader import Batch, BatchLoader, build_eval_loader, build_train_loader
from zipformer_crctc.model import CtcModel, build_model
from zipformer_crctc.objective import Objective, TargetEncoder
from zipformer_crctc.optim import Eden, ScaledAdam
from zipformer_crctc.schedule import set_batch_count
from zipformer_crctc.shar import find_shards
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.tracking import MetricsWriter, RunningSums, format_losses, losses_per_frame, set_up_logging

logger = logging.getLogger(__name__)

SCHEDULE_INTERVAL = 10
"""Batches between settings of the scheduled values."""

CLIPPING_SCALE = 2.0
"""The optimizer clips gradients beyond this many times their usual size."""


@dataclass
class Progress:
    """How far a run is; stored in its checkpoints under the published names."""

    batch_idx_train: int = 0
    cur_epoch: int = 1
    best_train_loss: float = math.inf
    best_valid_loss: float = math.inf
    best_train_epoch: int = -1
    best_valid_epoch: int = -1

    def load(self, payload: dict[str, Any]) -> None:
        """Take over what a checkpoint tells."""
        for field in fields(self):
            if payload.get(field.name) is not None:
                setattr(self, field.name, payload[field.name])


class TrainingStopped(RuntimeError):
    """Training cannot go on; the text says why and what can be done."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration or missing data ends it with status 2 and one message."""
    run_program("train.py", lambda: parse_train_args(argv), start)


def start(args: TrainArgs) -> None:
    """Look for everything that a run needs, then start its processes."""
    sets = load_data_config(args.data.data_config).require("train")
    check_inputs(args.config, sets)
    launch(run, args.train.world_size, args.train.master_port, args, sets)


def check_inputs(config: Config, sets: DataSets) -> None:
    """Look for all folders and files of a run before any process starts.

    Raises:
        ValueError: one is missing or unfit; the message names it.
    """
    unsup = sets.require("unsup").unsup if config.model.use_unsup_cr_ctc else []
    for folder in [*sets.train, *unsup, *sets.dev.values()]:
        find_shards(folder)
    load_tokenizer(config.data.bpe_model)
    path = checkpoint_to_resume(config)
    if path is not None and not path.is_file():
        checkpoint.load(path)  # says what is there instead
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb True needs the package wandb: pip install wandb, or leave the flag out")


def load_tokenizer(path: Path | None) -> PhoneTokenizer:
    """The tokenizer of a sentencepiece model file, or of the package's table."""
    return PhoneTokenizer.from_table() if path is None else PhoneTokenizer.from_model(path)


def checkpoint_to_resume(config: Config) -> Path | None:
    """The file that --start-batch or --start-epoch names, if any."""
    train = config.train
    if train.start_batch > 0:
        return train.exp_dir / f"checkpoint-{train.start_batch}.pt"
    return train.exp_dir / f"epoch-{train.start_epoch - 1}.pt" if train.start_epoch > 1 else None


def run(rank: int, world_size: int, args: TrainArgs, sets: DataSets) -> None:
    """One training process, from its start to the end of training."""
    config = args.config
    set_up_logging(config.train.exp_dir / "log", rank, world_size)
    if rank == 0:
        for warning in args.warnings:
            logger.warning(warning)
    with process_group(rank, world_size, config.train.device, config.train.num_threads) as process:
        Trainer(config, process, sets).fit()


def seed_everything(seed: int, rank: int) -> None:
    """Seed all generators; Python's own, which takes yes/no decisions, alike on all ranks."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed + 100_003 * rank)


def build_loaders(
    config: Config, process: Process, sets: DataSets, encode: TargetEncoder
) -> tuple[BatchLoader, BatchLoader | None, BatchLoader | None]:
    """Loaders of the labelled, the pseudo-labelled and the validation sets; None for the latter two if not there."""
    data, factor = config.data, config.model.output_downsampling_factor

    def training(folders: list[Path], limits: FilterLimits, endless: bool) -> BatchLoader:
        return build_train_loader(
            folders,
            accept=TrainingFilter(encode, limits, factor, 1.0 + data.speed_perturbation),
            max_duration=data.max_duration,
            num_buckets=data.num_buckets if data.bucketing_sampler else 1,
            shuffle=data.shuffle,
            drop_last=data.drop_last,
            subset=100 if data.full_libri else data.subset,
            seed=config.train.seed,
            world_size=process.world_size,
            rank=process.rank,
            num_workers=data.num_workers,
            speed_perturbation=data.speed_perturbation,
            endless=endless,
            pin_memory=process.device.type == "cuda",
        )

    mixed = config.model.use_unsup_cr_ctc
    valid = None
    if sets.dev:
        valid = build_eval_loader(
            list(sets.dev.values()),
            max_duration=data.max_duration,
            num_workers=min(1, data.num_workers),
            world_size=process.world_size,
            rank=process.rank,
        )
    return (
        training(sets.train, sets.filters, False),
        training(sets.unsup, sets.unsup_filters, True) if mixed else None,
        valid,
    )


class Trainer:
    """The state of a training run in one process, and the loop over batches.

    Args:
        config: of the run, with the true world size.
        process: this process.
        sets: folders of the data.
    """

    def __init__(self, config: Config, process: Process, sets: DataSets) -> None:
        self.config = config
        self.process = process
        self.exp_dir = config.train.exp_dir
        seed_everything(config.train.seed, process.rank)
        self.tokenizer = load_tokenizer(config.data.bpe_model)
        self.encode = TargetEncoder(self.tokenizer, config.data.remove_diacritics)
        self.objective = Objective(config, TargetEncoder(self.tokenizer, config.data.remove_diacritics))
        self.train_loader, self.unsup_loader, self.valid_loader = build_loaders(config, process, sets, self.encode)

        self.model: CtcModel = build_model(config.model, self.tokenizer.vocab_size).to(process.device)
        self.average = RunningAverage(self.model) if process.is_main else None
        named = list(self.model.named_parameters())
        self.optimizer = ScaledAdam([{"named_params": named}], lr=config.train.base_lr, clipping_scale=CLIPPING_SCALE)
        self.scheduler = Eden(
            self.optimizer, config.train.lr_batches, config.train.lr_epochs, config.train.lr_warmup_batches
        )
        precision = config.train.precision_on(process.device.type)
        self.scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
        self.autocast = torch.autocast(
            process.device.type,
            dtype=torch.float16 if precision == "fp16" else torch.bfloat16,
            enabled=precision != "fp32",
        )
        self.progress = Progress(cur_epoch=config.train.start_epoch)
        self._resume()
        self.wrapped: nn.Module = self.model
        if process.world_size > 1:
            # A layer's own bypass_scale is never used, and a positional projection is skipped now and then.
            self.wrapped = DistributedDataParallel(
                self.model, find_unused_parameters=True, gradient_as_bucket_view=True
            )
        self.running, self.running_unsup = RunningSums(), RunningSums()
        self.skipped_steps = self.skipped_in_a_row = 0
        self.metrics = MetricsWriter(config.train, process.is_main, config_to_dict(config))
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        logger.info(
            "%.2f M parameters, %d symbols, %s, %s", size, len(self.tokenizer.pieces), process.device, precision
        )

    # Loop

    def fit(self) -> None:
        """Train until the last epoch, or the last batch if --num-steps says."""
        train = self.config.train
        try:
            while not self._is_finished() and (train.num_steps or self.progress.cur_epoch <= train.num_epochs):
                epoch = self.progress.cur_epoch
                seed_everything(train.seed + epoch - 1, self.process.rank)
                self.scheduler.step_epoch(epoch - 1)
                self._train_epoch()
                if self._is_finished():
                    break
                self._finish_epoch(epoch)
                self.progress.cur_epoch += 1
            if train.num_steps:
                self._validate()
                self._save_batch_checkpoint()
            if self.skipped_steps:
                logger.warning("%d optimizer steps were skipped, as a gradient was not finite", self.skipped_steps)
        except Exception:
            logger.exception("training stopped after batch %d", self.progress.batch_idx_train)
            checkpoint.save(self.exp_dir / f"bad-model-{self.process.rank}.pt", self._payload())
            raise
        finally:
            self.metrics.close()

    def _is_finished(self) -> bool:
        return 0 < self.config.train.num_steps <= self.progress.batch_idx_train

    def _train_epoch(self) -> None:
        """The rest of an epoch, from the loader's position on."""
        train = self.config.train
        self.model.train()
        unsup = iter(self.unsup_loader) if self.unsup_loader is not None else None
        started, seconds = time.monotonic(), 0.0
        for batch_idx, batch in enumerate(self.train_loader):
            if batch_idx % SCHEDULE_INTERVAL == 0:
                set_batch_count(self.model, self._adjusted_batch_count())
            self.progress.batch_idx_train += 1
            k = self.progress.batch_idx_train
            self._train_step(batch, next(unsup) if unsup is not None else None)
            seconds += batch.seconds * self.process.world_size
            if self.average is not None and k % train.average_period == 0:
                self.average.update(self.model, k, train.average_period)
            if k % train.save_every_n == 0 and not self._is_finished():
                self._save_batch_checkpoint()
            if k % train.log_interval == 0 or k == 1:
                self._log(batch, seconds / (time.monotonic() - started))
                started, seconds = time.monotonic(), 0.0
            if k % train.valid_interval == 0 and not self._is_finished():
                self._validate()
                started, seconds = time.monotonic(), 0.0
            if self._is_finished():
                break
        if self.progress.cur_epoch == self.config.train.start_epoch and (report := self.encode.unknown.report()):
            logger.warning("training texts: %s", report)

    def _adjusted_batch_count(self) -> float:
        """b: batches of the reference duration that correspond to the batches so far."""
        seconds = self.config.data.max_duration * self.process.world_size
        return self.progress.batch_idx_train * seconds / self.config.train.ref_duration

    def _train_step(self, batch: Batch, unsup: Batch | None) -> None:
        """Forward and backward of a labelled and perhaps a pseudo-labelled batch; the optimizer's step if it is due."""
        accumulation = int(self.config.train.grad_accumulation)
        k = self.progress.batch_idx_train
        due = k % accumulation == 0
        self.running.add(self._backward(batch, 1.0 / accumulation, synchronise=due and unsup is None))
        if unsup is not None:
            scale = self.config.train.unsup_cr_ctc_loss_scale / accumulation
            self.running_unsup.add(self._backward(unsup, scale, synchronise=due))
        self.scheduler.step_batch(k)
        if due:
            self._optimizer_step([batch] if unsup is None else [batch, unsup])

    def _backward(self, batch: Batch, scale: float, synchronise: bool) -> Tensor:
        """Add the gradient of scale * loss; returns the sums to log."""
        wait: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(self.wrapped, DistributedDataParallel) and not synchronise:
            wait = self.wrapped.no_sync()
        with wait:
            plain = self.progress.batch_idx_train <= self.config.train.plain_ctc_batches
            loss = self.objective.train_loss(self.wrapped, batch.to(self.process.device), self.autocast, plain)
            self.scaler.scale(loss.total * scale).backward()
        return loss.sums

    def _optimizer_step(self, batches: list[Batch]) -> None:
        """Update the parameters, unless a gradient is not finite.

        Gradients are the same on all ranks by now, and so is the decision.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if not math.isfinite(float(norm)):
            self._skip_step(batches)
        else:
            if 0.0 < self.config.clip_norm < norm:
                torch._foreach_mul_(gradients, float(self.config.clip_norm / norm))
            self.scaler.step(self.optimizer)
            self.skipped_in_a_row = 0
        self.scaler.update()
        self.optimizer.zero_grad()

    def _skip_step(self, batches: list[Batch]) -> None:
        """Leave the parameters alone, save the batches for inspection, and stop if this goes on."""
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        k, limit = self.progress.batch_idx_train, self.config.train.max_skipped_steps
        ids = [utterance.id for batch in batches for utterance in batch.utterances]
        logger.warning("batch %d: a gradient is not finite, step skipped; utterances %s", k, ids)
        path = self.exp_dir / f"bad-batch-{k}-{self.process.rank}.pt"
        saved = [{"features": b.features, "num_frames": b.num_frames, "texts": b.texts} for b in batches]
        checkpoint.save(path, {"batches": saved, "ids": ids})
        if self.skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"the gradients of {limit} steps in a row were not finite (--max-skipped-steps): look at {path} and "
                "its neighbours, or resume from an earlier checkpoint with a lower --base-lr"
            )

    # Validation and logging

    def _validate(self) -> None:
        """Mean loss over the validation sets, in float32."""
        if self.valid_loader is None:
            return
        self.model.eval()
        total = torch.zeros_like(self.running.sums)
        for batch in self.valid_loader:
            if not batch.is_empty:
                total = (
                    total.to(self.process.device)
                    + self.objective.valid_loss(self.model, batch.to(self.process.device)).sums
                )
        self.model.train()
        losses = losses_per_frame(self.process.sum(total.to(self.process.device)))
        k = self.progress.batch_idx_train
        logger.info("epoch %d, batch %d, validation: %s", self.progress.cur_epoch, k, format_losses(losses))
        self.metrics.write("valid", k, losses)
        if losses["loss"] < self.progress.best_valid_loss:
            self.progress.best_valid_loss = losses["loss"]
            self.progress.best_valid_epoch = self.progress.cur_epoch

    def _log(self, batch: Batch, rate: float) -> None:
        """A line and the numbers of the running statistics; rate in seconds of audio per second."""
        k = self.progress.batch_idx_train
        learning_rate = self.optimizer.param_groups[0]["lr"]
        losses = self.running.per_frame()
        if self.unsup_loader is not None:
            losses |= {f"unsup_{name}": value for name, value in self.running_unsup.per_frame().items()}
        logger.info(
            "epoch %d, batch %d%s: %s, %d utterances, lr %.2e, %.0f audio s/s",
            self.progress.cur_epoch,
            k,
            f" of {self.config.train.num_steps}" if self.config.train.num_steps else "",
            format_losses(losses),
            len(batch.utterances),
            learning_rate,
            rate,
        )
        extra = {"learning_rate": learning_rate, "epoch": self.progress.cur_epoch, "audio_seconds_per_second": rate}
        self.metrics.write("train", k, {**losses, **extra, "grad_scale": self.scaler.get_scale()})

    # Checkpoints

    def _payload(self) -> dict[str, Any]:
        """All that a checkpoint holds."""
        config = self.config
        flags = {**vars(config.model), **vars(config.data), **vars(config.train)}
        params = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
        ids = {"blank_id": 0, "sos_id": 1, "eos_id": 1, "vocab_size": self.tokenizer.vocab_size}
        return checkpoint.make_payload(
            self.model.state_dict(),
            params={**params, **ids, **asdict(self.progress)},
            config=config_to_dict(config),
            tokenizer=self.tokenizer.proto,
            model_avg=self.average.state_dict() if self.average is not None else None,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            grad_scaler=self.scaler.state_dict(),
            sampler=self.train_loader.state_dict(),
        )

    def _save_batch_checkpoint(self) -> None:
        if self.process.is_main:
            path = self.exp_dir / f"checkpoint-{self.progress.batch_idx_train}.pt"
            checkpoint.save(path, self._payload())
            checkpoint.prune(self.exp_dir, self.config.train.keep_last_k)
            logger.info("saved %s", path)
        self.process.barrier()

    def _finish_epoch(self, epoch: int) -> None:
        """Validate, save the epoch's file, and copy it if it is the best one so far."""
        if self.config.train.num_steps:
            return  # epochs of a run counted in batches have no files
        self._validate()
        train_loss = self.running.per_frame()["loss"]
        is_best_train = train_loss < self.progress.best_train_loss
        if is_best_train:
            self.progress.best_train_loss, self.progress.best_train_epoch = train_loss, epoch
        if self.process.is_main:
            path = self.exp_dir / f"epoch-{epoch}.pt"
            checkpoint.save(path, self._payload())
            if is_best_train:
                checkpoint.copy(path, self.exp_dir / "best-train-loss.pt")
            if self.progress.best_valid_epoch == epoch:
                checkpoint.copy(path, self.exp_dir / "best-valid-loss.pt")
            logger.info("saved %s", path)
        self.process.barrier()

    def _resume(self) -> None:
        """Go on from a checkpoint, if the configuration names one."""
        train, path = self.config.train, checkpoint_to_resume(self.config)
        if path is None:
            return
        payload = checkpoint.load(path)
        checkpoint.load_model(self.model, checkpoint.model_state(payload, path), path)
        self.progress.load(payload)
        if self.average is not None and payload.get("model_avg") is not None:
            self.average.load_state_dict(checkpoint.strip_module_prefix(payload["model_avg"]))
        if payload.get("optimizer"):
            self.optimizer.load_state_dict(payload["optimizer"])
        if payload.get("scheduler"):
            self.scheduler.load_state_dict(payload["scheduler"])
        if payload.get("grad_scaler") and self.scaler.is_enabled():
            self.scaler.load_state_dict(payload["grad_scaler"])
        if train.start_batch == 0:
            self.progress.cur_epoch = train.start_epoch
        if payload.get("sampler"):
            self.train_loader.load_state_dict(payload["sampler"])
        else:
            self.train_loader.set_position(self.progress.cur_epoch)
            logger.warning("%s holds no place in the data: epoch %d begins anew", path, self.progress.cur_epoch)
        logger.info("resumed from %s: epoch %d, batch %d", path, self.progress.cur_epoch, self.progress.batch_idx_train)


if __name__ == "__main__":
    main()
