"""The C kernels: how they are built, and that each gives what PyTorch's operations give."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from zipformer_crctc import native
from zipformer_crctc.activations import SWOOSH_L, SWOOSH_R, gated, swoosh_l, swoosh_linear, tanh_gated
from zipformer_crctc.model import build_model
from zipformer_crctc.norms import BiasNorm, Bypass
from zipformer_crctc.presets import tiny
from zipformer_crctc.regularisers import Balancer, Whiten, limit_parameter, whitening_metric
from zipformer_crctc.schedule import set_batch_count

ROOT = Path(__file__).resolve().parents[1]
needs_kernels = pytest.mark.skipif(
    not native.suits(torch.zeros(1)), reason="no C compiler, or kernels are switched off"
)

T, N, C = 13, 3, 37
Compute = Callable[[list[Tensor]], Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(0)
    torch.manual_seed(0)


def assert_same(compute: Compute, inputs: list[Tensor], tolerance: float = 1e-5) -> None:
    """Outputs and gradients of the kernels are those of PyTorch's operations in float64."""

    def results(dtype: torch.dtype) -> list[Tensor]:
        given = [x.to(dtype).requires_grad_() for x in inputs]
        random.seed(1)
        torch.manual_seed(1)
        y = compute(given)
        torch.manual_seed(2)
        return [y, *torch.autograd.grad(y, given, torch.randn(y.shape).to(dtype))]

    for found, want in zip(results(torch.float32), results(torch.float64), strict=True):
        assert torch.allclose(found.double(), want, rtol=tolerance, atol=tolerance * float(want.detach().abs().max()))


@needs_kernels
@pytest.mark.parametrize("kind", [SWOOSH_L, SWOOSH_R])
@pytest.mark.parametrize("masked", [False, True])
def test_swoosh_before_a_linear_layer(kind: tuple[float, float], masked: bool) -> None:
    mask = (torch.rand(1, N, C) > 0.3).float() / 0.7 if masked else None

    def compute(given: list[Tensor]) -> Tensor:
        x, weight, bias = given
        return swoosh_linear(x, weight, bias, kind, None if mask is None else mask.to(x.dtype))

    assert_same(compute, [8 * torch.randn(T, N, C), torch.randn(5, C), torch.randn(5)])


@needs_kernels
def test_swoosh_far_from_zero_and_of_images() -> None:
    x = torch.tensor([[-1e5, -200.0, -88.0, -20.0, 0.0, 1.0, 4.0, 20.0, 88.0, 200.0, 1e5]])
    assert_same(lambda given: swoosh_l(given[0]), [x])
    image = torch.randn(2, 5, 6, 7).contiguous(memory_format=torch.channels_last)
    assert swoosh_l(image).is_contiguous(memory_format=torch.channels_last)
    assert_same(lambda given: swoosh_l(given[0]), [image])


@needs_kernels
@pytest.mark.parametrize("padded", [False, True])
def test_gates(padded: bool) -> None:
    """Halves of one array, as a layer's projection gives them; the padding of a slower frame rate is a strided view."""
    padding = torch.rand(N, 2 * T)[:, ::2] > 0.7 if padded else None
    inputs = [4 * torch.randn(T, N, 2 * C)]

    def halves(given: list[Tensor]) -> tuple[Tensor, Tensor]:
        x, gate = given[0].chunk(2, dim=-1)
        return x, gate

    assert_same(lambda given: gated(*halves(given), padding=padding), inputs)
    if not padded:
        assert_same(lambda given: tanh_gated(*halves(given)), inputs)


def module_of(given: list[Tensor], module: BiasNorm | Bypass) -> None:
    """Put tensors in place of a module's parameters."""
    for (name, _), value in zip(list(module.named_parameters()), given, strict=True):
        delattr(module, name)
        setattr(module, name, value)


@needs_kernels
@pytest.mark.parametrize("skipped", [0.0, 0.5])
def test_norm_alone_and_with_a_bypass(skipped: float) -> None:
    def alone(given: list[Tensor]) -> Tensor:
        norm = BiasNorm(C)
        module_of(given[1:3], norm)
        return norm(given[0])

    def with_bypass(given: list[Tensor]) -> Tensor:
        norm, bypass = BiasNorm(C), Bypass(C, skip_rate=skipped)
        module_of(given[1:3], norm)
        module_of(given[3:4], bypass)
        return norm(given[0], (given[4], bypass))

    inputs = [torch.randn(T, N, C), torch.tensor(0.3), torch.randn(C)]
    assert_same(alone, inputs)
    assert_same(with_bypass, [*inputs, torch.rand(C), torch.randn(T, N, C)])


@needs_kernels
@pytest.mark.parametrize("repeat", [1, 2, 4])
@pytest.mark.parametrize("skipped", [0.0, 0.5])
def test_bypass(repeat: int, skipped: float) -> None:
    def compute(given: list[Tensor]) -> Tensor:
        bypass = Bypass(C, skip_rate=skipped)
        module_of(given[2:], bypass)
        return bypass(given[0], given[1], repeat)

    assert_same(compute, [torch.randn(T, N, C), torch.randn(-(-T // repeat), N, C), torch.rand(C)])


@needs_kernels
@pytest.mark.parametrize("dim", [-1, 1])
def test_balancer(dim: int) -> None:
    """Of channels out of every limit, in a part of a wider array and in an image."""
    scales = torch.logspace(-3, 2, C)
    x = torch.randn(T, N, 2 * C) * scales.repeat(2) + scales.repeat(2) if dim == -1 else torch.randn(2, C, 5, 7)

    def compute(given: list[Tensor]) -> Tensor:
        balancer = Balancer(dim, min_positive=0.4, max_positive=0.6, min_abs=0.5, max_abs=2.0, prob=1.0)
        part = given[0][..., :C] if dim == -1 else given[0].contiguous(memory_format=torch.channels_last)
        return balancer(part) * 1.0

    assert_same(compute, [x])


def test_balancer_of_an_image_with_a_gradient_for_each_channel() -> None:
    x = torch.randn(2, 6, 5, 4).to(memory_format=torch.channels_last).requires_grad_()
    balancer, of_channel = Balancer(1, min_abs=5.0, prob=1.0).train(), torch.randn(6)
    found, want = (
        torch.autograd.grad((balancer(given).sum((0, 2, 3)) * of_channel).sum(), given)[0]
        for given in (x, x.detach().contiguous().requires_grad_())
    )
    assert torch.allclose(found, want, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("frames", [T, 500])
def test_whiten(groups: int, frames: int) -> None:
    """Above its limit, for a part of a wider array."""
    x = torch.randn(frames, N, 48) * torch.linspace(0.1, 3.0, 48) + torch.randn(frames, N, 1)

    def compute(given: list[Tensor]) -> Tensor:
        module = Whiten(groups, 1.1, grad_scale=0.1).train()
        module.prob = 1.0
        return module(given[0][..., :32]) * 1.0

    assert_same(compute, [x])
    x = x.detach()
    metric, slope = whitening_metric(x, groups)
    with native.disabled():
        want, want_slope = whitening_metric(x, groups)
    assert metric.item() == pytest.approx(want.item(), rel=1e-5)
    assert torch.allclose(slope, want_slope, rtol=1e-4, atol=1e-5 * float(want_slope.abs().max()))


@needs_kernels
@pytest.mark.parametrize("shape", [(), (70,)])
def test_limits_of_parameters(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random, "random", lambda: 0.0)
    for _ in range(20 if shape == () else 1):
        assert_same(lambda given: limit_parameter(given[0], -0.5, 0.3) * 1.0, [torch.randn(shape)])


@needs_kernels
def test_a_model_is_the_same_without_kernels() -> None:
    """All regularisers included; large steps of a random model would show any difference."""
    model = build_model(tiny().model, 12).train()
    set_batch_count(model, 20_000.0)
    features, num_frames = torch.randn(3, 77, 80), torch.tensor([77, 70, 61])

    def gradients() -> list[Tensor]:
        random.seed(0)
        torch.manual_seed(0)
        log_probs, _ = model(features, num_frames)
        grads = torch.autograd.grad(log_probs.square().mean(), list(model.parameters()), allow_unused=True)
        return [log_probs.detach(), *(grad for grad in grads if grad is not None)]

    found = gradients()
    with native.disabled():
        want = gradients()
    largest = max(float(b.norm()) for b in want[1:])
    for a, b in zip(found, want, strict=True):
        assert float((a - b).norm()) < 2e-3 * max(float(b.norm()), 1e-3 * largest)


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    norm, x, original = BiasNorm(64), torch.randn(200, 4, 64), torch.randn(200, 4, 64)
    bypass, given, before = Bypass(64), x.requires_grad_(), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = norm(given, (original, bypass))
            found.append(torch.autograd.grad((y**3).sum(), [x, norm.bias, bypass.bypass_scale]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


SUITS = "import torch; from zipformer_crctc import native; print(native.suits(torch.zeros(1)))"


def suits_in(tmp_path: Path, code: str = SUITS, **variables: str) -> str:
    """What a process of its own says, with a cache of its own."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **variables}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return run.stdout.strip()


@needs_kernels
def test_kernels_are_built_once(tmp_path: Path) -> None:
    assert suits_in(tmp_path) == "True"
    (built,) = tmp_path.rglob("*.so")
    made = built.stat().st_mtime_ns
    assert suits_in(tmp_path) == "True"
    assert built.stat().st_mtime_ns == made and list(tmp_path.rglob("*.part")) == []


def test_nothing_is_built_where_it_cannot_be(tmp_path: Path) -> None:
    """Without a compiler, or where the environment says so; the reason is logged."""
    assert suits_in(tmp_path, ZIPA_NATIVE="0") == "False"
    logged = "import logging; logging.basicConfig(level=20, stream=__import__('sys').stdout);" + SUITS
    said = suits_in(tmp_path, logged, PATH="/nowhere")
    assert "no C compiler" in said and said.endswith("False")
    assert list(tmp_path.rglob("*.so")) == []


@needs_kernels
def test_a_damaged_library_is_built_again(tmp_path: Path) -> None:
    assert suits_in(tmp_path) == "True"
    (built,) = tmp_path.rglob("*.so")
    built.write_bytes(b"")
    assert suits_in(tmp_path) == "True"
    assert built.stat().st_size > 1000


@needs_kernels
def test_threads_that_start_together_all_have_kernels(tmp_path: Path) -> None:
    code = """
import torch, threading
from zipformer_crctc import native
found = []
threads = [threading.Thread(target=lambda: found.append(native.suits(torch.zeros(1)))) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(found)
"""
    assert suits_in(tmp_path, code) == "[True, True, True]"


@needs_kernels
@pytest.mark.parametrize("fails", ["printf '\\377\\n' >&2; exit 1", "exit 1"])
def test_a_compiler_that_fails_is_no_error(tmp_path: Path, fails: str) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{fails}\n")
    compiler.chmod(0o755)
    assert suits_in(tmp_path, CC=str(compiler)) == "False"


def test_all_processes_use_kernels_or_none_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_enabled", True)
    native.use_on_all_or_none([True, True])
    assert native._enabled
    native.use_on_all_or_none([True, False])
    assert not native._enabled


@needs_kernels
def test_masks_that_are_broadcast() -> None:
    """As without kernels: padding of one utterance for all, masks that are expanded."""
    x, gate, padding = torch.randn(T, N, C), torch.randn(T, N, C), torch.rand(1, T) > 0.5
    assert torch.allclose(gated(x, gate, padding), gated(x, gate, padding.expand(N, T).contiguous()))
    mask = torch.rand(1, 1, C).expand(1, N, C)
    weight = torch.randn(5, C)
    found = swoosh_linear(x, weight, None, SWOOSH_L, mask)
    assert torch.allclose(found, swoosh_linear(x, weight, None, SWOOSH_L, mask.contiguous()), atol=1e-5)
    assert swoosh_l(torch.tensor(4.0)).item() == pytest.approx(0.338147, abs=1e-5)
    assert swoosh_l(torch.zeros(2, 0)).shape == (2, 0)


def test_what_does_not_suit() -> None:
    assert not native.suits(torch.zeros(2, dtype=torch.float64))
    assert not native.suits(torch.zeros(3, 2).t())
    with native.disabled():
        assert not native.suits(torch.zeros(1))
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.suits(torch.zeros(1))
