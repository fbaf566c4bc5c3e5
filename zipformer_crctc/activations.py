"""Swoosh activations, gates, and dropout with a mask shared over time.

Source: Zipformer (Yao et al., ICLR 2024), sections 3.3 and 3.4. C channels, T frames, N utterances.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zipformer_crctc import lowprecision, native
from zipformer_crctc.autograd import Function
from zipformer_crctc.native import Kernel
from zipformer_crctc.products import grad_of_input, grads_of_parameters, linear, mixed_precision
from zipformer_crctc.regularisers import at_least_float32
from zipformer_crctc.schedule import Schedule, ScheduledModule

SWOOSH_L = (4.0, 0.035)
SWOOSH_R = (1.0, 0.313261687)
"""Shift and offset of ln(1 + exp(x - shift)) - 0.08 x - offset, the two Swoosh functions."""

_swoosh_kernel = Kernel("swoosh", "pppiiiff")
_swoosh_gradient_kernel = Kernel("swoosh_gradient", "pppppiiiff")
_gate_kernel = Kernel("gate", "ppppiiiiiiii")
_gate_gradient_kernel = Kernel("gate_gradient", "ppppppiiiiiiii")


def kernel_sizes(x: Tensor, mask: Tensor | None) -> tuple[int, int, int]:
    """Rows, utterances and channels of x (T, N, C) and a mask (1, N, C), as the kernels want them."""
    channels = x.shape[-1]
    return x.numel() // channels, 1 if mask is None else mask.numel() // channels, channels


def _is_dense(x: Tensor, mask: Tensor | None) -> bool:
    """Whether x (T, N, C) and a mask (1, N, C) lie in memory without gaps."""
    if mask is not None and not (mask.is_contiguous() and mask.shape == (1, *x.shape[1:])):
        return False
    return x.dim() > 0 and x.numel() > 0 and x.is_contiguous()


def _swoosh(x: Tensor, kind: tuple[float, float], mask: Tensor | None = None) -> Tensor:
    """Swoosh of x (T, N, C), times the mask (1, N, C) where there is one; without gradient."""
    shift, offset = kind
    if _is_dense(x, mask) and native.suits(x, mask):
        y = torch.empty_like(x)
        _swoosh_kernel(x, mask, y, *kernel_sizes(x, mask), shift, offset)
        return y
    wide = at_least_float32(x)
    # Beyond its threshold softplus is the identity, which is exact at the precision in hand.
    y = F.softplus(wide - shift, threshold=20.0 if x.dtype != torch.float64 else 40.0)
    y = y.add_(wide, alpha=-0.08).sub_(offset).to(x.dtype)
    return y if mask is None else y.mul_(mask)


def _swoosh_gradient(
    x: Tensor, grad: Tensor, kind: tuple[float, float], mask: Tensor | None = None, with_y: bool = False
) -> tuple[Tensor | None, Tensor]:
    """`_swoosh` again, if asked for, and the gradient of x from that of its result."""
    shift, offset = kind
    if _is_dense(x, mask) and grad.is_contiguous() and native.suits(x, grad, mask):
        y, grad_x = torch.empty_like(x) if with_y else None, torch.empty_like(x)
        _swoosh_gradient_kernel(x, mask, grad, y, grad_x, *kernel_sizes(x, mask), shift, offset)
        return y, grad_x
    slope = torch.sigmoid_(at_least_float32(x) - shift).sub_(0.08).mul_(grad)
    if mask is not None:
        slope.mul_(mask)
    return _swoosh(x, kind, mask) if with_y else None, slope.to(x.dtype)


class _Swoosh(Function):
    """Keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: tuple[float, float]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _swoosh(x.movedim(1, -1), kind).movedim(-1, 1) if x.dim() == 4 else _swoosh(x, kind)

    @staticmethod
    @once_differentiable
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


class _SwooshLinear(Function):
    """Keeps the input of Swoosh, whose result the backward pass computes again beside its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, kind: tuple[float, float]
    ) -> Tensor:
        ctx.save_for_backward(x, mask, weight)
        ctx.kind = kind
        return linear(_swoosh(x, kind, mask), weight, bias)

    @staticmethod
    @once_differentiable
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
    if x.dim() != 3 or x.shape != gate.shape or not native.suits(x, gate):
        return None
    if any(y.stride(0) != y.shape[1] * y.stride(1) for y in (x, gate)):
        return None
    frames, utterances, channels = x.shape
    places = (0, 0) if padding is None else padding.expand(utterances, frames).stride()
    return (frames * utterances, utterances, channels, x.stride(1), gate.stride(1), *places, kind == "tanh")


class _Gated(Function):
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
    @once_differentiable
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


KEPT_BYTES = {"cpu": 1 << 22, "cuda": 1 << 20}
"""Arrays up to this size are kept all the same: they need little memory, and computing them again a tenth more time.
Less of it on a GPU, where passes are recorded as a rule, and launches of a recording cost little."""


@contextmanager
def computed_again(y: Tensor, compute: Callable[[], Tensor]) -> Iterator[Callable[[], Tensor]]:
    """What is done with y inside does not keep y for its backward pass, which computes it again: less memory.

    Gives a function that returns y without gradient, computed again where it is not kept.

    Args:
        y: a tensor that costs little to compute and that nothing but the operations inside would keep, whole or in
            parts; without gaps in memory.
        compute: gives y anew, in its shape; called without gradients and, for mixed precision, as y was.
    """
    if not y.requires_grad or y.numel() * y.element_size() <= KEPT_BYTES.get(y.device.type, 0):
        yield y.detach
        return
    place, first, count, kind = y.untyped_storage().data_ptr(), int(y.storage_offset()), y.numel(), y.device.type
    shape, stride, dtype = y.shape, y.stride(), y.dtype
    autocast = torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    again: Tensor | None = None
    uses = 0  # that are to come, for which one computation is enough

    def get() -> Tensor:
        nonlocal again
        if again is not None:
            return again
        with torch.no_grad(), autocast:
            result = compute()
            if result.stride() != stride:
                result = result.new_empty_strided(shape, stride).copy_(result)
        if uses > 0:
            again = result
        return result

    def pack(saved: Tensor) -> Tensor | tuple[torch.Size, tuple[int, ...], int]:
        nonlocal uses
        offset = int(saved.storage_offset()) - first
        last = offset + sum((n - 1) * step for n, step in zip(saved.shape, saved.stride(), strict=True))
        inside = saved.numel() > 0 and offset >= 0 and last < count
        if not inside or saved.dtype != dtype or saved.untyped_storage().data_ptr() != place:
            return saved
        uses += 1
        return saved.shape, saved.stride(), offset

    def unpack(packed: Tensor | tuple[torch.Size, tuple[int, ...], int]) -> Tensor:
        nonlocal again, uses
        if isinstance(packed, Tensor):
            return packed
        size, steps, offset = packed
        whole = get()
        uses -= 1
        if uses <= 0:
            again = None
        # A view of y, transposed perhaps, is the same view of what was computed again.
        return whole.as_strided(size, steps, whole.storage_offset() + offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield get


def projected_again(y: Tensor, layer: nn.Module, x: Tensor) -> AbstractContextManager[Callable[[], Tensor]]:
    """`computed_again` for y, the result of a linear layer for x, in mixed precision; else y is kept.

    Products cost little then, beside the memory.
    """
    dtype = mixed_precision(x) if torch.is_grad_enabled() else None
    return nullcontext(y.detach) if dtype is None else computed_again(y, partial(layer, lowprecision.cast(x, dtype)))


def convolved_again(y: Tensor, compute: Callable[[], Tensor]) -> AbstractContextManager[Any]:
    """`computed_again` for y, the result of a depthwise convolution, in mixed precision, as with `projected_again`."""
    return nullcontext() if mixed_precision(y) is None else computed_again(y, compute)


class SwooshR(nn.Module):
    """SwooshR as a module, for use in a sequence of layers."""

    def forward(self, x: Tensor) -> Tensor:
        return swoosh_r(x)


class Dropout(nn.Dropout):
    """torch.nn.Dropout with half of its time on a CPU: PyTorch draws a float64 for each value there."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or self.p == 1.0:
            return super().forward(x)
        return x * torch.rand(x.shape).ge_(self.p).mul_(1.0 / (1.0 - self.p)).to(x.dtype)


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
        return torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1.0 - p).div_(1.0 - p)
