"""The order of training batches: which utterances make which batch of which step on which rank.

The order is a pure function of the shards, the seed, the epoch and the settings. It does not depend on the number of
loader workers, which only read audio. Every rank works out the same order from the shards' indexes and takes its own
batch of each step, so nothing is lost or read twice, whatever the number of nodes, ranks and workers; all batches of a
step come from one bucket, and all ranks make the same number of steps.

Shards are read one after the other, a few at a time, in the shuffled order of the epoch, through a pool of bounded
size. Now and then the state is written down: how far each open shard is read, and which cuts the pool holds. From there
a later step is reached without reading what was consumed before.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from zlib import crc32

import torch

from zipformer_crctc.batches import FINGERPRINTS, BatchRequest, State
from zipformer_crctc.buckets import BucketPool, Item, ItemStep, bucket_limits, leftover_steps
from zipformer_crctc.shar import DataError, Shard, ShardReader, Skipped, Utterance
from zipformer_crctc.sharindex import Problem

logger = logging.getLogger(__name__)

_MIN_STEPS_PER_BUCKET = 4  # small sets get fewer buckets, lest most of them ends in left-over batches

Judge = Callable[[Utterance], str | None]
"""Says why an utterance is not to be trained on; None: it is."""


@dataclass(frozen=True)
class OrderSettings:
    """Settings of a training order. All but ``rank`` must be equal on all ranks."""

    max_duration: float = 600.0
    """Seconds of audio per batch and rank, padding included: count times longest never exceeds it."""
    quadratic_duration: float | None = None
    """Count an utterance of d seconds as d + d * d / this, as lhotse does, for models quadratic in the length."""
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
        if self.quadratic_duration is not None and not self.quadratic_duration > 0:
            problems.append(f"quadratic_duration: {self.quadratic_duration}; must be above 0 seconds, or None")
        if not 0 <= self.rank < max(1, self.world_size):
            problems.append(f"rank: {self.rank}; must be below world_size {self.world_size}")
        if problems:
            raise ValueError("; ".join(problems))

    def cost(self, duration: float) -> float:
        """What an utterance of ``duration`` seconds counts towards ``max_duration``."""
        return duration if self.quadratic_duration is None else duration + duration**2 / self.quadratic_duration

    def shared(self) -> dict[str, Any]:
        """All but the rank, as plain data: equal on all ranks."""
        values = dataclasses.asdict(self)
        del values["rank"]
        return values


class TrainOrder:
    """Training batches. An epoch holds every utterance once, but for those skipped or dropped, which are counted.

    ``accept`` judges utterances; those that cost more than ``max_duration`` are never used. ``weights`` (one for each
    shard, 1 without) say how often the utterances of a shard come in an epoch on average: 2.5 is all of them twice
    and a random half once more. ``skipped`` holds the counts of the epoch read last, complete at its end.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        settings: OrderSettings,
        accept: Judge | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.shards = list(shards)
        self.settings = settings
        self.weights = [1.0] * len(self.shards) if weights is None else list(weights)
        if len(self.weights) != len(self.shards) or not all(0 < weight < math.inf for weight in self.weights):
            raise ValueError(
                f"weights: {self.weights[:5]}; give a number above 0 for each of {len(self.shards)} shards"
            )
        self.skipped = Skipped()
        self._accept = accept
        self._first_epoch: int | None = None

    def fingerprint(self) -> str:
        """Of what the sequence of shards depends on. A place in one order is no place in another."""
        parts = [f"{shard.name} {weight:g}" for shard, weight in zip(self.shards, self.weights, strict=True)]
        text = "\n".join([f"{self.settings.seed} {self.settings.shuffle}", *parts])
        return sha256(text.encode()).hexdigest()[:16]

    def epoch(self, epoch: int, start_step: int = 0, state: State | None = None) -> Iterator[BatchRequest]:
        """This rank's batches from ``start_step`` on; steps since ``state``, or the start, are worked out again.

        A state of other settings (another number of ranks, say) is followed to ``start_step`` with those, and from
        there with the present ones: no utterance is lost or repeated, though the batches are others.
        """
        for step, batches, new_state in self.steps(epoch, start_step, state):
            utterances = tuple(item.utterance for item in batches[self.settings.rank])
            names = "\n".join(item.utterance.id for batch in batches for item in batch)
            yield BatchRequest(epoch, step, utterances, crc32(names.encode()) % FINGERPRINTS, new_state)

    def steps(
        self, epoch: int, start_step: int = 0, state: State | None = None
    ) -> Iterator[tuple[int, ItemStep, State | None]]:
        """Steps with the batches of all ranks, and now and then the state before the step.

        Raises ``DataError`` if the epoch has none.
        """
        if self._first_epoch is None:
            self._first_epoch = epoch
        first_time = epoch == self._first_epoch
        self.skipped = Skipped(announce=first_time and self.settings.rank == 0)
        plan = self._plan(epoch, start_step, state)
        while True:
            new_state = plan.renew()
            step, batches = plan.step, plan.next_step()
            if batches is None:
                break
            yield step, batches, new_state
        if plan.step == 0:
            raise self._nothing()
        if self.skipped.total and self.settings.rank == 0:
            logger.log(logging.WARNING if first_time else logging.INFO, "epoch %d: %s", epoch, self.skipped.report())

    def _plan(self, epoch: int, start_step: int, state: State | None) -> _Plan:
        """The plan of an epoch before ``start_step``, or before step 0 where that cannot be reached."""
        entries = self._entries(epoch)
        settings = self.settings
        if state is not None:
            settings = dataclasses.replace(OrderSettings(**state["settings"]), rank=0)
        plan = _Plan(entries, settings, f"{self.settings.seed} {epoch}", self._accept, self.skipped)
        try:
            if state is not None:
                plan.restore(state)
            while plan.step < start_step:
                plan.renew()
                if plan.next_step() is None:
                    break
        except _Changed as change:
            logger.warning("%s: epoch %d begins anew", change, epoch)
            self.skipped = Skipped()
            return _Plan(entries, self.settings, f"{self.settings.seed} {epoch}", self._accept, self.skipped)
        if settings.shared() != self.settings.shared():
            old, new = settings.shared(), self.settings.shared()
            changes = ", ".join(f"{name} {old[name]} -> {new[name]}" for name in new if old[name] != new[name])
            logger.info(
                "epoch %d, step %d: from here on %s; no utterance of the epoch is lost or repeated, the batches are "
                "others",
                *(epoch, plan.step, changes),
            )
            plan.change(self.settings)
        return plan

    def _entries(self, epoch: int) -> list[tuple[Shard, float]]:
        """The shards of an epoch in their order, each with the share of its utterances that is used."""
        entries = []
        for shard, weight in zip(self.shards, self.weights, strict=True):
            entries += [(shard, 1.0)] * int(weight)
            if weight % 1:
                entries.append((shard, weight % 1))
        if self.settings.shuffle:
            random.Random(f"shards {self.settings.seed} {epoch}").shuffle(entries)
        return entries

    def _nothing(self) -> DataError:
        return DataError(
            f"{self.shards[0].cuts.parent if self.shards else 'no shards'}: not one step of training batches "
            f"(max_duration {self.settings.max_duration:g} s, {self.settings.world_size} ranks). "
            f"{self.skipped.report() or 'There are no utterances'}. Use more data, a smaller max_duration, "
            "or drop_last False"
        )


class _Changed(Exception):
    """The data are no longer those that a state was made of."""


class _Plan:
    """The order of an epoch, step by step."""

    def __init__(
        self,
        entries: Sequence[tuple[Shard, float]],
        settings: OrderSettings,
        seed: str,
        accept: Judge | None,
        skipped: Skipped,
    ) -> None:
        self.settings = settings
        self.step = 0
        self._stream = _Stream(entries, settings.open_shards if settings.shuffle else 1, seed)
        self._accept, self._skipped = accept, skipped
        self._seed = seed
        self._renewals = 0
        self._rng = random.Random(f"batch order {seed} 0")
        self._drawn: int | None = None  # utterances since the state was renewed; None: never yet
        self._pool: BucketPool | None = None
        self._rest: list[ItemStep] | None = None  # left-over steps, the next one last
        self._partial: ItemStep = []

    def next_step(self) -> ItemStep | None:
        """The batches of all ranks; None at the end of the epoch."""
        settings = self.settings
        if self._pool is None:
            self._pool = self._sampled_pool()
        if self._rest is None:
            self._fill(self._pool)
            step = self._pool.draw(settings.world_size, settings.max_duration)
            if step is not None:
                return self._count(step)
            items = self._pool.empty()
            full, self._partial = leftover_steps(
                items, settings.world_size, settings.max_duration, settings.shuffle, self._rng
            )
            self._rest = full[::-1]
        if self._rest:
            return self._count(self._rest.pop())
        partial, self._partial = self._partial, []
        if not partial:
            return None
        if not settings.drop_last:
            return self._count(partial)
        self._skipped.announce = False  # nothing is wrong with these
        for item in (item for batch in partial for item in batch):
            self._skipped.add("dropped at the end of the epoch (drop_last)", item.utterance.id)
        return None

    def renew(self) -> State | None:
        """Where it is time, the state before the next step, with random numbers that begin anew from it."""
        if self._drawn is None:
            self._drawn = 0
            return {"settings": self.settings.shared(), "step": 0} if self.step == 0 else None
        if self._pool is None or self._rest is not None:
            return None
        if self._drawn < max(self.settings.buffer_size, self._pool.count):
            return None
        return self._renewed(self._pool)

    def change(self, settings: OrderSettings) -> None:
        """Go on with other settings from here."""
        self.settings = settings
        self._stream.open_shards = settings.open_shards if settings.shuffle else 1
        if self._pool is None:
            return
        items = self._pool.empty()
        if self._rest is not None:
            items += [item for step in [*self._rest[::-1], self._partial] for batch in step for item in batch]
            self._rest, self._partial = None, []
        self._pool = self._new_pool([item._replace(cost=settings.cost(item.utterance.duration)) for item in items])
        self._drawn = max(settings.buffer_size, self._pool.count)  # the next step begins with a state

    def restore(self, state: State) -> None:
        """Go to where a state was taken."""
        if state["step"] == 0:
            return
        self.step, self._renewals, self._drawn = state["step"], state["renewals"], 0
        self._rng = random.Random(f"batch order {self._seed} {self._renewals}")
        self._skipped.counts.update(state["skipped"])
        self._skipped.examples.update({reason: list(names) for reason, names in state["examples"].items()})
        self._stream.restore(state["opened"], state["readers"].tolist())
        self._pool = BucketPool(list(state["limits"]), self.settings.shuffle, self._rng)
        for position, pairs in enumerate(state["buckets"]):
            utterances = self._stream.fetch(pairs.tolist())
            items = [Item(self.settings.cost(item.duration), place, n, item) for place, n, item in utterances]
            self._pool.restore(position, items)
        self._stream.forget()

    def _renewed(self, pool: BucketPool) -> State:
        self._renewals += 1
        self._drawn = 0
        self._rng = pool.rng = random.Random(f"batch order {self._seed} {self._renewals}")
        pool.resum()
        return {
            "settings": self.settings.shared(),
            "step": self.step,
            "renewals": self._renewals,
            "skipped": dict(self._skipped.counts),
            "examples": {reason: list(names) for reason, names in self._skipped.examples.items()},
            "opened": self._stream.opened,
            "readers": _pairs(self._stream.positions()),
            "limits": list(pool.limits),
            "buckets": [_pairs([(item.place, item.number) for item in bucket]) for bucket in pool.buckets],
        }

    def _sampled_pool(self) -> BucketPool:
        """A pool whose limits are those of the first utterances, which it holds."""
        sample: list[Item] = []
        while len(sample) < self.settings.buffer_size and (item := self._next_item()) is not None:
            sample.append(item)
        return self._new_pool(sample)

    def _new_pool(self, items: Sequence[Item]) -> BucketPool:
        settings = self.settings
        num_buckets = settings.num_buckets
        if len(items) < settings.buffer_size:  # the whole epoch, or the end of it
            steps = sum(item.cost for item in items) / (settings.world_size * settings.max_duration)
            num_buckets = max(1, min(num_buckets, int(steps / _MIN_STEPS_PER_BUCKET)))
        limits = bucket_limits([item.cost for item in items], num_buckets)
        pool = BucketPool(limits, settings.shuffle, self._rng)
        for item in items:
            pool.add(item)
        return pool

    def _fill(self, pool: BucketPool) -> None:
        # With more than one step's worth per bucket, some bucket can always serve a step; twice that gives a choice.
        settings = self.settings
        wanted = 2 * settings.num_buckets * settings.world_size * settings.max_duration
        while pool.count < settings.buffer_size or sum(pool.costs) < wanted:
            item = self._next_item()
            if item is None:
                return
            pool.add(item)

    def _next_item(self) -> Item | None:
        """The next utterance that may be trained on."""
        while (found := self._stream.take(self._rng)) is not None:
            place, number, utterance = found
            if isinstance(utterance, Problem):
                self._skipped.add(utterance.reason, utterance.name)
                continue
            reason = self._accept(utterance) if self._accept is not None else None
            cost = self.settings.cost(utterance.duration)
            if reason is None and cost > self.settings.max_duration:
                reason = f"longer than max_duration, {self.settings.max_duration:g} s, allows"
            if reason is None:
                return Item(cost, place, number, utterance)
            self._skipped.add(reason, utterance.id)
        return None

    def _count(self, step: ItemStep) -> ItemStep:
        self.step += 1
        self._drawn = (self._drawn or 0) + sum(len(batch) for batch in step)
        return step


def _pairs(pairs: Sequence[tuple[int, int]]) -> torch.Tensor:
    return torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)


class _Stream:
    """What the shards of an epoch hold: several are read at the same time, in random turns."""

    def __init__(self, entries: Sequence[tuple[Shard, float]], open_shards: int, seed: str) -> None:
        self.opened = 0  # shards taken from the epoch's order so far
        self.open_shards = open_shards
        self._entries, self._seed = entries, seed
        self._readers: list[_OpenShard] = []
        self._fetched: dict[int, ShardReader] = {}

    def take(self, rng: random.Random) -> tuple[int, int, Utterance | Problem] | None:
        """(place of the shard, number in it, utterance or problem); None at the end."""
        while True:
            while len(self._readers) < self.open_shards and self.opened < len(self._entries):
                self._readers.append(self._open(self.opened))
                self.opened += 1
            if not self._readers:
                return None
            position = rng.randrange(len(self._readers))
            shard = self._readers[position]
            if shard.position < len(shard.numbers):
                number = shard.numbers[shard.position]
                shard.position += 1
                return shard.place, number, shard.reader.get(number)
            del self._readers[position]

    def positions(self) -> list[tuple[int, int]]:
        """(place, utterances read) of each open shard."""
        return [(shard.place, shard.position) for shard in self._readers]

    def restore(self, opened: int, positions: Sequence[tuple[int, int]]) -> None:
        """The inverse of `opened` and `positions`."""
        self.opened = opened
        for place, position in positions:
            shard = self._open(place)
            shard.position = position
            if position > len(shard.numbers):
                raise _Changed(f"{shard.reader.path} has fewer cuts than when the checkpoint was written")
            self._fetched[place] = shard.reader
            self._readers.append(shard)

    def fetch(self, pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, Utterance]]:
        """Utterances by place and number. Their shards stay open until `forget`."""
        found = []
        for place, number in pairs:
            if place not in self._fetched:
                self._fetched[place] = ShardReader(self._entries[place][0])
            reader = self._fetched[place]
            item = reader.get(number) if number < len(reader) else None
            if not isinstance(item, Utterance):
                raise _Changed(f"{reader.path} has other cuts than when the checkpoint was written")
            found.append((place, number, item))
        return found

    def forget(self) -> None:
        """Close the shards that were only fetched from."""
        self._fetched.clear()

    def _open(self, place: int) -> _OpenShard:
        shard, share = self._entries[place]
        reader = ShardReader(shard)
        numbers: Sequence[int] = range(len(reader))
        if share < 1.0:
            rng = random.Random(f"share {self._seed} {place}")
            numbers = sorted(rng.sample(numbers, int(share * len(reader) + rng.random())))
        return _OpenShard(place, reader, numbers)


@dataclass
class _OpenShard:
    place: int
    reader: ShardReader
    numbers: Sequence[int]
    position: int = 0  # in numbers
