"""Passes through a model as CUDA graphs: what the host launches for a shape is recorded and then replayed.

A pass and its backward pass are thousands of launches, each of which costs the host about ten microseconds: at the
published batch that is several times the work of the GPU. A replay is one launch.

A recording holds the decisions of its pass, such as which Balancers act, and the values of all schedules. So it is
replayed a number of times at most, or until schedules have moved on, and then made anew: a decision is as probable in
every step as without graphs, but the steps of one shape between two recordings share it. What is drawn on the GPU
(dropout, layer-drop) is new in each replay.
"""

from __future__ import annotations

import logging
import random
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_crctc.regularisers import Whiten
from zipformer_crctc.schedule import ScheduledModule, named_schedules

logger = logging.getLogger(__name__)

REPLAYS = 200
"""A recording costs several passes without graphs."""
MAX_AGE, MAX_STEP = 0.1, 0.02
"""Relative changes of the adjusted batch count while schedules still change: after which a recording is made anew, and
up to which, since a shape was last seen, one is worth its cost."""
MAX_RECORDINGS = 64
"""The one that was not used for longest goes first. They share their memory, but each has a few MB of its own."""


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
    used: list[int]
    """which parameters have gradients"""
    batch_count: float
    """adjusted, up to where schedules change"""
    replays: int = 0


class GraphedPasses:
    """A model whose training passes on a GPU are replayed. One at a time: a backward pass follows each forward pass.

    Gradients are those of the last backward pass; they are not added to what is there, so none may be there.

    Args:
        model: from features and frame counts to log-probabilities and lengths, all on one GPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.seconds_of_last_recording = 0.0
        self._gradients: list[Tensor] = []
        self._anchor = torch.zeros((), device=self.parameters[0].device, requires_grad=True)
        self._pool: Any = None
        self._recordings: OrderedDict[tuple[Any, ...], _Recording] = OrderedDict()
        self._seen: dict[tuple[Any, ...], float] = {}
        self._clock = next(module for module in model.modules() if isinstance(module, ScheduledModule))
        self._last_change = max(schedule.counts[-1] for _, schedule in named_schedules(model))
        self._works = True

    def __call__(self, features: Tensor, num_frames: Tensor) -> tuple[Tensor, Tensor]:
        """As the model. The first pass of a shape is not recorded, as it may be the only one."""
        if not (self._works and self.model.training and torch.is_grad_enabled()):
            return self.model(features, num_frames)
        key = (features.shape, features.dtype, torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        now, seen = self._batch_count(), self._seen.get(key)
        self._seen[key] = now
        recording = self._recordings.pop(key, None)
        if recording is None or recording.replays >= REPLAYS or now > (1.0 + MAX_AGE) * recording.batch_count:
            recording = None  # its memory is there for the next one
            if seen is None or now - seen >= MAX_STEP * now:
                return self.model(features, num_frames)
            while len(self._recordings) >= MAX_RECORDINGS:
                self._recordings.popitem(last=False)
            try:
                recording = self._recorded(features, num_frames)
            except torch.OutOfMemoryError:
                logger.warning("not enough memory to record passes: training goes on without CUDA graphs")
                self.clear()
                self._works = False
                torch.cuda.empty_cache()
                return self.model(features, num_frames)
        self._recordings[key] = recording
        recording.replays += 1
        return _Replay.apply(self._anchor, recording, self, features, num_frames)

    def clear(self) -> None:
        """Forget all recordings and shapes, so that what comes next does not depend on them."""
        self._recordings.clear()
        self._seen.clear()

    def _batch_count(self) -> float:
        """The adjusted batch count, up to where schedules change."""
        return self._last_change if self._clock.batch_count is None else min(self._clock.batch_count, self._last_change)

    def _recorded(self, features: Tensor, num_frames: Tensor) -> _Recording:
        started = time.perf_counter()
        if not self._gradients:
            self._gradients = [torch.zeros_like(p) for p in self.parameters]
            self._pool = torch.cuda.graph_pool_handle()
        features, num_frames = features.clone(), num_frames.clone()
        whitens = [module for module in self.model.modules() if isinstance(module, Whiten)]
        decisions, probs = random.getstate(), [whiten.prob for whiten in whitens]
        kind, enabled = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")
        grad: Tensor | None = None

        def forward_pass() -> tuple[Tensor, Tensor]:
            # Casts of weights must be part of what is recorded, and not be kept from before.
            torch.clear_autocast_cache()
            with torch.autocast("cuda", kind, enabled, cache_enabled=False):
                return self.model(features, num_frames)

        def backward_pass(log_probs: Tensor) -> tuple[Tensor | None, ...]:
            # Each gradient goes where it stays at once, so that there are never two of all.
            hooks = [p.register_hook(kept.copy_) for p, kept in zip(self.parameters, self._gradients, strict=True)]
            with torch.autocast("cuda", enabled=False):
                gradients = torch.autograd.grad(log_probs, self.parameters, grad, allow_unused=True)
            for hook in hooks:
                hook.remove()
            return gradients

        # Once without recording, with the same decisions: kernels are compiled and loaded now, libraries set up.
        log_probs, lengths = forward_pass()
        grad = torch.zeros_like(log_probs)
        backward_pass(log_probs)
        del log_probs, lengths
        random.setstate(decisions)
        for whiten, prob in zip(whitens, probs, strict=True):
            whiten.prob = prob
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # Other threads, such as that which pins the memory of batches, may do as they like.
        with torch.cuda.graph(forward, pool=self._pool, capture_error_mode="thread_local"):
            log_probs, lengths = forward_pass()
        with torch.cuda.graph(backward, pool=self._pool, capture_error_mode="thread_local"):
            gradients = backward_pass(log_probs)
        used = [index for index, gradient in enumerate(gradients) if gradient is not None]
        torch.cuda.synchronize()
        self.seconds_of_last_recording = time.perf_counter() - started
        logger.debug("recorded passes of %s in %.2f s", tuple(features.shape), self.seconds_of_last_recording)
        return _Recording(
            forward, backward, features, num_frames, log_probs.detach(), lengths, grad, used, self._batch_count()
        )


class _Replay(torch.autograd.Function):
    """Replays a recording; its backward pass gives the parameters their gradients."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, recording: _Recording, passes: GraphedPasses, features: Tensor, num_frames: Tensor
    ) -> tuple[Tensor, Tensor]:
        recording.features.copy_(features)
        recording.num_frames.copy_(num_frames)
        recording.forward.replay()
        ctx.recording, ctx.passes = recording, passes
        log_probs, lengths = recording.log_probs.detach(), recording.lengths.detach()
        ctx.mark_non_differentiable(lengths)
        return log_probs, lengths

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, None, None, None, None]:
        recording, passes = ctx.recording, ctx.passes
        recording.grad.copy_(grad_outputs[0])
        recording.backward.replay()
        for index in recording.used:
            p = passes.parameters[index]
            assert p.grad is None, "gradients of replayed passes cannot be added up"
            p.grad = passes._gradients[index]
        return None, None, None, None, None
