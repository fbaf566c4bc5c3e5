"""Train a phone recogniser: `python zipformer_crctc/train.py --world-size 2 --exp-dir exp/my-run`.

Reads the shar folders that the data config lists, and writes checkpoints, logs and metrics to --exp-dir. `--help` lists
the flags, `--print-config` shows the whole configuration.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import logging
import math
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from zipformer_crctc import checkpoint, native
from zipformer_crctc.badbatches import report_infinite, save_bad_batches
from zipformer_crctc.batches import FINGERPRINTS
from zipformer_crctc.commandline import TrainArgs, parse_train_args, run_program
from zipformer_crctc.config import Config, config_to_dict
from zipformer_crctc.cudagraphs import GraphedPasses
from zipformer_crctc.dataconfig import DataSets, load_data_config
from zipformer_crctc.distributed import Process, autocast_to, launch, process_group
from zipformer_crctc.loader import Batch
from zipformer_crctc.memory import keep_freed_memory, return_freed_memory
from zipformer_crctc.objective import Loss, Objective, TargetEncoder
from zipformer_crctc.preemption import REQUEUE, Preemption
from zipformer_crctc.probe import GIB, EpochPlan, naming_batch, plan_epoch, scan_memory, state_bytes
from zipformer_crctc.randomstate import seed_everything, set_random_state
from zipformer_crctc.resume import PREEMPTED, named_checkpoint
from zipformer_crctc.runstate import RunState, all_gradients, build_loaders, load_tokenizer
from zipformer_crctc.schedule import set_batch_count
from zipformer_crctc.shar import find_shards
from zipformer_crctc.tracking import MetricsWriter, format_losses, losses_per_frame, set_up_logging

logger = logging.getLogger(__name__)

SCHEDULE_INTERVAL = 10
"""Batches between settings of the scheduled values."""

MEMORY_INTERVAL = 50
"""Batches after which memory that nothing uses goes back to the system."""

DRY_RUN_STEPS = 5
"""Steps that --dry-run times."""


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
        native.use_on_all_or_none(process.gather(native.suits(torch.empty(1, device=process.device))))
        trainer = Trainer(config, process, sets, preemption)
        try:
            if train.dry_run:
                trainer.dry_run()
            else:
                trainer.fit()
        finally:
            trainer.close()


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
        self.state = state = RunState(config, process, sets)
        self.model, self.progress = state.model, state.progress
        self.parameters = list(state.model.parameters())
        self.objective = Objective(config, TargetEncoder(state.tokenizer, config.data.remove_diacritics))
        precision = config.train.precision_on(process.device.type)
        self.autocast = autocast_to(precision, process.device.type)
        if config.train.inf_check:
            report_infinite(self.model)
        self.passes: nn.Module | GraphedPasses = self.model
        self.average_late = False
        """Whether gradients are averaged over the ranks after the backward pass, as DDP cannot be replayed."""
        graphed = process.device.type == "cuda" and config.train.cuda_graphs and _can_be_replayed(config)
        if graphed and native.suits(self.parameters[0]):
            self.passes = GraphedPasses(self.model, process.world_size)
            self.average_late = process.world_size > 1
            with torch.no_grad():
                process.take_from_main_(self.model.state_dict().values())
        elif process.world_size > 1:
            # A layer's own bypass_scale is never used, and a positional projection is skipped now and then.
            self.passes = DistributedDataParallel(self.model, find_unused_parameters=True, gradient_as_bucket_view=True)
        if graphed and not isinstance(self.passes, GraphedPasses):
            logger.info("without Triton kernels passes are not recorded as CUDA graphs")
        self.unsup_batches = iter(state.unsup_loader) if state.unsup_loader is not None else None
        self.window: list[tuple[Batch, Tensor]] = []
        self.metrics = MetricsWriter(
            config.train,
            process.is_main and not config.train.dry_run,
            config_to_dict(config),
            self.progress.batch_idx_train,
        )
        size, pieces = state.num_parameters / 1e6, len(state.tokenizer.pieces)
        logger.info("%.2f M parameters, %d symbols, %s, %s", size, pieces, process.device, precision)

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
            # What there is now stays: the garbage collector need not look through it again and again.
            gc.collect()
            gc.freeze()
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
            if self.state.unsaved is not None:
                raise TrainingStopped(f"training is over, but {self.state.unsaved}")
        except Exception:
            logger.exception("training stopped after batch %d", self.progress.batch_idx_train)
            if self.process.is_main:
                self.state.write("bad-model-0.pt", None)
            raise

    def close(self) -> None:
        """Write what is left, and end the workers of the loaders."""
        gc.unfreeze()
        self.metrics.close()
        for loader in (self.state.train_loader, self.state.unsup_loader, self.state.valid_loader):
            if loader is not None:
                loader.close()

    def dry_run(self) -> None:
        """Tell what the run will need. A few steps are made, nothing is written."""
        train, size = self.config.train, self.state.num_parameters / 1e6
        steps = self._scan_memory() if train.scan_oom else self._plan().steps
        self._begin_epoch()
        self.model.train()
        set_batch_count(self.model, self.state.adjusted_batch_count)
        moments, audio = [time.monotonic()], 0.0
        for batch in itertools.islice(self.state.train_loader, DRY_RUN_STEPS):
            self.progress.batch_idx_train += 1
            self._train_step(batch)
            if self.process.device.type == "cuda":
                torch.cuda.synchronize(self.process.device)
            moments.append(time.monotonic())
            audio += batch.seconds
        times = [end - start for start, end in itertools.pairwise(moments)]  # with the wait for the data
        seconds = statistics.median(times[1:] or times)  # in the first one the loader starts
        run_steps = train.num_steps or steps * train.num_epochs
        logger.info("%.2f M parameters; with gradients and optimizer %.2f GiB", size, state_bytes(self.model) / GIB)
        if self.process.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.process.device)
            logger.info("at most %.2f GiB of the GPU's memory in use", peak / GIB)
        logger.info("%d batches in an epoch, about %.0f s of audio each and process", steps, audio / len(times))
        logger.info(
            "%.3f s for a step, %.2f h for an epoch, %.2f h for the %d batches of the run",
            *(seconds, seconds * steps / 3600, seconds * run_steps / 3600, run_steps),
        )

    def _plan(self, unsup: bool = False) -> EpochPlan:
        """The batches of an epoch, by loaders of their own, so that the run's counts and places stay as they are."""
        encode = TargetEncoder(self.state.tokenizer, self.config.data.remove_diacritics)
        loaders = build_loaders(self.config, self.process, self.sets, encode)
        loader = loaders[1] if unsup else loaders[0]
        assert loader is not None
        return plan_epoch(loader.order, self.progress.cur_epoch)

    def _scan_memory(self) -> int:
        """Forward and backward of the largest batches; returns the number of labelled ones in an epoch."""
        plans = [self._plan()] + ([self._plan(unsup=True)] if self.state.unsup_loader is not None else [])

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
        if self.state.random_state is not None:
            set_random_state(self.state.random_state, self.model, self.process.device)
        if self.state.place_in_epoch == 0:
            seed_everything(seed + epoch - 1, rank)
        elif self.state.random_state is None:  # of no use for this run
            seed_everything(seed + self.progress.batch_idx_train, rank)
        self.state.random_state = None
        self.state.scheduler.step_epoch(epoch - 1)

    def _train_epoch(self) -> None:
        """The rest of an epoch, from the loader's position on."""
        train = self.config.train
        self.model.train()
        started, seconds = time.monotonic(), 0.0
        for batch in self.state.train_loader:
            if batch.step % SCHEDULE_INTERVAL == 0:
                self.progress.schedule_batch_count = self.state.adjusted_batch_count
                set_batch_count(self.model, self.progress.schedule_batch_count)
            self.progress.batch_idx_train += 1
            k = self.progress.batch_idx_train
            asked_to_end = self._train_step(batch)
            seconds += batch.seconds * self.process.world_size
            if self.state.average is not None and k % train.average_period == 0:
                self.state.average.update(self.model, k, train.average_period)
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
        if self.progress.cur_epoch == self.config.train.start_epoch and (report := self.state.encode.unknown.report()):
            logger.warning("training texts: %s", report)

    def _save(self, name: str, copies: Sequence[str] = ()) -> None:
        if isinstance(self.passes, GraphedPasses):
            self.passes.clear()  # a run that goes on from here has none either
        self.state.save(name, copies, accumulating=bool(self.window))

    def _end_early(self) -> None:
        """Save, and exit with the status that asks for another start."""
        logger.warning("asked to end by a signal after batch %d", self.progress.batch_idx_train)
        self._save(PREEMPTED)
        logger.warning("exit status %d; --resume auto goes on from here", REQUEUE)
        sys.exit(REQUEUE)

    def _train_step(self, batch: Batch) -> bool:
        """Forward and backward of a labelled and perhaps a pseudo-labelled batch; the optimizer's step if it is due.

        Returns whether the run is to end after it, on all ranks alike.
        """
        accumulation = int(self.config.train.grad_accumulation)
        k = self.progress.batch_idx_train
        due = k % accumulation == 0
        unsup = next(self.unsup_batches) if self.unsup_batches is not None else None
        self.state.running.add(self._backward(batch, 1.0 / accumulation, synchronise=due and unsup is None))
        if unsup is not None:
            scale = self.config.train.unsup_cr_ctc_loss_scale / accumulation
            self.state.running_unsup.add(self._backward(unsup, scale, synchronise=due))
        self.state.scheduler.step_batch(k)
        if not due:
            return False
        with naming_batch([batch.utterances for batch, _ in self.window]):
            return self._optimizer_step()

    def _backward(self, batch: Batch, scale: float, synchronise: bool) -> Tensor:
        """Add the gradient of scale * loss; returns the sums to log."""
        wait: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if isinstance(self.passes, DistributedDataParallel) and not synchronise:
            wait = self.passes.no_sync()
        with wait, naming_batch([batch.utterances]):
            failure = ""
            try:
                loss = self._forward_and_backward(batch, scale)
            except torch.OutOfMemoryError as error:
                if not (isinstance(self.passes, GraphedPasses) and self.passes.holds_memory):
                    raise
                failure = str(error)
            if failure and isinstance(self.passes, GraphedPasses):  # its memory is free only after the exception
                self.passes.give_up(failure)
                self.state.optimizer.zero_grad()
                loss = self._forward_and_backward(batch, scale)
        self.window.append((batch, loss.total.detach()))
        return loss.sums

    def _forward_and_backward(self, batch: Batch, scale: float) -> Loss:
        plain = self.progress.batch_idx_train <= self.config.train.plain_ctc_batches
        loss = self.objective.train_loss(self.passes, batch.to(self.process.device), self.autocast, plain)
        self.state.scaler.scale(loss.total * scale).backward()
        return loss

    def _optimizer_step(self) -> bool:
        """Update the parameters, unless a loss or a gradient is not finite.

        The decision is the same on all ranks, and so is what is returned: whether any was asked to end.
        """
        used = [float(p.grad is not None) for p in self.parameters] if self.average_late else []
        if self.average_late:
            self.process.average_(all_gradients(self.parameters))
        self.state.scaler.unscale_(self.state.optimizer)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        own_losses = torch.stack([loss for _, loss in self.window])
        own_is_bad = own_losses.isfinite().logical_not().any().float()
        bad_ranks, asked_to_end, norm, *using_ranks = self._exchange(own_is_bad, gradients, used)
        is_finite = not bad_ranks and math.isfinite(norm)
        if not bad_ranks and not is_finite and self._can_scale_down():
            logger.info(
                "batch %d: a loss scale of %g is too large",
                self.progress.batch_idx_train,
                self.state.scaler.get_scale(),
            )
        elif not is_finite:
            # Where all losses are finite, any rank may be the cause.
            self._skip_step(bool(own_is_bad) or not bad_ranks)
        else:
            if 0.0 < self.config.clip_norm < norm:
                torch._foreach_mul_(gradients, self.config.clip_norm / norm)
            for p, ranks in zip(self.parameters, using_ranks, strict=False):
                if ranks == 0.0:
                    p.grad = None  # as with DDP
            self.state.scaler.step(self.state.optimizer)
            self.progress.skipped_in_a_row = 0
        self.window.clear()
        self.state.scaler.update()
        self.state.optimizer.zero_grad()
        return asked_to_end > 0

    def _exchange(self, own_is_bad: Tensor, gradients: list[Tensor], used: list[float]) -> list[float]:
        """One exchange between the ranks, and one transfer from the device, of some numbers.

        Returns how many ranks have a loss that is not finite and how many are asked to end, the norm of the gradients,
        and how many ranks used each parameter.

        Raises:
            TrainingStopped: the ranks do not read the same data.
        """
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        own_fingerprint = sum(batch.fingerprint for batch, _ in self.window) % FINGERPRINTS
        others = own_is_bad.new_tensor([float(self.preemption.asked), own_fingerprint, *used])
        told = self.process.sum(torch.cat([own_is_bad[None], others]))
        bad_ranks, asked_to_end, fingerprints, *using_ranks, host_norm = torch.cat([told, norm[None]]).tolist()
        if fingerprints != own_fingerprint * self.process.world_size:
            raise TrainingStopped(
                f"batch {self.progress.batch_idx_train}: the ranks do not read the same utterances: compare the copies "
                "of the shards on all machines, file by file"
            )
        return [bad_ranks, asked_to_end, host_norm, *using_ranks]

    def _can_scale_down(self) -> bool:
        """Whether infinite gradients of float16 may be due to the loss scale, which is then lowered."""
        return self.state.scaler.is_enabled() and self.state.scaler.get_scale() > 1.0

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
        if self.state.valid_loader is None:
            return
        self.model.eval()
        device = self.process.device
        total = torch.zeros_like(self.state.running.sums, device=device)
        for batch in self.state.valid_loader:
            if not batch.is_empty:
                with naming_batch([batch.utterances]):
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
        learning_rate = self.state.optimizer.param_groups[0]["lr"]
        losses = self.state.running.per_frame()
        if self.state.unsup_loader is not None:
            losses |= {f"unsup_{name}": value for name, value in self.state.running_unsup.per_frame().items()}
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
        extra = {
            "learning_rate": learning_rate,
            "epoch": self.progress.cur_epoch,
            "audio_seconds_per_second": rate,
        }
        self.metrics.write("train", k, {**losses, **extra, "grad_scale": self.state.scaler.get_scale()})

    def _finish_epoch(self) -> None:
        """Validate, save the epoch's file, copy it if it is the best one so far, and go to the next epoch."""
        epoch, progress = self.progress.cur_epoch, self.progress
        if not self.config.train.num_steps:  # epochs of a run counted in batches have no files
            self._validate()
            copies = []
            train_loss = self.state.running.per_frame()["loss"]
            if train_loss < progress.best_train_loss:
                progress.best_train_loss, progress.best_train_epoch = train_loss, epoch
                copies.append("best-train-loss.pt")
            if progress.best_valid_epoch == epoch:
                copies.append("best-valid-loss.pt")
            self._save(f"epoch-{epoch}.pt", copies)
        progress.cur_epoch += 1


def _can_be_replayed(config: Config) -> bool:
    """Replays replace gradients, so that there must be one pass for each step; and hooks are not called."""
    return config.train.grad_accumulation == 1 and not config.model.use_unsup_cr_ctc and not config.train.inf_check


if __name__ == "__main__":
    main()
