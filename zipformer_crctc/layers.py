"""The encoder layer and its parts that do not attend: feed-forward and convolution.

T frames, N utterances, C channels; sequences are (T, N, C).
Source: Zipformer (Yao et al., ICLR 2024), section 3.2 and figure 2.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipformer_crctc.activations import (
    SWOOSH_L,
    SWOOSH_R,
    SharedDropout,
    computed_again,
    convolved_again,
    gated,
    projected_again,
    swoosh_linear,
)
from zipformer_crctc.attention import AttentionWeights, NonlinAttention, SelfAttention, uniform_attention
from zipformer_crctc.convolution import depthwise_conv
from zipformer_crctc.frontend import scale_initial_values
from zipformer_crctc.norms import BiasNorm, Bypass, added, keep_mask
from zipformer_crctc.products import Linear
from zipformer_crctc.regularisers import Balancer, Whiten
from zipformer_crctc.schedule import Schedule, ScheduledModule


class FeedForward(nn.Module):
    """Two linear layers with SwooshL and time-shared dropout between.

    Args:
        embed_dim: C.
        hidden_dim: channels between the two.
        dropout: probability of dropping a hidden channel of an utterance.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, dropout: float | Schedule = 0.0) -> None:
        super().__init__()
        self.in_proj = Linear(embed_dim, hidden_dim)
        self.hidden_balancer = Balancer(-1, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.dropout = SharedDropout(dropout, shared_dim=0)
        self.out_proj = Linear(hidden_dim, embed_dim)
        scale_initial_values(self.out_proj, 0.1)
        self.out_whiten = Whiten(1, Schedule((0, 7.5), (20000, 15.0), default=7.5), grad_scale=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """(T, N, C) to the same shape."""
        hidden = self.in_proj(x)
        mask = self.dropout.mask(hidden)
        with projected_again(hidden, self.in_proj, x):
            balanced = self.hidden_balancer(hidden)
            result = swoosh_linear(balanced, self.out_proj.weight, self.out_proj.bias, SWOOSH_L, mask)
        return self.out_whiten(result)


class ChunkCausalConv(nn.Module):
    """Depthwise convolution over time that sees its own chunk and the past: a causal one plus one within chunks.

    Args:
        channels: C.
        kernel_size: K, odd.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.causal_conv = nn.Conv1d(channels, channels, (kernel_size + 1) // 2, groups=channels)
        scale_initial_values(self.causal_conv, 1.0)
        self.chunkwise_conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        # How much the places near the left and the right edge of a chunk are scaled, less one.
        self.chunkwise_conv_scale = nn.Parameter(torch.zeros(2, channels, kernel_size))

    def forward(self, x: Tensor, chunk_size: int = -1, lengths: Tensor | None = None) -> Tensor:
        """(T, N, C) to the same shape; a negative chunk size means one chunk of T frames.

        With lengths (N,) the chunk of an utterance that is shorter ends with it, as it would alone.
        """
        frames = x.shape[0]
        if chunk_size < 0 or chunk_size > frames:
            chunk_size = frames
        half = self.kernel_size // 2
        causal = depthwise_conv(F.pad(x, (0, 0, 0, 0, half, 0)), self.causal_conv)
        padded = F.pad(x, (0, 0, 0, 0, 0, -frames % chunk_size))
        by_chunk = padded.unflatten(0, (-1, chunk_size)).transpose(0, 1).flatten(1, 2)  # (chunk, chunks * N, C)
        by_chunk = depthwise_conv(by_chunk, self.chunkwise_conv).unflatten(1, (-1, x.shape[1]))
        if lengths is None:
            by_chunk = by_chunk * self._edge_scale(chunk_size)[:, None, None]
        else:
            by_chunk = by_chunk * self._edge_scales(chunk_size, lengths.clamp(max=chunk_size))[:, None]
        within = by_chunk.transpose(0, 1).flatten(0, 1)
        return causal + within[:frames]

    def _edge_scales(self, chunk_size: int, ends: Tensor) -> Tensor:
        """As `_edge_scale`, with the right edge of each utterance at its end in ends (N,): (chunk, N, C)."""
        none = self.kernel_size  # the row of zeros for what is no edge
        left, right = F.pad(self.chunkwise_conv_scale.transpose(1, 2), (0, 0, 0, 1))  # (K + 1, C) each
        place = torch.arange(chunk_size, device=ends.device)[:, None]
        from_right = place + self.kernel_size - ends  # (chunk, N)
        from_right = from_right.masked_fill((from_right < 0) | (from_right > none), none)
        return 1.0 + left[place.clamp(max=none)] + right[from_right]

    def _edge_scale(self, chunk_size: int) -> Tensor:
        """1 + scales of the left edge, aligned left, + those of the right edge, aligned right: (chunk, C)."""
        left, right = self.chunkwise_conv_scale.transpose(1, 2)  # (K, C) each
        missing = chunk_size - self.kernel_size
        if missing >= 0:
            return 1.0 + F.pad(left, (0, 0, 0, missing)) + F.pad(right, (0, 0, missing, 0))
        return 1.0 + left[:chunk_size] + right[-chunk_size:]


class ConvModule(nn.Module):
    """Gated linear unit, depthwise convolution over time, SwooshR and a projection.

    Args:
        channels: C.
        kernel_size: K, odd, frames of the stack's own rate.
        causal: whether the convolution respects chunks.
    """

    def __init__(self, channels: int, kernel_size: int, causal: bool) -> None:
        super().__init__()
        self.in_proj = Linear(channels, 2 * channels)
        self.balancer1 = Balancer(
            -1,
            min_positive=Schedule((0, 0.05), (8000, 0.025)),
            max_positive=1.0,
            min_abs=1.5,
            max_abs=Schedule((0, 5.0), (8000, 10.0), default=1.0),
        )
        self.depthwise_conv: nn.Conv1d | ChunkCausalConv
        if causal:
            self.depthwise_conv = ChunkCausalConv(channels, kernel_size)
        else:
            self.depthwise_conv = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.balancer2 = Balancer(
            -1,
            min_positive=Schedule((0, 0.1), (8000, 0.05)),
            max_positive=1.0,
            min_abs=Schedule((0, 0.2), (20000, 0.5)),
            max_abs=10.0,
        )
        self.whiten = Whiten(1, Schedule((0, 7.5), (20000, 15.0), default=7.5), grad_scale=0.01)
        self.out_proj = Linear(channels, channels)
        scale_initial_values(self.out_proj, 0.05)

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        chunk_size: int = -1,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(T, N, C) and (N, T) to (T, N, C); chunk_size and lengths (`ChunkCausalConv`) at the stack's own rate."""
        projected = self.in_proj(x)
        with projected_again(projected, self.in_proj, x) as again:
            v, gate = projected.chunk(2, dim=-1)
            u = gated(v, self.balancer1(gate), key_padding_mask)
        with computed_again(u, lambda: _gated_again(again(), key_padding_mask)) as gated_again:
            convolved = self._convolved(u, chunk_size, lengths)
        with convolved_again(convolved, lambda: self._convolved(gated_again(), chunk_size, lengths)):
            balanced = self.whiten(self.balancer2(convolved))
            return swoosh_linear(balanced, self.out_proj.weight, self.out_proj.bias, SWOOSH_R)

    def _convolved(self, u: Tensor, chunk_size: int, lengths: Tensor | None) -> Tensor:
        if isinstance(self.depthwise_conv, ChunkCausalConv):
            return self.depthwise_conv(u, chunk_size, lengths)
        return depthwise_conv(u, self.depthwise_conv)


def _gated_again(projected: Tensor, padding: Tensor | None) -> Tensor:
    v, gate = projected.chunk(2, dim=-1)
    return gated(v, gate, padding)


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of an encoder layer, in channels unless said otherwise."""

    embed_dim: int
    pos_dim: int
    num_heads: int
    query_head_dim: int
    pos_head_dim: int
    value_head_dim: int
    feedforward_dim: int
    cnn_module_kernel: int
    """frames of the stack's own rate, odd"""


class EncoderLayer(ScheduledModule):
    """One Zipformer layer.

    Args:
        sizes: its sizes.
        causal: whether its convolutions respect chunks.
        dropout: probability of dropping a hidden channel of a feed-forward module.
        skip_rate: probability that an utterance bypasses the whole layer (layer-drop).
    """

    def __init__(
        self,
        sizes: LayerSizes,
        causal: bool = False,
        dropout: float | Schedule = 0.0,
        skip_rate: float | Schedule = 0.0,
    ) -> None:
        super().__init__()
        dim, hidden = sizes.embed_dim, sizes.feedforward_dim
        self.attention_skip_rate = Schedule((0, 0.2), (4000, 0.05), (16000, 0.0))
        self.conv_skip_rate = Schedule((0, 0.2), (4000, 0.05), (16000, 0.0))
        self.ff2_skip_rate = Schedule((0, 0.1), (4000, 0.01), (50000, 0.0))
        self.ff3_skip_rate = Schedule((0, 0.1), (4000, 0.01), (50000, 0.0))
        self.const_attention_rate = Schedule((0, 0.25), (4000, 0.025))
        # Takes no part in the forward pass; published checkpoints hold it.
        self.bypass_scale = nn.Parameter(torch.full((dim,), 0.5))
        self.bypass = Bypass(dim, skip_rate)
        self.bypass_mid = Bypass(dim)
        self.self_attn_weights = AttentionWeights(
            dim, sizes.pos_dim, sizes.num_heads, sizes.query_head_dim, sizes.pos_head_dim
        )
        self.self_attn1 = SelfAttention(dim, sizes.num_heads, sizes.value_head_dim)
        self.self_attn2 = SelfAttention(dim, sizes.num_heads, sizes.value_head_dim)
        self.feed_forward1 = FeedForward(dim, hidden * 3 // 4, dropout)
        self.feed_forward2 = FeedForward(dim, hidden, dropout)
        self.feed_forward3 = FeedForward(dim, hidden * 5 // 4, dropout)
        self.nonlin_attention = NonlinAttention(dim, 3 * dim // 4)
        self.conv_module1 = ConvModule(dim, sizes.cnn_module_kernel, causal)
        self.conv_module2 = ConvModule(dim, sizes.cnn_module_kernel, causal)
        self.norm = BiasNorm(dim)

        def rarely_balanced(min_abs: Schedule, max_abs: float) -> Balancer:
            return Balancer(-1, min_positive=0.3, max_positive=0.7, min_abs=min_abs, max_abs=max_abs, prob=0.05)

        self.balancer_na = rarely_balanced(Schedule((0, 0.004), (4000, 0.02)), 100.0)
        self.balancer_ff2 = rarely_balanced(Schedule((0, 0.0), (4000, 0.1)), 2.0)
        self.balancer_ff3 = rarely_balanced(Schedule((0, 0.0), (4000, 0.2)), 4.0)
        self.balancer1 = Balancer(-1, min_positive=0.45, max_positive=0.55, min_abs=0.2, max_abs=4.0)
        self.balancer2 = Balancer(-1, min_positive=0.45, max_positive=0.55, min_abs=0.1, max_abs=4.0)
        self.whiten = Whiten(1, Schedule((0, 4.0), (20000, 12.0), default=4.0), grad_scale=0.01)

    def forward(
        self,
        x: Tensor,
        pos_emb: Tensor,
        chunk_size: int = -1,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            x: (T, N, C).
            pos_emb: (1, 2T - 1, pos_dim).
            chunk_size: frames of the stack's own rate; negative for none.
            attn_mask: (T, T) or (N, T, T), True where attention is not allowed.
            key_padding_mask: (N, T), True at padding.
            lengths: (N,) frames of the stack's own rate, for `ChunkCausalConv`.

        Returns:
            (T, N, C).
        """
        original = x
        attn_weights = self.self_attn_weights(x, pos_emb, key_padding_mask, attn_mask)
        first_head = attn_weights[:1]
        if self.training and random.random() < self.value(self.const_attention_rate):
            first_head = uniform_attention(first_head)
        attention_mask = self._skip_mask(x, self.attention_skip_rate)

        x = added(x, self.feed_forward1(x))
        x = added(x, self.balancer_na(self.nonlin_attention(x, first_head)), attention_mask)
        x = added(x, self.self_attn1(x, attn_weights), attention_mask)
        convolved = self.conv_module1(x, key_padding_mask, chunk_size, lengths)
        x = added(x, convolved, self._skip_mask(x, self.conv_skip_rate))
        update = self.balancer_ff2(self.feed_forward2(x))
        x = added(x, update, self._skip_mask(x, self.ff2_skip_rate), for_products=False)
        x = self.bypass_mid(original, x)
        x = added(x, self.self_attn2(x, attn_weights), attention_mask)
        convolved = self.conv_module2(x, key_padding_mask, chunk_size, lengths)
        x = added(x, convolved, self._skip_mask(x, self.conv_skip_rate))
        update = self.balancer_ff3(self.feed_forward3(x))
        x = added(x, update, self._skip_mask(x, self.ff3_skip_rate), for_products=False)
        x = self.balancer1(x)
        x = self.norm(x, (original, self.bypass))
        return self.whiten(self.balancer2(x))

    def _skip_mask(self, x: Tensor, schedule: Schedule) -> Tensor | None:
        """Which utterances keep a module's output, or None where all do."""
        rate = self.value(schedule) if self.training else 0.0
        return keep_mask(x, rate) if rate > 0.0 else None
