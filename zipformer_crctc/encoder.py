"""The Zipformer encoder: stacks of layers at several frame rates, and how they are wired together.

T frames at 50 Hz, N utterances, C channels; sequences are (T, N, C).
Source: Zipformer (Yao et al., ICLR 2024), section 3.1; ZIPA (Zhu et al., ACL 2025), section 3.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zipformer_crctc import gpu, native
from zipformer_crctc.attention import RelativePositions
from zipformer_crctc.autograd import Function
from zipformer_crctc.layers import EncoderLayer, LayerSizes
from zipformer_crctc.norms import Bypass, kept
from zipformer_crctc.schedule import Schedule


class Downsample(nn.Module):
    """Weighted sums of groups of frames, with learnt weights; the last frame is repeated to fill the last group.

    Args:
        factor: frames per group.
    """

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.bias = nn.Parameter(torch.zeros(factor))

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(T, N, C) to (ceil(T / factor), N, C).

        With lengths (N,) the last valid frame of each utterance is repeated to the end, as it would be alone.
        """
        missing = -x.shape[0] % self.factor
        if lengths is not None and gpu.takes(x) and not torch.is_grad_enabled() and native.suits(x, self.bias):
            from zipformer_crctc.gpu_sequences import weighted_sums  # needs Triton

            return weighted_sums(x.contiguous(), self.bias.softmax(dim=0), lengths)
        if lengths is not None:
            x = repeat_last(x, lengths, x.shape[0] + missing)
        elif missing:
            x = torch.cat([x, x[-1:].expand(missing, -1, -1)])
        return _WeightedSums.apply(x, self.bias)


class _WeightedSums(Function):
    """(G * F, N, C) and the logits (F,) of the weights of the frames of a group to (G, N, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        weights = bias.softmax(dim=0)
        ctx.save_for_backward(kept(x), bias, weights)
        ctx.dtype = x.dtype
        return (x.unflatten(0, (-1, len(weights))) * weights[:, None, None]).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        x, bias, weights = ctx.saved_tensors
        grad = grad_outputs[0][:, None]
        grad_x = (grad * weights[:, None, None]).flatten(0, 1).to(ctx.dtype)
        grad_weights = (grad * x.unflatten(0, (-1, len(weights)))).sum(dim=(0, 2, 3)).double()
        # In float64, as the differences are nothing but rounding where frames are equal.
        exact = bias.double().softmax(dim=0)
        return grad_x, (exact * (grad_weights - (exact * grad_weights).sum())).to(bias.dtype)


def repeat_last(x: Tensor, lengths: Tensor, frames: int) -> Tensor:
    """(T, N, C) to (frames, N, C): each utterance up to its length in lengths (N,), then its last frame again."""
    time = torch.arange(frames, device=x.device)[:, None].minimum(lengths - 1)  # (frames, N)
    return x[time, torch.arange(x.shape[1], device=x.device)]


class Stack(nn.Module):
    """Layers at one frame rate, sharing a positional table.

    Args:
        layers: the layers.
        pos_dim: channels of the positional table.
    """

    def __init__(self, layers: Sequence[EncoderLayer], pos_dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.positions = RelativePositions(pos_dim)

    def forward(
        self,
        x: Tensor,
        chunk_size: int = -1,
        feature_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """(T, N, C) to the same shape; feature_mask (N, C) multiplies the input and each layer's output.

        All else as in `EncoderLayer.forward`.
        """
        pos_emb = self.positions(x)
        if feature_mask is not None:
            x = x * feature_mask
        for layer in self.layers:
            x = layer(x, pos_emb, chunk_size, attn_mask, key_padding_mask, lengths)
            if feature_mask is not None:
                x = x * feature_mask
        return x


class DownsampledStack(nn.Module):
    """A stack that runs at a lower frame rate and is combined with its input by a bypass.

    Args:
        stack: the stack.
        embed_dim: C.
        factor: ratio of the frame rates.
    """

    def __init__(self, stack: Stack, embed_dim: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.downsample = Downsample(factor)
        self.encoder = stack
        self.out_combiner = Bypass(embed_dim)

    def forward(
        self,
        x: Tensor,
        chunk_size: int = -1,
        feature_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """As `Stack.forward`; all at the full rate but key_padding_mask, which is at the stack's own.

        lengths: see `Downsample.forward`.
        """
        if attn_mask is not None:
            attn_mask = attn_mask[..., :: self.factor, :: self.factor]
        chunk_size = chunk_size // self.factor if chunk_size > 0 else chunk_size
        low = self.downsample(x, lengths)
        ends = None if lengths is None else (lengths + self.factor - 1) // self.factor
        y = self.encoder(low, chunk_size, feature_mask, attn_mask, key_padding_mask, ends)
        return self.out_combiner(x, y, self.factor)


def chunk_attention_mask(frames: int, chunk_size: int, left_chunks: int, device: torch.device | None = None) -> Tensor:
    """Which attention chunks forbid: (T, T), True = masked.

    A target sees its own chunk and `left_chunks` before it (all, if negative).
    """
    chunk = torch.arange(frames, device=device) // chunk_size
    target, source = chunk[:, None], chunk[None, :]
    masked = source > target
    if left_chunks >= 0:
        masked = masked | (source < target - left_chunks)
    return masked


def left_context_chunks(chunk_size: int, left_context_frames: int) -> int:
    """Number of chunks of left context, at least one; -1 for no limit or where there are no chunks."""
    if chunk_size < 0 or left_context_frames < 0:
        return -1
    return max(1, left_context_frames // chunk_size)


class Zipformer(nn.Module):
    """All stacks.

    Each list holds one value per stack.

    Args:
        downsampling_factor: frame rate of the input over the stack's own.
        num_encoder_layers: layers.
        sizes: sizes of the layers.
        encoder_unmasked_dim: channels that the feature masks of training never touch.
        causal: whether attention and convolutions respect chunks.
        chunk_size: chunk sizes in frames to draw from in training, -1 for the whole utterance.
        left_context_frames: numbers of frames of left context to draw from, -1 for all.
        dropout: probability of dropping a hidden channel of a feed-forward module.
        warmup_batches: adjusted batch count at which layer-drop has fallen in all stacks.
        output_downsampling_factor: 1 for output at 50 Hz.
    """

    def __init__(
        self,
        downsampling_factor: Sequence[int],
        num_encoder_layers: Sequence[int],
        sizes: Sequence[LayerSizes],
        encoder_unmasked_dim: Sequence[int],
        causal: bool = False,
        chunk_size: Sequence[int] = (-1,),
        left_context_frames: Sequence[int] = (-1,),
        dropout: float | Schedule = 0.0,
        warmup_batches: float = 4000.0,
        output_downsampling_factor: int = 1,
    ) -> None:
        super().__init__()
        self.encoder_dim = tuple(size.embed_dim for size in sizes)
        self.encoder_unmasked_dim = tuple(encoder_unmasked_dim)
        self.downsampling_factor = tuple(downsampling_factor)
        self.causal = causal
        self.chunk_size = tuple(chunk_size)
        self.left_context_frames = tuple(left_context_frames)
        stacks: list[nn.Module] = []
        for i, (size, factor, layers) in enumerate(zip(sizes, downsampling_factor, num_encoder_layers, strict=True)):
            drops = _layer_drop(i, layers, len(sizes), factor, warmup_batches)
            stack = Stack([EncoderLayer(size, causal, dropout, drop) for drop in drops], size.pos_dim)
            stacks.append(stack if factor == 1 else DownsampledStack(stack, size.embed_dim, factor))
        self.encoders = nn.ModuleList(stacks)
        self.downsample_output = Downsample(output_downsampling_factor)

    def forward(
        self, x: Tensor, lengths: Tensor, key_padding_mask: Tensor | None = None, isolate: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Encode.

        Args:
            x: (T, N, first encoder_dim).
            lengths: (N,) valid frames.
            key_padding_mask: (N, T), True at padding; None if there is none.
            isolate: what follows an utterance does not change its output.

        Returns:
            (ceil(T / output factor), N, max encoder_dim) and the lengths at that rate.
        """
        ends = lengths if isolate else None
        outputs = self.stack_outputs(x, key_padding_mask, ends)
        y = self.downsample_output(self._combine(outputs), ends)
        factor = self.downsample_output.factor
        return y, (lengths + factor - 1) // factor

    def stack_outputs(
        self, x: Tensor, key_padding_mask: Tensor | None = None, lengths: Tensor | None = None
    ) -> list[Tensor]:
        """Outputs of the stacks, each (T, N, its encoder_dim); lengths (N,) keep them apart from what follows."""
        chunk_size, left_chunks = self._draw_chunks()
        attn_mask = None
        if chunk_size > 0:
            attn_mask = chunk_attention_mask(x.shape[0], chunk_size, left_chunks, x.device)
        feature_masks = self._feature_masks(x)
        outputs = []
        for i, stack in enumerate(self.encoders):
            # Else all that follows would be laid out as x is, and copied again and again.
            x = _convert_channels(x, self.encoder_dim[i]).contiguous()
            factor = self.downsampling_factor[i]
            mask = None if key_padding_mask is None else key_padding_mask[:, ::factor]
            x = stack(x, chunk_size, feature_masks[i], attn_mask, mask, lengths)
            outputs.append(x)
        return outputs

    def _combine(self, outputs: list[Tensor]) -> Tensor:
        """Each channel from the last stack that has it."""
        pieces, width = [outputs[-1]], outputs[-1].shape[-1]
        for output in reversed(outputs[:-1]):
            if output.shape[-1] > width:
                pieces.append(output[..., width:])
                width = output.shape[-1]
        return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]

    def _draw_chunks(self) -> tuple[int, int]:
        """Chunk size in frames and left context in chunks of this forward pass; -1 for no limit.

        Drawn in training; in evaluation mode the widest of each list.
        """
        if not self.causal:
            return -1, -1
        choose: Callable[[Sequence[int]], int] = random.choice if self.training else widest
        chunk_size = choose(self.chunk_size)
        if chunk_size < 0:
            return -1, -1
        return chunk_size, left_context_chunks(chunk_size, choose(self.left_context_frames))

    def _feature_masks(self, x: Tensor) -> list[Tensor | None]:
        """For each stack (N, C), or None for ones: half of the maskable channels, or all, may be zero, the rest one."""
        if not self.training:
            return [None] * len(self.encoders)
        drawn = torch.rand((2, x.shape[1], 1), device=x.device) > 0.125
        keep = torch.stack([drawn[0], drawn[0] & drawn[1]]).to(x.dtype)  # (2, N, 1)
        masks: list[Tensor | None] = []
        for dim, unmasked in zip(self.encoder_dim, self.encoder_unmasked_dim, strict=True):
            if dim == unmasked:
                masks.append(None)
                continue
            half = (dim - unmasked) // 2
            widths = (half, dim - unmasked - half)
            parts = [torch.ones_like(keep[0]).expand(-1, unmasked)]
            parts += [part.expand(-1, width) for part, width in zip(keep, widths, strict=True)]
            masks.append(torch.cat(parts, dim=1))
        return masks


def widest(frames: Sequence[int]) -> int:
    """The largest of some numbers of frames, of which a negative one means no limit."""
    return -1 if min(frames) < 0 else max(frames)


def _convert_channels(x: Tensor, channels: int) -> Tensor:
    """Keep the first channels, or append zeros."""
    if x.shape[-1] >= channels:
        return x[..., :channels]
    return F.pad(x, (0, channels - x.shape[-1]))


def _layer_drop(stack: int, layers: int, stacks: int, factor: int, warmup: float) -> list[Schedule]:
    """Layer-drop of each layer of a stack: it falls stack by stack and, within one, layer by layer."""
    begin = warmup * (stack + 1) / (stacks + 1)
    step = warmup / (stacks + 1) / layers
    final = 0.035 * factor**0.5
    return [Schedule((begin + i * step, 0.5), (begin + (i + 1) * step, final)) for i in range(layers)]
