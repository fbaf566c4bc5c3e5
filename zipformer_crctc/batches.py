"""The order of batches: which utterances make which batch of which step on which rank.

The order is a pure function of the shards, the seed, the epoch and the settings. It does not depend on the number of
loader workers, which only read audio. Every rank works out the same order from the manifests and takes its own batch
of each step; all batches of a step come from one duration bucket, so that ranks wait little for each other.
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from zipformer_crctc.shar import DataError, Shard, Skipped, Utterance, read_shard

logger = logging.getLogger(__name__)

_MIN_STEPS_PER_BUCKET = 4  # small sets get fewer buckets, lest most of them ends in left-over batches
_LEFTOVER_JITTER = 0.1  # relative noise on the duration that left-overs are sorted by

Step = list[list[Utterance]]  # one batch per rank; an empty one where a rank has none left


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a loader worker is asked to read. ``step`` counts from 0 within the epoch."""

    epoch: int
    step: int
    utterances: tuple[Utterance, ...]


class BatchOrder(Protocol):
    """What the loader needs of an order."""

    skipped: Skipped

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[BatchRequest]:
        """This rank's batches of an epoch from step ``start_step`` on."""


@dataclass(frozen=True)
class OrderSettings:
    """Settings of a training order. The seed and all but ``rank`` must be equal on all ranks."""

    max_duration: float = 600.0
    """Seconds of audio per batch and rank, padding included: count times longest never exceeds it."""
    num_buckets: int = 10
    """Duration buckets; 1 mixes all durations."""
    shuffle: bool = True
    """Shuffle shards, utterances and buckets; False keeps the order of the files within a bucket."""
    drop_last: bool = True
    """Drop the last step of an epoch if it has not a full batch for every rank."""
    seed: int = 42
    world_size: int = 1
    rank: int = 0
    buffer_size: int = 10_000
    """Utterances held for shuffling, at least; also the sample that sets the limits of the buckets."""
    open_shards: int = 8
    """Shards read at the same time, so that corpora and languages mix."""

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {getattr(self, name)}; must be at least 1"
            for name in ("num_buckets", "world_size", "buffer_size", "open_shards")
            if getattr(self, name) < 1
        ]
        if not self.max_duration > 0:
            problems.append(f"max_duration: {self.max_duration}; must be above 0 seconds")
        if not 0 <= self.rank < max(1, self.world_size):
            problems.append(f"rank: {self.rank}; must be below world_size {self.world_size}")
        if problems:
            raise ValueError("; ".join(problems))


def take_batch(utterances: Sequence[Utterance], start: int, max_duration: float) -> tuple[int, bool]:
    """End of the batch that begins at ``start``, and whether the rule closed it (else the utterances ran out).

    A batch closes when ``(count + 1) * longest > max_duration``, the next utterance included in ``longest``. An
    utterance that is longer than ``max_duration`` is a batch of its own.
    """
    longest = 0.0
    for end in range(start, len(utterances)):
        longest = max(longest, utterances[end].duration)
        if end > start and (end - start + 1) * longest > max_duration:
            return end, True
    return len(utterances), (len(utterances) - start + 1) * longest > max_duration


def bucket_limits(durations: Sequence[float], num_buckets: int) -> list[float]:
    """The ``num_buckets - 1`` durations that split the sample into buckets of equal total duration."""
    total, so_far = sum(durations), 0.0
    limits: list[float] = []
    for duration in sorted(durations):
        if len(limits) < num_buckets - 1 and so_far >= total * (len(limits) + 1) / num_buckets:
            limits.append(duration)
        so_far += duration
    return limits


class TrainOrder:
    """Training batches. An epoch holds every utterance once, but for those skipped or dropped, which are counted.

    ``accept`` says why an utterance is not to be trained on (None: it is); utterances longer than ``max_duration`` are
    never. ``skipped`` holds the counts of the epoch read last, complete at its end.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        settings: OrderSettings,
        accept: Callable[[Utterance], str | None] | None = None,
    ) -> None:
        self.shards = list(shards)
        self.settings = settings
        self.skipped = Skipped()
        self._accept = accept
        self._first_epoch: int | None = None

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[BatchRequest]:
        """This rank's batches. Steps before ``start_step`` are worked out again, from the manifests alone."""
        for step, batches in enumerate(self.steps(epoch)):
            if step >= start_step:
                yield BatchRequest(epoch, step, tuple(batches[self.settings.rank]))

    def count_steps(self, epoch: int = 1) -> int:
        """Number of steps of an epoch; reads all manifests, no audio. Nothing is logged or counted."""
        return sum(1 for _ in self._checked_steps(epoch, Skipped()))

    def steps(self, epoch: int) -> Iterator[Step]:
        """The batches of all ranks, step by step. Raises ``DataError`` if the epoch has none."""
        if self._first_epoch is None:
            self._first_epoch = epoch
        first_time = epoch == self._first_epoch
        skipped = self.skipped = Skipped(announce=first_time and self.settings.rank == 0)
        yield from self._checked_steps(epoch, skipped)
        if skipped.total and self.settings.rank == 0:
            logger.log(logging.WARNING if first_time else logging.INFO, "epoch %d: %s", epoch, skipped.report())

    def _checked_steps(self, epoch: int, skipped: Skipped) -> Iterator[Step]:
        empty = True
        for step in self._shuffled_steps(epoch, skipped):
            empty = False
            yield step
        if empty:
            raise DataError(
                f"{self.shards[0].cuts.parent if self.shards else 'no shards'}: not one step of training batches "
                f"(max_duration {self.settings.max_duration:g} s, {self.settings.world_size} ranks). "
                f"{skipped.report() or 'There are no utterances'}. Use more data, a smaller max_duration, "
                "or drop_last False"
            )

    def _shuffled_steps(self, epoch: int, skipped: Skipped) -> Iterator[Step]:
        settings = self.settings
        rng = random.Random(f"batch order {settings.seed} {epoch}")
        stream = self._accepted(rng, skipped)
        pool = _Pool(list(islice(stream, settings.buffer_size)), settings, rng)
        # With more than one step's worth per bucket, some bucket can always serve a step; twice that gives a choice.
        wanted_seconds = 2 * settings.num_buckets * settings.world_size * settings.max_duration
        while True:
            while pool.count < settings.buffer_size or pool.seconds < wanted_seconds:
                utterance = next(stream, None)
                if utterance is None:
                    break
                pool.add(utterance)
            step = pool.draw()
            if step is None:
                break
            yield step
        full_steps, partial = pool.leftover_steps()
        yield from full_steps
        if partial and settings.drop_last:
            skipped.announce = False  # nothing is wrong with these
            for utterance in (utterance for batch in partial for utterance in batch):
                skipped.add("dropped at the end of the epoch (drop_last)", utterance.id)
        elif partial:
            yield partial

    def _accepted(self, rng: random.Random, skipped: Skipped) -> Iterator[Utterance]:
        limit = self.settings.max_duration
        for utterance in self._read(rng, skipped):
            reason = self._accept(utterance) if self._accept is not None else None
            if reason is None and utterance.duration > limit:
                reason = f"longer than max_duration, {limit:g} s"
            if reason is None:
                yield utterance
            else:
                skipped.add(reason, utterance.id)

    def _read(self, rng: random.Random, skipped: Skipped) -> Iterator[Utterance]:
        """All utterances: shards shuffled, several of them read at the same time in random turns."""
        shards = list(self.shards)
        if not self.settings.shuffle:
            for shard in shards:
                yield from read_shard(shard, skipped)
            return
        rng.shuffle(shards)
        waiting = (read_shard(shard, skipped) for shard in shards)
        readers = list(islice(waiting, self.settings.open_shards))
        while readers:
            position = rng.randrange(len(readers))
            utterance = next(readers[position], None)
            if utterance is not None:
                yield utterance
                continue
            following = next(waiting, None)
            if following is None:
                del readers[position]
            else:
                readers[position] = following


class EvalOrder:
    """Batches of a set that is scored: every utterance once, longest first, the same in every epoch.

    Nothing is filtered or dropped; an utterance longer than ``max_duration`` is a batch of its own. Ranks take turns;
    at the end some may get an empty batch. ``skipped`` names every cut that cannot be read at all (logged once).
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        max_duration: float,
        world_size: int = 1,
        rank: int = 0,
        *,
        need_text: bool = True,
        keep_alignment: bool = False,
    ) -> None:
        OrderSettings(max_duration=max_duration, world_size=world_size, rank=rank)  # checks them
        self.shards = list(shards)
        self.max_duration, self.world_size, self.rank = max_duration, world_size, rank
        self.skipped = Skipped(max_examples=None)
        self._logged = False
        self._need_text, self._keep_alignment = need_text, keep_alignment

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[BatchRequest]:
        """This rank's batches from step ``start_step`` on."""
        batches = self.batches()
        for step in range(start_step, -(-len(batches) // self.world_size)):
            position = step * self.world_size + self.rank
            yield BatchRequest(epoch, step, tuple(batches[position]) if position < len(batches) else ())

    def batches(self) -> list[list[Utterance]]:
        """All batches of all ranks."""
        self.skipped = Skipped(max_examples=None)
        utterances = [
            utterance
            for shard in self.shards
            for utterance in read_shard(
                shard, self.skipped, need_text=self._need_text, keep_alignment=self._keep_alignment
            )
        ]
        if self.skipped.total and self.rank == 0 and not self._logged:
            logger.warning("%s: %s", self.shards[0].cuts.parent, self.skipped.report())
            self._logged = True
        utterances.sort(key=lambda utterance: -utterance.duration)
        return [batch for batch, _ in _consecutive_batches(utterances, self.max_duration)]


def _consecutive_batches(utterances: list[Utterance], max_duration: float) -> Iterator[tuple[list[Utterance], bool]]:
    """Batches of neighbours, each with whether it is full."""
    start = 0
    while start < len(utterances):
        end, full = take_batch(utterances, start, max_duration)
        yield utterances[start:end], full
        start = end


class _Pool:
    """Utterances in duration buckets, from which steps are drawn."""

    def __init__(self, sample: list[Utterance], settings: OrderSettings, rng: random.Random) -> None:
        self._settings, self._rng = settings, rng
        self._step_seconds = settings.world_size * settings.max_duration
        num_buckets = settings.num_buckets
        if len(sample) < settings.buffer_size:  # the whole epoch
            steps = sum(utterance.duration for utterance in sample) / self._step_seconds
            num_buckets = max(1, min(num_buckets, int(steps / _MIN_STEPS_PER_BUCKET)))
        self._limits = bucket_limits([utterance.duration for utterance in sample], num_buckets)
        self._buckets: list[list[Utterance]] = [[] for _ in range(len(self._limits) + 1)]
        self._bucket_seconds = [0.0] * len(self._buckets)
        self.count = 0
        for utterance in sample:
            self.add(utterance)

    @property
    def seconds(self) -> float:
        return sum(self._bucket_seconds)

    def add(self, utterance: Utterance) -> None:
        """Put an utterance at a random place of its bucket (at its end without shuffling)."""
        position = bisect_right(self._limits, utterance.duration)
        bucket = self._buckets[position]
        bucket.append(utterance)
        if self._settings.shuffle:
            other = self._rng.randrange(len(bucket))
            bucket[other], bucket[-1] = bucket[-1], bucket[other]
        self._bucket_seconds[position] += utterance.duration
        self.count += 1

    def draw(self) -> Step | None:
        """A full batch for every rank, all from one bucket; None if no bucket holds enough.

        The sum of a batch is at most ``max_duration``, so a bucket with more than ``world_size`` times that is enough.
        """
        ready = [position for position, held in enumerate(self._bucket_seconds) if held > self._step_seconds]
        if not ready:
            return None
        if self._settings.shuffle:
            weights = [self._bucket_seconds[position] for position in ready]
            position = self._rng.choices(ready, weights)[0]
        else:
            position = max(ready, key=lambda ready_position: self._bucket_seconds[ready_position])
        bucket = self._buckets[position]
        step, start = [], 0
        for _ in range(self._settings.world_size):
            end, _ = take_batch(bucket, start, self._settings.max_duration)
            step.append(bucket[start:end])
            start = end
        del bucket[:start]
        self.count -= start
        # Summed anew, so that rounding errors do not pile up over a long run.
        self._bucket_seconds[position] = sum(utterance.duration for utterance in bucket)
        return step

    def leftover_steps(self) -> tuple[list[Step], Step]:
        """What no bucket could serve, as full steps and one partial step (may be empty)."""
        rest = [utterance for bucket in self._buckets for utterance in bucket]
        if self._settings.shuffle:
            jitter = {id(item): self._rng.uniform(1 - _LEFTOVER_JITTER, 1 + _LEFTOVER_JITTER) for item in rest}
            rest.sort(key=lambda utterance: utterance.duration * jitter[id(utterance)])
            if self._rng.random() < 0.5:  # what is dropped at the end is not always the longest
                rest.reverse()
        batches = list(_consecutive_batches(rest, self._settings.max_duration))
        size = self._settings.world_size
        tail = [batches.pop()[0]] if batches and not batches[-1][1] else []
        whole = len(batches) - len(batches) % size
        full_steps = [[batch for batch, _ in batches[start : start + size]] for start in range(0, whole, size)]
        if self._settings.shuffle:
            self._rng.shuffle(full_steps)
        last = [batch for batch, _ in batches[whole:]] + tail
        return full_steps, last + [[] for _ in range(size - len(last))] if last else []
