"""Where the tests of GPU kernels run: on the GPU if there is one, else on the CPU through Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
pytest.importorskip("triton", reason="no GPU kernels: the package triton is not installed")

from zipformer_crctc import gpu, native  # noqa: E402  (kernels are made when they are imported)

Compute = Callable[[list[Tensor]], Tensor]


@contextmanager
def kernels() -> Iterator[None]:
    """GPU kernels take the arrays of DEVICE inside."""
    if DEVICE == "cuda":
        yield
        return
    with gpu.interpreted():
        yield


def assert_same(compute: Compute, inputs: list[Tensor], tolerance: float = 2e-5) -> None:
    """Outputs and gradients of the kernels in float32 are those of PyTorch's operations in float64.

    Or as near as PyTorch's in float32, for sums that nearly cancel.
    """
    torch.manual_seed(2)
    inputs = [x.to(DEVICE) for x in inputs]

    def results(dtype: torch.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in inputs]
        y = compute(given)
        cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return [y, *torch.autograd.grad(y, given, cotangent.to(y))]

    with kernels():
        found = results(torch.float32)
    with native.disabled():
        wanted, plain = results(torch.float64), results(torch.float32)
    for got, near, want in zip(found, plain, wanted, strict=True):
        assert got.dtype == torch.float32
        allowed = max(float(3.0 * (near - want).abs().max()), tolerance * float(want.detach().abs().max()))
        assert (got.double() - want).abs().max() <= allowed
