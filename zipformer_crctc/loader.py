"""From batch requests to feature batches: worker processes read FLAC data, perturb the volume and make features.

Shapes: N utterances, T frames of 10 ms, 80 mel bins, S samples at 16 kHz.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from zipformer_crctc.audio import AudioError
from zipformer_crctc.batches import BatchOrder, BatchRequest, EvalOrder, State
from zipformer_crctc.features import LOG_EPS, NUM_BINS, SAMPLING_RATE, Fbank, num_feature_frames
from zipformer_crctc.flac import decode
from zipformer_crctc.preemption import is_noted, outlive_preemption
from zipformer_crctc.remote import with_retries
from zipformer_crctc.shar import Shard, Skipped, Utterance, find_shards
from zipformer_crctc.trainorder import OrderSettings, TrainOrder

logger = logging.getLogger(__name__)

MIN_FRAMES = 9  # the front-end needs as many for one output frame
_LENGTH_TOLERANCE = 400  # samples, 25 ms, as lhotse allows
_OPEN_TARS = 64  # file handles that a worker keeps
_PREFETCH = 4  # batches that each worker has under way
_VOLUME_PROBABILITY = 0.5
_VOLUME_RANGE = (0.125, 2.0)


@dataclass
class Batch:
    """Features of some utterances, longest first. May be empty: a rank with nothing left to do at an epoch's end."""

    features: Tensor  # (N, T, 80) float32, padded with ln(1e-10)
    num_frames: Tensor  # (N,) int64
    utterances: list[Utterance]
    epoch: int = 0
    step: int = 0  # within the epoch, from 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (utterance id, reason) of audio that is no use
    mirrored: Tensor | None = None
    """(N, (T - 1) 160 + 400): audio of which `to` makes the features, which are empty until then"""
    fingerprint: int = 0
    """see `BatchRequest`"""

    def __getstate__(self) -> dict[str, Any]:
        """From process to process lengths travel as numbers: each tensor is a file of shared memory and a socket."""
        return {**vars(self), "num_frames": self.num_frames.tolist()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, num_frames=torch.as_tensor(state["num_frames"], dtype=torch.int64))

    @property
    def texts(self) -> list[str]:
        return [utterance.text for utterance in self.utterances]

    @property
    def is_empty(self) -> bool:
        return not self.utterances

    @property
    def seconds(self) -> float:
        """Audio in the batch, padding not counted."""
        return sum(utterance.duration for utterance in self.utterances)

    def pin_memory(self) -> Batch:
        mirrored = None if self.mirrored is None else self.mirrored.pin_memory()
        features, num_frames = self.features.pin_memory(), self.num_frames.pin_memory()
        return replace(self, features=features, num_frames=num_frames, mirrored=mirrored)

    def to(self, device: torch.device | str) -> Batch:
        """The batch with its tensors on ``device``, where the features are made if the workers left it to that."""
        num_frames = self.num_frames.to(device, non_blocking=True)
        if self.mirrored is None:
            return replace(self, features=self.features.to(device, non_blocking=True), num_frames=num_frames)
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            features = Fbank().of_mirrored(self.mirrored.to(device, non_blocking=True), num_frames)
        return replace(self, features=features, num_frames=num_frames, mirrored=None)


class AudioReader:
    """Reads and decodes FLAC members of tars; keeps the tars it used last open."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self._failed: set[str] = set()  # tars that failed all tries: they are not waited for again

    def __call__(self, utterance: Utterance) -> np.ndarray:
        """Samples (S,) float32 in [-1, 1]. Raises ``AudioError`` with a reason."""
        try:
            if utterance.tar in self._failed:
                data = self._bytes(utterance)
            else:
                data = with_retries(lambda: self._bytes(utterance), f"{utterance.tar}, {utterance.id}")
        except OSError as error:
            self._failed.add(utterance.tar)
            raise AudioError(f"tar cannot be read ({error.strerror})") from error
        if len(data) != utterance.size:
            raise AudioError("tar is truncated")
        try:
            samples, sampling_rate = decode(data)
        except (RuntimeError, ValueError, TypeError) as error:  # soundfile's own errors are RuntimeErrors
            raise AudioError("damaged audio") from error
        if sampling_rate != SAMPLING_RATE:
            raise AudioError(f"sampling rate {sampling_rate} instead of {SAMPLING_RATE}")
        if samples.ndim != 1:
            raise AudioError(f"{samples.shape[1]} channels instead of one")
        if num_feature_frames(len(samples)) < MIN_FRAMES:
            raise AudioError(f"fewer than {MIN_FRAMES} feature frames")
        if abs(len(samples) - utterance.num_samples) > _LENGTH_TOLERANCE:  # batches and filters rely on it
            raise AudioError("another length than the manifest says")
        return samples

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def _bytes(self, utterance: Utterance) -> bytes:
        try:
            return os.pread(self._descriptor(utterance.tar), utterance.size, utterance.offset)
        except OSError:
            if utterance.tar in self._open:  # a handle may be stale; the next try opens the file again
                os.close(self._open.pop(utterance.tar))
            raise

    def _descriptor(self, tar: str) -> int:
        if tar not in self._open:
            if len(self._open) >= _OPEN_TARS:
                os.close(self._open.popitem(last=False)[1])
            self._open[tar] = os.open(tar, os.O_RDONLY)
        self._open.move_to_end(tar)
        return self._open[tar]


def volume_factor(seed: int, epoch: int, utterance_id: str) -> float:
    """1 with probability 0.5, else uniform in [0.125, 2]; the same whichever worker or rank reads the utterance."""
    rng = random.Random(f"volume {seed} {epoch} {utterance_id}")
    return rng.uniform(*_VOLUME_RANGE) if rng.random() < _VOLUME_PROBABILITY else 1.0


def speed_factor(amount: float, seed: int, epoch: int, utterance_id: str) -> float:
    """Uniform in [1 - amount, 1 + amount]; the same whichever worker or rank reads the utterance."""
    return 1.0 + amount * random.Random(f"speed {seed} {epoch} {utterance_id}").uniform(-1.0, 1.0)


def change_speed(samples: np.ndarray, factor: float) -> np.ndarray:
    """Resampled so that it lasts 1 / factor as long, with the pitch and the formants times factor."""
    import soxr  # installations for decoding alone can do without

    return soxr.resample(samples, SAMPLING_RATE * factor, SAMPLING_RATE)


class BatchReader(Dataset[Batch]):
    """Turns a request into a batch; runs in the workers.

    ``perturbation_seed`` None leaves volume and speed as they are, ``speed`` 0 the speed. With ``only_audio`` the
    features are left to ``Batch.to``.
    """

    def __init__(
        self,
        perturbation_seed: int | None = None,
        speed: float = 0.0,
        zero_padded: bool = False,
        only_audio: bool = False,
    ) -> None:
        if only_audio and zero_padded:
            raise ValueError("only_audio: features of zero-padded batches are made by the workers; leave one of both")
        self._only_audio = only_audio
        self._seed = perturbation_seed
        self._speed = speed
        self._fbank = Fbank(zero_padded=zero_padded)
        self._read = AudioReader()

    def __getitem__(self, request: BatchRequest) -> Batch:
        utterances: list[Utterance] = []
        waveforms: list[Tensor] = []
        skipped: list[tuple[str, str]] = []
        for utterance in request.utterances:
            try:
                samples = self._read(utterance)
            except AudioError as error:
                skipped.append((utterance.id, str(error)))
                continue
            if self._seed is not None:
                if self._speed:
                    samples = change_speed(samples, speed_factor(self._speed, self._seed, request.epoch, utterance.id))
                samples *= volume_factor(self._seed, request.epoch, utterance.id)
            utterances.append(utterance)
            waveforms.append(torch.from_numpy(samples))
        if self._only_audio:
            return self._audio_batch(request, utterances, waveforms, skipped)
        with torch.inference_mode():  # costs less than no_grad; the batch itself must not be made in this mode
            parts = self._fbank.batch(waveforms)
        features, num_frames, order = collate(parts)
        in_order = [utterances[i] for i in order]
        return Batch(
            features, num_frames, in_order, request.epoch, request.step, skipped, fingerprint=request.fingerprint
        )

    def _audio_batch(
        self,
        request: BatchRequest,
        utterances: list[Utterance],
        waveforms: list[Tensor],
        skipped: list[tuple[str, str]],
    ) -> Batch:
        """The same batch as `__getitem__` makes, but for its features."""
        counts = [num_feature_frames(len(waveform)) for waveform in waveforms]
        order = sorted(range(len(counts)), key=lambda i: -counts[i])
        parts = [self._fbank.mirrored(waveforms[i]) for i in order]
        mirrored = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True) if parts else torch.zeros(0, 0)
        num_frames = torch.tensor([counts[i] for i in order], dtype=torch.int64)
        in_order = [utterances[i] for i in order]
        nothing = torch.zeros(len(order), 0, NUM_BINS)
        return Batch(nothing, num_frames, in_order, request.epoch, request.step, skipped, mirrored, request.fingerprint)


def collate(features: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[int]]:
    """[(T_i, 80)] to a padded (N, T, 80), lengths (N,), and the order taken: longest first, else as given."""
    order = sorted(range(len(features)), key=lambda i: -features[i].shape[0])
    num_frames = [features[i].shape[0] for i in order]
    padded = torch.full((len(order), num_frames[0] if num_frames else 0, NUM_BINS), LOG_EPS)
    for row, i in enumerate(order):
        padded[row, : num_frames[row]] = features[i]
    return padded, torch.tensor(num_frames, dtype=torch.int64), order


_STATE_FORMAT = 2


@dataclass
class _Position:
    """Where the next pass begins, and the states of the order that were met since the first one still needed."""

    epoch: int
    step: int
    states: deque[tuple[int, int, State]] = field(default_factory=deque)  # (epoch, step, state), in this order

    def move(self, epoch: int, step: int) -> None:
        """Forget the states that a later one before the position replaces."""
        self.epoch, self.step = epoch, step
        while len(self.states) > 1 and self.states[1][:2] <= (epoch, step):
            self.states.popleft()

    def state(self) -> State | None:
        """The last state before the position in its epoch."""
        if self.states and self.states[0][0] == self.epoch and self.states[0][1] <= self.step:
            return self.states[0][2]
        return None


class BatchLoader:
    """Iterates over batches from a position (epoch, step) on.

    One pass gives the rest of the current epoch and moves the position to the next; with ``endless`` it goes on for
    ever. ``state_dict`` is the position behind the batch given out last, whatever the workers have prefetched.
    With ``scored`` each pass is the whole set. Utterances whose audio turned out to be no use are logged, and counted
    in ``skipped`` (``scored``: each by name, anew in each pass).
    """

    def __init__(
        self,
        order: BatchOrder,
        reader: BatchReader,
        num_workers: int = 0,
        *,
        endless: bool = False,
        pin_memory: bool = False,
        first_epoch: int = 1,
        scored: bool = False,
    ) -> None:
        if num_workers < 0:
            raise ValueError(f"num_workers: {num_workers}; must be at least 0")
        self.order = order
        self.scored = scored
        self._position = _Position(first_epoch, 0)
        self.skipped = Skipped(max_examples=None if scored else 3)
        self._loader: DataLoader[Batch] = DataLoader(
            reader,
            batch_size=None,
            sampler=_Requests(order, self._position, endless),
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            prefetch_factor=_PREFETCH if num_workers else None,
            pin_memory=pin_memory,
            worker_init_fn=outlive_preemption if is_noted() else None,
            generator=torch.Generator().manual_seed(0),  # leaves the program's own random numbers alone
        )

    def __iter__(self) -> Iterator[Batch]:
        if self.scored:
            self.set_position(self._position.epoch)
            self.skipped = Skipped(max_examples=None)
        for batch in self._loader:
            for utterance_id, reason in batch.skipped:
                logger.warning("skipped %s: %s", utterance_id, reason)
                self.skipped.add(reason, utterance_id)
            self._position.move(batch.epoch, batch.step + 1)
            yield batch
        self.set_position(self._position.epoch + 1)

    def close(self) -> None:
        """End the workers; nothing can be read after that."""
        shutdown = getattr(self._loader._iterator, "_shutdown_workers", None)
        if shutdown is not None:
            # A worker that a signal kills on its way out would else hide why the run ends, and its exit status.
            with contextlib.suppress(RuntimeError):
                shutdown()

    def set_position(self, epoch: int, step: int = 0) -> None:
        """The next pass begins at ``step`` of ``epoch``, which takes reading the indexes of all that comes before."""
        self._position.states.clear()
        self._position.move(epoch, step)

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, equal on all ranks; of a size that depends on the shuffle buffer only."""
        position = self._position
        return {
            "format": _STATE_FORMAT,
            "epoch": position.epoch,
            "step": position.step,
            "order": self.order.fingerprint(),
            "state": position.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that ``state_dict`` told; the same batches follow, or without loss others if settings changed.

        A place of an older version, or in other data, cannot be found again: then the epoch begins anew, and a warning
        says so.
        """
        epoch, step = int(state["epoch"]), int(state["step"])
        problem = ""
        if state.get("format") != _STATE_FORMAT:
            problem = "an older version wrote it"
        elif state["order"] != self.order.fingerprint():
            problem = "the shards, their weights, the seed or --shuffle are others"
        if problem and step:
            logger.warning("the place in the data (step %d) is unknown, %s: epoch %d begins anew", step, problem, epoch)
        self.set_position(epoch, 0 if problem else step)
        if not problem and state["state"] is not None:
            self._position.states.append((epoch, int(state["state"]["step"]), state["state"]))


class _Requests:
    """The sampler of the inner loader: requests from a position on.

    It does not hold the outer loader: a cycle would leave the workers to the garbage collector, which closes their
    queues first, so that each worker is waited for in vain.
    """

    def __init__(self, order: BatchOrder, position: _Position, endless: bool) -> None:
        self._order, self._position, self._endless = order, position, endless

    def __iter__(self) -> Iterator[BatchRequest]:
        position = self._position
        epoch, state = position.epoch, position.state()
        requests = self._order.epoch(epoch, position.step, state)
        position.states.clear()
        if state is not None:
            position.states.append((epoch, int(state["step"]), state))
        while True:
            for request in requests:
                if request.state is not None:
                    position.states.append((request.epoch, request.step, request.state))
                yield replace(request, state=None)  # the workers have no use for it
            if not self._endless:
                break
            epoch += 1
            requests = self._order.epoch(epoch)


def build_train_loader(
    folders: Sequence[str | Path],
    *,
    weights: Mapping[Path, float] | None = None,
    accept: Callable[[Utterance], str | None] | None = None,
    max_duration: float = 600.0,
    quadratic_duration: float | None = None,
    num_buckets: int = 10,
    shuffle: bool = True,
    drop_last: bool = True,
    subset: int = 100,
    seed: int = 42,
    world_size: int = 1,
    rank: int = 0,
    buffer_size: int = OrderSettings.buffer_size,
    num_workers: int = 4,
    perturbation: bool = True,
    speed_perturbation: float = 0.0,
    zero_padded: bool = False,
    only_audio: bool = False,
    endless: bool = False,
    pin_memory: bool = False,
    index_dir: Path | None = None,
) -> BatchLoader:
    """A loader of training batches from several shar folders, whose shards are shuffled together.

    ``weights`` of folders (1 where there is none) mix them as in ``trainorder.TrainOrder``. ``accept`` (such as
    ``filters.TrainingFilter``) says why an utterance is left out, or None. ``subset`` is the share
    of each folder's shards that is used, in percent, at least one shard. ``max_duration`` to ``buffer_size`` are as in
    ``trainorder.OrderSettings``; durations are those before a change of speed. ``perturbation`` False leaves volume and
    speed as they are. Raises ``DataError`` for a folder without usable shards and
    ``ValueError`` for a setting.
    """
    settings = OrderSettings(
        max_duration=max_duration,
        quadratic_duration=quadratic_duration,
        num_buckets=num_buckets,
        shuffle=shuffle,
        drop_last=drop_last,
        seed=seed,
        world_size=world_size,
        rank=rank,
        buffer_size=buffer_size,
    )
    found = [_shards(folder, subset, index_dir) for folder in _named(folders)]
    by_folder = weights or {}
    order = TrainOrder(
        [shard for shards in found for shard in shards],
        settings,
        accept,
        [by_folder.get(Path(folder), 1.0) for folder, shards in zip(folders, found, strict=True) for _ in shards],
    )
    reader = BatchReader(seed if perturbation else None, speed_perturbation, zero_padded, only_audio)
    return BatchLoader(order, reader, num_workers, endless=endless, pin_memory=pin_memory)


def build_eval_loader(
    folders: Sequence[str | Path],
    *,
    max_duration: float = 600.0,
    num_workers: int = 1,
    world_size: int = 1,
    rank: int = 0,
    need_text: bool = True,
    keep_alignment: bool = False,
    zero_padded: bool = False,
    pin_memory: bool = False,
    index_dir: Path | None = None,
) -> BatchLoader:
    """A loader of a set that is scored: every utterance once, longest first, none filtered, no augmentation.

    Each pass is the whole set. What cannot be read is listed in ``loader.order.skipped`` (manifests and tars) and
    ``loader.skipped`` (audio).
    """
    shards = [shard for folder in _named(folders) for shard in find_shards(folder, index_dir)]
    order = EvalOrder(shards, max_duration, world_size, rank, need_text=need_text, keep_alignment=keep_alignment)
    reader = BatchReader(zero_padded=zero_padded)
    return BatchLoader(order, reader, num_workers, pin_memory=pin_memory, scored=True)


def _named(folders: Sequence[str | Path]) -> Sequence[str | Path]:
    if not folders:
        raise ValueError("no data folder given; name at least one")
    return folders


def _shards(folder: str | Path, subset: int, index_dir: Path | None) -> list[Shard]:
    """The first `subset` percent of the shards of a folder, rounded up."""
    shards = find_shards(folder, index_dir)
    return shards[: -(-len(shards) * subset // 100)]
