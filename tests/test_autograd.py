"""Operations with a backward pass of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zipformer_crctc.activations import swoosh_l, swoosh_r
from zipformer_crctc.autograd import Function


class Doubled(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        rounded = (2.0 * x).half()
        ctx.save_for_backward(x)
        ctx.mark_non_differentiable(rounded)
        ctx.set_materialize_grads(False)
        return 2.0 * x, rounded

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return 2.0 * grad_outputs[0]


def test_the_same_with_and_without_gradients() -> None:
    x = torch.randn(5, requires_grad=True)
    y, rounded = Doubled.apply(x)
    with torch.no_grad():
        plain, plainly_rounded = Doubled.apply(x)
    assert torch.equal(y, plain) and torch.equal(rounded, plainly_rounded)
    assert y.requires_grad and not (rounded.requires_grad or plain.requires_grad)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((5,), 2.0))


@pytest.mark.parametrize("function", [swoosh_l, swoosh_r])
def test_traced(function: Any) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    traced = torch.jit.trace(function, x)
    torch.testing.assert_close(traced(2.0 * x), function(2.0 * x))
