"""Swoosh activations, gates, BiasNorm, bypasses, and dropout with a mask shared over time.

Source: Zipformer (Yao et al., ICLR 2024), sections 3.3 and 3.4. C channels, T frames, N utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipformer_crctc import native
from zipformer_crctc.native import Kernel
from zipformer_crctc.products import grad_of_input, grads_of_parameters, linear
from zipformer_crctc.regularisers import limit_parameter
from zipformer_crctc.schedule import Schedule, ScheduledModule

SWOOSH_L = (4.0, 0.035)
SWOOSH_R = (1.0, 0.313261687)
"""Shift and offset of ln(1 + exp(x - shift)) - 0.08 x - offset, the two Swoosh functions."""

_swoosh_kernel = Kernel("swoosh", "pppiiiff")
_swoosh_gradient_kernel = Kernel("swoosh_gradient", "pppppiiiff")
_gate_kernel = Kernel("gate", "ppppiiiiiiii")
_gate_gradient_kernel = Kernel("gate_gradient", "ppppppiiiiiiii")
_bias_norm_kernel = Kernel("bias_norm", "ppppppiiif")
_bias_norm_gradient_kernel = Kernel("bias_norm_gradient", "pppppppppppiiif")


def _wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _sizes(x: Tensor, mask: Tensor | None) -> tuple[int, int, int]:
    """Rows, utterances and channels of x (T, N, C) and a mask (1, N, C), as the kernels want them."""
    channels = x.shape[-1]
    return x.numel() // channels, 1 if mask is None else mask.numel() // channels, channels


def _swoosh(x: Tensor, kind: tuple[float, float], mask: Tensor | None = None) -> Tensor:
    """Swoosh of x (T, N, C), times the mask (1, N, C) where there is one; without gradient."""
    shift, offset = kind
    if x.is_contiguous() and native.suits(x, mask):
        y = torch.empty_like(x)
        _swoosh_kernel(x, mask, y, *_sizes(x, mask), shift, offset)
        return y
    wide = _wide(x)
    # Beyond its threshold softplus is the identity, which is exact at the precision in hand.
    y = F.softplus(wide - shift, threshold=20.0 if x.dtype != torch.float64 else 40.0)
    y = y.add_(wide, alpha=-0.08).sub_(offset).to(x.dtype)
    return y if mask is None else y.mul_(mask)


def _swoosh_gradient(
    x: Tensor, grad: Tensor, kind: tuple[float, float], mask: Tensor | None = None, with_y: bool = False
) -> tuple[Tensor | None, Tensor]:
    """`_swoosh` again, if asked for, and the gradient of x from that of its result."""
    shift, offset = kind
    if x.is_contiguous() and grad.is_contiguous() and native.suits(x, grad, mask):
        y, grad_x = torch.empty_like(x) if with_y else None, torch.empty_like(x)
        _swoosh_gradient_kernel(x, mask, grad, y, grad_x, *_sizes(x, mask), shift, offset)
        return y, grad_x
    slope = torch.sigmoid_(_wide(x) - shift).sub_(0.08).mul_(grad)
    if mask is not None:
        slope.mul_(mask)
    return _swoosh(x, kind, mask) if with_y else None, slope.to(x.dtype)


class _Swoosh(torch.autograd.Function):
    """Keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _swoosh(x.movedim(1, -1), kind).movedim(-1, 1) if x.dim() == 4 else _swoosh(x, kind)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        if x.dim() < 4:
            return _swoosh_gradient(x, grad, ctx.kind)[1], None
        # Images lie in memory with channels last.
        return _swoosh_gradient(x.movedim(1, -1), grad.movedim(1, -1), ctx.kind)[1].movedim(-1, 1), None


def swoosh_l(x: Tensor) -> Tensor:
    """SwooshL(x) = ln(1 + exp(x - 4)) - 0.08 x - 0.035, element-wise, computed in float32."""
    return _Swoosh.apply(x, SWOOSH_L)


def swoosh_r(x: Tensor) -> Tensor:
    """SwooshR(x) = ln(1 + exp(x - 1)) - 0.08 x - 0.313261687, element-wise, computed in float32."""
    return _Swoosh.apply(x, SWOOSH_R)


class _SwooshLinear(torch.autograd.Function):
    """Keeps the input of Swoosh, whose result the backward pass computes again beside its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, kind: tuple[float, float]
    ) -> Tensor:
        ctx.save_for_backward(x, mask, weight)
        ctx.kind = kind
        return linear(_swoosh(x, kind, mask), weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, mask, weight = ctx.saved_tensors
        active, grad_x = _swoosh_gradient(x, grad_of_input(grad, weight), ctx.kind, mask, with_y=True)
        return grad_x, None, *grads_of_parameters(grad, active, weight, ctx.needs_input_grad[3]), None


def swoosh_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: tuple[float, float], mask: Tensor | None = None
) -> Tensor:
    """A linear layer after Swoosh and perhaps dropout: (T, N, C), (O, C), (O,) to (T, N, O).

    Args:
        x: the input of Swoosh.
        weight: of the linear layer.
        bias: of the linear layer.
        kind: SWOOSH_L or SWOOSH_R.
        mask: (1, N, C), what the result of Swoosh is multiplied by.
    """
    return _SwooshLinear.apply(x, mask, weight, bias, kind)


_OPENINGS = {
    "sigmoid": (torch.sigmoid, torch.ops.aten.sigmoid_backward),
    "tanh": (torch.tanh, torch.ops.aten.tanh_backward),
}
"""Functions of a gate, and their gradients from that of the result and the result."""


def _gate_arguments(x: Tensor, gate: Tensor, padding: Tensor | None, kind: str) -> tuple[int, ...] | None:
    """What the kernels of gates are told besides the arrays; None where they do not suit."""
    if x.dim() != 3 or not native.suits(x, gate) or any(y.stride(0) != y.shape[1] * y.stride(1) for y in (x, gate)):
        return None
    frames, utterances, channels = x.shape
    places = (0, 0) if padding is None else padding.stride()
    return (frames * utterances, utterances, channels, x.stride(1), gate.stride(1), *places, kind == "tanh")


class _Gated(torch.autograd.Function):
    """x times a function of the gate, zero at padding; keeps no more than its inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, kind: str, padding: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, gate, padding)
        ctx.kind = kind
        if (arguments := _gate_arguments(x, gate, padding, kind)) is not None:
            y = x.new_empty(x.shape)
            _gate_kernel(x, gate, padding, y, *arguments)
            return y
        y = _OPENINGS[kind][0](gate).mul_(x)
        return y if padding is None else y.masked_fill_(padding.t()[:, :, None], 0.0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, gate, padding = ctx.saved_tensors
        (grad,) = grad_outputs
        arguments = _gate_arguments(x, gate, padding, ctx.kind)
        if arguments is not None and grad.is_contiguous():
            grad_x, grad_gate = torch.empty_like(grad), torch.empty_like(grad)
            _gate_gradient_kernel(x, gate, padding, grad, grad_x, grad_gate, *arguments)
            return grad_x, grad_gate, None, None
        if padding is not None:
            grad = grad.masked_fill(padding.t()[:, :, None], 0.0)
        function, gradient = _OPENINGS[ctx.kind]
        opening = function(gate)
        return grad * opening, gradient(x * grad, opening), None, None


def gated(x: Tensor, gate: Tensor, padding: Tensor | None = None) -> Tensor:
    """x * sigmoid(gate), element-wise; of x (T, N, C) frames where padding (N, T) is True are zero."""
    return _Gated.apply(x, gate, "sigmoid", padding)


def tanh_gated(x: Tensor, gate: Tensor) -> Tensor:
    """x * tanh(gate), element-wise."""
    return _Gated.apply(x, gate, "tanh", None)


KEPT_BYTES = 1 << 22
"""Arrays up to this size are kept all the same: they need little memory, and computing them again a tenth more time."""


@contextmanager
def computed_again(y: Tensor, compute: Callable[[], Tensor]) -> Iterator[None]:
    """What is done with y inside does not keep y for its backward pass, which computes it again: less memory.

    Args:
        y: a tensor that costs little to compute and that nothing but the operations inside would keep; without gaps in
            memory.
        compute: gives y anew, in its shape; called without gradients and, for mixed precision, as y was.
    """
    if not y.requires_grad or y.numel() * y.element_size() <= KEPT_BYTES:
        yield
        return
    place, count, kind = y.data_ptr(), y.numel(), y.device.type
    shape, stride, dtype = y.shape, y.stride(), y.dtype
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...]]:
        is_y = saved.data_ptr() == place and saved.numel() == count and saved.dtype == dtype
        return (saved.shape, saved.stride()) if is_y else saved

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...]]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        with torch.no_grad(), autocast:
            again = compute()
            if again.stride() != stride:
                again = again.new_empty_strided(shape, stride).copy_(again)
            # A view of y, transposed perhaps, is the same view of what was computed again.
            return again.as_strided(*packed, again.storage_offset())

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class SwooshR(nn.Module):
    """SwooshR as a module, for use in a sequence of layers."""

    def forward(self, x: Tensor) -> Tensor:
        return swoosh_r(x)


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
            ctx.sizes = *_sizes(x, scale), float(gain)
            _bias_norm_kernel(x, bias, original, scale, y, factors, *ctx.sizes)
        else:
            wide = _wide(x)
            factors = (wide - bias).square_().mean(-1, keepdim=True).rsqrt_() * gain
            y = (wide * factors).to(x.dtype)
            if original is not None and scale is not None:
                y = original + (y - original) * scale
        ctx.save_for_backward(x, bias, gain, original, scale, factors)
        return y

    @staticmethod
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
        wide, grad = _wide(x), _wide(grad)
        if original is not None:
            grad_scale = _summed(grad * ((wide * factors).to(x.dtype) - original), scale)
            through = grad * scale
            grad_original = (grad - through).to(original.dtype)
            grad = through
        along = (grad * wide).sum(-1, keepdim=True)
        inwards = (along * factors.pow(3) / (x.shape[-1] * gain.square())) * (wide - bias)
        grad_log = (along * factors).sum()
        return (
            (grad * factors - inwards).to(x.dtype),
            inwards.flatten(0, -2).sum(0),
            grad_log,
            grad_original,
            grad_scale,
        )


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


_bypass_kernel = Kernel("bypass", "ppppiiiii")
_bypass_gradient_kernel = Kernel("bypass_gradient", "pppppppiiiii")


class _BypassFunction(torch.autograd.Function):
    """Keeps its inputs only; each frame of x serves `repeat` frames of the original."""

    @staticmethod
    def forward(ctx: Any, original: Tensor, x: Tensor, scale: Tensor, repeat: int) -> Tensor:
        ctx.save_for_backward(original, x, scale)
        ctx.repeat = repeat
        arrays = (original, x, scale)
        ctx.with_kernel = native.suits(*arrays) and all(array.is_contiguous() for array in arrays)
        if ctx.with_kernel:
            y = torch.empty_like(original)
            ctx.sizes = *original.shape, scale.numel() // scale.shape[-1], repeat
            _bypass_kernel(original, x, scale, y, *ctx.sizes)
            return y
        return original + (_repeated(x, repeat, len(original)) - original) * scale

    @staticmethod
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
    return (torch.rand((x.shape[1], 1), device=x.device) >= skip_rate).to(x.dtype)


class SharedDropout(ScheduledModule):
    """Dropout whose mask is shared along one axis (time), so that whole channels of an utterance are dropped.

    Args:
        p: probability of dropping, a number or a schedule; active in training only.
        shared_dim: axis over which the mask is shared.
    """

    def __init__(self, p: float | Schedule, shared_dim: int) -> None:
        super().__init__()
        self.p = p
        self.shared_dim = shared_dim

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        return x if mask is None else x * mask

    def mask(self, x: Tensor) -> Tensor | None:
        """What x is multiplied by, drawn anew in each call; None for nothing."""
        p = self.value(self.p) if self.training else 0.0
        if p <= 0.0:
            return None
        shape = list(x.shape)
        shape[self.shared_dim] = 1
        keep = torch.rand(shape, device=x.device) > p
        return keep.to(x.dtype) * (1.0 / (1.0 - p))
