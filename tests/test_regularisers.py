"""Modules that change nothing but the gradient: Balancer, Whiten, the range limiter, the penalty."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor, nn

from small_models import loud_first_channel, numbers
from zipformer_crctc.regularisers import (
    Balancer,
    Parts,
    ScaleGrad,
    Whiten,
    limit_parameter,
    penalise_large_values,
    whitening_metric,
)
from zipformer_crctc.schedule import Schedule


def gradient(module: nn.Module, x: Tensor, cotangent: Tensor) -> Tensor:
    """What the module makes of an incoming gradient; its forward pass must be the identity."""
    leaf = x.detach().requires_grad_()
    y = module(leaf)
    assert torch.equal(y, leaf)
    (result,) = torch.autograd.grad(y, leaf, cotangent)
    assert result.dtype == cotangent.dtype
    return result


def always(module: Balancer | Whiten) -> Balancer | Whiten:
    """The module in training mode, acting on the next call."""
    module.prob = 1.0
    return module.train()


def test_balancer_check_values() -> None:
    module = Balancer(-1, min_positive=0.45, max_positive=0.55, min_abs=0.2, max_abs=1.0, prob=1.0)
    got = gradient(module, 1 + 2 * numbers((20, 2), 11), numbers((20, 2), 12))
    assert got[0].tolist() == pytest.approx([-0.634079, 0.812138], abs=1e-6)
    assert got[19].tolist() == pytest.approx([-0.240129, -0.427639], abs=1e-6)


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (1, 1, 18)])
def test_balancer_of_parts_takes_the_statistics_of_all(sizes: tuple[int, ...]) -> None:
    module = Balancer(-1, min_positive=0.45, max_positive=0.55, min_abs=0.2, max_abs=1.0, prob=1.0).train()
    x, cotangent = 1 + 2 * numbers((20, 2), 11), numbers((20, 2), 12)
    leaf = x.detach().requires_grad_()
    shared = Parts()
    y = torch.cat([module(part, shared) for part in leaf.split(sizes)])
    assert torch.equal(y, x)
    (got,) = torch.autograd.grad(y, leaf, cotangent)
    want = gradient(module, x, cotangent)
    assert torch.allclose(got, want, rtol=0, atol=1e-6)
    assert torch.equal(got, want) or len(sizes) > 1


def test_balancer_decides_once_for_all_parts() -> None:
    module = Balancer(-1, max_abs=1.0, prob=0.5).train()
    random.seed(0)
    acts = set()
    for _ in range(20):
        shared = Parts()
        parts = [module(torch.ones(4, 2, requires_grad=True), shared) for _ in range(3)]
        acts.add(tuple(part.grad_fn is not None for part in parts))
    assert acts == {(True,) * 3, (False,) * 3}
    assert module.eval()(parts[0], Parts()) is parts[0]


def test_whiten_check_values() -> None:
    x = numbers((20, 3), 13) * torch.tensor([1.0, 2.0, 3.0])
    assert whitening_metric(x, 1)[0].item() == pytest.approx(1.763876, abs=1e-6)
    got = gradient(always(Whiten(1, 1.0001, 0.02)), x, numbers((20, 3), 14))
    assert got[0].tolist() == pytest.approx([0.680988, 0.082159, 0.031413], abs=1e-6)


def test_balancer_limits() -> None:
    limits = Balancer(-1, min_positive=0.05, max_positive=1.0, min_abs=0.2, max_abs=100.0).limits()
    assert limits[0] == pytest.approx(0.8139535143 * math.atanh(2 * 0.05 - 1), rel=1e-8)
    assert 9.0 < limits[1] < 11.0  # finite, and beyond any real channel
    assert limits[2:] == pytest.approx((0.2 * math.sqrt(math.pi / 2), 100 * math.sqrt(math.pi / 2)), rel=1e-9)


@pytest.mark.parametrize("channel_dim", [0, 1, -1])
def test_balancer_follows_the_gradient_of_its_loss(channel_dim: int) -> None:
    """Against autograd: |m - clip(m)| + |ln(clip(r) / r)| of each channel, its gradient scaled to the rms asked for."""
    torch.manual_seed(0)
    module = Balancer(channel_dim, min_positive=0.4, max_positive=0.6, min_abs=0.5, max_abs=1.0, grad_scale=0.07)
    low_mean, high_mean, low_rms, high_rms = module.limits()
    means, scales = torch.tensor([-2.0, 0.0, 2.0, 0.0, 0.1]), torch.tensor([1.0, 0.01, 0.1, 9.0, 1.0])
    x = (torch.randn(7, 40, 5, dtype=torch.float64) * scales + means * scales).transpose(channel_dim, -1).contiguous()
    cotangent = torch.randn_like(x)

    leaf = x.clone().requires_grad_()
    by_channel = leaf.transpose(channel_dim, -1).flatten(0, -2)  # (elements, C)
    mean, moment = by_channel.mean(0), by_channel.square().mean(0)
    ratio, rms = mean / (moment - mean.square()).sqrt(), moment.sqrt()
    loss = (ratio - ratio.clamp(low_mean, high_mean)).abs() + (rms.clamp(low_rms, high_rms) / rms).log().abs()
    (push,) = torch.autograd.grad(loss.sum(), leaf)
    sizes = push.transpose(channel_dim, -1).flatten(0, -2).square().mean(0).sqrt()
    assert sizes[-1] == 0.0 and (sizes[:-1] > 0.0).all()  # one channel is within its limits
    push = (push.transpose(channel_dim, -1) * (0.07 / sizes.clamp(min=1e-20))).transpose(channel_dim, -1)

    got = gradient(always(module), x, cotangent)
    assert torch.allclose(got, cotangent + cotangent.abs() * push, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_groups", [1, 3])
def test_whitening_metric_by_eigenvalues(num_groups: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 50, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64) + 5.0
    metric, slope = whitening_metric(x, num_groups)
    centred = (x - x.mean((0, 1))).flatten(0, 1).unflatten(-1, (num_groups, -1))  # (frames, G, C / G)
    eigenvalues = torch.linalg.eigvalsh(torch.einsum("fgc,fgd->gcd", centred, centred))
    want = eigenvalues.square().mean() / eigenvalues.mean().square()
    assert metric.item() == pytest.approx(want.item(), rel=1e-10)
    leaf = x.clone().requires_grad_()
    (want_slope,) = torch.autograd.grad(whitening_metric(leaf, num_groups)[0], leaf)
    assert torch.allclose(slope, want_slope, rtol=1e-9, atol=1e-14)


def test_whitening_metric_of_white_noise_is_one() -> None:
    eye = torch.cat([torch.eye(6), -torch.eye(6)]).double()
    assert whitening_metric(eye, 1)[0].item() == pytest.approx(1.0, abs=1e-12)
    assert whitening_metric(eye, 2)[0].item() == pytest.approx(1.0, abs=1e-12)


def test_whitening_of_many_rows_far_from_zero() -> None:
    x = torch.randn(300_000, 16) * 0.01 + 10.0
    assert whitening_metric(x, 1)[0].item() == pytest.approx(whitening_metric(x.double(), 1)[0].item(), abs=1e-3)


def test_groups_of_channels_are_of_equal_size() -> None:
    with pytest.raises(ValueError, match="10 channels cannot be shared out among 3 groups"):
        whitening_metric(torch.randn(4, 10), 3)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("b", [0.0, 20000.0])
def test_whiten_acts_above_its_limit(groups: int, b: float) -> None:
    module = Whiten(groups, Schedule((0, 3.0), (20000, 6.0), default=3.0), grad_scale=0.025)
    module.batch_count = b
    limit = 3.0 if b == 0.0 else 6.0
    below, above = (loud_first_channel(limit * share, 16, groups) for share in (0.99, 1.01))
    assert whitening_metric(above, groups)[0].item() == pytest.approx(1.01 * limit)
    cotangent = numbers(above.shape, 5)
    assert torch.equal(gradient(always(module), below, cotangent), cotangent)
    assert module.prob == 0.025
    push = gradient(always(module), above, cotangent) - cotangent
    assert module.prob == 0.25
    assert push.norm().item() == pytest.approx(0.025 * cotangent.norm().item(), rel=1e-6)
    assert (push * whitening_metric(above, groups)[1]).sum() > 0.0  # a step against it lowers the metric


@pytest.mark.parametrize(
    "module",
    [Balancer(-1, max_abs=0.01, prob=1.0), Whiten(1, 1.0001, 0.02), ScaleGrad(0.2)],
    ids=lambda m: type(m).__name__,
)
def test_regularisers_act_in_training_only(module: nn.Module) -> None:
    x, cotangent = 1 + 2 * numbers((20, 3), 11), numbers((20, 3), 12)
    if isinstance(module, Whiten):
        module.prob = 1.0
    assert not torch.equal(gradient(module.train(), x, cotangent), cotangent)
    assert torch.equal(gradient(module.eval(), x, cotangent), cotangent)
    assert module.train()(x) is x or isinstance(module, ScaleGrad)  # nothing to do where no gradient will come


def test_scale_grad_scales() -> None:
    cotangent = numbers((4, 3), 12)
    assert torch.equal(gradient(ScaleGrad(0.2).train(), numbers((4, 3), 1), cotangent), 0.2 * cotangent)


@pytest.mark.parametrize("kind", ["dead", "constant", "tiny", "huge", "dead gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_degenerate_channels_give_finite_gradients(kind: str, dtype: torch.dtype) -> None:
    scale = {"dead": 0.0, "constant": 0.0, "tiny": 1e-7, "huge": 3e4}.get(kind, 1.0)
    x = numbers((30, 2, 8), 1)
    x[:, :, :5] *= scale
    x[:, :, :5] += kind == "constant"
    cotangent = numbers((30, 2, 8), 2) * (kind != "dead gradient")
    modules: list[Balancer | Whiten] = [
        Balancer(-1),
        Balancer(-1, min_positive=0.45, max_positive=0.55, min_abs=0.2, max_abs=4.0),
        Balancer(-1, min_positive=0.6, max_positive=1.0, min_abs=0.0),
        Whiten(1, 1.0, 0.02),
        Whiten(4, 1.0, 0.02),
    ]
    for module in modules:
        got = gradient(always(module), x.to(dtype), cotangent.to(dtype))
        assert torch.isfinite(got).all(), module
        if kind == "dead gradient":
            assert not got.any()
        if isinstance(module, Balancer):
            # At most about grad_scale of a channel's gradient is added; a rare value in a tail gets a few times that.
            assert ((got - cotangent.to(dtype)).abs() <= 0.2 * cotangent.abs() + 1e-6).all()
    for whole in (torch.zeros(30, 8, dtype=dtype), torch.ones(1, 8, dtype=dtype)):
        for module in modules:
            assert torch.isfinite(gradient(always(module), whole, torch.ones_like(whole))).all()


def test_limiter_flips_what_pushes_outwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.59)
    x = torch.tensor([0.1, 0.1, 0.5, 0.5, 2.0, 2.0], requires_grad=True)
    y = limit_parameter(x, 0.2, 1.0)
    assert torch.equal(y, x)  # not clipped
    (got,) = torch.autograd.grad(y, x, torch.tensor([3.0, -3.0, 3.0, -3.0, 3.0, -3.0]))
    assert got.tolist() == [-3.0, -3.0, 3.0, -3.0, 3.0, 3.0]
    monkeypatch.setattr(random, "random", lambda: 0.6)
    assert limit_parameter(x, 0.2, 1.0) is x


def test_penalty_is_a_loss_of_weight_one() -> None:
    x = torch.tensor([-30.0, -25.0, 0.0, 24.0, 26.0], requires_grad=True)
    cotangent = torch.tensor([0.0, 1.0, 2.0, 3.0, -4.0])
    y = penalise_large_values(x, 25.0, 1e-4)
    assert torch.equal(y, x)
    (got,) = torch.autograd.grad(y, x, cotangent)
    loss = (x * cotangent).sum() + 1e-4 * (x.abs() - 25.0).relu().sum()
    (want,) = torch.autograd.grad(loss, x)
    assert torch.allclose(got, want, rtol=0, atol=1e-9)
