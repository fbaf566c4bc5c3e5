"""Swoosh activations, BiasNorm and dropout with a mask shared over time.

Source: Zipformer (Yao et al., ICLR 2024), sections 3.3 and 3.4. C channels, T frames, N utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipformer_crctc.regularisers import limit_parameter
from zipformer_crctc.schedule import Schedule, ScheduledModule


class _Swoosh(torch.autograd.Function):
    """ln(1 + exp(x - shift)) - 0.08 x - offset, which keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: float, offset: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.shift = shift
        wide = x if x.dtype == torch.float64 else x.float()
        # Beyond its threshold softplus is the identity, which is exact at the precision in hand.
        y = F.softplus(wide - shift, threshold=20.0 if x.dtype != torch.float64 else 40.0)
        return y.add_(wide, alpha=-0.08).sub_(offset).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        wide = x if x.dtype == torch.float64 else x.float()
        slope = torch.sigmoid_(wide - ctx.shift).sub_(0.08)
        return slope.mul_(grad).to(x.dtype), None, None


def swoosh_l(x: Tensor) -> Tensor:
    """SwooshL(x) = ln(1 + exp(x - 4)) - 0.08 x - 0.035, element-wise, computed in float32."""
    return _Swoosh.apply(x, 4.0, 0.035)


def swoosh_r(x: Tensor) -> Tensor:
    """SwooshR(x) = ln(1 + exp(x - 1)) - 0.08 x - 0.313261687, element-wise, computed in float32."""
    return _Swoosh.apply(x, 1.0, 0.313261687)


_OPENINGS = {
    "sigmoid": (torch.sigmoid, torch.ops.aten.sigmoid_backward),
    "tanh": (torch.tanh, torch.ops.aten.tanh_backward),
}
"""Functions of a gate, and their gradients from that of the result and the result."""


class _Gated(torch.autograd.Function):
    """x times a function of the gate, which keeps no more than its two inputs for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x, gate)
        ctx.kind = kind
        return _OPENINGS[kind][0](gate).mul_(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gate = ctx.saved_tensors
        (grad,) = grad_outputs
        function, gradient = _OPENINGS[ctx.kind]
        opening = function(gate)
        return grad * opening, gradient(x * grad, opening), None


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x * sigmoid(gate), element-wise."""
    return _Gated.apply(x, gate, "sigmoid")


def tanh_gated(x: Tensor, gate: Tensor) -> Tensor:
    """x * tanh(gate), element-wise."""
    return _Gated.apply(x, gate, "tanh")


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


def for_two(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A function whose every second call gives what the call before computed, which it keeps no longer.

    For two operations in a row that each need the same again: the backward passes of a linear layer and of the
    activation before it.
    """
    kept: list[Tensor] = []

    def again() -> Tensor:
        if kept:
            return kept.pop()
        kept.append(compute())
        return kept[0]

    return again


class SwooshR(nn.Module):
    """SwooshR as a module, for use in a sequence of layers."""

    def forward(self, x: Tensor) -> Tensor:
        return swoosh_r(x)


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

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.values(x, self.log_scale)
        return self.values(x, limit_parameter(self.log_scale, *self.log_scale_range))

    def values(self, x: Tensor, log_scale: Tensor) -> Tensor:
        """What `forward` gives; draws nothing."""
        dim = self.channel_dim % x.dim()
        bias = self.bias.view([-1] + [1] * (x.dim() - dim - 1))
        wide = x if x.dtype == torch.float64 else x.float()
        shifted = wide - bias
        with computed_again(shifted, partial(torch.sub, wide.detach(), bias.detach())):
            squares = shifted.square()
        inverse_rms = squares.mean(dim, keepdim=True).rsqrt()
        return (wide * (inverse_rms * log_scale.exp())).to(x.dtype)


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
