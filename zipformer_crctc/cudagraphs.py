"""Passes through a model as CUDA graphs: what the host launches for a shape is recorded and then replayed.

A pass and its backward pass are thousands of launches, each of which costs the host about ten microseconds: at the
published batch that is several times the work of the GPU. A replay is one launch.

A recording holds the decisions of its pass, such as which Balancers act, and the values of all schedules. So it is
replayed a number of times at most, or until schedules have moved on, and then made anew: a decision is as probable in
every step as without graphs, but the steps of one shape between two recordings share it. What is drawn on the GPU
(dropout, layer-drop) is new in each replay.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_crctc.attention import RelativePositions
from zipformer_crctc.regularisers import Whiten
from zipformer_crctc.schedule import ScheduledModule, named_schedules

logger = logging.getLogger(__name__)

REPLAYS = 200
"""A recording costs several passes without graphs."""
MAX_AGE, MAX_GAP = 0.1, 0.005
"""Relative changes of the adjusted batch count while schedules still change: after which a recording is made anew, and
which a shape may take to come again, so that a recording is replayed often enough to be worth its cost."""
MAX_RECORDINGS = 64
"""The one that was not used for longest goes first. They share their memory, that of the gradients too, but for what
goes in and comes out, which is 100 MB at 600 s of audio."""


@dataclass
class _Recording:
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    features: Tensor
    num_frames: Tensor
    log_probs: Tensor
    lengths: Tensor
    grad: Tensor
    """of the log-probabilities"""
    gradients: list[tuple[nn.Parameter, Tensor]]
    """In memory that the next pass, of this or another recording, uses for what comes before them."""
    read: list[Tensor | None]
    """what else of the model it reads, which must not go to other arrays"""
    batch_count: float
    """adjusted, up to where schedules change"""
    replays: int = 0


class GraphedPasses:
    """A model whose training passes on a GPU are replayed. One at a time: a backward pass follows each forward pass.

    Gradients are those of the last backward pass; they are not added to what is there, so none may be there. They and
    the log-probabilities hold until the next pass. No result of a pass may be kept until then: what PyTorch keeps with
    it for the parameters belongs to the stream of its pass, and a recording fails. That no utterance is too short or
    longer than the features is looked at in passes that are not replayed only.

    Args:
        model: from features and frame counts to log-probabilities and lengths, all on one GPU, where kernels suit.
        processes: how many train together. Each records for itself, and all wait for each one that does. So recordings
            serve for so many times more steps; as the decisions of a process are its own, a step has more of them.
    """

    def __init__(self, model: nn.Module, processes: int = 1) -> None:
        self.model = model
        self.processes = processes
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.seconds_of_last_recording = 0.0
        self._anchor = torch.zeros((), device=self.parameters[0].device, requires_grad=True)
        self._pool: Any = None
        self._recordings: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._calls = 0
        self._seen: dict[tuple[Any, ...], int] = {}
        """the last call with a shape"""
        self._clock = next(module for module in model.modules() if isinstance(module, ScheduledModule))
        self._last_change = max(schedule.counts[-1] for _, schedule in named_schedules(model))
        self._first_count: float | None = None
        self._works = True

    def __call__(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """As the model. The first pass of a shape is not recorded, as it may be the only one."""
        if not (self._works and self.model.training and torch.is_grad_enabled()):
            return self.model(features, num_frames)
        key = (features.shape, features.dtype, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        recording = self._recordings.pop(key, None)
        if recording is None or self._is_old(recording):
            recording = None  # its memory is there for the next one
            if self._comes_again_soon(key):
                recording = self._try_to_record(features, num_frames)
        self._calls += 1
        self._seen[key] = self._calls
        if recording is None:
            return self.model(features, num_frames)
        self._recordings[key] = recording
        recording.replays += 1
        return _Replay.apply(self._anchor, recording, features, num_frames)

    def clear(self) -> None:
        """Forget all recordings and shapes, so that what comes next does not depend on them."""
        self._recordings.clear()
        self._seen.clear()
        self._calls, self._first_count = 0, None

    @property
    def holds_memory(self) -> bool:
        """Whether there are recordings, whose memory passes without one cannot use."""
        return bool(self._recordings)

    def give_up(self, why: str) -> None:
        """Record nothing any more, and let go of the memory of recordings. To be called when failed passes are gone."""
        logger.warning("passes are not recorded any more, training goes on without CUDA graphs: %s", why)
        self.clear()
        self._pool, self._works = None, False
        torch.cuda.empty_cache()

    def _batch_count(self) -> float:
        """The adjusted batch count, up to where schedules change."""
        return self._last_change if self._clock.batch_count is None else min(self._clock.batch_count, self._last_change)

    def _is_old(self, recording: _Recording) -> bool:
        if recording.replays >= REPLAYS * self.processes:
            return True
        return self._batch_count() > (1.0 + MAX_AGE) * recording.batch_count

    def _comes_again_soon(self, key: tuple[Any, ...]) -> bool:
        """Whether a shape seems to come often enough, going by the last time and the pace of the batch count."""
        now = self._batch_count()
        if self._first_count is None:
            self._first_count = now
        if key not in self._seen:
            return False
        pace = (now - self._first_count) / self._calls if now < self._last_change else 0.0
        return pace * (self._calls + 1 - self._seen[key]) < MAX_GAP * now

    def _try_to_record(self, features: Tensor, num_frames: Tensor) -> _Recording | None:
        """A recording; None where that fails, after which nothing is recorded any more."""
        while len(self._recordings) >= MAX_RECORDINGS:
            self._recordings.popitem(last=False)
        whitens = [module for module in self.model.modules() if isinstance(module, Whiten)]
        decisions, probs = random.getstate(), [whiten.prob for whiten in whitens]

        def decide_again() -> None:
            """Let the next pass decide as the next one would have here."""
            random.setstate(decisions)
            for whiten, prob in zip(whitens, probs, strict=True):
                whiten.prob = prob

        failure = ""
        stream = torch.cuda.current_stream(features.device) if features.is_cuda else None
        try:
            return self._recorded(features, num_frames, decide_again)
        except RuntimeError as error:  # out of memory, too; what is beyond repair will show in the next pass
            failure = str(error)
        if stream is not None:  # a recording that ended in the middle may have kept these to itself
            torch.cuda.synchronize()
            torch.cuda.set_stream(stream)
            numbers = torch.cuda.default_generators[features.device.index]
            numbers.graphsafe_set_state(numbers.clone_state())
        self.give_up(failure)  # only now is nothing of the failed pass left
        decide_again()
        return None

    def _recorded(self, features: Tensor, num_frames: Tensor, decide_again: Callable[[], None]) -> _Recording:
        started = time.perf_counter()
        # Recordings and graphs of earlier passes that are garbage must not be freed while one is made.
        gc.collect()
        if not self._recordings:
            self._pool = torch.cuda.graph_pool_handle()
        features, num_frames = features.clone(), num_frames.clone()
        kind, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        grad: Tensor | None = None

        def forward_pass() -> tuple[Tensor, Tensor]:
            # Casts of weights must be part of what is recorded, and not be kept from before.
            torch.clear_autocast_cache()
            with torch.autocast("cuda", kind, enabled, cache_enabled=False):
                return self.model(features, num_frames)

        def backward_pass(log_probs: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
            with torch.autocast("cuda", enabled=False):
                found = torch.autograd.grad(log_probs, self.parameters, grad, allow_unused=True)
            return list(_apart(zip(self.parameters, found, strict=True)))

        # Once without recording, with the same decisions: kernels are compiled and loaded now, libraries set up.
        log_probs, lengths = forward_pass()
        grad = torch.zeros_like(log_probs)
        backward_pass(log_probs)
        del log_probs, lengths
        decide_again()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as that which pins the memory of batches, may do as they like.
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            log_probs, lengths = forward_pass()
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            gradients = backward_pass(log_probs)
        gradients = [(p, _without_keeping(gradient, backward)) for p, gradient in gradients]
        tables = [module.table for module in self.model.modules() if isinstance(module, RelativePositions)]
        torch.cuda.synchronize()
        self.seconds_of_last_recording = time.perf_counter() - started
        logger.debug("recorded passes of %s in %.2f s", tuple(features.shape), self.seconds_of_last_recording)
        made = forward, backward, features, num_frames, log_probs.detach(), lengths, grad, gradients, tables
        return _Recording(*made, self._batch_count())


def _apart(found: Iterable[tuple[nn.Parameter, Tensor | None]]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Gradients, laid out as their parameters are and each in an array of its own: optimizers may write to them."""
    seen = set()
    for p, gradient in found:
        if gradient is None:
            continue
        storage = gradient.untyped_storage()
        if gradient.stride() != p.stride() or storage.nbytes() != p.nbytes or storage.data_ptr() in seen:
            gradient = torch.empty_like(p).copy_(gradient)
        seen.add(gradient.untyped_storage().data_ptr())
        yield p, gradient


class _Place:
    """Where an array lies, in memory that is there as long as a graph."""

    def __init__(self, x: Tensor, graph: torch.cuda.CUDAGraph) -> None:
        self.__cuda_array_interface__ = x.__cuda_array_interface__
        self.graph = graph


def _without_keeping(x: Tensor, graph: torch.cuda.CUDAGraph) -> Tensor:
    """The same array, whose memory other graphs of the pool may use once x is gone."""
    alias = torch.as_tensor(_Place(x.detach(), graph), device=x.device)
    return alias.as_strided(x.shape, x.stride())  # of an axis of size 1 the strides are lost on the way


class _Replay(torch.autograd.Function):
    """Replays a recording; its backward pass gives the parameters their gradients."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, recording: _Recording, features: Tensor, num_frames: Tensor
    ) -> tuple[Tensor, Tensor]:
        recording.features.copy_(features)
        recording.num_frames.copy_(num_frames)
        recording.forward.replay()
        ctx.recording = recording
        log_probs, lengths = recording.log_probs.detach(), recording.lengths.detach()
        ctx.mark_non_differentiable(lengths)
        return log_probs, lengths

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None, None]:
        recording = ctx.recording
        recording.grad.copy_(grad_outputs[0])
        recording.backward.replay()
        for p, gradient in recording.gradients:
            assert p.grad is None, "gradients of replayed passes cannot be added up"
            p.grad = gradient
        return None, None, None, None
