"""The regularisers of a model in training: how often each decides to act, and each seen acting in a real step.

The rates of the limiters and the penalty are measured with all others in test_randomness.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from small_models import (
    BATCH_COUNTS,
    assert_rate,
    loud_first_channel,
    numbers,
    piecewise_linear,
    random_batch,
    small_model,
    small_run,
)
from zipformer_crctc import attention, native, norms
from zipformer_crctc.attention import AttentionWeights
from zipformer_crctc.model import CtcModel
from zipformer_crctc.norms import BiasNorm, Bypass
from zipformer_crctc.objective import Objective
from zipformer_crctc.regularisers import Balancer, ScaleGrad, Whiten
from zipformer_crctc.schedule import set_batch_count

Points = tuple[tuple[float, float], ...]

CALLS = 2_500
DEFAULT_PROB: Points = ((0, 0.5), (8000, 0.125))
POSITIONS_KEPT = 4000.0
"""Adjusted batch count from which on the positional term is never skipped."""


@pytest.fixture(autouse=True)
def seed() -> None:
    random.seed(1)
    torch.manual_seed(1)


# How often: one decision for each call


def regulariser_names(kind: type[nn.Module]) -> list[str]:
    """Those of the front-end and of one layer."""
    others = tuple(f"encoder.encoders.{i}" for i in range(1, 6))
    modules = small_model().named_modules()
    return [name for name, module in modules if isinstance(module, kind) and not name.startswith(others)]


RARE = {"balance_keys": 0.025, "balancer_na": 0.05, "balancer_ff2": 0.05, "balancer_ff3": 0.05}


@pytest.mark.parametrize("name", regulariser_names(Balancer))
@pytest.mark.parametrize("b", BATCH_COUNTS)
def test_rate_of_each_balancer(name: str, b: float) -> None:
    model = small_model()
    set_batch_count(model.train(), b)
    module = model.get_submodule(name)
    x = torch.randn(3, 3, 3, requires_grad=True)
    hits = sum(module(x) is not x for _ in range(CALLS))
    rare = RARE.get(name.rpartition(".")[2])
    assert_rate(hits, CALLS, piecewise_linear(DEFAULT_PROB, b) if rare is None else rare)


WHITEN_LIMITS: dict[str, Points] = {
    "convnext.out_whiten": ((0, 5.0),),
    "encoder_embed.out_whiten": ((0, 4), (20000, 8)),
    "whiten_keys": ((0, 3), (20000, 6)),
    "self_attn1.whiten": ((0, 7.5), (20000, 22.5)),
    "self_attn2.whiten": ((0, 7.5), (20000, 22.5)),
    "feed_forward1.out_whiten": ((0, 7.5), (20000, 15)),
    "feed_forward2.out_whiten": ((0, 7.5), (20000, 15)),
    "feed_forward3.out_whiten": ((0, 7.5), (20000, 15)),
    "nonlin_attention.whiten1": ((0, 5), (20000, 10)),
    "nonlin_attention.whiten2": ((0, 5), (20000, 15)),
    "conv_module1.whiten": ((0, 7.5), (20000, 15)),
    "conv_module2.whiten": ((0, 7.5), (20000, 15)),
    "layers.0.whiten": ((0, 4), (20000, 12)),
}


def whiten_calls(module: Whiten, x: Tensor) -> tuple[int, int]:
    """Calls that looked at the statistics, and calls that changed the gradient."""
    leaf = x.clone().requires_grad_()
    cotangent = torch.ones_like(x)
    looked = changed = 0
    for _ in range(CALLS):
        y = module(leaf)
        if y is not leaf:
            looked += 1
            changed += not torch.equal(torch.autograd.grad(y, leaf, cotangent)[0], cotangent)
    return looked, changed


@pytest.mark.parametrize("name", regulariser_names(Whiten))
@pytest.mark.parametrize("b", BATCH_COUNTS)
def test_rate_of_each_whiten(name: str, b: float) -> None:
    """A quarter of the calls while the metric is above the limit, a fortieth once it was found below."""
    model = small_model()
    set_batch_count(model.train(), b)
    module = model.get_submodule(name)
    assert isinstance(module, Whiten)
    (points,) = (points for place, points in WHITEN_LIMITS.items() if name.endswith(place))
    limit = piecewise_linear(points, b)
    groups = 2 if name.endswith("whiten_keys") else 1
    below, above = (loud_first_channel(share * limit, 30, groups).float() for share in (0.99, 1.01))
    looked, changed = whiten_calls(module, above)
    assert looked == changed
    assert_rate(looked, CALLS, 0.25)
    module.prob = module.min_prob
    looked, changed = whiten_calls(module, below)
    assert changed == 0
    assert_rate(looked, CALLS, 0.025)


def test_whiten_changes_its_rate_with_what_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Whiten(1, 3.0, 0.01).train()
    below, above = (loud_first_channel(metric, 30).requires_grad_() for metric in (2.9, 3.1))
    for x, draw, acts in (
        (below, 0.249, True),  # looks, finds nothing wrong, and looks less often from now on
        (below, 0.026, False),
        (above, 0.026, False),
        (above, 0.024, True),  # finds something
        (above, 0.249, True),
        (above, 0.251, False),
    ):
        monkeypatch.setattr(random, "random", lambda draw=draw: draw)
        y = module(x)
        assert (y is not x) is acts
        y.sum().backward()


# In a real training step with the CR-CTC loss: decisions are forced, and statistics brought out of their limits


class Watch:
    """Names of the regularisers that were called, and of those that changed a gradient."""

    def __init__(self, model: CtcModel, monkeypatch: pytest.MonkeyPatch) -> None:
        self.called: set[str] = set()
        self.acted: set[str] = set()
        self.current = ""
        for name, module in model.named_modules():
            if isinstance(module, Balancer | Whiten | ScaleGrad):
                module.register_full_backward_hook(self._module_hook(name))
            elif isinstance(module, BiasNorm | AttentionWeights):
                module.register_forward_pre_hook(self._enter(name))
            elif isinstance(module, Bypass):  # a layer's norm only asks for its scale
                monkeypatch.setattr(module, "scale", self._scale(name, module.scale))
        monkeypatch.setattr(norms, "limit_parameter", self._function(norms.limit_parameter))
        penalty = self._function(attention.penalise_large_values)
        monkeypatch.setattr(attention, "penalise_large_values", penalty)

    def _note(self, name: str, entering: Tensor, leaving: Tensor) -> None:
        self.called.add(name)
        if not torch.equal(entering, leaving):
            self.acted.add(name)

    def _module_hook(self, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, grad_input: tuple[Tensor, ...], grad_output: tuple[Tensor, ...]) -> None:
            self._note(name, grad_output[0], grad_input[0])

        return hook

    def _enter(self, name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self.current = name

        return hook

    def _scale(self, name: str, scale: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def named(x: Tensor) -> Tensor:
            self.current = name
            return scale(x)

        return named

    def _function(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The function, with a look at the gradient on both of its sides."""

        def watched(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            name = self.current
            entering: list[Tensor] = []
            inner = x.view_as(x)
            inner.register_hook(lambda gradient: self._note(name, entering[0], gradient))
            y = function(inner, *args, **kwargs)
            outer = y.view_as(y)
            outer.register_hook(entering.append)
            return outer

        return watched


def regularised(model: CtcModel) -> set[str]:
    """Names of all modules that regularise something."""
    kinds = Balancer | Whiten | ScaleGrad | BiasNorm | Bypass | AttentionWeights
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


LOUD_ROWS = {
    "encoder_embed.conv.7": [0],
    "encoder_embed.out": [0],
    "self_attn_weights.in_proj": [16, 24],  # the first key of each of the two heads
    "self_attn1.out_proj": [0],
    "self_attn2.out_proj": [0],
    "feed_forward1.out_proj": [0],
    "feed_forward2.out_proj": [0],
    "feed_forward3.out_proj": [0],
    "nonlin_attention.out_proj": [0],
    "depthwise_conv": [0],
}
"""Rows of weights that are made so large that one channel outweighs all others, in front of each Whiten."""


def spoil(model: CtcModel) -> None:
    """Scales of bypasses out of their ranges, loud channels; means and sizes are out of limits as they are."""
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if name.endswith("bypass_scale"):  # half of them below any minimum, half of them above one
                p.copy_(0.6 + 0.7 * numbers(p.shape, i).sign())
            elif name.endswith(".weight"):
                for layer, rows in LOUD_ROWS.items():
                    if name.endswith(f"{layer}.weight"):
                        p[rows] *= 30.0
                if name.endswith("nonlin_attention.in_proj.weight"):
                    p[len(p) // 3] *= 30.0  # the first row of v


def train_step(model: CtcModel, seed: int) -> None:
    """Forward and backward of a made-up batch; the loss must be a number."""
    objective = Objective(small_run(), lambda text: [int(digit) for digit in text])
    batch = random_batch([150, 133, 120], ["3456", "3789", "345"], seed)
    loss = objective.train_loss(model, batch, torch.autocast("cpu", enabled=False))
    assert torch.isfinite(loss.total)
    model.zero_grad()
    loss.total.backward()


@pytest.mark.parametrize("kernels", [False, True])
def test_each_acts(monkeypatch: pytest.MonkeyPatch, kernels: bool) -> None:
    """With C kernels all but the penalty of attention scores, which cannot be watched there: test_attention has it."""
    if kernels and not native.suits():
        pytest.skip("no C compiler, or kernels are switched off")
    monkeypatch.setattr(native, "_enabled", kernels)
    model = small_model().train()
    set_batch_count(model, POSITIONS_KEPT)
    spoil(model)
    watch = Watch(model, monkeypatch)
    monkeypatch.setattr(random, "random", lambda: 0.02)  # below the lowest probability, 0.025
    # The front-end has 9; a layer 14 Balancers, 11 Whitens, 3 limiters and a penalty; five stacks one more limiter.
    assert len(regularised(model)) == 9 + 6 * 29 + 5
    watched = {name for name in regularised(model) if not (kernels and name.endswith("self_attn_weights"))}
    for step in range(6):
        # A scale that is out of range is only stopped on its way further out, so each is below one and above another.
        monkeypatch.setattr(BiasNorm, "log_scale_range", (2.0, 3.0) if step % 2 == 0 else (-3.0, -2.0))
        train_step(model, step)
        if step == 0:
            assert watch.called == watched
    assert watched - watch.acted == set()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_none_acts_where_the_decisions_say_no(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch itself: it must not see what is not there."""
    model = small_model().train()
    set_batch_count(model, POSITIONS_KEPT)
    spoil(model)
    watch = Watch(model, monkeypatch)
    monkeypatch.setattr(random, "random", lambda: 0.999)
    train_step(model, 0)
    assert watch.acted == {"encoder_embed.conv.1"}  # the scaling of the gradient needs no decision
