"""Convolutional front-end: log-mel features at 100 Hz to embeddings at 50 Hz.

N utterances, T feature frames of 10 ms, T' = (T - 7) // 2 output frames of 20 ms, F mel bins, C channels.
Source: Zipformer (Yao et al., ICLR 2024), section 3.1 (Conv-Embed).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zipformer_crctc import native
from zipformer_crctc.activations import (
    SWOOSH_L,
    SWOOSH_R,
    SharedDropout,
    SwooshR,
    computed_again,
    swoosh_linear,
    swoosh_r,
)
from zipformer_crctc.convolution import depthwise_conv2d
from zipformer_crctc.norms import BiasNorm
from zipformer_crctc.products import Linear, linear, mixed_precision
from zipformer_crctc.regularisers import Balancer, Parts, ScaleGrad, Whiten
from zipformer_crctc.schedule import Schedule, ScheduledModule

MIN_FEATURE_FRAMES = 9
HIDDEN_BYTES = {"cpu": 1 << 24, "other": 1 << 28}
"""The hidden images of ConvNeXt are the largest arrays of the model; so many bytes of them are there at once.

By device: accelerators want more work at a time than the caches of a CPU.
"""


def output_frames(num_frames: Tensor) -> Tensor:
    """Number of 20 ms output frames for a number of 10 ms feature frames."""
    return (num_frames - 7) // 2


def padding_mask(lengths: Tensor, frames: int) -> Tensor:
    """(N, T), True at frames beyond an utterance's length."""
    return torch.arange(frames, device=lengths.device) >= lengths[:, None]


def in_parts(image: Tensor, hidden_channels: int) -> Sequence[Tensor]:
    """(N, C, T', F') in parts of some utterances, of each of which the hidden image has at most HIDDEN_BYTES."""
    each = image[0, 0].numel() * hidden_channels * image.element_size()
    return image.split(max(1, HIDDEN_BYTES["cpu" if image.device.type == "cpu" else "other"] // each))


def check_lengths(features: Tensor, num_frames: Tensor) -> None:
    """Raise ValueError for an utterance too short to give one output frame, or longer than the features.

    Not while a CUDA graph is recorded, as nothing can be read from the device then.
    """
    if num_frames.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    shortest, longest = torch.stack(num_frames.aminmax()).tolist()  # one transfer from the device
    if longest > features.shape[1] or shortest < MIN_FEATURE_FRAMES:
        raise ValueError(
            f"the front-end got {features.shape[1]} feature frames for utterances of {num_frames.tolist()} frames: "
            f"none may be longer, and each needs at least {MIN_FEATURE_FRAMES}"
        )


class PointwiseConv(nn.Conv2d):
    """A convolution of single places, (N, C, T', F') to (N, O, T', F'): with channels last it is a linear layer."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class ConvNeXt(ScheduledModule):
    """Depthwise 7x7 convolution, two pointwise ones and a residual connection, with layer-drop per utterance.

    Args:
        channels: channels of input and output.
        hidden_channels: channels between the pointwise convolutions.
    """

    def __init__(self, channels: int, hidden_channels: int) -> None:
        super().__init__()
        self.hidden_channels = hidden_channels
        self.layerdrop_rate = Schedule((0, 0.2), (20000, 0.015))
        self.depthwise_conv = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.pointwise_conv1 = PointwiseConv(channels, hidden_channels)
        self.hidden_balancer = Balancer(1, min_positive=0.3, max_positive=1.0, min_abs=0.75, max_abs=5.0)
        self.pointwise_conv2 = PointwiseConv(hidden_channels, channels)
        scale_initial_values(self.pointwise_conv2, 0.01)
        self.out_balancer = Balancer(1, min_positive=0.4, max_positive=0.6, min_abs=1.0, max_abs=6.0)
        self.out_whiten = Whiten(1, whitening_limit=5.0, grad_scale=0.01)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """(N, C, T', F') to the same shape; frames where padding (N, T') is True count as zeros."""
        inner = x
        if padding is not None:  # of a view, which keeps channels last in memory
            inner = x.permute(0, 2, 3, 1).masked_fill(padding[:, :, None, None], 0.0).permute(0, 3, 1, 2)
        images = in_parts(depthwise_conv2d(inner, self.depthwise_conv), self.hidden_channels)
        parts = Parts()
        if torch.is_inference_mode_enabled() and not self.training:  # sums are where they belong at once
            y, each = torch.empty_like(x), len(images[0])
            for image, original, result in zip(images, x.split(each), y.split(each), strict=True):
                torch.add(original, self._pointwise(image, parts), out=result)
            return y
        residuals = [self._pointwise(image, parts) for image in images]
        originals = in_parts(x, self.hidden_channels)
        if self.training:
            keep = torch.rand((x.shape[0], 1, 1, 1), device=x.device).ge_(self.value(self.layerdrop_rate))
            kept = keep.to(x.dtype).split(len(images[0]))
            sums = [torch.addcmul(*part) for part in zip(originals, residuals, kept, strict=True)]
        else:
            sums = [original + residual for original, residual in zip(originals, residuals, strict=True)]
        x = torch.cat(sums) if len(sums) > 1 else sums[0]
        x = self.out_balancer(x)
        return self.out_whiten(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def _pointwise(self, narrow: Tensor, parts: Parts) -> Tensor:
        """Both pointwise convolutions of some utterances. Neither the hidden image is kept nor its activation."""
        hidden = self.pointwise_conv1(narrow)
        with computed_again(hidden, partial(self.pointwise_conv1, narrow.detach())):
            balanced = self.hidden_balancer(hidden, parts)
            rows = balanced.permute(0, 2, 3, 1)  # (N, T', F', hidden channels)
            last = self.pointwise_conv2
            return swoosh_linear(rows, last.weight.flatten(1), last.bias, SWOOSH_L).permute(0, 3, 1, 2)


class Conv2dSubsampling(nn.Module):
    """The whole front-end: three convolutions, a ConvNeXt block, a projection and BiasNorm.

    Args:
        feature_dim: F, mel bins of the input.
        embed_dim: channels of the output.
        channels: channels after each of the three convolutions.
        hidden_channels: hidden channels of the ConvNeXt block.
        dropout: probability of dropping an output channel of an utterance for all its frames.
    """

    def __init__(
        self,
        feature_dim: int,
        embed_dim: int,
        channels: tuple[int, ...] = (8, 32, 128),
        hidden_channels: int = 384,
        dropout: float | Schedule = 0.0,
    ) -> None:
        super().__init__()
        first, second, third = channels
        self.conv = nn.Sequential(
            nn.Conv2d(1, first, kernel_size=3, padding=(0, 1)),
            ScaleGrad(0.2),
            Balancer(1, max_abs=1.0),
            SwooshR(),
            nn.Conv2d(first, second, kernel_size=3, stride=2),
            Balancer(1, max_abs=4.0),
            SwooshR(),
            nn.Conv2d(second, third, kernel_size=3, stride=(1, 2)),
            Balancer(1, max_abs=4.0),
            SwooshR(),
        )
        self.convnext = ConvNeXt(third, hidden_channels)
        self.out = Linear((((feature_dim - 1) // 2) - 1) // 2 * third, embed_dim)
        self.out_whiten = Whiten(1, whitening_limit=Schedule((0, 4.0), (20000, 8.0), default=4.0), grad_scale=0.02)
        self.out_norm = BiasNorm(embed_dim)
        self.dropout = SharedDropout(dropout, shared_dim=1)
        # Convolution kernels, those of CPUs above all, are faster with channels last in memory.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, features: Tensor, num_frames: Tensor, isolate: bool = False) -> tuple[Tensor, Tensor]:
        """Embed features.

        Args:
            features: (N, T, F) log-mel features, T at least the longest of num_frames.
            num_frames: (N,) valid frames of each utterance, at least 9.
            isolate: what follows an utterance does not change its embeddings.

        Returns:
            embeddings (N, T', C) and their lengths (N,).

        Raises:
            ValueError: an utterance too short to give one output frame, or longer than T.
        """
        check_lengths(features, num_frames)
        lengths = output_frames(num_frames)
        x, not_kept = self._convolved(features[:, None].to(memory_format=torch.channels_last))
        with not_kept:
            x = self.convnext(x, padding_mask(lengths, x.shape[2]) if isolate else None)  # (N, C, T', F')
        # The weight's columns are in the order c * F' + f; the image lies in memory in the order f * C + c.
        weight = self.out.weight.unflatten(1, (x.shape[1], -1)).transpose(1, 2).flatten(1)
        x = linear(x.permute(0, 2, 3, 1).flatten(2), weight, self.out.bias)
        x = self.out_norm(self.out_whiten(x))
        return self.dropout(x), lengths

    def _convolved(self, x: Tensor) -> tuple[Tensor, AbstractContextManager[Any]]:
        """(N, 1, T, F) to (N, C, T', F'), and the context of what comes next, where that is not kept.

        What Swoosh gives is as large as its input, from which the backward pass computes it again.
        """
        not_kept: AbstractContextManager[Any] = nullcontext()
        dtype, image = mixed_precision(x), x.permute(0, 2, 3, 1)
        if dtype is not None and not torch.is_grad_enabled() and native.suits(image):
            from zipformer_crctc.gpu_images import convolved  # needs Triton

            for conv in self.conv:
                if isinstance(conv, nn.Conv2d):
                    image = convolved(image, conv, SWOOSH_R, dtype)
            return image.permute(0, 3, 1, 2), not_kept
        for layer in self.conv:
            with not_kept:
                y = layer(x)
            not_kept = nullcontext()
            if isinstance(layer, SwooshR) and y.requires_grad:
                not_kept = computed_again(y, partial(swoosh_r, x.detach()))
            x = y
        return x, not_kept


def scale_initial_values(layer: nn.Linear | nn.Conv1d | nn.Conv2d, scale: float) -> None:
    """Multiply the initial weight by `scale` and draw the bias from U(-0.1 scale, 0.1 scale)."""
    with torch.no_grad():
        layer.weight *= scale
        if layer.bias is not None:
            layer.bias.uniform_(-0.1 * scale, 0.1 * scale)
