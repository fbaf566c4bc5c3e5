"""Swoosh activations, BiasNorm and time-shared dropout."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from zipformer_crctc import activations, attention, frontend, layers
from zipformer_crctc.activations import (
    Dropout,
    SharedDropout,
    SwooshR,
    computed_again,
    gated,
    swoosh_l,
    swoosh_r,
    tanh_gated,
)
from zipformer_crctc.convolution import depthwise_conv
from zipformer_crctc.model import build_model
from zipformer_crctc.norms import BiasNorm
from zipformer_crctc.presets import tiny
from zipformer_crctc.schedule import Schedule, set_batch_count

Function = Callable[[Tensor], Tensor]


def test_known_values() -> None:
    x = torch.tensor([-10.0, 0.0, 4.0, 10.0])
    assert swoosh_l(x).tolist() == pytest.approx([0.765001, -0.016850, 0.338147, 5.167476], abs=2e-6)
    assert swoosh_r(x).tolist() == pytest.approx([0.486755, 0.0, 2.415326, 7.886861], abs=2e-6)
    assert torch.equal(SwooshR()(x), swoosh_r(x))


@pytest.mark.parametrize(("function", "shift", "offset"), [(swoosh_l, 4.0, 0.035), (swoosh_r, 1.0, 0.313261687)])
def test_swoosh_is_its_formula(function: Function, shift: float, offset: float) -> None:
    x = torch.linspace(-30, 30, 601, dtype=torch.float64, requires_grad=True)
    y = function(x)
    assert torch.allclose(y, (1 + (x - shift).exp()).log() - 0.08 * x - offset, rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope, torch.sigmoid(x - shift) - 0.08, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(function, (torch.linspace(-9, 9, 19).double().requires_grad_(),))


@pytest.mark.parametrize("function", [swoosh_l, swoosh_r])
def test_swoosh_does_not_overflow(function: Function) -> None:
    x = torch.tensor([-1e4, -200.0, 200.0, 1e4], requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(y).all()
    assert slope.tolist() == pytest.approx([-0.08, -0.08, 0.92, 0.92], abs=1e-6)


@pytest.mark.parametrize("function", [swoosh_l, swoosh_r])
def test_half_precision_is_computed_in_float32(function: Function) -> None:
    """An 8-bit mantissa would lose what exp and log are given; the one rounding left is that of the result."""
    x = torch.linspace(-8, 8, 65).bfloat16().requires_grad_()
    y = function(x)
    want = function(x.detach().float()).bfloat16()
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert y.dtype == slope.dtype == torch.bfloat16
    assert torch.equal(y, want)


@pytest.mark.parametrize("channel_dim", [-1, 1, 0])
def test_bias_norm_is_its_formula(channel_dim: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 5, 5, dtype=torch.float64, requires_grad=True)
    norm = BiasNorm(5, channel_dim).double().eval()
    with torch.no_grad():
        norm.bias.copy_(torch.randn(5))
        norm.log_scale.fill_(0.3)
    shape = [1, 1, 1]
    shape[channel_dim] = 5
    rms = (x - norm.bias.view(shape)).square().mean(channel_dim, keepdim=True).sqrt()
    want = x * norm.log_scale.exp() / rms  # the bias is not subtracted from the numerator
    assert torch.allclose(norm(x), want, rtol=0, atol=1e-12)
    inputs = (x, norm.log_scale, norm.bias)
    cotangent = torch.randn_like(want)
    got_grads = torch.autograd.grad(norm(x), inputs, cotangent)
    want_grads = torch.autograd.grad(want, inputs, cotangent)
    for got, wanted in zip(got_grads, want_grads, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_tanh_gated_is_its_formula_to_the_bit() -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    got, want = tanh_gated(x, gate), torch.tanh(gate) * x
    assert torch.equal(got, want)
    cotangent = torch.randn(5, 7)
    found, wanted = (torch.autograd.grad(y, [x, gate], cotangent) for y in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_bias_norm_begins_with_the_published_values() -> None:
    torch.manual_seed(0)
    norm = BiasNorm(4000)
    assert norm.log_scale.shape == ()
    assert norm.log_scale.item() == 1.0
    assert norm.bias.std().item() == pytest.approx(1e-4, rel=0.05)


@pytest.mark.parametrize("shared_dim", [0, 1])
def test_dropout_is_shared_along_its_axis(shared_dim: int) -> None:
    torch.manual_seed(0)
    y = SharedDropout(0.25, shared_dim).train()(torch.ones(6, 6, 50))
    first = y.select(shared_dim, 0)
    assert all(torch.equal(y.select(shared_dim, t), first) for t in range(6))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    # each utterance draws for itself
    assert not torch.equal(y.select(1 - shared_dim, 0), y.select(1 - shared_dim, 1))


def test_dropout_is_for_training() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 5)
    dropout = SharedDropout(Schedule((0, 0.5), (10, 0.0)), 0)
    dropout.batch_count = 0.0
    assert not torch.equal(dropout.train()(x), x)
    assert torch.equal(dropout.eval()(x), x)
    dropout.batch_count = 10.0
    assert torch.equal(dropout.train()(x), x)
    assert torch.equal(SharedDropout(0.5, 0).eval()(x), x)  # a plain number too


def test_dropout_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(40_000, requires_grad=True)
    y = Dropout(0.25).train()(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad, y)
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
    assert Dropout(1.0).train()(x).count_nonzero() == 0
    assert Dropout(0.25).eval()(x) is x


def test_what_is_computed_again_is_not_kept() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(5, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)
    calls = []

    def compute() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return swoosh_l(x.detach())

    y = swoosh_l(x)
    with computed_again(y, compute):
        z = torch.nn.functional.linear(y, weight)
    assert calls == []
    found = torch.autograd.grad(z.square().sum(), [x, weight])
    assert calls == [False]
    want = torch.autograd.grad((swoosh_l(x) @ weight.t()).square().sum(), [x, weight])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(found, want, strict=True))


def test_a_small_array_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "KEPT_BYTES", {"cpu": 4 * 30})
    for rows, times in ((5, 0), (6, 1)):
        x = torch.randn(rows, 6, requires_grad=True)
        compute = Mock(return_value=swoosh_l(x.detach()))
        y = swoosh_l(x)
        with computed_again(y, compute):
            z = y.square()
        z.sum().backward()
        assert compute.call_count == times


@pytest.mark.parametrize("mixed", [False, True], ids=["as in float32", "as in mixed precision"])
@pytest.mark.parametrize("causal", [False, True], ids=["", "causal"])
def test_a_model_that_computes_again_learns_the_same(
    monkeypatch: pytest.MonkeyPatch, mixed: bool, causal: bool
) -> None:
    """To the bit, with every regulariser: gradients of a model that keeps all are those of one that does not."""
    model = build_model(tiny().model.with_values({"causal": causal}), 12).train()
    set_batch_count(model, 20_000.0)
    features = torch.randn(3, 77, 80)

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        random.seed(0)
        log_probs, _ = model(features, torch.tensor([77, 70, 61]))
        found = torch.autograd.grad(log_probs.square().mean(), list(model.parameters()), allow_unused=True)
        return [gradient for gradient in found if gradient is not None]

    if mixed:  # what is computed again in mixed precision only, in float32
        for module in (attention, layers):
            monkeypatch.setattr(
                module, "projected_again", lambda y, layer, x: computed_again(y, partial(layer, x.detach()))
            )
        monkeypatch.setattr(layers, "convolved_again", computed_again)
    convolutions: list[bool] = []

    def convolve(x: Tensor, conv: nn.Conv1d) -> Tensor:
        convolutions.append(torch.is_grad_enabled())
        return depthwise_conv(x, conv)

    monkeypatch.setattr(layers, "depthwise_conv", convolve)
    found = gradients()
    assert convolutions.count(False) == (convolutions.count(True) if mixed else 0)
    for module in (activations, attention, frontend, layers):
        monkeypatch.setattr(module, "computed_again", lambda y, compute: nullcontext())
    for module in (attention, layers):
        monkeypatch.setattr(module, "projected_again", lambda y, layer, x: nullcontext())
    monkeypatch.setattr(layers, "convolved_again", lambda y, compute: nullcontext())
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(), strict=True))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_views_of_what_is_computed_again_stay_apart(order: tuple[int, int]) -> None:
    """Also where it is laid out in memory in another way than before."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, requires_grad=True)
    weight = torch.randn(3, 12)

    def result(again: bool) -> Tensor:
        y = swoosh_l(x)
        compute = lambda: swoosh_l(x.detach()).permute(order).contiguous().permute(order)  # noqa: E731
        with computed_again(y, compute) if again else nullcontext():
            flat = (y.view(2, 12) @ weight.t()).square().sum()
            transposed = (y.t() ** 3 * torch.arange(4.0)).sum()
            return flat + transposed + (y[:2] ** 3).sum() + (y[:1].expand(4, 6) ** 3).sum()

    (found,), (want,) = (torch.autograd.grad(result(again), x) for again in (True, False))
    assert torch.equal(found, want)


def test_gate() -> None:
    torch.manual_seed(0)
    x, gate = torch.randn(2, 5, 6, dtype=torch.float64).requires_grad_().unbind()
    assert torch.allclose(gated(x, gate), x * torch.sigmoid(gate))
    assert torch.autograd.gradcheck(gated, (x.detach().requires_grad_(), gate.detach().requires_grad_()))
