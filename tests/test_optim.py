from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from golden_checks.training import CHECKERS
from zipformer_crctc import native
from zipformer_crctc.optim import EARLY_THRESHOLD_STEPS, ScaledAdam

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


needs_kernels = pytest.mark.skipif(not native.suits(torch.zeros(1)), reason="no C kernels: they need a C compiler")


@pytest.fixture(params=[pytest.param("kernels", marks=needs_kernels), "operations"])
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """The optimizer's work in C and by PyTorch's operations."""
    if request.param == "kernels":
        yield
    else:
        with native.disabled():
            yield


def u(k: int, r: int) -> float:
    """Pseudo-random number in [-1, 1] that is the same everywhere."""
    return ((7919 * k * k + 104729 * k + 1299709 * r + 12345) % 65537) / 32768 - 1


def u_tensor(r: int, *shape: int) -> Tensor:
    return torch.tensor([u(k, r) for k in range(math.prod(shape))], dtype=torch.float64).reshape(shape).float()


def small_model(seed: int = 0) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    shapes = {"a.weight": (3, 4), "scale": (), "b.weight": (3, 4), "bias": (5,), "gain": (1,), "b.scale": ()}
    return {name: nn.Parameter(0.5 * torch.randn(shape)) for name, shape in shapes.items()}


def set_grads(params: dict[str, nn.Parameter], step: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params.values():
        p.grad = size * torch.randn(p.shape, generator=generator)


def make(params: dict[str, nn.Parameter], lr: float = 0.05, clipping_scale: float | None = 2.0) -> ScaledAdam:
    return ScaledAdam([{"named_params": list(params.items())}], lr=lr, clipping_scale=clipping_scale)


def run(params: dict[str, nn.Parameter], optimizer: ScaledAdam, steps: range) -> None:
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def same(a: dict[str, nn.Parameter], b: dict[str, nn.Parameter]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.usefixtures("way")
def test_known_trajectory() -> None:
    """Values from an independent run of the published optimizer, clipping included (the spike at step 15)."""
    a, s = nn.Parameter(0.5 * u_tensor(1, 3, 4)), nn.Parameter(torch.tensor(0.3))
    optimizer = ScaledAdam([{"named_params": [("A", a), ("s", s)]}], lr=0.05, clipping_scale=2.0)
    want = {
        1: (-0.4782229, -0.2827940, 0.2995000),
        4: (-0.4647072, -0.2728803, 0.3024422),
        8: (-0.4527080, -0.2651269, 0.3051551),
        16: (-0.4201553, -0.2355115, 0.3162881),
        24: (-0.4163477, -0.1944399, 0.3284897),
    }
    for step in range(24):
        size = 10.0 if step == 15 else 1.0
        a.grad, s.grad = size * u_tensor(100 + step, 3, 4), torch.tensor(0.1 * size * u(0, 200 + step))
        optimizer.step()
        if step + 1 in want:
            got = (a[0, 0].item(), a[2, 3].item(), s.item())
            assert got == pytest.approx(want[step + 1], abs=2e-6)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["clip", "eden", "groups", "inf", "noclip"])
def test_golden(name: str) -> None:
    path = GOLDEN / f"50_scaled_adam_{name}.safetensors"
    if not path.is_file():
        pytest.skip(f"no reference fixtures at {GOLDEN}")
    failed = [result for result in CHECKERS["50"](path) if not result.ok]
    assert not failed


def test_forms_of_parameters_are_equal() -> None:
    forms = []
    for form in (
        lambda p: [{"named_params": list(p.items())}],
        lambda p: [{"params": list(p.values())}],
        lambda p: list(p.values()),
        lambda p: list(p.items()),
    ):
        params = small_model()
        run(params, ScaledAdam(form(params), lr=0.05, clipping_scale=2.0), range(6))
        forms.append(params)
    assert all(same(forms[0], other) for other in forms[1:])
    assert not same(forms[0], small_model())


def test_no_parameters() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        ScaledAdam([])


def test_both_names_of_parameters() -> None:
    p = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="both named_params and params"):
        ScaledAdam([{"named_params": [("p", p)], "params": [p]}])


def test_state_layout() -> None:
    params = small_model()
    optimizer = make(params)
    run(params, optimizer, range(12))
    names = list(params)
    state = {names[index]: value for index, value in optimizer.state_dict()["state"].items()}
    assert set(state) == {"a.weight", "scale", "bias", "gain"}  # the first of each stack
    common = {"step", "delta", "exp_avg_sq"}
    tensors = common | {"param_rms", "scale_exp_avg_sq", "scale_grads"}
    clipping = {"model_norms", "model_norm_threshold", "num_clipped"}
    assert set(state["scale"]) == common | clipping  # the first stack: scalars before all others
    assert set(state["gain"]) == common
    assert set(state["a.weight"]) == set(state["bias"]) == tensors
    assert state["a.weight"]["step"] == 12
    assert state["a.weight"]["delta"].shape == state["a.weight"]["exp_avg_sq"].shape == (2, 3, 4)
    assert state["a.weight"]["param_rms"].shape == state["a.weight"]["scale_exp_avg_sq"].shape == (2, 1, 1)
    assert state["a.weight"]["scale_grads"].shape == (4, 2, 1, 1)
    assert state["scale"]["delta"].shape == (2,)
    assert state["gain"]["delta"].shape == (1, 1)
    assert state["scale"]["model_norms"].shape == (100,)
    group = optimizer.state_dict()["param_groups"][0]
    assert group["betas"] == (0.9, 0.98)
    assert group["params"] == list(range(6))


@pytest.mark.usefixtures("way")
def test_published_state_is_read() -> None:
    """A state dict built by hand in the published layout, then one step worked out by hand."""
    params = small_model()
    before = {name: p.detach().clone() for name, p in params.items()}
    full = torch.full
    state: dict[int, dict[str, object]] = {
        0: {
            "step": 400,
            "delta": full((2, 3, 4), 0.01),
            "exp_avg_sq": full((2, 3, 4), 4.0),
            "param_rms": torch.tensor([0.5, 0.25]).view(2, 1, 1),
            "scale_exp_avg_sq": full((2, 1, 1), 1.0),
            "scale_grads": torch.zeros(4, 2, 1, 1),
        },
        1: {
            "step": 400,
            "delta": full((2,), 0.02),
            "exp_avg_sq": full((2,), 1.0),
            "model_norms": full((100,), 1.0),
            "model_norm_threshold": torch.tensor(2.0),
            "num_clipped": 3,
        },
        3: {
            "step": 400,
            "delta": full((1, 5), -0.01),
            "exp_avg_sq": full((1, 5), 1.0),
            "param_rms": full((1, 1), 0.1),
            "scale_exp_avg_sq": full((1, 1), 1.0),
            "scale_grads": torch.zeros(4, 1, 1),
        },
        4: {"step": 400, "delta": full((1, 1), 0.0), "exp_avg_sq": full((1, 1), 1.0)},
    }
    group = {"lr": 0.02, "base_lr": 0.03, "params": list(range(6)), **make(params).defaults, "clipping_scale": 2.0}
    group["lr"] = 0.02
    optimizer = make(params, lr=0.5)
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    assert optimizer.param_groups[0]["lr"] == 0.02
    for p in params.values():
        p.grad = torch.full_like(p, 2.0)
    params["scale"].grad = None
    optimizer.step()

    # Norm: 12 elements of 2 in a.weight and b.weight with their rms, 5 in the bias, two scalars times 0.1.
    # At step 400, a multiple of 100, the threshold is 2 * median of 99 ones and this norm = 2.
    norm = math.sqrt(48 * 0.5**2 + 48 * 0.25**2 + 20 * 0.1**2 + 2 * 0.2**2)
    factor = 2.0 / norm
    assert optimizer.clip_factors == pytest.approx([factor])
    grad = 2 * factor
    square = 0.98 * 4.0 + 0.02 * grad**2
    for name, rms in (("a.weight", 0.5), ("b.weight", 0.25)):
        delta = 0.9 * 0.01 - 0.02 * 0.1 * rms * grad / math.sqrt(square)
        torch.testing.assert_close(params[name].detach(), before[name] + delta)
    delta = 0.9 * 0.02  # no gradient, so no new step
    torch.testing.assert_close(params["scale"].detach(), before["scale"] + delta)
    new = optimizer.state_dict()["state"]
    assert new[1]["num_clipped"] == 1
    assert new[1]["model_norms"][0].item() == pytest.approx(norm)
    assert all(entry["step"] == 401 for entry in new.values())


@pytest.mark.usefixtures("way")
def test_resume_is_exact(tmp_path: Path) -> None:
    straight, first = small_model(), small_model()
    run(straight, make(straight), range(30))
    optimizer = make(first)
    run(first, optimizer, range(13))
    torch.save({"optimizer": optimizer.state_dict(), "params": first}, tmp_path / "half.pt")
    saved = torch.load(tmp_path / "half.pt", weights_only=True)
    second = {name: nn.Parameter(p.detach().clone()) for name, p in saved["params"].items()}
    optimizer = make(second, lr=0.001)
    optimizer.load_state_dict(saved["optimizer"])
    run(second, optimizer, range(13, 30))
    assert same(straight, second)


def test_state_of_another_model_is_refused() -> None:
    params = small_model()
    optimizer = make(params)
    run(params, optimizer, range(2))
    state = optimizer.state_dict()

    fewer = {name: p for name, p in small_model().items() if name != "gain"}
    with pytest.raises(ValueError, match=r"groups of \[6\] parameters, here are \[5\]"):
        make(fewer).load_state_dict(state)
    wider = small_model()
    wider["bias"] = nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match=r"bias has shape \(1, 5\), expected \(1, 7\)"):
        make(wider).load_state_dict(state)
    other_order = dict(reversed(small_model().items()))
    with pytest.raises(ValueError, match=r"b\.scale has shape \(2, 3, 4\), expected \(2,\)"):
        make(other_order).load_state_dict(state)
    without = copy.deepcopy(state)
    del without["state"][3]
    with pytest.raises(ValueError, match="bias leads a stack"):
        make(small_model()).load_state_dict(without)


def test_clipping_begins_after_step_10() -> None:
    params = small_model()
    optimizer = make(params)
    for step in range(60):
        set_grads(params, step, 1e3 if step in (5, 12) else 1.0)
        optimizer.step()
        if step in (12,):
            assert optimizer.clip_factors[0] < 0.1
        elif step < EARLY_THRESHOLD_STEPS[0]:
            assert optimizer.clip_factors == [1.0]


@pytest.mark.usefixtures("way")
def test_infinite_gradients_become_zero(caplog: pytest.LogCaptureFixture) -> None:
    params = small_model()
    optimizer = make(params)
    run(params, optimizer, range(20))
    zeroed = copy.deepcopy(params)
    twin = make(zeroed)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_grads(params, 20)
    bias_grad = params["bias"].grad
    assert bias_grad is not None
    bias_grad[2] = math.inf
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert optimizer.clip_factors == [0.0]
    assert "bias" in caplog.text
    twin.zero_grad()
    twin.step()
    assert same(params, zeroed)


@pytest.mark.usefixtures("way")
def test_warning_names_the_dominating_parameter(caplog: pytest.LogCaptureFixture) -> None:
    params = small_model()
    optimizer = make(params)
    run(params, optimizer, range(20))
    set_grads(params, 20)
    params["b.weight"].grad = 1e4 * torch.ones(3, 4)
    before = params["b.weight"].grad.clone()
    with caplog.at_level(logging.WARNING):
        optimizer.step()
    assert optimizer.clip_factors[0] < 0.1
    assert "b.weight has 100% of the squared norm" in caplog.text
    assert torch.equal(params["b.weight"].grad, before)  # the gradients themselves are left as they were


@pytest.mark.usefixtures("way")
def test_too_many_infinite_norms() -> None:
    params = small_model()
    optimizer = make(params)
    run(params, optimizer, range(4))
    with pytest.raises(RuntimeError, match="gradient norms are infinite or NaN"):
        for step in range(4, 12):
            set_grads(params, step, math.inf)
            optimizer.step()


@pytest.mark.usefixtures("way")
def test_sizes_are_limited() -> None:
    """A tensor and a scalar pushed outwards stop near their limits."""
    big, scalar = nn.Parameter(2.9 * torch.ones(4)), nn.Parameter(torch.tensor(9.9))
    optimizer = ScaledAdam([big, scalar], lr=0.02)
    for _ in range(400):
        big.grad, scalar.grad = -big.detach(), torch.tensor(-1.0)
        optimizer.step()
    # Four steps outwards of lr times the rms balance one size update towards 3.
    assert big.detach().square().mean().sqrt() == pytest.approx(3 / (1 - 4 * 0.02), rel=0.02)
    assert scalar.item() == pytest.approx(10 + 0.1 * 0.02, abs=1e-4)  # clamped before the last update


def varied_model() -> dict[str, nn.Parameter]:
    """Scalars, stacks of several, other orders of axes, sizes beyond the limits, and enough values for two threads."""
    generator = torch.Generator().manual_seed(5)
    shapes = {"scale": (), "b.scale": (), "gain": (1, 1), "bias": (5,), "conv": (6, 4, 3, 3), "point": (4, 6, 1, 1)}
    shapes |= {f"{name}.weight": (70, 61) for name in "abcde"} | {"wide": (3, 2777), "small": (4,), "empty": (7,)}
    params = {name: nn.Parameter(0.3 * torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    for name in ("conv", "point"):
        params[name].data = params[name].data.to(memory_format=torch.channels_last)
    params["small"].data.mul_(1e-6)  # below the least rms
    params["bias"].data.mul_(12)  # above the largest
    params["scale"].data.fill_(9.99)
    params["empty"].data.zero_()
    return params


def set_varied_grads(params: dict[str, nn.Parameter], step: int) -> None:
    set_grads(params, step, 30.0 if step in (33, 70) else 1.0)
    params["b.weight"].grad = params["b.weight"].grad.t().contiguous().t()  # type: ignore[union-attr]
    params["scale"].grad = -torch.ones(())
    if step % 3 == 1:
        params["c.weight"].grad = params["b.scale"].grad = params["wide"].grad = None
    if step in (10, 11):
        params["d.weight"].grad = torch.zeros(70, 61)
    if step in (50, 51):
        params["e.weight"].grad[0, 7] = math.inf  # type: ignore[index]
    if step == 52:
        for p in params.values():
            p.grad = None


def varied_optimizer(params: dict[str, nn.Parameter]) -> ScaledAdam:
    named = list(params.items())
    return ScaledAdam(
        [
            {"named_params": named[:9]},
            {"named_params": named[9:12], "lr": 0.02, "betas": (0.8, 0.95), "size_update_period": 3},
            {"named_params": named[12:], "clipping_scale": None, "param_min_rms": 1e-4, "param_max_rms": 1.0},
        ],
        lr=0.05,
        clipping_scale=2.0,
    )


def run_varied(params: dict[str, nn.Parameter], optimizer: ScaledAdam, steps: range) -> list[list[float]]:
    factors = []
    for step in steps:
        set_varied_grads(params, step)
        optimizer.step()
        factors.append(optimizer.clip_factors)
    return factors


@needs_kernels
def test_kernels_equal_operations() -> None:
    params, twins = varied_model(), varied_model()
    optimizer, twin = varied_optimizer(params), varied_optimizer(twins)
    all_factors: list[float] = []
    for start in range(0, 120, 10):
        factors = run_varied(params, optimizer, range(start, start + 10))
        with native.disabled():
            want = run_varied(twins, twin, range(start, start + 10))
        torch.testing.assert_close(factors, want, rtol=1e-5, atol=0)
        for name, twin_param in twins.items():
            size = twin_param.detach().abs().max().item()
            torch.testing.assert_close(params[name], twin_param, rtol=1e-5, atol=5e-6 * size)
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in twin.state_dict()["state"][index].items():
                atol = 3e-5 if key == "scale_grads" else 1e-6  # sums over thousands of values of both signs
                torch.testing.assert_close(state[key], value, rtol=1e-5, atol=atol)
        all_factors += [factor for of_step in factors for factor in of_step]
    assert {0.0, 1.0} < set(all_factors)
    assert params["conv"].is_contiguous(memory_format=torch.channels_last)
    assert not same(twins, varied_model())


@needs_kernels
def test_kernels_do_not_depend_on_threads_or_addresses() -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads, offset in ((1, 0), (2, 0), (3, 1), (1, 5)):
            torch.set_num_threads(threads)
            params = varied_model()
            for p in params.values():
                if p.is_contiguous():
                    place = torch.empty(p.numel() + offset)[offset:].view(p.shape)
                    p.data = place.copy_(p.data)
            run_varied(params, varied_optimizer(params), range(30))
            results.append(params)
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results[1:])


@needs_kernels
def test_kernels_are_seen_by_autograd() -> None:
    p = nn.Parameter(torch.ones(3))
    loss = p.square().sum()
    p.grad = torch.ones(3)
    ScaledAdam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_kernels_do_not_take() -> None:
    """Other types take PyTorch's operations; a state that does not fit is refused rather than overrun."""
    single, double = small_model(), {name: nn.Parameter(p.detach().double()) for name, p in small_model().items()}
    optimizers = make(single), make(double)
    for step in range(12):
        set_grads(single, step)
        for name, p in single.items():
            double[name].grad = p.grad.double()  # type: ignore[union-attr]
        for optimizer in optimizers:
            optimizer.step()
    for name, p in single.items():
        torch.testing.assert_close(p, double[name].float())
    optimizer = optimizers[0]
    optimizer.param_groups[0]["size_update_period"] = 20
    with pytest.raises(IndexError):
        run(single, optimizer, range(12, 20))


def test_closure() -> None:
    p = nn.Parameter(torch.tensor([1.0, -2.0]))

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    assert ScaledAdam([p]).step(closure).item() == 5.0
    assert p[0] < 1.0 and p[1] > -2.0
