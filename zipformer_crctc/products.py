"""Linear layers through the fastest matrix product that the machine has.

For float32 PyTorch calls MKL, which uses AVX-512 on processors of one maker only. oneDNN, which PyTorch holds too, uses
it wherever it is there, and takes half the time from Zen 5 on. `_suits_onednn` chooses; results differ by rounding.
R rows, I and O channels.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zipformer_crctc import gpu, lowprecision, native
from zipformer_crctc.autograd import Function

MAX_GRID_ROWS = 8192
"""With more rows it costs more to append some than to prepare a product for their number."""


def _has_onednn() -> bool:
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return known and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _is_slow_with_mkl() -> bool:
    """An AMD processor from Zen 5 (family 26) on: twice as fast with AVX-512, which those before it are not."""
    try:
        info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    family = re.search(r"^cpu family\s*: (\d+)$", info, re.MULTILINE)
    return "AuthenticAMD" in info and family is not None and int(family[1]) >= 26


HAS_ONEDNN = _has_onednn()
HAS_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype") and hasattr(torch.ops.aten.bmm, "dtype")
"""Whether PyTorch multiplies 16-bit matrices on a GPU to a float32 one: from 2.8 on."""
MIN_SIZE, INFERENCE_MIN_SIZE = (1 << 26, 1 << 24) if _is_slow_with_mkl() else (math.inf, 1 << 26)
"""Rows times input times output channels, from which oneDNN is taken in training and in inference mode.

Each new shape costs milliseconds, so smaller products gain nothing. In inference mode there are fewer other arrays and
shapes, and no products with transposed weights, for which MKL is as good where it is not slow.
"""


class Linear(nn.Linear):
    """torch.nn.Linear with the product of `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As torch.nn.functional.linear: (..., I), (O, I) and (O,) to (..., O).

    In inference mode, where PyTorch does not count changes, x must not be changed in place between layers that it is
    given to: under autocast on a GPU they share one 16-bit copy.
    """
    if _suits_onednn(x, weight, weight.shape[0]):
        return _OnednnLinear.apply(x, weight, bias)
    if (dtype := mixed_precision(x)) is not None:
        return _MixedLinear.apply(x, weight, bias, dtype)
    return F.linear(x, weight, bias)


def mixed_precision(x: Tensor) -> torch.dtype | None:
    """The 16-bit type of products with x, a float32 or 16-bit array on a GPU, under autocast; None for none."""
    if not gpu.takes(x) or x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    exported = torch.jit.is_tracing() or torch.compiler.is_compiling()
    return None if exported else torch.get_autocast_dtype(x.device.type)


class _MixedLinear(Function):
    """A linear layer under autocast with few operations besides its products: a GPU waits for launches."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        low = lowprecision.cast(x, dtype)
        ctx.save_for_backward(low, weight)
        ctx.dtype = x.dtype
        return _linear_in(low, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        low, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        (grad,) = grad_outputs
        grad_x = grad_of_input(grad, weight, ctx.dtype) if needs_x else None
        return grad_x, *grads_of_parameters(grad, low if needs_weight else None, weight, needs_bias), None


def _linear_in(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` in the type of x, without gradient."""
    rows, low = x.reshape(-1, weight.shape[1]), lowprecision.copy_of(weight, x.dtype)
    y = torch.mm(rows, low.t()) if bias is None else torch.addmm(lowprecision.copy_of(bias, x.dtype), rows, low.t())
    return y.view(*x.shape[:-1], len(weight))


def over_rows(a: Tensor, b: Tensor) -> Tensor:
    """The sum over rows of their outer products: (R, O) and (R, I) to (O, I). No gradient passes through it."""
    return _onednn_over_rows(_to_grid(a), _to_grid(b)) if _suits_onednn(a, b, b.shape[1]) else torch.mm(a.t(), b)


def _suits_onednn(x: Tensor, other: Tensor, size: int) -> bool:
    """size: the channels of the product that x has not."""
    least = INFERENCE_MIN_SIZE if torch.is_inference_mode_enabled() else MIN_SIZE
    return (
        HAS_ONEDNN
        and x.is_cpu
        and least < math.inf
        # What is exported runs elsewhere.
        and not (torch.jit.is_tracing() or torch.compiler.is_compiling())
        and bool(torch.backends.mkldnn.enabled)
        and x.dtype == other.dtype == torch.float32
        and x.numel() * size >= least
        and not torch.is_autocast_enabled("cpu")
    )


class _OnednnLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y = _onednn(_to_grid(x.reshape(-1, x.shape[-1])), weight, bias)
        return y[: x.numel() // x.shape[-1]].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        grad, y = grad_outputs[0], x if needs_weight else None
        grad_x = grad_of_input(grad, weight) if needs_x else None
        return grad_x, *grads_of_parameters(grad, y, weight, needs_bias)


def grad_of_input(grad: Tensor, weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Gradient of the input of `linear`, of a dtype if given, from that of its output: (..., O), (O, I) to (..., I)."""
    rows = grad.reshape(-1, weight.shape[0])
    if _suits_onednn(rows, weight, weight.shape[1]):
        return _onednn(_to_grid(rows), weight.t())[: len(rows)].view(*grad.shape[:-1], -1)
    grad_x = product(rows, lowprecision.copy_of(weight, rows.dtype), dtype or rows.dtype)
    return grad_x.view(*grad.shape[:-1], weight.shape[1])


def grads_of_parameters(
    grad: Tensor, x: Tensor | None, weight: Tensor, with_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the weight and of the bias of `linear`, from that of its output and its input, where given."""
    rows = grad.reshape(-1, weight.shape[0])
    of_weight = None
    if x is not None:
        columns = x.reshape(-1, weight.shape[1]).to(rows.dtype)
        same = rows.dtype == weight.dtype
        of_weight = over_rows(rows, columns) if same else product(rows.t(), columns, weight.dtype)
    return of_weight, _column_sums(rows, weight.dtype) if with_bias else None


def _column_sums(rows: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float32 and gpu.takes(rows) and native.suits(rows):
        from zipformer_crctc.gpu_activations import column_sums  # needs Triton

        return column_sums(rows)
    return rows.sum(dim=0, dtype=dtype)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, S) and (S, T) to (R, T) in the given type, or so for each of a batch; sums of 16-bit operands are float32."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    if dtype == torch.float32 != a.dtype and a.is_cuda and HAS_WIDE_PRODUCTS:
        return multiply(a, b, out_dtype=dtype)
    return multiply(a, b).to(dtype)


def missing_to_grid(size: int) -> int:
    """What to add to a size, so that it has one of sixteen values between a power of two and the next.

    Batches have many different numbers of frames, and every new shape costs: oneDNN prepares programs for it, and the
    arrays of a step do not fit where those of the last one were.
    """
    return -size % (1 << max(0, size.bit_length() - 5))


def _to_grid(x: Tensor) -> Tensor:
    """(R, C) with rows of zeros appended, see `missing_to_grid`."""
    missing = missing_to_grid(len(x)) if len(x) <= MAX_GRID_ROWS else 0
    return torch.cat([x, x.new_zeros(missing, x.shape[1])]) if missing else x


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """(R, I), (O, I), (O,) to (R, O)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _onednn_over_rows(a: Tensor, b: Tensor) -> Tensor:
    # The first operand is copied to be contiguous. The other way round it is b, and the result, that are copied.
    direct, swapped = a.numel(), b.numel() + a.shape[1] * b.shape[1]
    return _onednn(a.t(), b.t()) if direct <= swapped else _onednn(b.t(), a.t()).t().contiguous()
