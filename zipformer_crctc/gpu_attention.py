"""Attention on a GPU: matrix products by PyTorch, and Triton kernels for all that is between them.

Scores, positions, masks and softmax are one pass over the largest arrays of a layer; positional scores are made where
they are needed, as a table of them would be twice as large as the weights. The backward pass writes the gradient of the
scores where that of the weights was.

T frames, N utterances, H heads, c channels per head; weights (H, N, T, T), targets before sources.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from zipformer_crctc import gpu
from zipformer_crctc.attention_shared import MASKED_SCORE, SCORE_LIMIT, SCORE_PENALTY, Products, Use, by_head
from zipformer_crctc.autograd import Function
from zipformer_crctc.gpu_tiles import PROGRAMS, ceil_div, next_power_of_two

WARP_SOURCES = 256
"""Sources of a target that a warp holds."""
MAX_UTTERANCES = 16
"""A program does one target of so many utterances, as these share positional keys."""
DIAGONAL_TILE = (32, 128)
"""Targets and offsets of a program that adds up along offsets."""


@triton.jit
def _sources(frames, block: tl.constexpr):
    """All sources, and which of them exist; more than half of a block do, and those need no mask."""
    source = tl.arange(0, block)
    return source, (source < block // 2) | (source < frames)


@triton.jit
def _pos_keys(pos_key, target, head, source, exists, frames, channels: tl.constexpr, padded: tl.constexpr):
    """Positional keys of a target's sources, (c, sources), from (H, 2T - 1, c): one load for all channels of each."""
    channel = tl.arange(0, padded)
    place = (head * (2 * frames - 1) + frames - 1 - target + source) * channels
    inside = (channel < channels)[:, None] & exists[None, :]
    return tl.load(pos_key + place[None, :] + channel[:, None], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _filled(x, value, padding, forbidden, first_of_forbidden, target, utterance, source, frames, exists):
    """x with a value in the places of sources that are not to be attended to."""
    if forbidden is not None:
        of_mask = tl.cast(utterance, tl.int64) * first_of_forbidden + target * frames + source
        x = tl.where(tl.load(forbidden + of_mask, mask=exists, other=0) != 0, value, x)
    if padding is not None:
        x = tl.where(tl.load(padding + utterance * frames + source, mask=exists, other=0) != 0, value, x)
    return x


@triton.jit(do_not_specialize=["utterances", "frames", "each", "first_of_forbidden"])
def _weights(
    scores, pos_query, pos_key, padding, forbidden, large, utterances, frames, each, first_of_forbidden,
    limit, masked_score, channels: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    target, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source, exists = _sources(frames, block)
    channel = tl.arange(0, padded)
    if pos_key is not None:
        key = _pos_keys(pos_key, target, head, source, exists, frames, channels, padded)
    for utterance in range(part * each, tl.minimum(part * each + each, utterances)):
        place = (tl.cast(head * utterances + utterance, tl.int64) * frames + target) * frames + source
        score = tl.load(scores + place, mask=exists, other=0.0).to(tl.float32)
        if pos_key is not None:
            of_query = (target.to(tl.int64) * utterances + utterance) * tl.num_programs(2) + head
            query = tl.load(pos_query + of_query * channels + channel, mask=channel < channels, other=0.0)
            score += tl.sum(query.to(tl.float32)[:, None] * key, axis=0)
        if large is not None:
            over = (score > limit).to(tl.int8) - (score < -limit).to(tl.int8)
            tl.store(large + place, over, mask=exists)
        score = _filled(
            score, masked_score, padding, forbidden, first_of_forbidden, target, utterance, source, frames, exists
        )
        score = tl.where(exists, score, float("-inf"))
        weight = tl.exp(score - tl.max(score, axis=0))
        tl.store(scores + place, weight * (1.0 / tl.sum(weight, axis=0)), mask=exists)


@triton.jit(do_not_specialize=["utterances", "frames", "each", "first_of_forbidden"])
def _weights_gradient(
    weights, grad, grad_pos_query, pos_key, padding, forbidden, large, utterances, frames, each, first_of_forbidden,
    penalty, channels: tl.constexpr, padded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    target, part, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    source, exists = _sources(frames, block)
    channel = tl.arange(0, padded)
    if pos_key is not None:
        key = _pos_keys(pos_key, target, head, source, exists, frames, channels, padded)
    for utterance in range(part * each, tl.minimum(part * each + each, utterances)):
        place = (tl.cast(head * utterances + utterance, tl.int64) * frames + target) * frames + source
        weight = tl.load(weights + place, mask=exists, other=0.0).to(tl.float32)
        slope = tl.load(grad + place, mask=exists, other=0.0).to(tl.float32)
        slope = weight * (slope - tl.sum(weight * slope, axis=0))
        # What is masked is a constant, also where all of a target's sources are, which then have weights.
        slope = _filled(slope, 0.0, padding, forbidden, first_of_forbidden, target, utterance, source, frames, exists)
        if large is not None:
            slope += penalty * tl.load(large + place, mask=exists, other=0).to(tl.float32)
        tl.store(grad + place, slope, mask=exists)
        if pos_key is not None:
            of_query = (target.to(tl.int64) * utterances + utterance) * tl.num_programs(2) + head
            total = tl.sum(slope[None, :] * key, axis=1)
            tl.store(grad_pos_query + of_query * channels + channel, total, mask=channel < channels)


@triton.jit(do_not_specialize=["utterances", "frames", "each"])
def _pos_key_gradient(
    grad, pos_query, sums, utterances, frames, frame_step, utterance_step, each,
    channels: tl.constexpr, padded: tl.constexpr, block_targets: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    offset = tl.program_id(0) * block + tl.arange(0, block)
    head = tl.program_id(1)
    part = tl.program_id(2)
    heads = tl.num_programs(1)
    channel = tl.arange(0, padded)
    total = tl.zeros([padded, block], dtype=tl.float32)
    # Only so many targets have a source at any of these offsets.
    first_target = tl.maximum(frames - 1 - (tl.program_id(0) * block + block - 1), 0)
    last_target = tl.minimum(2 * frames - 1 - tl.program_id(0) * block, frames)
    for utterance in range(part * each, tl.minimum(part * each + each, utterances)):
        of_grad = grad + tl.cast(head * utterances + utterance, tl.int64) * frames * frames
        of_query = pos_query + tl.cast(utterance, tl.int64) * utterance_step + head * channels
        for start in range(first_target, last_target, block_targets):
            target = start + tl.arange(0, block_targets)
            source = target[:, None] + offset[None, :] - (frames - 1)
            inside = (target < frames)[:, None] & (source >= 0) & (source < frames)
            slope = tl.load(of_grad + target.to(tl.int64)[:, None] * frames + source, mask=inside, other=0.0)
            query = tl.load(
                of_query + target.to(tl.int64)[:, None] * frame_step + channel[None, :],
                mask=(target < frames)[:, None] & (channel < channels)[None, :],
                other=0.0,
            )
            for number in tl.static_range(channels):
                of_channel = tl.sum(tl.where((channel == number)[None, :], query.to(tl.float32), 0.0), axis=1)
                here = tl.sum(slope.to(tl.float32) * of_channel[:, None], axis=0)
                total += tl.where((channel == number)[:, None], here[None, :], 0.0)
    place = (part * heads + head) * channels + channel
    tl.store(
        sums + place.to(tl.int64)[:, None] * (2 * frames - 1) + offset[None, :],
        total,
        mask=(channel < channels)[:, None] & (offset < 2 * frames - 1)[None, :],
    )


def _utterances_of_a_program(heads: int, utterances: int, frames: int) -> int:
    """As many as share positional keys, or fewer, so that all multiprocessors have programs."""
    return max(1, min(MAX_UTTERANCES, heads * utterances * frames // (8 * PROGRAMS)))


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


class Weights(Function):
    """Attention weights; its arguments are those of the function for CPUs in attention.py."""

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        key: Tensor | None,
        pos_key: Tensor | None,
        padding: Tensor | None,
        forbidden: Tensor | None,
        heads: int,
        sizes: tuple[int, int, int],
        penalised: bool,
    ) -> Tensor:
        frames, utterances, _ = projected.shape
        query, own_key, pos_query = projected.split(sizes, dim=-1)
        key = own_key if key is None else key
        # Copies of these are kept for the backward pass, and not the whole projection as well.
        queries = by_head(query, heads).reshape(heads * utterances, frames, -1)
        keys = by_head(key, heads).reshape(heads * utterances, frames, -1).to(queries.dtype)
        pos_query = pos_query.contiguous()
        weights = torch.bmm(queries, keys.transpose(1, 2)).view(heads, utterances, frames, frames)
        large = torch.empty_like(weights, dtype=torch.int8) if penalised else None
        # (H, 2T - 1, c), so that neighbours among the sources read what is dense in memory.
        pos_key_rows = None if pos_key is None else pos_key.unflatten(1, (heads, -1)).transpose(0, 1).contiguous()
        each = _utterances_of_a_program(heads, utterances, frames)
        ctx.grid = frames, ceil_div(utterances, each), heads
        ctx.numbers = utterances, frames, each, 0 if forbidden is None else forbidden.stride(0)
        ctx.key = None if key is own_key else key.dtype
        ctx.sizes = sizes
        channels, block = sizes[2] // heads, next_power_of_two(frames)
        ctx.blocks = {"channels": channels, "padded": next_power_of_two(channels), "block": block}
        ctx.blocks["num_warps"] = max(1, block // WARP_SOURCES)
        with gpu.on_device_of(weights):
            _weights[ctx.grid](
                weights, pos_query, pos_key_rows, _bytes(padding), _bytes(forbidden), large, *ctx.numbers,
                SCORE_LIMIT, MASKED_SCORE, **ctx.blocks,
            )  # fmt: skip
        ctx.save_for_backward(pos_query, pos_key_rows, padding, forbidden, large, queries, keys, weights)
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        pos_query, pos_key_rows, padding, forbidden, large, queries, keys, weights = ctx.saved_tensors
        heads, utterances, frames, _ = weights.shape
        grad = _added_up(grad_outputs[0], weights)
        grad_projected = queries.new_empty(frames, utterances, sum(ctx.sizes))
        grad_query, grad_own_key, grad_pos_query = grad_projected.split(ctx.sizes, dim=-1)
        of_positions = torch.empty_like(pos_query)
        _weights_gradient[ctx.grid](
            weights, grad, of_positions, pos_key_rows, _bytes(padding), _bytes(forbidden), large, *ctx.numbers,
            SCORE_PENALTY, **ctx.blocks,
        )  # fmt: skip
        scores = grad.flatten(0, 1)
        by_head(grad_query, heads).copy_(torch.bmm(scores, keys).view(heads, utterances, frames, -1))
        grad_keys = torch.bmm(scores.transpose(1, 2), queries).view(heads, utterances, frames, -1)
        grad_key = None
        if ctx.key is None:
            by_head(grad_own_key, heads).copy_(grad_keys)
        else:
            grad_own_key.zero_()
            grad_key = grad_keys.permute(2, 1, 0, 3).flatten(2).to(ctx.key)
        grad_pos_key = None
        if pos_key_rows is None:
            grad_pos_query.zero_()
        else:
            grad_pos_query.copy_(of_positions)
            grad_pos_key = _gradient_of_pos_key(grad, pos_query).to(pos_key_rows.dtype)
        return grad_projected, grad_key, grad_pos_key, None, None, None, None, None


def _added_up(grad: Tensor, weights: Tensor) -> Tensor:
    """The gradient of the weights as an array that can be written to."""
    if not isinstance(grad, Products):
        return grad.to(weights.dtype).clone(memory_format=torch.contiguous_format)
    uses = sorted(grad.uses, key=lambda use: -len(use.grad))  # those of all heads first
    total: Tensor | None = None
    for use in uses:
        products = use.grad.flatten(0, 1), use.values.flatten(0, 1).transpose(1, 2)
        if total is None and len(use.grad) == len(weights):
            total = torch.bmm(*products).view(weights.shape)
            continue
        if total is None:
            total = torch.zeros_like(weights)
        total[use.first : use.first + len(use.grad)].flatten(0, 1).baddbmm_(*products)
    assert total is not None
    return total


def _gradient_of_pos_key(grad: Tensor, pos_query: Tensor) -> Tensor:
    """(2T - 1, H * c) from the gradient of the scores and the positional queries (T, N, H * c)."""
    heads, utterances, frames, _ = grad.shape
    channels = pos_query.shape[-1] // heads
    targets, block = DIAGONAL_TILE
    columns = ceil_div(2 * frames - 1, block)
    each = ceil_div(utterances, max(1, min(utterances, PROGRAMS // (columns * heads))))
    parts = ceil_div(utterances, each)
    sums = torch.empty(parts, heads * channels, 2 * frames - 1, device=grad.device)
    _pos_key_gradient[(columns, heads, parts)](
        grad, pos_query, sums, utterances, frames, *pos_query.stride()[:2], each,
        channels, next_power_of_two(channels), targets, block,
    )  # fmt: skip
    return sums.sum(dim=0).t()


class Averages(Function):
    """Averages over sources by matrix products: weights (H, N, T, T) and values (T, N, E) to (T, N, E)."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor) -> Tensor:
        heads, utterances = weights.shape[:2]
        ctx.dtype = values.dtype
        values = by_head(values.to(weights.dtype), heads).flatten(0, 1)  # (H * N, T, E / H)
        ctx.save_for_backward(weights, values)
        return _products_side_by_side(weights.flatten(0, 1), values, utterances)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor]:
        weights, values = ctx.saved_tensors
        heads, utterances = weights.shape[:2]
        grad = by_head(grad_outputs[0].to(weights.dtype), heads).flatten(0, 1)
        grad_values = _products_side_by_side(weights.flatten(0, 1).transpose(1, 2), grad, utterances)
        of_weights = None
        if ctx.needs_input_grad[0]:
            shape = (heads, utterances)
            of_weights = Products(weights.shape, [Use(grad.unflatten(0, shape), values.unflatten(0, shape), 0)])
        return of_weights, grad_values.to(ctx.dtype)


def _products_side_by_side(weights: Tensor, values: Tensor, utterances: int) -> Tensor:
    """Products of (H * N, T, T) and (H * N, T, e), those of all heads side by side: (T, N, H * e)."""
    matrices, frames, channels = values.shape
    if matrices == utterances:  # one head, written to its place at once
        products = values.new_empty(frames, utterances, channels)
        torch.bmm(weights, values, out=products.transpose(0, 1))
        return products
    products = torch.bmm(weights, values)
    return products.unflatten(0, (-1, utterances)).permute(2, 1, 0, 3).flatten(2).contiguous()
