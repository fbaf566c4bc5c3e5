"""All that a training run is made of and its checkpoints hold: saved by all ranks, and taken up again to the bit."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_crctc import checkpoint
from zipformer_crctc.averaging import RunningAverage
from zipformer_crctc.config import Config, config_to_dict
from zipformer_crctc.dataconfig import DataSets
from zipformer_crctc.distributed import Process
from zipformer_crctc.filters import FilterLimits, TrainingFilter
from zipformer_crctc.loader import BatchLoader, build_eval_loader, build_train_loader
from zipformer_crctc.model import CtcModel, build_model
from zipformer_crctc.objective import TargetEncoder
from zipformer_crctc.optim import Eden, ScaledAdam
from zipformer_crctc.randomstate import random_state, seed_everything
from zipformer_crctc.resume import named_checkpoint, newest_checkpoint, set_aside
from zipformer_crctc.schedule import set_batch_count
from zipformer_crctc.tokenizer import PhoneTokenizer
from zipformer_crctc.tracking import RunningSums

logger = logging.getLogger(__name__)

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


def load_tokenizer(path: Path | None) -> PhoneTokenizer:
    """The tokenizer of a sentencepiece model file, or of the package's table."""
    return PhoneTokenizer.from_table() if path is None else PhoneTokenizer.from_model(path)


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


class RunState:
    """What changes in a training run, in one process: model, optimizer, place in the data, and how far it is.

    Args:
        config: of the run, with the true world size.
        process: this process.
        sets: folders of the data.

    A run goes on from a checkpoint where the configuration asks for one.
    """

    def __init__(self, config: Config, process: Process, sets: DataSets) -> None:
        self.config = config
        self.process = process
        self.exp_dir = config.train.exp_dir
        seed_everything(config.train.seed, process.rank)
        self.tokenizer = load_tokenizer(config.data.bpe_model)
        self.encode = TargetEncoder(self.tokenizer, config.data.remove_diacritics)
        self.train_loader, self.unsup_loader, self.valid_loader = build_loaders(config, process, sets, self.encode)

        self.model: CtcModel = build_model(config.model, self.tokenizer.vocab_size).to(process.device)
        self.average = RunningAverage(self.model) if process.is_main else None
        named = list(self.model.named_parameters())
        self.optimizer = ScaledAdam([{"named_params": named}], lr=config.train.base_lr, clipping_scale=CLIPPING_SCALE)
        self.scheduler = Eden(
            self.optimizer, config.train.lr_batches, config.train.lr_epochs, config.train.lr_warmup_batches
        )
        self.scaler = torch.amp.GradScaler(
            process.device.type, enabled=config.train.precision_on(process.device.type) == "fp16"
        )
        self.progress = Progress(cur_epoch=config.train.start_epoch)
        self.running, self.running_unsup = RunningSums(), RunningSums()
        self.random_state: dict[str, Any] | None = None
        self.unsaved: str | None = None
        self._resume()

    @property
    def num_parameters(self) -> int:
        """Of the model."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def place_in_epoch(self) -> int:
        """Steps of the epoch that are done."""
        return int(self.train_loader.state_dict()["step"])

    @property
    def adjusted_batch_count(self) -> float:
        """b: batches of the reference duration that correspond to the batches so far."""
        seconds = self.config.data.max_duration * self.process.world_size
        return self.progress.batch_idx_train * seconds / self.config.train.ref_duration

    def save(self, name: str, copies: Sequence[str] = (), accumulating: bool = False) -> None:
        """Write a checkpoint of all ranks and delete outdated ones. Where the disk is full, training goes on.

        Args:
            name: of the file in the folder of the run.
            copies: further names for it.
            accumulating: whether gradients wait for an optimizer step; the same on all ranks.
        """
        if accumulating:
            self._share_gradients()
        rank_states = self.process.gather(self._rank_state())
        if self.process.is_main:
            self.write(name, rank_states, copies)
        self.process.barrier()

    def write(self, name: str, rank_states: list[dict[str, Any]] | None, copies: Sequence[str] = ()) -> None:
        """As `save`, by this process alone."""
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
            gradients=gradients or None,
            rank_states=rank_states,
        )

    def _rank_state(self) -> dict[str, Any]:
        """What differs from rank to rank."""
        return {
            "random": random_state(self.model, self.process.device),
            "running": self.running.sums.cpu(),
            "running_unsup": self.running_unsup.sums.cpu(),
        }

    def _share_gradients(self) -> None:
        """Replace the gradients of an accumulation under way by their mean over the ranks, which one file can hold."""
        if self.process.world_size == 1:
            return
        self.process.average_(all_gradients(self.model.parameters()))

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
            self.progress.schedule_batch_count = self.adjusted_batch_count
        set_batch_count(self.model, self.progress.schedule_batch_count)
        sampler = payload.get("sampler")
        if path.name.startswith("epoch-"):
            self.progress.cur_epoch = int(path.stem.removeprefix("epoch-")) + 1
        if sampler and "step" in sampler:  # other samplers, as in published files, tell no place of ours
            self.train_loader.load_state_dict(sampler)
        else:
            self.train_loader.set_position(self.progress.cur_epoch)
            logger.warning("%s holds no place in the data: epoch %d begins anew", path, self.progress.cur_epoch)
        if self.unsup_loader is not None:
            if sampler and sampler.get("unsup") is not None:
                self.unsup_loader.load_state_dict(sampler["unsup"])
            else:
                logger.warning("%s holds no place in the pseudo-labelled data: they begin anew", path)
        self._resume_rank(path, payload)
        train = self.config.train
        if self.process.is_main and train.resume != "auto" and not train.dry_run:
            set_aside(self.exp_dir, self.progress.batch_idx_train)
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
        elif self.place_in_epoch > 0:
            there = f"of {len(states)} ranks, not {world_size}" if states else "not there"
            logger.warning("%s: states of random generators are %s, so random numbers begin anew", path, there)


def all_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """A gradient of each parameter; those that have none get zeros."""
    gradients = []
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
        gradients.append(p.grad)
    return gradients
