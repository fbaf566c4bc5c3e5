from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from golden_checks.training import CHECKERS
from gpu_device import DEVICE, kernels
from zipformer_crctc import gpu_optim, native
from zipformer_crctc.optim import ScaledAdam

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture(autouse=True)
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """With small chunks, so that small tensors have several."""
    monkeypatch.setattr(gpu_optim, "CHUNK", 64)
    monkeypatch.setattr(gpu_optim, "PARAMS_AT_ONCE", 4)
    monkeypatch.setattr(gpu_optim, "CHUNKS_AT_ONCE", 4)
    with kernels():
        yield


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The factors of the updates that the kernels have made."""
    made: list[float] = []
    update = gpu_optim.GpuKernels.update

    def counted(kernels: gpu_optim.GpuKernels, step: int, factor: float) -> None:
        made.append(factor)
        update(kernels, step, factor)

    monkeypatch.setattr(gpu_optim.GpuKernels, "update", counted)
    return made


def varied_model() -> dict[str, nn.Parameter]:
    """Scalars, stacks of several, other orders of axes, views, and sizes beyond the limits."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"scale": (), "b.scale": (), "gain": (1, 1), "bias": (5,), "conv": (6, 4, 3, 3), "point": (4, 6, 1, 1)}
    shapes |= {f"{name}.weight": (7, 9) for name in "abcd"} | {"wide": (3, 111), "whole": (2, 64), "e.weight": (7, 9)}
    shapes |= {"small": (4,), "zero": (7,), "none": (0,), "c.scale": ()}
    params = {n: nn.Parameter((0.3 * torch.randn(s, generator=generator)).to(DEVICE)) for n, s in shapes.items()}
    for name in ("conv", "point"):
        params[name].data = params[name].data.to(memory_format=torch.channels_last)
    params["a.weight"].data = params["a.weight"].data.t().contiguous().t()
    # Part of something else: not at the beginning of a line of the memory.
    params["c.weight"].data = torch.empty(100, device=DEVICE)[5:68].view(7, 9).copy_(params["c.weight"].data)
    params["small"].data.mul_(1e-6)  # below the least rms
    params["bias"].data.mul_(12)  # above the largest
    params["scale"].data.fill_(9.99)
    params["zero"].data.zero_()
    return params


def set_grads(params: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params.values():
        p.grad = ((30.0 if step == 12 else 1.0) * torch.randn(p.shape, generator=generator)).to(DEVICE)
    params["b.weight"].grad = params["b.weight"].grad.t().contiguous().t()  # type: ignore[union-attr]
    params["scale"].grad = -torch.ones((), device=DEVICE)
    if step % 3 == 1:
        params["c.weight"].grad = params["b.scale"].grad = params["wide"].grad = None
    if step == 13:
        params["d.weight"].grad[0, 7] = math.inf  # type: ignore[index]
    if step == 14:
        for p in params.values():
            p.grad = None


def varied_optimizer(params: dict[str, nn.Parameter]) -> ScaledAdam:
    named = list(params.items())
    return ScaledAdam(
        [
            {"named_params": named[:10]},
            {"named_params": named[10:12], "lr": 0.02, "betas": (0.8, 0.95), "size_update_period": 3},
            {"named_params": named[12:], "clipping_scale": None, "param_min_rms": 1e-4, "param_max_rms": 1},
        ],
        lr=0.05,
        clipping_scale=2.0,
    )


def run(params: dict[str, nn.Parameter], optimizer: ScaledAdam, steps: range) -> list[list[float]]:
    factors = []
    for step in steps:
        set_grads(params, step)
        optimizer.step()
        factors.append(optimizer.clip_factors)
    return factors


def assert_equal(
    params: dict[str, nn.Parameter], optimizer: ScaledAdam, twins: dict[str, nn.Parameter], twin: ScaledAdam
) -> None:
    for name, twin_param in twins.items():
        size = twin_param.detach().abs().max().item() if twin_param.numel() else 0.0
        torch.testing.assert_close(params[name], twin_param, rtol=1e-5, atol=2e-6 * size)
    states, want = optimizer.state_dict()["state"], twin.state_dict()["state"]
    assert states.keys() == want.keys()
    for index, state in states.items():
        assert state.keys() == want[index].keys()
        for key, value in want[index].items():
            atol = 3e-5 if key == "scale_grads" else 1e-6  # sums over many values of both signs
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=atol, equal_nan=True)


def test_kernels_equal_operations(updates: list[float]) -> None:
    params, twins = varied_model(), varied_model()
    optimizer, twin = varied_optimizer(params), varied_optimizer(twins)
    for steps in (range(1), range(1, 6), range(6, 13), range(13, 17)):
        factors = run(params, optimizer, steps)
        with native.disabled():
            want = run(twins, twin, steps)
        torch.testing.assert_close(factors, want, rtol=1e-5, atol=0)
        assert_equal(params, optimizer, twins, twin)
        # The state is elsewhere from now on, and what another optimizer needs to go on is in it.
        state, optimizer = optimizer.state_dict(), varied_optimizer(params)
        optimizer.load_state_dict(state)
    assert len(updates) == 3 * 17
    assert {0.0, 1.0} < set(updates)
    assert params["conv"].is_contiguous(memory_format=torch.channels_last)
    assert any(not torch.equal(p, params[name]) for name, p in varied_model().items())


def test_state_loaded_into_the_same_optimizer() -> None:
    params = varied_model()
    optimizer = varied_optimizer(params)
    run(params, optimizer, range(3))
    saved = {name: p.detach().clone() for name, p in params.items()}
    state = copy.deepcopy(optimizer.state_dict())
    run(params, optimizer, range(3, 6))
    first = {name: p.detach().clone() for name, p in params.items()}
    for name, p in params.items():
        p.data.copy_(saved[name])
    optimizer.load_state_dict(state)
    run(params, optimizer, range(3, 6))
    assert all(torch.equal(p, first[name]) for name, p in params.items())


@pytest.mark.parametrize("clipping_scale", [2.0, None])
def test_chunks_of_the_usual_size(
    monkeypatch: pytest.MonkeyPatch, updates: list[float], clipping_scale: float | None
) -> None:
    monkeypatch.undo()
    sizes = [1, 2, gpu_optim.CHUNK - 1, gpu_optim.CHUNK, gpu_optim.CHUNK + 1, 3 * gpu_optim.CHUNK - 5]
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(size, generator=generator) for size in sizes]
    params, twins = ([nn.Parameter(value.clone().to(DEVICE)) for value in values] for _ in range(2))
    optimizer, twin = (ScaledAdam(of, lr=0.05, clipping_scale=clipping_scale) for of in (params, twins))
    for _ in range(5):
        for p, q in zip(params, twins, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
            q.grad = p.grad.clone()
        optimizer.step()
        with native.disabled():
            twin.step()
    assert_equal(dict(enumerate(params)), optimizer, dict(enumerate(twins)), twin)  # type: ignore[arg-type]


def test_tables_are_kept_while_true() -> None:
    params = {"a": nn.Parameter(torch.ones(3, 50, device=DEVICE)), "b": nn.Parameter(torch.ones((), device=DEVICE))}
    optimizer = ScaledAdam(list(params.values()))
    tables = []
    for step in range(3):
        for p in params.values():
            if p.grad is None:
                p.grad = torch.ones_like(p)
        if step == 2:
            params["a"].grad = torch.ones(3, 50, device=DEVICE)  # the one before is still there, so elsewhere
        optimizer.step()
        kept = optimizer._tables[0]
        tables.append((kept.params, kept.chunks, kept.addresses))
    assert all(a is b for a, b in zip(tables[0], tables[1], strict=True))
    assert tables[1][0] is tables[2][0] and tables[1][2] is not tables[2][2]
    assert tables[0][1].tolist() == [[0, 0], [1, 0], [1, 64], [1, 128]]


def test_gradients_are_not_kept() -> None:
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad = torch.ones(3, device=DEVICE)
    optimizer = ScaledAdam([p])
    optimizer.step()
    grad = weakref.ref(p.grad)
    optimizer.zero_grad()
    assert grad() is None


def test_results_do_not_depend_on_addresses() -> None:
    results = []
    for offset in (0, 1, 6):
        params = varied_model()
        for p in params.values():
            if p.is_contiguous():
                p.data = torch.empty(p.numel() + offset, device=DEVICE)[offset:].view(p.shape).copy_(p.data)
        run(params, varied_optimizer(params), range(4))
        results.append(params)
    assert all(torch.equal(p, other[name]) for other in results[1:] for name, p in results[0].items())


def test_kernels_are_seen_by_autograd(updates: list[float]) -> None:
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    loss = p.square().sum()
    p.grad = torch.ones(3, device=DEVICE)
    ScaledAdam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert updates == [1.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_take_operations(updates: list[float], dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.ones(3, dtype=dtype, device=DEVICE))
    p.grad = torch.ones_like(p)
    ScaledAdam([p], clipping_scale=2.0).step()
    assert updates == [] and (p < 1).all()


def test_a_state_that_does_not_fit_is_refused(updates: list[float]) -> None:
    p = nn.Parameter(torch.ones(3, device=DEVICE))
    optimizer = ScaledAdam([p])
    optimizer.param_groups[0]["size_update_period"] = 2
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.param_groups[0]["size_update_period"] = 20
    with pytest.raises(IndexError):
        for _ in range(3):
            optimizer.step()
    assert len(updates) == 1


@pytest.mark.parametrize("name", ["clip", "eden", "groups", "inf", "noclip"])
@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: takes minutes in the interpreter")
def test_golden(name: str) -> None:
    path = GOLDEN / f"50_scaled_adam_{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no reference fixtures at {GOLDEN}")
    torch.set_default_device(DEVICE)
    try:
        failed = [result for result in CHECKERS["50"](path) if not result.ok]
    finally:
        torch.set_default_device(None)
    assert not failed
