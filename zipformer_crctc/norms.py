"""BiasNorm, bypasses and residual additions.

T frames, N utterances, C channels; sequences are (T, N, C).
Source: Zipformer (Yao et al., ICLR 2024), sections 3.2 (bypass) and 3.3 (BiasNorm).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zipformer_crctc import gpu, lowprecision, native
from zipformer_crctc.activations import kernel_sizes
from zipformer_crctc.autograd import Function
from zipformer_crctc.native import Kernel
from zipformer_crctc.products import mixed_precision
from zipformer_crctc.regularisers import at_least_float32, limit_parameter
from zipformer_crctc.schedule import Schedule, ScheduledModule

_bias_norm_kernel = Kernel("bias_norm", "pppppppiii")
_bias_norm_gradient_kernel = Kernel("bias_norm_gradient", "ppppppppppppiii")
_bypass_kernel = Kernel("bypass", "ppppiiiii")
_bypass_gradient_kernel = Kernel("bypass_gradient", "pppppppiiiii")


class _BiasNormFunction(Function):
    """Normalised x (..., C), or what a bypass makes of it; keeps its inputs and one number for each row."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor, log_scale: Tensor, original: Tensor | None, scale: Tensor | None
    ) -> Tensor:
        gain = log_scale.exp()
        ctx.with_kernel = (
            native.suits(x, bias, original, scale, gain)
            and x.is_contiguous()
            and (original is None or (original.is_contiguous() and scale is not None and scale.is_contiguous()))
        )
        if ctx.with_kernel:
            y = torch.empty_like(x, dtype=_common_dtype(x, original, scale))
            factors = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
            ctx.sizes = kernel_sizes(x, scale)
            _bias_norm_kernel(x, bias, original, scale, y, factors, gain, *ctx.sizes)
        else:
            wide = at_least_float32(x)
            factors = (wide - bias).square_().mean(-1, keepdim=True).rsqrt_() * gain
            y = (wide * factors).to(x.dtype)
            if original is not None and scale is not None:
                y = original + (y - original) * scale
        ctx.dtypes = x.dtype, None if original is None else original.dtype
        ctx.save_for_backward(kept(x), bias, gain, None if original is None else kept(original), scale, factors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, bias, gain, original, scale, factors = ctx.saved_tensors
        grad_original = grad_scale = None
        if ctx.with_kernel:
            grad_x = torch.empty_like(x, dtype=ctx.dtypes[0])
            grad_bias, grad_log = torch.empty_like(bias), torch.empty_like(gain)
            if original is not None:
                grad_original, grad_scale = torch.empty_like(original, dtype=ctx.dtypes[1]), torch.empty_like(scale)
            results = (grad_x, grad_bias, grad_original, grad_scale, grad_log, gain)
            _bias_norm_gradient_kernel(x, bias, original, scale, factors, grad.contiguous(), *results, *ctx.sizes)
            return grad_x, grad_bias, grad_log, grad_original, grad_scale
        wide, grad = at_least_float32(x), at_least_float32(grad)
        if original is not None:
            grad_scale = _summed(grad * ((wide * factors).to(x.dtype) - original), scale)
            through = grad * scale
            grad_original = (grad - through).to(ctx.dtypes[1])
            grad = through
        along = (grad * wide).sum(-1, keepdim=True)
        inwards = (along * factors.pow(3) / (x.shape[-1] * gain.square())) * (wide - bias)
        grad_x, grad_bias = (grad * factors - inwards).to(ctx.dtypes[0]), inwards.flatten(0, -2).sum(0)
        return grad_x, grad_bias, (along * factors).sum(), grad_original, grad_scale


def kept(x: Tensor) -> Tensor:
    """x as it is kept for the backward pass: under bfloat16 autocast in half of the memory.

    Such rounding is in all products of the backward pass; layers have made the same copies of some sequences.
    """
    if torch.is_inference_mode_enabled() or mixed_precision(x) is not torch.bfloat16:
        return x
    return lowprecision.cast(x, torch.bfloat16)


def _common_dtype(x: Tensor, original: Tensor | None, scale: Tensor | None) -> torch.dtype:
    """Of what a bypass makes of x and the original by a scale, as PyTorch's operations have it; else that of x."""
    if original is None or scale is None:
        return x.dtype
    return torch.promote_types(torch.promote_types(x.dtype, original.dtype), scale.dtype)


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


class _BypassFunction(Function):
    """Keeps its inputs only; each frame of x serves `repeat` frames of the original."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, x: Tensor, scale: Tensor, repeat: int) -> Tensor:
        ctx.save_for_backward(kept(original), kept(x), scale)
        ctx.repeat, ctx.dtypes = repeat, (original.dtype, x.dtype)
        assert len(x) == -(-len(original) // repeat)
        arrays = (original, x, scale)
        ctx.with_kernel = native.suits(*arrays) and all(array.is_contiguous() for array in arrays)
        if ctx.with_kernel:
            y = torch.empty_like(original, dtype=_common_dtype(x, original, scale))
            ctx.sizes = *original.shape, scale.numel() // scale.shape[-1], repeat
            _bypass_kernel(original, x, scale, y, *ctx.sizes)
            return y
        return original + (_repeated(x, repeat, len(original)) - original) * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        original, x, scale = ctx.saved_tensors
        if ctx.with_kernel:
            sequences = (torch.empty_like(y, dtype=dtype) for y, dtype in zip((original, x), ctx.dtypes, strict=True))
            grads = *sequences, torch.empty_like(scale)
            _bypass_gradient_kernel(original, x, scale, grad.contiguous(), *grads, *ctx.sizes)
            return *grads, None
        grad_scale = _summed(grad * (_repeated(x, ctx.repeat, len(grad)) - original), scale)
        through = grad * scale
        grad_original = (grad - through).to(ctx.dtypes[0])
        if ctx.repeat > 1:
            missing = len(x) * ctx.repeat - len(grad)
            through = F.pad(through, (0, 0, 0, 0, 0, missing)).unflatten(0, (-1, ctx.repeat)).sum(dim=1)
        return grad_original, through.to(ctx.dtypes[1]), grad_scale, None


class _Added(Function):
    """A residual addition and, under autocast, the 16-bit copy of its result, from which the next module begins."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, update: Tensor, mask: Tensor | None, low: torch.dtype | None
    ) -> tuple[Tensor, Tensor | None]:
        from zipformer_crctc.gpu_sequences import added  # needs Triton

        ctx.save_for_backward(mask)
        ctx.dtypes = x.dtype, update.dtype
        y, copy = added(x, update, mask, low)
        if copy is not None:
            ctx.mark_non_differentiable(copy)
            ctx.set_materialize_grads(False)  # no zeros for the copy
        return y, copy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (mask,) = ctx.saved_tensors
        grad = grad_outputs[0]
        of_update = grad if mask is None else grad * mask
        return grad.to(ctx.dtypes[0]), of_update.to(ctx.dtypes[1]), None, None


def added(x: Tensor, update: Tensor, mask: Tensor | None = None, for_products: bool = True) -> Tensor:
    """A residual addition, (T, N, C).

    Args:
        x: what is added to.
        update: what is added.
        mask: (N, 1), which utterances get their update; None for all.
        for_products: whether what comes next are matrix products; else only training has a use for a 16-bit copy.
    """
    low = mixed_precision(x)
    if not (for_products or (torch.is_grad_enabled() and low is torch.bfloat16)):  # see `kept`
        low = None
    arrays = (x, update) if mask is None else (x, update, mask)
    with_copy = low is not None and torch.promote_types(x.dtype, update.dtype) != low
    gains = gpu.takes(x) and (with_copy or x.dtype != update.dtype)
    if gains and native.suits(*arrays) and all(array.is_contiguous() for array in arrays):
        y, copy = _Added.apply(x, update, mask, low if with_copy else None)
        if copy is not None:
            lowprecision.remember(y, copy)
        return y
    return x + update if mask is None else torch.addcmul(x, update, mask)


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
    return torch.empty((x.shape[1], 1), dtype=x.dtype, device=x.device).bernoulli_(1.0 - skip_rate)
