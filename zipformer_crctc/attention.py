"""Attention weights shared by several modules of a layer, and the modules that use them.

T frames, N utterances, C channels, H heads; sequences are (T, N, C), attention weights (H, N, target, source).
Source: Zipformer (Yao et al., ICLR 2024), sections 3.2 (attention weights, self-attention, non-linear attention)
and the relative positional encoding of its appendix.
"""

from __future__ import annotations

import math
import random
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_crctc.activations import computed_again, tanh_gated
from zipformer_crctc.frontend import scale_initial_values
from zipformer_crctc.products import Linear
from zipformer_crctc.regularisers import Balancer, Whiten, penalise_large_values
from zipformer_crctc.schedule import Schedule, ScheduledModule

MASKED_SCORE = -1000.0


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
        self.dropout = nn.Dropout(dropout)
        self._table: Tensor | None = None  # for the longest T so far; shorter ones are its middle

    def forward(self, x: Tensor, left_context: int = 0) -> Tensor:
        """The table (1, left_context + 2 T - 1, dim) for a sequence x of (T, ...)."""
        frames = x.shape[0]
        table, needed = self._table, frames + left_context
        if table is None or table.device != x.device or table.shape[1] < 2 * needed - 1:
            table = relative_positions(max(needed, 1000), self.dim, device=x.device)
            self._table = table
        centre = table.shape[1] // 2
        return self.dropout(table[:, centre - needed + 1 : centre + frames])


class _AlignOffsets(torch.autograd.Function):
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

        def per_head(y: Tensor) -> Tensor:  # (T, N, H * c) to (H, N, T, c)
            return y.unflatten(-1, (self.num_heads, -1)).permute(2, 1, 0, 3)

        query, key, pos_query = self.in_proj(x).split([self.query_dim, self.query_dim, self.pos_query_dim], dim=-1)
        key = self.whiten_keys(self.balance_keys(key))
        scores = torch.matmul(per_head(query), per_head(key).transpose(2, 3))
        if not (self.training and random.random() < self.value(self.pos_emb_skip_rate)):
            pos_key = self.linear_pos(pos_emb[0]).unflatten(-1, (self.num_heads, -1))  # (2T - 1, H, c)
            by_offset = torch.matmul(per_head(pos_query), pos_key.permute(1, 2, 0)[:, None])  # (H, N, T, 2T - 1)
            scores += _AlignOffsets.apply(by_offset)
        if self.training and random.random() < self.penalty_prob:
            scores = penalise_large_values(scores, limit=25.0, penalty=1e-4).clone()  # no view, so it can be filled
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
        values = self.in_proj(x).unflatten(-1, (self.num_heads, -1)).permute(2, 1, 0, 3)  # (H, N, T, c)
        averages = torch.matmul(attn_weights, values).permute(2, 1, 0, 3).flatten(2)  # (T, N, H * c)
        return self.whiten(self.out_proj(averages))


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
        s, v, y = self.in_proj(x).chunk(3, dim=-1)
        z = tanh_gated(self.whiten1(v), self.balancer(s))
        with computed_again(z, partial(tanh_gated, v.detach(), s.detach())):
            by_head = z.unflatten(-1, (attn_weights.shape[0], -1)).permute(2, 1, 0, 3)  # (H, N, T, E / H)
            averages = torch.matmul(attn_weights, by_head)
        z = averages.permute(2, 1, 0, 3).flatten(2)  # (T, N, E)
        product = z * y
        with computed_again(product, partial(torch.mul, z.detach(), y.detach())):
            return self.whiten2(self.out_proj(product))


def uniform_attention(attn_weights: Tensor) -> Tensor:
    """The same weight for each source that a target attends to at all; a target's weights still sum to one."""
    attended = (attn_weights > 0.0).to(attn_weights.dtype)
    return attended / attended.sum(dim=-1, keepdim=True)
