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
from zipformer_crctc.gpu_tiles import PROGRAMS

TILE = 1024
"""Weights of the targets that a program holds."""
DIAGONAL_TILE = (32, 128)
"""Targets and offsets of a program that adds up along offsets."""


@triton.jit
def _places(rows, utterances, frames, rows_each: tl.constexpr, block: tl.constexpr):
    """The rows of this program, one for each target of a head in an utterance, their sources, and where these are."""
    row = tl.program_id(0) * rows_each + tl.arange(0, rows_each)
    source = tl.arange(0, block)
    target = row % frames
    utterance = (row // frames) % utterances
    head = row // (frames * utterances)
    inside = (row < rows)[:, None] & (source < frames)[None, :]
    place = row.to(tl.int64)[:, None] * frames + source[None, :]
    return row, source, target, utterance, head, inside, place


@triton.jit
def _filled(x, value, padding, forbidden, first_of_forbidden, utterance, target, source, frames, inside):
    """x with a value in the places of sources that are not to be attended to."""
    if forbidden is not None:
        of_mask = (utterance.to(tl.int64) * first_of_forbidden + target * frames)[:, None] + source[None, :]
        x = tl.where(tl.load(forbidden + of_mask, mask=inside, other=0) != 0, value, x)
    if padding is not None:
        of_mask = (utterance * frames)[:, None] + source[None, :]
        x = tl.where(tl.load(padding + of_mask, mask=inside, other=0) != 0, value, x)
    return x


@triton.jit(do_not_specialize=["rows", "utterances", "frames", "first_of_forbidden"])
def _weights(
    scores, pos_query, pos_key, padding, forbidden, large, rows, utterances, frames, frame_step, utterance_step,
    first_of_forbidden, limit, masked_score, channels: tl.constexpr, rows_each: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, source, target, utterance, head, inside, place = _places(rows, utterances, frames, rows_each, block)
    score = tl.load(scores + place, mask=inside, other=0.0).to(tl.float32)
    if pos_key is not None:
        query = target.to(tl.int64) * frame_step + utterance * utterance_step + head * channels
        offset = frames - 1 - target[:, None] + source[None, :]
        for channel in tl.static_range(channels):
            of_query = tl.load(pos_query + query + channel, mask=row < rows, other=0.0).to(tl.float32)
            key = (head * channels + channel)[:, None] * (2 * frames - 1) + offset
            score += of_query[:, None] * tl.load(pos_key + key, mask=inside, other=0.0).to(tl.float32)
    if large is not None:
        over = (score > limit).to(tl.int8) - (score < -limit).to(tl.int8)
        tl.store(large + place, over, mask=inside)
    score = _filled(
        score, masked_score, padding, forbidden, first_of_forbidden, utterance, target, source, frames, inside
    )
    score = tl.where((source < frames)[None, :], score, float("-inf"))
    weight = tl.exp(score - tl.max(score, axis=1)[:, None])
    tl.store(scores + place, weight / tl.sum(weight, axis=1)[:, None], mask=inside)


@triton.jit(do_not_specialize=["rows", "utterances", "frames"])
def _weights_gradient(
    weights, grad, pos_query, pos_key, padding, forbidden, large, grad_pos_query, rows, utterances, frames,
    frame_step, utterance_step, first_of_forbidden, penalty,
    channels: tl.constexpr, rows_each: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row, source, target, utterance, head, inside, place = _places(rows, utterances, frames, rows_each, block)
    weight = tl.load(weights + place, mask=inside, other=0.0).to(tl.float32)
    slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    slope = weight * (slope - tl.sum(weight * slope, axis=1)[:, None])
    # What is masked is a constant, also where all of a target's sources are, which then have weights.
    slope = _filled(slope, 0.0, padding, forbidden, first_of_forbidden, utterance, target, source, frames, inside)
    if large is not None:
        slope += penalty * tl.load(large + place, mask=inside, other=0).to(tl.float32)
    tl.store(grad + place, slope, mask=inside)
    if pos_key is not None:
        query = target.to(tl.int64) * frame_step + utterance * utterance_step + head * channels
        offset = frames - 1 - target[:, None] + source[None, :]
        for channel in tl.static_range(channels):
            key = (head * channels + channel)[:, None] * (2 * frames - 1) + offset
            of_query = tl.sum(slope * tl.load(pos_key + key, mask=inside, other=0.0).to(tl.float32), axis=1)
            tl.store(grad_pos_query + query + channel, of_query, mask=row < rows)


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


def _rows_of_a_program(frames: int) -> dict[str, int]:
    block = triton.next_power_of_2(frames)
    return {"rows_each": max(1, TILE // block), "block": block, "num_warps": 8 if block >= 2048 else 4}


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.view(torch.uint8)


class Weights(torch.autograd.Function):
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
        # Neighbours among the sources are neighbours among the offsets.
        pos_key_rows = None if pos_key is None else pos_key.t().contiguous()
        ctx.numbers = weights.numel() // frames, utterances, frames, *pos_query.stride()[:2]
        ctx.step = 0 if forbidden is None else forbidden.stride(0)
        ctx.key = None if key is own_key else key.dtype
        ctx.sizes, ctx.channels = sizes, sizes[2] // heads
        ctx.blocks = _rows_of_a_program(frames)
        with gpu.on_device_of(weights):
            _weights[(triton.cdiv(ctx.numbers[0], ctx.blocks["rows_each"]),)](
                weights, pos_query, pos_key_rows, _bytes(padding), _bytes(forbidden), large, *ctx.numbers,
                ctx.step, SCORE_LIMIT, MASKED_SCORE, ctx.channels, **ctx.blocks,
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
        _weights_gradient[(triton.cdiv(ctx.numbers[0], ctx.blocks["rows_each"]),)](
            weights, grad, pos_query, pos_key_rows, _bytes(padding), _bytes(forbidden), large, of_positions,
            *ctx.numbers, ctx.step, SCORE_PENALTY, ctx.channels, **ctx.blocks,
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
    columns = triton.cdiv(2 * frames - 1, block)
    each = triton.cdiv(utterances, max(1, min(utterances, PROGRAMS // (columns * heads))))
    parts = triton.cdiv(utterances, each)
    sums = torch.empty(parts, heads * channels, 2 * frames - 1, device=grad.device)
    _pos_key_gradient[(columns, heads, parts)](
        grad, pos_query, sums, utterances, frames, *pos_query.stride()[:2], each,
        channels, triton.next_power_of_2(channels), targets, block,
    )  # fmt: skip
    return sums.sum(dim=0).t()


class Averages(torch.autograd.Function):
    """Averages over sources by matrix products: weights (H, N, T, T) and values (T, N, E) to (T, N, E)."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor) -> Tensor:
        heads, utterances = weights.shape[:2]
        ctx.dtype = values.dtype
        values = by_head(values.to(weights.dtype), heads).flatten(0, 1)  # (H * N, T, E / H)
        ctx.save_for_backward(weights, values)
        return _side_by_side(torch.bmm(weights.flatten(0, 1), values), utterances)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor]:
        weights, values = ctx.saved_tensors
        heads, utterances = weights.shape[:2]
        grad = by_head(grad_outputs[0].to(weights.dtype), heads).flatten(0, 1)
        grad_values = torch.bmm(weights.flatten(0, 1).transpose(1, 2), grad)
        of_weights = None
        if ctx.needs_input_grad[0]:
            shape = (heads, utterances)
            of_weights = Products(weights.shape, [Use(grad.unflatten(0, shape), values.unflatten(0, shape), 0)])
        return of_weights, _side_by_side(grad_values, utterances).to(ctx.dtype)


def _side_by_side(x: Tensor, utterances: int) -> Tensor:
    """(H * N, T, e) to (T, N, H * e)."""
    return x.unflatten(0, (-1, utterances)).permute(2, 1, 0, 3).flatten(2).contiguous()
