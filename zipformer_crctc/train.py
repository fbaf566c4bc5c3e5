"""Train a phone recogniser: `python zipformer_crctc/train.py --world-size 2 --exp-dir exp/my-run`.

Reads the shar folders that the data config lists, and writes checkpoints, logs and metrics to --exp-dir. `--help` lists
the flags, `--print-config` shows the whole configuration.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import logging
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zipformer_crctc import checkpoint
from zipformer_crctc.averaging import RunningAverage
from zipformer_crctc.badbatches import save_bad_batches
from zipformer_crctc.commandline import TrainArgs, parse_train_args, run_program
from zipformer_crctc.config import Config, config_to_dict
from zipformer_crctc.dataconfig import DataSets, load_data_config
from zipformer_crctc.distributed import Process, launch, process_group
from zipformer_crctc.filters import FilterLimits, TrainingFilter
from zipformer_crctc.loader import Batch, BatchLoader, build_eval_loader, build_train_loader
from zipformer_crctc.memory import keep_freed_memory, return_freed_memory
from zipformer_crctc.model import CtcModel, build_model
from zipformer_crctc.objective import Objective, TargetEncoder
from zipformer_crctc.optim import Eden, ScaledAdam
from zipformer_crctc.preemption import REQUEUE, Preemption
from zipformer_crctc.probe import GIB, EpochPlan, naming_batch, plan_epoch, scan_memory, state_bytes
from zipformer_crctc.randomstate import random_state, seed_everything, set_random_state
from zipformer_crctc.resume import PREEMPTED, named_checkpoint, newest_checkpoint
from zipformer_crctc.schedule import set_batch_count
from zipformer_crctc.shar import find_shards
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.tracking import MetricsWriter, RunningSums, format_losses, losses_per_frame, set_up_logging

logger = logging.getLogger(__name__)

SCHEDULE_INTERVAL = 10
"""Batches between settings of the scheduled values."""

MEMORY_INTERVAL = 100
"""Batches after which memory that nothing uses goes back to the system."""

DRY_RUN_STEPS = 5
"""Steps that --dry-run times."""

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
    schedule_batch_count: float = 0.0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

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
    path = named_checkpoint(config.train)
    if path is not None and not path.is_file():
        checkpoint.load(path)  # says what is there instead
    if config.train.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError("--wandb True needs the package wandb: pip install wandb, or leave the flag out")


def load_tokenizer(path: Path | None) -> PhoneTokenizer:
    """The tokenizer of a sentencepiece model file, or of the package's table."""
    return PhoneTokenizer.from_table() if path is None else PhoneTokenizer.from_model(path)


def run(rank: int, world_size: int, args: TrainArgs, sets: DataSets) -> None:
    """One training process, from its start to the end of training."""
    config = args.config
    set_up_logging(None if config.train.dry_run else config.train.exp_dir / "log", rank, world_size)
    if rank == 0:
        for warning in args.warnings:
            logger.warning(warning)
        if not config.train.dry_run and (stale := checkpoint.remove_stale(config.train.exp_dir)):
            logger.info("deleted %d files that a killed process left half-written", len(stale))
    train = config.train
    keep_freed_memory()
    with (
        Preemption() as preemption,
        process_group(rank, world_size, train.device, train.num_threads, train.process_timeout) as process,
    ):
        trainer = Trainer(config, process, sets, preemption)
        try:
            if train.dry_run:
                trainer.dry_run()
            else:
                trainer.fit()
        finally:
            trainer.close()


def build_loaders(
    config: Config, process: Process, sets: DataSets, encode: TargetEncoder
) -> tuple[BatchLoader, BatchLoader | None, BatchLoader | None]:
    """Loaders of the labelled, the pseudo-labelled and the validation sets; None for the latter two if not there."""
    data, factor = config.data, config.model.output_downsampling_factor

    def training(folders: list[Path], limits: FilterLimits, endless: bool) -> BatchLoader:
        return build_train_loader(
            folders,
            weights=sets.weights,
            accept=TrainingFilter(encode, limits, factor, 1.0 + data.speed_perturbation),
            max_duration=data.max_duration,
            quadratic_duration=data.quadratic_duration,
            num_buckets=data.num_buckets if data.bucketing_sampler else 1,
            shuffle=data.shuffle,
            drop_last=data.drop_last,
            subset=100 if data.full_libri else data.subset,
            seed=config.train.seed,
            world_size=process.world_size,
            rank=process.rank,
            num_workers=data.num_workers,
            speed_perturbation=data.speed_perturbation,
            only_audio=data.fbank_device == "model",
            endless=endless,
            pin_memory=process.device.type == "cuda",
            index_dir=data.index_dir,
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
            index_dir=data.index_dir,
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
        preemption: says when the run is asked to end.
    """

    def __init__(self, config: Config, process: Process, sets: DataSets, preemption: Preemption) -> None:
        self.config = config
        self.process = process
        self.sets = sets
        self.preemption = preemption
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
        self.running, self.running_unsup = RunningSums(), RunningSums()
        self.random_state: dict[str, Any] | None = None
        self._resume()
        self.wrapped: nn.Module = self.model
        if process.world_size > 1:
            # A layer's own bypass_scale is never used, and a positional projection is skipped now and then.
            self.wrapped = DistributedDataParallel(
                self.model, find_unused_parameters=True, gradient_as_bucket_view=True
            )
        self.unsup_batches = iter(self.unsup_loader) if self.unsup_loader is not None else None
        self.window: list[tuple[Batch, Tensor]] = []
        self.unsaved: str | None = None
        self.metrics = MetricsWriter(
            config.train,
            process.is_main and not config.train.dry_run,
            config_to_dict(config),
            self.progress.batch_idx_train,
        )
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        logger.info(
            "%.2f M parameters, %d symbols, %s, %s", size, len(self.tokenizer.pieces), process.device, precision
        )

    # Loop

    def fit(self) -> None:
        """Train until the last epoch, or the last batch if --num-steps says.

        Exits with REQUEUE where the run was asked to end before that.
        """
        train = self.config.train
        try:
            if self._is_finished():
                logger.info("--num-steps %d is over: nothing is left to do", train.num_steps)
                return
            if train.scan_oom:
                self._scan_memory()
            while train.num_steps or self.progress.cur_epoch <= train.num_epochs:
                self._begin_epoch()
                self._train_epoch()
                if self._is_finished():
                    break
                self._finish_epoch()
            if train.num_steps:
                self._validate()
                self._save(f"checkpoint-{self.progress.batch_idx_train}.pt")
            if self.progress.skipped_steps:
                logger.warning(
                    "%d optimizer steps were skipped, as a loss or a gradient was not finite",
                    self.progress.skipped_steps,
                )
            if self.unsaved is not None:
                raise TrainingStopped(f"training is over, but {self.unsaved}")
        except Exception:
            logger.exception("training stopped after batch %d", self.progress.batch_idx_train)
            if self.process.is_main:
                self._write("bad-model-0.pt", None)
            raise

    def close(self) -> None:
        """Write what is left, and end the workers of the loaders."""
        self.metrics.close()
        for loader in (self.train_loader, self.unsup_loader, self.valid_loader):
            if loader is not None:
                loader.close()

    def dry_run(self) -> None:
        """Tell what the run will need. A few steps are made, nothing is written."""
        train, size = self.config.train, sum(p.numel() for p in self.model.parameters()) / 1e6
        steps = self._scan_memory() if train.scan_oom else self._plan().steps
        self._begin_epoch()
        self.model.train()
        set_batch_count(self.model, self._adjusted_batch_count())
        times, audio = [], 0.0
        for batch in itertools.islice(self.train_loader, DRY_RUN_STEPS):
            self.progress.batch_idx_train += 1
            started = time.monotonic()
            self._train_step(batch)
            if self.process.device.type == "cuda":
                torch.cuda.synchronize(self.process.device)
            times.append(time.monotonic() - started)
            audio += batch.seconds
        seconds = statistics.median(times)
        logger.info("%.2f M parameters; with gradients and optimizer %.2f GiB", size, state_bytes(self.model) / GIB)
        if self.process.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.process.device)
            logger.info("at most %.2f GiB of the GPU's memory in use", peak / GIB)
        logger.info("%d batches in an epoch, about %.0f s of audio each and process", steps, audio / len(times))
        logger.info(
            "%.3f s for a step (median of %d), %.2f h for an epoch", seconds, len(times), seconds * steps / 3600
        )

    def _plan(self, unsup: bool = False) -> EpochPlan:
        """The batches of an epoch, by loaders of their own, so that the run's counts and places stay as they are."""
        encode = TargetEncoder(self.tokenizer, self.config.data.remove_diacritics)
        loaders = build_loaders(self.config, self.process, self.sets, encode)
        loader = loaders[1] if unsup else loaders[0]
        assert loader is not None
        return plan_epoch(loader.order, self.progress.cur_epoch)

    def _scan_memory(self) -> int:
        """Forward and backward of the largest batches; returns the number of labelled ones in an epoch."""
        plans = [self._plan()] + ([self._plan(unsup=True)] if self.unsup_loader is not None else [])

        def loss_of(batch: Batch) -> Tensor:
            return self.objective.train_loss(self.model, batch.to(self.process.device), self.autocast).total

        peak = scan_memory(self.model, [batch for plan in plans for batch in plan.worst], loss_of, self.process.device)
        in_use = f"; at most {peak / GIB:.2f} GiB in use" if peak else ""
        logger.info("the largest batches of an epoch fit into memory%s", in_use)
        return plans[0].steps

    def _is_finished(self) -> bool:
        return 0 < self.config.train.num_steps <= self.progress.batch_idx_train

    def _begin_epoch(self) -> None:
        """Set what depends on the epoch; its random numbers begin anew, unless the run goes on within it."""
        epoch, seed, rank = self.progress.cur_epoch, self.config.train.seed, self.process.rank
        if self.random_state is not None:
            set_random_state(self.random_state, self.model, self.process.device)
        if self._place_in_epoch() == 0:
            seed_everything(seed + epoch - 1, rank)
        elif self.random_state is None:  # of no use for this run
            seed_everything(seed + self.progress.batch_idx_train, rank)
        self.random_state = None
        self.scheduler.step_epoch(epoch - 1)

    def _place_in_epoch(self) -> int:
        """Steps of the epoch that are done."""
        return int(self.train_loader.state_dict()["step"])

    def _train_epoch(self) -> None:
        """The rest of an epoch, from the loader's position on."""
        train = self.config.train
        self.model.train()
        started, seconds = time.monotonic(), 0.0
        for batch in self.train_loader:
            if batch.step % SCHEDULE_INTERVAL == 0:
                self.progress.schedule_batch_count = self._adjusted_batch_count()
                set_batch_count(self.model, self.progress.schedule_batch_count)
            self.progress.batch_idx_train += 1
            k = self.progress.batch_idx_train
            asked_to_end = self._train_step(batch)
            seconds += batch.seconds * self.process.world_size
            if self.average is not None and k % train.average_period == 0:
                self.average.update(self.model, k, train.average_period)
            if k % train.log_interval == 0 or k == 1:
                self._log(batch, seconds / (time.monotonic() - started))
                started, seconds = time.monotonic(), 0.0
            if k % MEMORY_INTERVAL == 0:
                return_freed_memory()
            if self._is_finished():
                break
            if k % train.valid_interval == 0:
                self._validate()
                started, seconds = time.monotonic(), 0.0
            # Last, so that a run that goes on from here has nothing of this step left to do.
            if k % train.save_every_n == 0:
                self._save(f"checkpoint-{k}.pt")
            if asked_to_end:
                self._end_early()
        if self.progress.cur_epoch == self.config.train.start_epoch and (report := self.encode.unknown.report()):
            logger.warning("training texts: %s", report)

    def _end_early(self) -> None:
        """Save, and exit with the status that asks for another start."""
        logger.warning("asked to end by a signal after batch %d", self.progress.batch_idx_train)
        self._save(PREEMPTED)
        logger.warning("exit status %d; --resume auto goes on from here", REQUEUE)
        sys.exit(REQUEUE)

    def _adjusted_batch_count(self) -> float:
        """b: batches of the reference duration that correspond to the batches so far."""
        seconds = self.config.data.max_duration * self.process.world_size
        return self.progress.batch_idx_train * seconds / self.config.train.ref_duration

    def _train_step(self, batch: Batch) -> bool:
        """Forward and backward of a labelled and perhaps a pseudo-labelled batch; the optimizer's step if it is due.

        Returns whether the run is to end after it, on all ranks alike.
        """
        accumulation = int(self.config.train.grad_accumulation)
        k = self.progress.batch_idx_train
        due = k % accumulation == 0
        unsup = next(self.unsup_batches) if self.unsup_batches is not None else None
        self.running.add(self._backward(batch, 1.0 / accumulation, synchronise=due and unsup is None))
        if unsup is not None:
            scale = self.config.train.unsup_cr_ctc_loss_scale / accumulation
            self.running_unsup.add(self._backward(unsup, scale, synchronise=due))
        self.scheduler.step_batch(k)
        return self._optimizer_step() if due else False

    def _backward(self, batch: Batch, scale: float, synchronise: bool) -> Tensor:
        """Add the gradient of scale * loss; returns the sums to log."""
        wait: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(self.wrapped, DistributedDataParallel) and not synchronise:
            wait = self.wrapped.no_sync()
        with wait, naming_batch([batch.utterances]):
            plain = self.progress.batch_idx_train <= self.config.train.plain_ctc_batches
            loss = self.objective.train_loss(self.wrapped, batch.to(self.process.device), self.autocast, plain)
            self.scaler.scale(loss.total * scale).backward()
        self.window.append((batch, loss.total.detach()))
        return loss.sums

    def _optimizer_step(self) -> bool:
        """Update the parameters, unless a loss or a gradient is not finite.

        The decision is the same on all ranks, and so is what is returned: whether any was asked to end. One exchange
        of two numbers and one transfer from the device tell both.
        """
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        own_losses = torch.stack([loss for _, loss in self.window])
        own_is_bad = own_losses.isfinite().logical_not().any().float()
        told = self.process.sum(torch.stack([own_is_bad, torch.full_like(own_is_bad, float(self.preemption.asked))]))
        bad_ranks, asked_to_end, host_norm = torch.cat([told, norm[None]]).tolist()
        if not bad_ranks and not math.isfinite(host_norm) and self._can_scale_down():
            logger.info(
                "batch %d: a loss scale of %g is too large", self.progress.batch_idx_train, self.scaler.get_scale()
            )
        elif bad_ranks or not math.isfinite(host_norm):
            # Where all losses are finite, any rank may be the cause.
            self._skip_step(bool(own_is_bad) or not bad_ranks)
        else:
            if 0.0 < self.config.clip_norm < host_norm:
                torch._foreach_mul_(gradients, self.config.clip_norm / host_norm)
            self.scaler.step(self.optimizer)
            self.progress.skipped_in_a_row = 0
        self.window.clear()
        self.scaler.update()
        self.optimizer.zero_grad()
        return asked_to_end > 0

    def _can_scale_down(self) -> bool:
        """Whether infinite gradients of float16 may be due to the loss scale, which is then lowered."""
        return self.scaler.is_enabled() and self.scaler.get_scale() > 1.0

    def _skip_step(self, may_be_the_cause: bool) -> None:
        """Leave the parameters alone, save the batches for inspection, and stop if this goes on."""
        progress, limit = self.progress, self.config.train.max_skipped_steps
        progress.skipped_steps += 1
        progress.skipped_in_a_row += 1
        logger.warning("batch %d: a loss or a gradient is not finite, step skipped", progress.batch_idx_train)
        if may_be_the_cause and not self.config.train.dry_run:
            batches = [batch for batch, _ in self.window]
            save_bad_batches(self.exp_dir, progress.batch_idx_train, self.process.rank, batches)
        if progress.skipped_in_a_row >= limit:
            raise TrainingStopped(
                f"the losses or gradients of {limit} steps in a row were not finite (--max-skipped-steps): look at "
                f"{self.exp_dir}/bad-batch-*.pt, or resume from an earlier checkpoint with a lower --base-lr"
            )

    # Validation and logging

    def _validate(self) -> None:
        """Mean loss over the validation sets, in float32."""
        if self.valid_loader is None:
            return
        self.model.eval()
        device = self.process.device
        total = torch.zeros_like(self.running.sums, device=device)
        for batch in self.valid_loader:
            if not batch.is_empty:
                total = total + self.objective.valid_loss(self.model, batch.to(device)).sums
        self.model.train()
        losses = losses_per_frame(self.process.sum(total))
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

    def _payload(self, rank_states: list[dict[str, Any]] | None) -> dict[str, Any]:
        """All that a checkpoint holds."""
        config = self.config
        flags = {**vars(config.model), **vars(config.data), **vars(config.train)}
        params = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
        ids = {"blank_id": 0, "sos_id": 1, "eos_id": 1, "vocab_size": self.tokenizer.vocab_size}
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        return checkpoint.make_payload(
            self.model.state_dict(),
            params={**params, **ids, **asdict(self.progress)},
            config=config_to_dict(config),
            tokenizer=self.tokenizer.proto,
            model_avg=self.average.state_dict() if self.average is not None else None,
            optimizer=self.optimizer.state_dict(),
            scheduler=self.scheduler.state_dict(),
            grad_scaler=self.scaler.state_dict(),
            sampler={
                **self.train_loader.state_dict(),
                "unsup": self.unsup_loader.state_dict() if self.unsup_loader is not None else None,
            },
            gradients=gradients if self.window else None,
            rank_states=rank_states,
        )

    def _rank_state(self) -> dict[str, Any]:
        """What differs from rank to rank."""
        return {
            "random": random_state(self.model, self.process.device),
            "running": self.running.sums.cpu(),
            "running_unsup": self.running_unsup.sums.cpu(),
        }

    def _save(self, name: str, copies: Sequence[str] = ()) -> None:
        """Write a checkpoint of all ranks and delete outdated ones. Where the disk is full, training goes on."""
        if self.window:
            self._share_gradients()
        rank_states = self.process.gather(self._rank_state())
        if self.process.is_main:
            self._write(name, rank_states, copies)
        self.process.barrier()

    def _write(self, name: str, rank_states: list[dict[str, Any]] | None, copies: Sequence[str] = ()) -> None:
        path = self.exp_dir / name
        try:
            checkpoint.save(path, self._payload(rank_states))
            for copy in copies:
                checkpoint.copy(path, self.exp_dir / copy)
            self.unsaved = None
        except checkpoint.SaveError as error:
            self.unsaved = str(error)
            logger.error("%s. Earlier checkpoints are whole; the next save tries again", error)
            return
        checkpoint.prune(self.exp_dir, self.config.train.keep_last_k)
        logger.info("saved %s", path)

    def _share_gradients(self) -> None:
        """Replace the gradients of an accumulation under way by their mean over the ranks, which one file can hold."""
        if self.process.world_size == 1:
            return
        for p in self.model.parameters():
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            p.grad = self.process.sum(gradient) / self.process.world_size

    def _finish_epoch(self) -> None:
        """Validate, save the epoch's file, copy it if it is the best one so far, and go to the next epoch."""
        epoch, progress = self.progress.cur_epoch, self.progress
        if not self.config.train.num_steps:  # epochs of a run counted in batches have no files
            self._validate()
            copies = []
            train_loss = self.running.per_frame()["loss"]
            if train_loss < progress.best_train_loss:
                progress.best_train_loss, progress.best_train_epoch = train_loss, epoch
                copies.append("best-train-loss.pt")
            if progress.best_valid_epoch == epoch:
                copies.append("best-valid-loss.pt")
            self._save(f"epoch-{epoch}.pt", copies)
        progress.cur_epoch += 1

    def _resume(self) -> None:
        """Go on from a checkpoint, if there is one that the configuration asks for."""
        found = self._find_checkpoint()
        if found is None:
            return
        path, payload = found
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
        if payload.get("schedule_batch_count") is None:
            self.progress.schedule_batch_count = self._adjusted_batch_count()
        set_batch_count(self.model, self.progress.schedule_batch_count)
        sampler = payload.get("sampler")
        if path.name.startswith("epoch-"):
            self.progress.cur_epoch = int(path.stem.removeprefix("epoch-")) + 1
        if sampler and "step" in sampler:  # other samplers, as in published files, tell no place of ours
            self.train_loader.load_state_dict(sampler)
            if self.unsup_loader is not None and sampler.get("unsup") is not None:
                self.unsup_loader.load_state_dict(sampler["unsup"])
        else:
            self.train_loader.set_position(self.progress.cur_epoch)
            logger.warning("%s holds no place in the data: epoch %d begins anew", path, self.progress.cur_epoch)
        self._resume_rank(path, payload)
        logger.info("resumed from %s: epoch %d, batch %d", path, self.progress.cur_epoch, self.progress.batch_idx_train)

    def _find_checkpoint(self) -> tuple[Path, dict[str, Any]] | None:
        """The checkpoint to go on from, the same on all ranks, and its content."""
        train = self.config.train
        path = named_checkpoint(train)
        if train.resume != "auto":
            return None if path is None else (path, checkpoint.load(path))
        found = newest_checkpoint(self.exp_dir) if self.process.is_main else None
        path = self.process.from_main(found[0] if found is not None else None)
        if path is None:
            logger.info("--resume auto: %s holds no checkpoint, so training begins", self.exp_dir)
            return None
        return found if found is not None else (path, checkpoint.load(path))

    def _resume_rank(self, path: Path, payload: dict[str, Any]) -> None:
        """Take over what is this rank's own, where the checkpoint has it."""
        for name, p in self.model.named_parameters():
            if payload.get("gradients") and name in payload["gradients"]:
                p.grad = payload["gradients"][name].to(p.device)
        states, world_size = payload.get("rank_states"), self.process.world_size
        if states and len(states) == world_size:
            own = states[self.process.rank]
            self.running.sums, self.running_unsup.sums = own["running"], own["running_unsup"]
            self.random_state = own["random"]
        elif self._place_in_epoch() > 0:
            there = f"of {len(states)} ranks, not {world_size}" if states else "not there"
            logger.warning("%s: states of random generators are %s, so random numbers begin anew", path, there)


if __name__ == "__main__":
    main()
