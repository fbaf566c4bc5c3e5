"""BiasNorm and bypasses.

T frames, N utterances, C channels; sequences are (T, N, C).
Source: Zipformer (Yao et al., ICLR 2024), sections 3.2 (bypass) and 3.3 (BiasNorm).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zipformer_crctc import native
from zipformer_crctc.activations import kernel_sizes
from zipformer_crctc.native import Kernel
from zipformer_crctc.regularisers import at_least_float32, limit_parameter
from zipformer_crctc.schedule import Schedule, ScheduledModule

_bias_norm_kernel = Kernel("bias_norm", "ppppppiiif")
_bias_norm_gradient_kernel = Kernel("bias_norm_gradient", "pppppppppppiiif")
_bypass_kernel = Kernel("bypass", "ppppiiiii")
_bypass_gradient_kernel = Kernel("bypass_gradient", "pppppppiiiii")


class _BiasNormFunction(torch.autograd.Function):
    """Normalised x (..., C), or what a bypass makes of it; keeps its inputs and one number for each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor, original: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        gain = log_scale.exp()
        ctx.with_kernel = (
            native.suits(x, bias, original, scale)
            and x.is_contiguous()
            and (original is None or (original.is_contiguous() and scale is not None and scale.is_contiguous()))
        )
        if ctx.with_kernel:
            y, factors = torch.empty_like(x), x.new_empty((*x.shape[:-1], 1))
            ctx.sizes = *kernel_sizes(x, scale), float(gain)
            _bias_norm_kernel(x, bias, original, scale, y, factors, *ctx.sizes)
        else:
            wide = at_least_float32(x)
            factors = (wide - bias).square_().mean(-1, keepdim=True).rsqrt_() * gain
            y = (wide * factors).to(x.dtype)
            if original is not None and scale is not None:
                y = original + (y - original) * scale
        ctx.save_for_backward(x, bias, gain, original, scale, factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, bias, gain, original, scale, factors = ctx.saved_tensors
        grad_original = grad_scale = None
        if ctx.with_kernel:
            grad_x, grad_bias, grad_log = torch.empty_like(x), torch.empty_like(bias), torch.empty_like(gain)
            if original is not None:
                grad_original, grad_scale = torch.empty_like(original), torch.empty_like(scale)
            results = (grad_x, grad_bias, grad_original, grad_scale, grad_log)
            _bias_norm_gradient_kernel(x, bias, original, scale, factors, grad.contiguous(), *results, *ctx.sizes)
            return grad_x, grad_bias, grad_log, grad_original, grad_scale
        wide, grad = at_least_float32(x), at_least_float32(grad)
        if original is not None:
            grad_scale = _summed(grad * ((wide * factors).to(x.dtype) - original), scale)
            through = grad * scale
            grad_original = (grad - through).to(original.dtype)
            grad = through
        along = (grad * wide).sum(-1, keepdim=True)
        inwards = (along * factors.pow(3) / (x.shape[-1] * gain.square())) * (wide - bias)
        grad_x, grad_bias = (grad * factors - inwards).to(x.dtype), inwards.flatten(0, -2).sum(0)
        return grad_x, grad_bias, (along * factors).sum(), grad_original, grad_scale


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """The gradient of what was broadcast: (T, N, C) summed to the shape of `like`, (C,) or (N, C)."""
    return grad.sum_to_size(like.shape).to(like.dtype)


class BiasNorm(ScheduledModule):
    """y = x exp(log_scale) / rms(x - bias), over the channel axis; the bias is used inside the root only.

    Args:
        channels: size of the channel axis.
        channel_dim: which axis holds the channels.
    """

    log_scale_range = (-1.5, 1.5)

    def __init__(self, channels: int, channel_dim: int = -1) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.empty(channels).normal_(0.0, 1e-4))

    def forward(self, x: Tensor, bypass: tuple[Tensor, Bypass] | None = None) -> Tensor:
        """Normalised x; with the original of a bypass, and it, what the bypass makes of that and the normalised x."""
        log_scale: Tensor = self.log_scale
        if self.training:
            log_scale = limit_parameter(log_scale, *self.log_scale_range)
        if bypass is not None:
            original, module = bypass
            return _BiasNormFunction.apply(x, self.bias, log_scale, original, module.scale(x))
        channels_last = x.transpose(self.channel_dim, -1)
        return _BiasNormFunction.apply(channels_last, self.bias, log_scale, None, None).transpose(self.channel_dim, -1)


class _BypassFunction(torch.autograd.Function):
    """Keeps its inputs only; each frame of x serves `repeat` frames of the original."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, x: Tensor, scale: Tensor, repeat: int) -> Tensor:
        ctx.save_for_backward(original, x, scale)
        ctx.repeat = repeat
        assert len(x) == -(-len(original) // repeat)
        arrays = (original, x, scale)
        ctx.with_kernel = native.suits(*arrays) and all(array.is_contiguous() for array in arrays)
        if ctx.with_kernel:
            y = torch.empty_like(original)
            ctx.sizes = *original.shape, scale.numel() // scale.shape[-1], repeat
            _bypass_kernel(original, x, scale, y, *ctx.sizes)
            return y
        return original + (_repeated(x, repeat, len(original)) - original) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grad_outputs
        original, x, scale = ctx.saved_tensors
        if ctx.with_kernel:
            grads = torch.empty_like(original), torch.empty_like(x), torch.empty_like(scale)
            _bypass_gradient_kernel(original, x, scale, grad.contiguous(), *grads, *ctx.sizes)
            return *grads, None
        grad_scale = _summed(grad * (_repeated(x, ctx.repeat, len(grad)) - original), scale)
        through = grad * scale
        grad_original = (grad - through).to(original.dtype)
        if ctx.repeat > 1:
            missing = len(x) * ctx.repeat - len(grad)
            through = F.pad(through, (0, 0, 0, 0, 0, missing)).unflatten(0, (-1, ctx.repeat)).sum(dim=1)
        return grad_original, through.to(x.dtype), grad_scale, None


def upsample(x: Tensor, factor: int) -> Tensor:
    """Repeat each frame: (T, N, C) to (T * factor, N, C)."""
    return x.repeat_interleave(factor, dim=0)


def _repeated(x: Tensor, factor: int, frames: int) -> Tensor:
    return x if factor == 1 else upsample(x, factor)[:frames]


class Bypass(ScheduledModule):
    """original + (x - original) * scale, a learnt scale per channel; in training some utterances bypass x wholly.

    Args:
        embed_dim: C.
        skip_rate: probability that an utterance gets the original.
    """

    def __init__(self, embed_dim: int, skip_rate: float | Schedule = 0.0) -> None:
        super().__init__()
        self.bypass_scale = nn.Parameter(torch.full((embed_dim,), 0.5))
        self.skip_rate = skip_rate
        self.scale_min = Schedule((0, 0.9), (20000, 0.2))

    def forward(self, original: Tensor, x: Tensor, repeat: int = 1) -> Tensor:
        """(T, N, C) and (ceil(T / repeat), N, C) to (T, N, C); each frame of x serves as many as `repeat` says."""
        return _BypassFunction.apply(original, x, self.scale(x), repeat)

    def scale(self, x: Tensor) -> Tensor:
        """(C,), or (N, C) where some utterances of the sequence x (T, N, C) are skipped; drawn anew in each call."""
        scale: Tensor = self.bypass_scale
        if self.training:
            scale = limit_parameter(scale, self.value(self.scale_min), 1.0)
            skip_rate = self.value(self.skip_rate)
            if skip_rate > 0.0:
                scale = scale * keep_mask(x, skip_rate)
        return scale


def keep_mask(x: Tensor, skip_rate: float) -> Tensor:
    """(N, 1) of ones and, with the given probability, zeros, for a sequence x of (T, N, C)."""
    return torch.rand((x.shape[1], 1), device=x.device).ge_(skip_rate).to(x.dtype)
