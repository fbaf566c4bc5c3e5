"""Triton kernels of Balancer and Whiten against PyTorch in float64; without a GPU, by Triton's interpreter."""

from __future__ import annotations

import copy
import importlib
import math
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_models import loud_first_channel, numbers
from zipformer_crctc import gpu, native
from zipformer_crctc.randomstate import random_state, set_random_state
from zipformer_crctc.regularisers import Balancer, Parts, Whiten, whitening_metric

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels are defined

pytest.importorskip("triton", reason="the package triton is not installed")
gpu_regularisers = importlib.import_module("zipformer_crctc.gpu_regularisers")

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # in the interpreter

DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Relative to the largest value. The interpreter cuts values off where a GPU rounds them to bfloat16."""


@pytest.fixture(autouse=True)
def on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Arrays go to the kernels, and small ones are shared out among programs as large ones are."""
    monkeypatch.setattr(gpu_regularisers, "PROGRAMS", 6)
    monkeypatch.setattr(gpu_regularisers, "TILE", 512)
    monkeypatch.setattr(gpu_regularisers, "BLOCK", 64)
    monkeypatch.setattr(gpu_regularisers, "MIN_CHUNK", 64)
    torch.manual_seed(0)
    with nullcontext() if HAS_GPU else gpu.interpreted():
        assert gpu.available()  # tried here, as it reads a value
        yield


@contextmanager
def nothing_waits() -> Iterator[None]:
    """Reading a tensor's values is an error inside."""

    def refuse(*_: Any) -> None:
        raise AssertionError("a value was read")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
            patch.setattr(Tensor, name, refuse)
        if HAS_GPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if HAS_GPU:
                torch.cuda.set_sync_debug_mode("default")


def gradient(module: nn.Module, x: Tensor, cotangent: Tensor) -> Tensor:
    """Of the module's input, which lies in memory as x does."""
    leaf = x.detach().requires_grad_()
    y = module.train()(leaf)
    assert y is not leaf
    (result,) = torch.autograd.grad(y, leaf, cotangent)
    return result


def assert_close(found: Tensor, want: Tensor, share: float) -> None:
    """Of all values, by a share of the largest."""
    assert found.shape == want.shape
    assert (found.double() - want).abs().max().item() <= share * want.abs().max().item() + 1e-30


def random_rows(rows: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Channels below, within and above all limits, with means of either sign."""
    scales, means = torch.logspace(-2, 2, channels), torch.linspace(-2, 2, channels)
    return (torch.randn(rows, channels) * scales + scales * means).to(DEVICE, dtype)


# Statistics


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = torch.full((2, x.shape[1]), torch.nan, device=DEVICE)
    with nothing_waits():
        native.Kernel("moments", "pppiii")(x, mean, variance, *x.shape, x.stride(0))
    return mean, variance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "channels"), [(1, 3), (7, 1), (33, 20), (300, 70), (2000, 2)])
def test_moments(rows: int, channels: int, dtype: torch.dtype) -> None:
    x = random_rows(rows, 2 * channels, dtype)[:, channels:]
    mean, variance = moments_of(x)
    assert torch.allclose(mean.double(), x.double().mean(0), rtol=1e-6, atol=1e-6 * float(x.abs().max()))
    assert torch.allclose(variance.double(), x.double().var(0, correction=0), rtol=1e-5, atol=1e-12)


def test_moments_far_from_zero() -> None:
    x = torch.randn(1500, 8, device=DEVICE) * 1e-3 + 100.0
    mean, variance = moments_of(x)
    assert torch.allclose(mean.double(), x.double().mean(0), rtol=1e-7)
    assert torch.allclose(variance.double(), x.double().var(0, correction=0), rtol=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -1e4])
def test_constant_channels_have_no_variance(value: float) -> None:
    mean, variance = moments_of(torch.full((777, 5), value, device=DEVICE))
    assert torch.equal(mean, torch.full_like(mean, value))
    assert not variance.any()


def test_moments_are_the_same_each_time() -> None:
    x = random_rows(500, 24)
    assert all(map(torch.equal, moments_of(x), moments_of(x)))


# Balancer


def balancer(dim: int) -> Balancer:
    return Balancer(dim, min_positive=0.3, max_positive=0.7, min_abs=0.5, max_abs=2.0, grad_scale=0.3, prob=1.0)


def assert_balances(dim: int, x: Tensor, cotangent: Tensor) -> None:
    want = gradient(balancer(dim), x.double(), cotangent.double())
    with nothing_waits():
        found = gradient(balancer(dim), x, cotangent)
    assert found.dtype == x.dtype
    assert not torch.equal(found, cotangent)
    assert_close(found, want, CLOSE[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(20, 3, 8), (100, 70), (1, 1, 5)])
def test_balancer(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = random_rows(math.prod(shape[:-1]), shape[-1], dtype).view(shape)
    assert_balances(-1, x, torch.randn_like(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_balancer_of_halves_of_a_projection(dtype: torch.dtype) -> None:
    x, cotangent = random_rows(60, 48, dtype).view(20, 3, 48), torch.randn(20, 3, 48).to(DEVICE, dtype)
    for part in (slice(0, 24), slice(24, 48)):
        assert_balances(-1, x[..., part], cotangent[..., part])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", [torch.channels_last, torch.contiguous_format])
def test_balancer_of_images(how: torch.memory_format, dtype: torch.dtype) -> None:
    """(N, C, T', F'), of which one may lie in memory in another way than the other."""
    x = random_rows(2 * 5 * 7, 6, dtype).view(2, 5, 7, 6).movedim(-1, 1)
    cotangent = torch.randn(2, 6, 5, 7).to(DEVICE, dtype)
    assert_balances(1, x, cotangent.contiguous(memory_format=how))
    assert_balances(1, x.contiguous(memory_format=how), cotangent.contiguous(memory_format=torch.channels_last))


def test_gradients_of_images_keep_channels_last() -> None:
    x = random_rows(70, 6).view(2, 5, 7, 6).movedim(-1, 1)
    assert gradient(balancer(1), x, torch.randn_like(x)).is_contiguous(memory_format=torch.channels_last)


def test_balancer_of_one_gradient_for_all_places() -> None:
    x, of_channel = random_rows(60, 8).view(20, 3, 8), torch.randn(8, device=DEVICE)
    assert_balances(-1, x, of_channel.expand(20, 3, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_balancer_of_dead_constant_tiny_and_large_channels(dtype: torch.dtype) -> None:
    x = random_rows(100, 6, dtype)
    x[:, 0], x[:, 1], x[:, 2] = 0.0, 10.0, x[:, 2] * 1e-4
    x[:, 3] *= 1e3
    x[7, 1] += 0.01  # one value is another, in float32 at least
    found = gradient(balancer(-1), x, torch.ones_like(x))
    assert torch.isfinite(found).all()
    assert ((found - 1.0).abs().float().square().mean(0).sqrt() <= 0.35).all()
    assert torch.equal(found[:, 0], torch.ones_like(found[:, 0]))
    assert_close(found[:, 2:], gradient(balancer(-1), x.double(), torch.ones_like(x).double())[:, 2:], CLOSE[dtype])


@pytest.mark.parametrize("sizes", [(20,), (7, 13), (1, 1, 18)])
def test_balancer_of_parts(sizes: tuple[int, ...]) -> None:
    x, cotangent = random_rows(20, 6), torch.randn(20, 6, device=DEVICE)
    leaf, module, shared = x.clone().requires_grad_(), balancer(-1).train(), Parts()
    y = torch.cat([module(part, shared) for part in leaf.split(sizes)])
    (found,) = torch.autograd.grad(y, leaf, cotangent)
    assert_close(found, gradient(balancer(-1), x.double(), cotangent.double()), 2e-5)


# Whiten


def whiten(groups: int, limit: float, scale: float = 0.1) -> Whiten:
    module = Whiten(groups, limit, scale)
    module.prob = 1.0
    return module


def mixed(rows: int, channels: int, mean: float = 3.0) -> Tensor:
    """Rows whose channels go together."""
    return torch.randn(rows, channels) @ (torch.eye(channels) + 0.3 * torch.randn(channels, channels)) + mean


def metric_of(x: Tensor, cotangent: Tensor, groups: int, dtype: torch.dtype) -> float:
    found = torch.full((2,), torch.nan, device=DEVICE)
    gpu.launch("whiten", (x, cotangent, torch.empty_like(cotangent), found, groups, 1.0, 0.1, dtype))
    return found[0].item()


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(("rows", "channels"), [(3, 8), (150, 24), (350, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_whiten(rows: int, channels: int, groups: int, dtype: torch.dtype) -> None:
    x, cotangent = mixed(rows, channels).to(DEVICE, dtype), torch.randn(rows, channels).to(DEVICE, dtype)
    reference, module = whiten(groups, 1.01), whiten(groups, 1.01)
    want = gradient(reference, x.double(), cotangent.double())
    with nothing_waits():
        found = gradient(module, x, cotangent)
    assert found.dtype == dtype
    assert_close(found, want, CLOSE[dtype])
    assert module.prob == reference.prob == Whiten.max_prob
    want_metric = whitening_metric(x.double(), groups)[0].item()
    assert metric_of(x, cotangent, groups, torch.float32) == pytest.approx(want_metric, rel=1e-5)
    assert metric_of(x, cotangent, groups, torch.bfloat16) == pytest.approx(want_metric, rel=1e-2 / rows**0.5)


@pytest.mark.parametrize("groups", [1, 4])
def test_what_whiten_adds(groups: int) -> None:
    x, cotangent = mixed(150, 24).to(DEVICE), torch.randn(150, 24, device=DEVICE)
    want = gradient(whiten(groups, 1.01), x.double(), cotangent.double()) - cotangent
    push = gradient(whiten(groups, 1.01), x, cotangent) - cotangent
    assert_close(push, want, 1e-4)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whiten_under_autocast(groups: int, dtype: torch.dtype) -> None:
    x, cotangent = mixed(200, 24).to(DEVICE, dtype), torch.randn(200, 24).to(DEVICE, dtype)
    want = gradient(whiten(groups, 1.01, 2.0), x.double(), cotangent.double()) - cotangent
    with torch.autocast(DEVICE.type, dtype=dtype), nothing_waits():
        push = gradient(whiten(groups, 1.01, 2.0), x, cotangent) - cotangent
    assert_close(push, want, 0.03)
    assert ((push - want).norm() / want.norm()).item() < 0.01


@pytest.mark.parametrize("groups", [1, 4])
def test_whiten_of_halves_of_a_projection(groups: int) -> None:
    x, cotangent = mixed(60, 48).view(20, 3, 48).to(DEVICE), torch.randn(20, 3, 48, device=DEVICE)
    for part in (slice(0, 24), slice(24, 48)):
        want = gradient(whiten(groups, 1.01), x[..., part].double(), cotangent[..., part].double())
        assert_close(gradient(whiten(groups, 1.01), x[..., part], cotangent[..., part]), want, 2e-5)


@pytest.mark.parametrize("how", [(1, 0, 2), (2, 1, 0)])
def test_whiten_of_what_does_not_lie_row_by_row(how: tuple[int, int, int]) -> None:
    x, cotangent = (mixed(60, 8).view(20, 3, 8).permute(how).to(DEVICE) for _ in range(2))
    want = gradient(whiten(1, 1.01), x.double(), cotangent.double())
    assert_close(gradient(whiten(1, 1.01), x, cotangent), want, 2e-5)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whiten_acts_from_its_limit_on(groups: int, dtype: torch.dtype) -> None:
    below, above = (loud_first_channel(3.0 * share, 16, groups).to(DEVICE, dtype) for share in (0.9, 1.1))
    cotangent = numbers(above.shape, 5).to(DEVICE, dtype)
    module = whiten(groups, 3.0, scale=0.3)
    assert torch.equal(gradient(module, below, cotangent), cotangent)
    assert module.prob == Whiten.min_prob
    module.prob = 1.0
    push = gradient(module, above, cotangent).double() - cotangent.double()
    assert module.prob == Whiten.max_prob
    assert push.norm().item() == pytest.approx(0.3 * cotangent.double().norm().item(), rel=2e-2)
    assert (push * whitening_metric(above.double(), groups)[1]).sum().item() > 0.0


def test_below_the_limit_nothing_changes_what_is_no_number() -> None:
    below = loud_first_channel(2.0, 16).to(DEVICE, torch.float32)
    cotangent = torch.full_like(below, torch.inf)
    assert torch.equal(gradient(whiten(1, 3.0), below, cotangent), cotangent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e4])
def test_whiten_of_zeros_and_of_tiny_and_large_values(scale: float, dtype: torch.dtype) -> None:
    x, cotangent = (scale * torch.randn(30, 8)).to(DEVICE, dtype), torch.randn(30, 8).to(DEVICE, dtype)
    for limit in (0.0, 1.0, 100.0):
        found = gradient(whiten(4, limit), x, cotangent)
        assert torch.isfinite(found).all()
        assert (found - cotangent).double().norm() <= 0.11 * cotangent.double().norm()
        assert not gradient(whiten(4, limit), x, torch.zeros_like(x)).any()
    assert torch.isfinite(gradient(whiten(1, 1.0), x[:1], cotangent[:1])).all()


def test_whiten_is_the_same_each_time() -> None:
    x, cotangent = mixed(200, 24).to(DEVICE), torch.randn(200, 24, device=DEVICE)
    assert torch.equal(gradient(whiten(4, 1.01), x, cotangent), gradient(whiten(4, 1.01), x, cotangent))


def test_groups_are_of_equal_size() -> None:
    with pytest.raises(ValueError, match="10 channels cannot be shared out among 3 groups"):
        gradient(whiten(3, 1.0), torch.randn(4, 10, device=DEVICE), torch.randn(4, 10, device=DEVICE))


# What a check decides about the next one


def checked(module: Whiten, *metrics: float) -> Whiten:
    """The module after checks of arrays with these metrics, the limit being 3."""
    leaves = [loud_first_channel(metric, 16).to(DEVICE, torch.float32).requires_grad_() for metric in metrics]
    module.train().prob = 1.0
    with nothing_waits():
        sum(module(leaf).sum() for leaf in leaves).backward()
    return module


def test_the_last_check_decides() -> None:
    """The backward pass of the last use comes first."""
    assert checked(Whiten(1, 3.0, 0.1), 2.0, 4.0).prob == Whiten.min_prob
    module = checked(Whiten(1, 3.0, 0.1), 4.0, 2.0)
    assert [module.prob, module.prob] == [Whiten.max_prob] * 2
    module = checked(checked(module, 2.0), 4.0)
    assert module.prob == Whiten.max_prob


def test_a_probability_that_is_set_later_counts() -> None:
    module = checked(Whiten(1, 3.0, 0.1), 2.0)
    module.prob = 0.7
    assert module.prob == 0.7


def test_copies_know_what_the_last_check_found() -> None:
    for metric, want in ((2.0, Whiten.min_prob), (4.0, Whiten.max_prob)):
        module = checked(Whiten(1, 3.0, 0.1), metric)
        copies = [copy.deepcopy(module), pickle.loads(pickle.dumps(checked(module, metric)))]
        assert [one.prob for one in (module, *copies)] == [want] * 3
        copies[0].prob = 0.5
        assert module.prob == want


def test_saved_states_hold_what_the_last_check_found() -> None:
    model = nn.Sequential(checked(Whiten(1, 3.0, 0.1), 2.0), checked(Whiten(1, 3.0, 0.1), 4.0))
    state = random_state(model, DEVICE)
    assert state["whiten"] == {"0": Whiten.min_prob, "1": Whiten.max_prob}
    other = nn.Sequential(checked(Whiten(1, 3.0, 0.1), 4.0), checked(Whiten(1, 3.0, 0.1), 2.0))
    set_random_state(state, other, DEVICE)
    assert [module.prob for module in other] == [Whiten.min_prob, Whiten.max_prob]
