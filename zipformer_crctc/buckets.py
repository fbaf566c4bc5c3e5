"""A bounded pool of utterances in duration buckets, from which the steps of training are drawn."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from zipformer_crctc.batches import consecutive_batches, take_batch
from zipformer_crctc.shar import Utterance

_LEFTOVER_JITTER = 0.1  # relative noise on the cost that left-overs are sorted by


class Item(NamedTuple):
    """An utterance and where it came from."""

    cost: float  # seconds, with the quadratic term if there is one
    place: int  # of its shard in the order of the epoch
    number: int  # of the utterance in its shard
    utterance: Utterance


ItemStep = list[list[Item]]
"""One batch for each rank."""


def bucket_limits(costs: Sequence[float], num_buckets: int) -> list[float]:
    """The ``num_buckets - 1`` costs that split the sample into buckets of equal total cost."""
    total, so_far = sum(costs), 0.0
    limits: list[float] = []
    for cost in sorted(costs):
        if len(limits) < num_buckets - 1 and so_far >= total * (len(limits) + 1) / num_buckets:
            limits.append(cost)
        so_far += cost
    return limits


class BucketPool:
    """Buckets between ``limits``; every choice is made by the generator of ``rng``, or none without shuffling."""

    def __init__(self, limits: list[float], shuffle: bool, rng: random.Random) -> None:
        self.limits, self.shuffle, self.rng = limits, shuffle, rng
        self.buckets: list[list[Item]] = [[] for _ in range(len(limits) + 1)]
        self.costs = [0.0] * len(self.buckets)  # of each bucket
        self.count = 0

    def add(self, item: Item) -> None:
        """Put an item at a random place of its bucket (at its end without shuffling)."""
        position = bisect_right(self.limits, item.cost)
        bucket = self.buckets[position]
        bucket.append(item)
        if self.shuffle:
            other = self.rng.randrange(len(bucket))
            bucket[other], bucket[-1] = bucket[-1], bucket[other]
        self.costs[position] += item.cost
        self.count += 1

    def draw(self, world_size: int, max_cost: float) -> ItemStep | None:
        """A full batch for every rank, all from one bucket; None if no bucket holds enough.

        The sum of a batch is at most ``max_cost``, so a bucket with more than ``world_size`` times that is enough.
        """
        ready = [position for position, held in enumerate(self.costs) if held > world_size * max_cost]
        if not ready:
            return None
        if self.shuffle:
            position = self.rng.choices(ready, [self.costs[position] for position in ready])[0]
        else:
            position = max(ready, key=lambda ready_position: self.costs[ready_position])
        bucket = self.buckets[position]
        costs = [item.cost for item in bucket]
        step, start = [], 0
        for _ in range(world_size):
            end, _ = take_batch(costs, start, max_cost)
            step.append(bucket[start:end])
            start = end
        del bucket[:start]
        self.count -= start
        # Summed anew, so that rounding errors do not pile up, and are the same after a resume.
        self.costs[position] = sum(costs[start:])
        return step

    def restore(self, position: int, items: list[Item]) -> None:
        """Fill an empty bucket with items in their order."""
        self.buckets[position] = items
        self.costs[position] = sum(item.cost for item in items)
        self.count += len(items)

    def resum(self) -> None:
        """Sum all costs anew, as `restore` does."""
        self.costs = [sum(item.cost for item in bucket) for bucket in self.buckets]

    def empty(self) -> list[Item]:
        """Take everything out."""
        items = [item for bucket in self.buckets for item in bucket]
        self.buckets = [[] for _ in self.buckets]
        self.costs, self.count = [0.0] * len(self.buckets), 0
        return items


def leftover_steps(
    rest: list[Item], world_size: int, max_cost: float, shuffle: bool, rng: random.Random
) -> tuple[list[ItemStep], ItemStep]:
    """What no bucket could serve, as full steps and one partial step (may be empty)."""
    if shuffle:
        keyed = [(item.cost * rng.uniform(1 - _LEFTOVER_JITTER, 1 + _LEFTOVER_JITTER), item) for item in rest]
        keyed.sort(key=lambda pair: pair[0])
        if rng.random() < 0.5:  # what is dropped at the end is not always the longest
            keyed.reverse()
        rest = [item for _, item in keyed]
    parts = list(consecutive_batches([item.cost for item in rest], max_cost))
    tail = [rest[parts.pop()[0]]] if parts and not parts[-1][1] else []
    batches = [rest[part] for part, _ in parts]
    whole = len(batches) - len(batches) % world_size
    full_steps = [batches[start : start + world_size] for start in range(0, whole, world_size)]
    if shuffle:
        rng.shuffle(full_steps)
    last = batches[whole:] + tail
    return full_steps, last + [[] for _ in range(world_size - len(last))] if last else []
