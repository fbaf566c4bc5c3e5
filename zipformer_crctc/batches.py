"""Batches: what closes one, what a loader worker is asked to read, and the order of sets that are scored.

The order of training batches is in ``trainorder``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from zipformer_crctc.shar import Shard, Skipped, Utterance, read_shard

logger = logging.getLogger(__name__)

FINGERPRINTS = 4096
"""So few that float32 adds up those of 4096 ranks."""

State = Mapping[str, Any]
"""An order in the middle of an epoch, as plain data and tensors for a checkpoint."""


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a loader worker is asked to read. ``step`` counts from 0 within the epoch."""

    epoch: int
    step: int
    utterances: tuple[Utterance, ...]
    fingerprint: int = 0
    """of the utterances of all ranks, below FINGERPRINTS: ranks with other data would else wait for each other"""
    state: State | None = None
    """now and then: the order before this step, to go on from without reading the epoch from its start"""


class BatchOrder(Protocol):
    """What the loader needs of an order."""

    skipped: Skipped

    def epoch(self, epoch: int, start_step: int = 0, state: State | None = None) -> Iterator[BatchRequest]:
        """This rank's batches of an epoch from step ``start_step`` on; ``state`` is one before it."""

    def fingerprint(self) -> str:
        """Equal for two orders if a place in one is a place in the other."""


def take_batch(costs: Sequence[float], start: int, max_cost: float) -> tuple[int, bool]:
    """End of the batch that begins at ``start``, and whether the rule closed it (else the utterances ran out).

    ``costs`` are seconds, as they are or with the quadratic term. A batch closes when ``(count + 1) * largest >
    max_cost``, the next utterance included in ``largest``. An utterance above ``max_cost`` is a batch of its own.
    """
    largest = 0.0
    for end in range(start, len(costs)):
        largest = max(largest, costs[end])
        if end > start and (end - start + 1) * largest > max_cost:
            return end, True
    return len(costs), (len(costs) - start + 1) * largest > max_cost


def consecutive_batches(costs: Sequence[float], max_cost: float) -> Iterator[tuple[slice, bool]]:
    """Batches of neighbours, each with whether it is full."""
    start = 0
    while start < len(costs):
        end, full = take_batch(costs, start, max_cost)
        yield slice(start, end), full
        start = end


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
        if not (max_duration > 0 and 0 <= rank < world_size):
            raise ValueError(
                f"max_duration {max_duration}, rank {rank} of {world_size}: need seconds above 0 and a rank"
            )
        self.shards = list(shards)
        self.max_duration, self.world_size, self.rank = max_duration, world_size, rank
        self.skipped = Skipped(max_examples=None)
        self._logged = False
        self._need_text, self._keep_alignment = need_text, keep_alignment

    def fingerprint(self) -> str:
        """Not needed: a pass over a scored set begins at its start."""
        return ""

    def epoch(self, epoch: int = 0, start_step: int = 0, state: State | None = None) -> Iterator[BatchRequest]:
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
        durations = [utterance.duration for utterance in utterances]
        return [utterances[part] for part, _ in consecutive_batches(durations, self.max_duration)]
