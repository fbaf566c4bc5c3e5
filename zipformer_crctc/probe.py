"""What a run will need, found out before it begins: batches in an epoch, and whether the largest ones fit into memory.

N utterances, T frames of 10 ms.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zipformer_crctc.batches import BatchOrder
from zipformer_crctc.features import LOG_EPS, NUM_BINS, num_feature_frames
from zipformer_crctc.loader import Batch
from zipformer_crctc.randomstate import random_state, set_random_state
from zipformer_crctc.shar import Utterance

logger = logging.getLogger(__name__)

STATES_PER_PARAMETER = 3
"""Tensors like the parameters that the optimizer will hold: two averages, and what it works with."""

GIB = 2**30


class OutOfMemory(RuntimeError):
    """A batch does not fit into the memory of the device; the text names it and says what to lower."""


@dataclass(frozen=True)
class EpochPlan:
    """The batches of one rank in an epoch, by their manifests."""

    steps: int
    worst: tuple[tuple[Utterance, ...], ...]
    """For each doubling of the length the batch with most N * T, and the one with most N * T * T; longest first."""


def plan_epoch(order: BatchOrder, epoch: int = 1) -> EpochPlan:
    """Go through an epoch of an order; audio is not read."""
    steps = 0
    worst: dict[int, tuple[int, tuple[Utterance, ...]]] = {}
    for request in order.epoch(epoch):
        steps += 1
        if request.utterances:
            rows, frames = len(request.utterances), _longest(request.utterances)
            for key, size in ((int(math.log2(frames)), rows * frames), (-1, rows * frames**2)):
                if size > worst.get(key, (0, ()))[0]:
                    worst[key] = size, request.utterances
    batches = {id(utterances): utterances for _, utterances in worst.values()}
    return EpochPlan(steps, tuple(sorted(batches.values(), key=_longest, reverse=True)))


def synthetic_batch(utterances: Sequence[Utterance]) -> Batch:
    """A batch of noise with the lengths and texts of these utterances."""
    utterances = sorted(utterances, key=lambda utterance: -utterance.num_samples)
    num_frames = [num_feature_frames(utterance.num_samples) for utterance in utterances]
    features = torch.randn(len(num_frames), num_frames[0], NUM_BINS) - 6.0
    for row, frames in zip(features, num_frames, strict=True):
        row[frames:] = LOG_EPS
    return Batch(features, torch.tensor(num_frames), list(utterances))


def scan_memory(
    model: nn.Module, batches: Sequence[Sequence[Utterance]], loss_of: Callable[[Batch], Tensor], device: torch.device
) -> float:
    """Forward and backward of each batch; the model, the optimizer and all random generators stay as they are.

    Args:
        model: in training or not; gradients that it holds are kept.
        batches: utterances of each.
        loss_of: the loss of a training batch, a scalar with gradient.
        device: of the model.

    Returns:
        the largest share of the device's memory in use, in bytes; 0 on a CPU.

    Raises:
        OutOfMemory: one of them does not fit.
    """
    before = random_state(model, device)
    on_gpu = device.type == "cuda"
    held = [torch.empty_like(p) for p in model.parameters() for _ in range(STATES_PER_PARAMETER)] if on_gpu else []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    was_training, gradients = model.training, [p.grad for p in model.parameters()]
    model.train()
    model.zero_grad()
    try:
        for utterances in batches:
            logger.info("memory scan: forward and backward of %s", describe(utterances))
            with naming_batch([utterances]):
                loss_of(synthetic_batch(utterances)).backward()
            model.zero_grad()
        return float(torch.cuda.max_memory_allocated(device)) if on_gpu else 0.0
    finally:
        model.train(was_training)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            p.grad = gradient
        held.clear()
        if on_gpu:
            torch.cuda.empty_cache()
        set_random_state(before, model, device)


@contextmanager
def naming_batch(batches: Sequence[Sequence[Utterance]]) -> Iterator[None]:
    """Turn an out-of-memory error of PyTorch into OutOfMemory, which names the batches."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):  # on a CPU
            raise
        what = " and ".join(describe(utterances) for utterances in batches)
        raise OutOfMemory(
            f"out of memory with {what}: lower --max-duration (and raise --grad-accumulation to make up for it), "
            f"use half precision, or set a lower max_duration in the filters of the data config. {error}"
        ) from error


def describe(utterances: Sequence[Utterance]) -> str:
    """A batch in words, with the ids of its first utterances."""
    if not utterances:
        return "an empty batch"
    seconds = [utterance.duration for utterance in utterances]
    ids = ", ".join(utterance.id for utterance in utterances[:5]) + (", ..." if len(utterances) > 5 else "")
    return f"a batch of {len(seconds)} utterances of {min(seconds):.1f} to {max(seconds):.1f} s ({ids})"


def state_bytes(model: nn.Module) -> int:
    """Bytes of parameters, gradients and optimizer; activations come on top."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) * (2 + STATES_PER_PARAMETER)


def _longest(utterances: Sequence[Utterance]) -> int:
    return max(num_feature_frames(utterance.num_samples) for utterance in utterances)
