"""Attention weights shared by several modules of a layer, and the modules that use them.

T frames, N utterances, C channels, H heads; sequences are (T, N, C), attention weights (H, N, target, source).
Source: Zipformer (Yao et al., ICLR 2024), sections 3.2 (attention weights, self-attention, non-linear attention)
and the relative positional encoding of its appendix.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zipformer_crctc import gpu, native
from zipformer_crctc.activations import Dropout, computed_again, projected_again, tanh_gated
from zipformer_crctc.attention_shared import MASKED_SCORE, SCORE_LIMIT, SCORE_PENALTY, Products, Use, by_head
from zipformer_crctc.autograd import Function
from zipformer_crctc.frontend import scale_initial_values
from zipformer_crctc.products import Linear
from zipformer_crctc.regularisers import Balancer, Whiten, penalise_large_values
from zipformer_crctc.schedule import Schedule, ScheduledModule

MAX_GPU_FRAMES = 4096
"""A program holds a whole row of weights."""

_weights = native.Kernel("attention_weights", "p" * 8 + "i" * 10 + "f")
_weights_gradient = native.Kernel("attention_weights_gradient", "ppp" + "i" + "p" * 11 + "i" * 14 + "f")
_averages = native.Kernel("attention_averages", "ppp" + "i" * 6)
_averages_gradient = native.Kernel("attention_averages_gradient", "ppp" + "i" * 6)


def relative_positions(frames: int, dim: int, left_context: int = 0, device: torch.device | None = None) -> Tensor:
    """Table of compressed relative positions, in float32.

    Args:
        frames: T.
        dim: channels of the table.
        left_context: earlier frames that serve as sources as well.

    Returns:
        (1, left_context + 2 T - 1, dim); row r stands for the offset r - (left_context + T - 1) of the source from
        the target.
    """
    offsets = torch.arange(-(left_context + frames - 1), frames, device=device, dtype=torch.float64)
    # Distances are compressed by a logarithm and then mapped to an angle, so that all of time fits in half a turn.
    width = math.sqrt(dim)
    compressed = width * offsets.sign() * ((offsets.abs() + width).log() - math.log(width))
    angle = torch.atan(2.0 * math.pi * compressed / dim)
    harmonics = torch.arange(1, dim // 2 + 1, device=device, dtype=torch.float64)
    phases = angle[:, None] * harmonics
    table = torch.stack([phases.cos(), phases.sin()], dim=2).flatten(1)
    table[:, -1] = 1.0
    return table.to(torch.float32)[None]


class RelativePositions(nn.Module):
    """The positional table of one stack, with dropout in training; key-less, computed once per length.

    Args:
        dim: channels of the table.
        dropout: probability of dropping an entry.
    """

    def __init__(self, dim: int, dropout: float = 0.15) -> None:
        super().__init__()
        self.dim = dim
        self.dropout = Dropout(dropout)
        self.table: Tensor | None = None  # for the longest T so far; shorter ones are its middle

    def forward(self, x: Tensor, left_context: int = 0) -> Tensor:
        """The table (1, left_context + 2 T - 1, dim) for a sequence x of (T, ...)."""
        frames = x.shape[0]
        table, needed = self.table, frames + left_context
        if table is None or table.device != x.device or table.shape[1] < 2 * needed - 1:
            table = relative_positions(max(needed, 1000), self.dim, device=x.device)
            self.table = table
        centre = table.shape[1] // 2
        return self.dropout(table[:, centre - needed + 1 : centre + frames])


class _AlignOffsets(Function):
    """(..., T, 2T - 1) over offsets source - target to (..., T, T) over sources, as a view.

    Row t begins at column T - 1 - t, that is, each row begins 2T - 2 places after the one before.
    """

    @staticmethod
    def _view(by_offset: Tensor) -> Tensor:
        frames = by_offset.shape[-2]
        *outer, _, _ = by_offset.stride()
        shape = (*by_offset.shape[:-1], frames)
        return by_offset.as_strided(shape, (*outer, 2 * frames - 2, 1), by_offset.storage_offset() + frames - 1)

    @staticmethod
    def forward(ctx: Any, by_offset: Tensor) -> Tensor:
        ctx.shape = by_offset.shape
        return _AlignOffsets._view(by_offset.contiguous())

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (grad,) = grad_outputs
        by_offset = grad.new_zeros(ctx.shape)
        _AlignOffsets._view(by_offset).copy_(grad)
        return by_offset


def _numbers(use: Use) -> list[int]:
    """As the kernel takes it: both arrays are dense in memory as (T, N, E)."""
    heads, _, _, channels = use.grad.shape
    steps = [use.grad.stride(2), use.grad.stride(1), use.values.stride(2), use.values.stride(1)]
    return [use.grad.data_ptr(), use.values.data_ptr(), use.first, heads, channels, *steps]


def _steps(x: Tensor) -> tuple[int, int]:
    """From a frame of a sequence to the next, and from an utterance to the next."""
    return x.stride(0), x.stride(1)


@dataclass(frozen=True)
class _Inputs:
    """What attention weights are made of, as kernels take it."""

    projected: Tensor
    """(T, N, C): queries, keys and positional queries side by side"""
    key: Tensor | None
    """(T, N, H * c) in place of those keys"""
    pos_key: Tensor | None
    """(2T - 1, H * c), None for no positions"""
    padding: Tensor | None
    """(N, T)"""
    forbidden: Tensor | None
    """(N, T, T), utterances perhaps one and the same"""
    heads: int
    sizes: tuple[int, int, int]
    """channels of queries, keys and positional queries"""

    def arrays(self) -> list[Tensor | None]:
        query, key, pos_query = self.projected.split(self.sizes, dim=-1)
        key = key if self.key is None else self.key
        return [query, key, pos_query, self.pos_key, self.padding, self.forbidden]

    def numbers(self) -> list[int]:
        frames, utterances, _ = self.projected.shape
        per_head = [size // self.heads for size in (self.sizes[0], self.sizes[2])]
        key_steps = _steps(self.projected if self.key is None else self.key)
        forbidden_step = 0 if self.forbidden is None else self.forbidden.stride(0)
        return [self.heads, utterances, frames, *per_head, *_steps(self.projected), *key_steps, forbidden_step]


class _Weights(Function):
    """Attention weights by kernels: scores, masks and softmax of a few targets at a time, which stay in the cache."""

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
        weights = projected.new_empty(heads, utterances, frames, frames)
        large = torch.empty_like(weights, dtype=torch.int8) if penalised else None
        inputs = _Inputs(projected, key, pos_key, padding, forbidden, heads, sizes)
        _weights(*inputs.arrays(), large, weights, *inputs.numbers(), SCORE_LIMIT)
        ctx.save_for_backward(projected, key, pos_key, padding, forbidden, large, weights)
        ctx.sizes = sizes
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        projected, key, pos_key, padding, forbidden, large, weights = ctx.saved_tensors
        inputs = _Inputs(projected, key, pos_key, padding, forbidden, len(weights), ctx.sizes)
        (grad,) = grad_outputs
        whole, uses = (None, grad.uses) if isinstance(grad, Products) else (grad.contiguous(), [])
        table = torch.tensor([_numbers(use) for use in uses], dtype=torch.int64)
        grad_projected = torch.empty_like(projected)
        grad_query, grad_own_key, grad_pos_query = grad_projected.split(ctx.sizes, dim=-1)
        grad_key = grad_own_key
        if key is not None:
            grad_own_key.zero_()
            grad_key = torch.empty_like(key)
        if pos_key is None:
            grad_pos_query.zero_()
        grad_pos_key = None if pos_key is None else torch.empty_like(pos_key)
        grads = [grad_query, grad_key, grad_pos_query, grad_pos_key]
        steps = [*_steps(grad_query), *_steps(grad_key)]
        _weights_gradient(
            weights, whole, table, len(uses), *inputs.arrays(), large, *grads, *inputs.numbers(), *steps, SCORE_PENALTY
        )
        return grad_projected, None if key is None else grad_key, grad_pos_key, None, None, None, None, None


class _Averages(Function):
    """Averages by kernels, which read and write sequences in place."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(weights, values)
        averages = values.new_empty(values.shape)
        heads, utterances, frames, _ = weights.shape
        channels = values.shape[-1] // heads
        _averages(weights, values, averages, heads, utterances, frames, channels, *_steps(values))
        return averages

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor]:
        weights, values = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_values = torch.empty_like(grad)
        heads, utterances, frames, _ = weights.shape
        channels = values.shape[-1] // heads
        _averages_gradient(weights, grad, grad_values, heads, utterances, frames, channels, *_steps(grad))
        if not ctx.needs_input_grad[0]:
            return None, grad_values
        return Products(weights.shape, [Use(by_head(grad, heads), by_head(values, heads), 0)]), grad_values


def averaged(weights: Tensor, values: Tensor) -> Tensor:
    """Averages over sources of each head's share of the channels: (H, N, T, T) and (T, N, E) to (T, N, E)."""
    if native.suits(weights, values):
        assert weights.shape == (weights.shape[0], values.shape[1], len(values), len(values))
        averages = _gpu().Averages if gpu.takes(values) else _Averages
        return averages.apply(weights.contiguous(), values)
    return torch.matmul(weights, by_head(values, weights.shape[0])).permute(2, 1, 0, 3).flatten(2)


def _gpu() -> Any:
    """The module of attention on a GPU, which needs Triton."""
    from zipformer_crctc import gpu_attention

    return gpu_attention


class AttentionWeights(ScheduledModule):
    """Multi-head attention weights with relative positions; the weights of a layer serve all its attention modules.

    Args:
        embed_dim: C.
        pos_dim: channels of the positional table.
        num_heads: H.
        query_head_dim: channels of queries and keys per head.
        pos_head_dim: channels of the positional queries per head.
    """

    penalty_prob = 0.1

    def __init__(self, embed_dim: int, pos_dim: int, num_heads: int, query_head_dim: int, pos_head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query_dim = num_heads * query_head_dim
        self.pos_query_dim = num_heads * pos_head_dim
        self.pos_emb_skip_rate = Schedule((0, 0.5), (4000, 0.0))
        self.in_proj = Linear(embed_dim, 2 * self.query_dim + self.pos_query_dim)
        # Stands for the usual scaling of the scores.
        scale_initial_values(self.in_proj, query_head_dim**-0.25)
        self.linear_pos = nn.Linear(pos_dim, self.pos_query_dim, bias=False)
        scale_initial_values(self.linear_pos, 0.05)
        self.balance_keys = Balancer(-1, min_positive=0.4, max_positive=0.6, min_abs=0.0, prob=0.025)
        self.whiten_keys = Whiten(num_heads, Schedule((0, 3.0), (20000, 6.0), default=3.0), grad_scale=0.025)

    def forward(
        self, x: Tensor, pos_emb: Tensor, key_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> Tensor:
        """Attention weights of a sequence.

        Args:
            x: (T, N, C).
            pos_emb: (1, 2T - 1, pos_dim).
            key_padding_mask: (N, T), True at frames that are padding.
            attn_mask: (T, T) or (N, T, T), rows are targets, True where attention is not allowed.

        Returns:
            (H, N, T, T), rows sum to one over sources.
        """

        sizes = (self.query_dim, self.query_dim, self.pos_query_dim)
        projected = self.in_proj(x)
        query, own_key, pos_query = projected.split(sizes, dim=-1)
        key = self.whiten_keys(self.balance_keys(own_key))
        pos_key = None
        if not (self.training and random.random() < self.value(self.pos_emb_skip_rate)):
            pos_key = self.linear_pos(pos_emb[0])  # (2T - 1, H * c)
        penalised = self.training and random.random() < self.penalty_prob
        frames, utterances, _ = x.shape
        too_long = gpu.takes(projected) and frames > MAX_GPU_FRAMES
        if projected.numel() > 0 and not too_long and native.suits(projected, key, pos_key):
            assert pos_key is None or len(pos_key) == 2 * frames - 1
            padding = key_padding_mask
            if padding is not None:
                padding = padding.to(torch.bool).expand(utterances, frames).contiguous()
            forbidden = None if attn_mask is None else attn_mask.contiguous().expand(utterances, frames, frames)
            other_key = None if key is own_key else key
            function = _gpu().Weights if gpu.takes(projected) else _Weights
            return function.apply(projected, other_key, pos_key, padding, forbidden, self.num_heads, sizes, penalised)

        scores = torch.matmul(by_head(query, self.num_heads), by_head(key, self.num_heads).transpose(2, 3))
        if pos_key is not None:
            offsets = pos_key.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0)  # (H, c, 2T - 1)
            by_offset = torch.matmul(by_head(pos_query, self.num_heads), offsets[:, None])  # (H, N, T, 2T - 1)
            scores += _AlignOffsets.apply(by_offset)
        if penalised:
            scores = penalise_large_values(scores, SCORE_LIMIT, SCORE_PENALTY).clone()  # no view, so it can be filled
        if attn_mask is not None:
            scores.masked_fill_(attn_mask, MASKED_SCORE)
        if key_padding_mask is not None:
            scores.masked_fill_(key_padding_mask[:, None], MASKED_SCORE)
        return scores.softmax(dim=-1)


class SelfAttention(nn.Module):
    """Averages of linear projections of the sequence, by given attention weights.

    Args:
        embed_dim: C.
        num_heads: H.
        value_head_dim: channels of the values per head.
    """

    def __init__(self, embed_dim: int, num_heads: int, value_head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = Linear(embed_dim, num_heads * value_head_dim)
        self.out_proj = Linear(num_heads * value_head_dim, embed_dim)
        scale_initial_values(self.out_proj, 0.05)
        self.whiten = Whiten(1, Schedule((0, 7.5), (20000, 22.5), default=7.5), grad_scale=0.01)

    def forward(self, x: Tensor, attn_weights: Tensor) -> Tensor:
        """(T, N, C) and (H, N, T, T) to (T, N, C)."""
        return self.whiten(self.out_proj(averaged(attn_weights, self.in_proj(x))))


class NonlinAttention(nn.Module):
    """Gated attention: tanh(s) * v is averaged by the attention weights and multiplied by y.

    Args:
        channels: C.
        hidden_channels: E, channels of s, v and y.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.in_proj = Linear(channels, 3 * hidden_channels)
        self.balancer = Balancer(
            -1,
            min_positive=Schedule((0, 0.25), (20000, 0.05)),
            max_positive=Schedule((0, 0.75), (20000, 0.95)),
            min_abs=0.5,
            max_abs=5.0,
        )
        self.whiten1 = Whiten(1, Schedule((0, 5.0), (20000, 10.0), default=5.0), grad_scale=0.01)
        self.out_proj = Linear(hidden_channels, channels)
        scale_initial_values(self.out_proj, 0.05)
        self.whiten2 = Whiten(1, Schedule((0, 5.0), (20000, 15.0), default=5.0), grad_scale=0.01)

    def forward(self, x: Tensor, attn_weights: Tensor) -> Tensor:
        """(T, N, C) and (H, N, T, T) to (T, N, C); the hidden channels are shared out over the heads given."""
        projected = self.in_proj(x)
        with projected_again(projected, self.in_proj, x) as again:
            s, v, y = projected.chunk(3, dim=-1)
            z = tanh_gated(self.whiten1(v), self.balancer(s))
            with computed_again(z, lambda: _tanh_gated_again(again())):
                averages = averaged(attn_weights, z)  # (T, N, E)
            product = averages * y
        kept = averages.detach()
        with computed_again(product, lambda: kept * again().chunk(3, dim=-1)[2]):
            return self.whiten2(self.out_proj(product))


def _tanh_gated_again(projected: Tensor) -> Tensor:
    s, v, _ = projected.chunk(3, dim=-1)
    return tanh_gated(v, s)


def uniform_attention(attn_weights: Tensor) -> Tensor:
    """The same weight for each source that a target attends to at all; a target's weights still sum to one."""
    attended = (attn_weights > 0.0).to(attn_weights.dtype)
    return attended / attended.sum(dim=-1, keepdim=True)
