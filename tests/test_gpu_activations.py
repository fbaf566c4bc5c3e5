"""Swoosh, gates, BiasNorm, bypasses and limits of parameters by Triton kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_device import DEVICE, assert_same, kernels
from zipformer_crctc import gpu
from zipformer_crctc.activations import (
    SWOOSH_L,
    SWOOSH_R,
    gated,
    swoosh_l,
    swoosh_linear,
    swoosh_r,
    tanh_gated,
)
from zipformer_crctc.gpu_activations import column_sums
from zipformer_crctc.norms import _BiasNormFunction, _BypassFunction
from zipformer_crctc.regularisers import limit_parameter

T, N, C = 13, 3, 37


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", [SWOOSH_L, SWOOSH_R])
@pytest.mark.parametrize("masked", [False, True])
def test_swoosh_before_a_linear_layer(kind: tuple[float, float], masked: bool) -> None:
    mask = ((torch.rand(1, N, C) > 0.3).float() / 0.7).to(DEVICE) if masked else None

    def compute(given: list[Tensor]) -> Tensor:
        x, weight, bias = given
        return swoosh_linear(x, weight, bias, kind, None if mask is None else mask.to(x.dtype))

    assert_same(compute, [8 * torch.randn(T, N, C), torch.randn(5, C), torch.randn(5)])


def test_swoosh_far_from_zero_and_of_images() -> None:
    x = torch.tensor([[-1e5, -200.0, -88.0, -20.0, 0.0, 1.0, 4.0, 20.0, 88.0, 200.0, 1e5]])
    assert_same(lambda given: swoosh_l(given[0]), [x])
    image = torch.randn(2, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    assert_same(lambda given: swoosh_r(given[0]), [image])


@pytest.mark.parametrize("padded", [False, True])
def test_gates(padded: bool) -> None:
    """Halves of one array, as a layer's projection gives them; the padding of a slower frame rate is a strided view."""
    padding = (torch.rand(N, 2 * T)[:, ::2] > 0.7).to(DEVICE) if padded else None
    x = torch.randn(T, N, 2 * C)

    def halves(given: list[Tensor]) -> tuple[Tensor, Tensor]:
        return given[0][..., :C], given[0][..., C:]

    assert_same(lambda given: gated(*halves(given), padding), [x])
    assert_same(lambda given: tanh_gated(*halves(given)), [x])


@pytest.mark.parametrize("scale", [None, (C,), (N, C)])
def test_bias_norm(scale: tuple[int, ...] | None) -> None:
    inputs = [torch.randn(T, N, C), 0.3 * torch.randn(C), torch.tensor(0.3)]
    if scale is not None:
        inputs += [torch.randn(T, N, C), torch.rand(scale)]
    assert_same(lambda given: _BiasNormFunction.apply(*given, *[None] * (5 - len(given))), inputs)


@pytest.mark.parametrize("scale", [(C,), (N, C)])
@pytest.mark.parametrize("repeat", [1, 2, 4])
def test_bypass(scale: tuple[int, ...], repeat: int) -> None:
    inputs = [torch.randn(T, N, C), torch.randn(-(-T // repeat), N, C), torch.rand(scale)]
    assert_same(lambda given: _BypassFunction.apply(*given, repeat), inputs)


@pytest.mark.parametrize("rows", [1, 33, 70])
def test_column_sums(rows: int) -> None:
    x = torch.randn(rows, 2 * C, device=DEVICE).bfloat16()[:, :C]
    with kernels():
        got = column_sums(x)
    assert got.dtype == torch.float32
    assert torch.allclose(got, x.float().sum(dim=0), rtol=1e-5, atol=1e-5)


def test_limits_of_parameters() -> None:
    assert_same(lambda given: limit_parameter(given[0], -0.5, 0.5, prob=1.0), [torch.randn(50)])


def test_each_array_keeps_its_own_type() -> None:
    """As under autocast: a 16-bit norm of what a float32 bypass goes around."""
    x = torch.randn(T, N, C, device=DEVICE).bfloat16().requires_grad_()
    original = torch.randn(T, N, C, device=DEVICE, requires_grad=True)
    bias, log_scale, scale = (torch.rand(size, device=DEVICE, requires_grad=True) for size in ((C,), (), (C,)))
    with kernels():
        y = _BiasNormFunction.apply(x, bias, log_scale, original, scale)
        assert y.dtype == torch.float32
        grads = torch.autograd.grad(y.square().sum(), [x, bias, log_scale, original, scale])
    assert [grad.dtype for grad in grads] == [torch.bfloat16] + 4 * [torch.float32]
    given = [v.detach().double().requires_grad_() for v in (x, bias, log_scale, original, scale)]
    wanted = _BiasNormFunction.apply(*given)
    assert torch.allclose(y.double(), wanted, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, torch.autograd.grad(wanted.square().sum(), given), strict=True):
        assert (got.double() - want).abs().max() <= (1e-2 if got.dtype == torch.bfloat16 else 1e-4) * want.abs().max()


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_without_a_gpu_kernels_are_not_there() -> None:
    assert not gpu.available()
    with kernels():
        assert gpu.available()
