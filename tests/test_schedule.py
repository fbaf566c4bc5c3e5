"""Schedules: piecewise linear values, and the published points of every scheduled value of the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from small_models import piecewise_linear, small_model
from zipformer_crctc.schedule import Schedule, ScheduledModule, named_schedules, set_batch_count

SKIPS = ((0, 0.2), (4000, 0.05), (16000, 0.0))
FF_SKIPS = ((0, 0.1), (4000, 0.01), (50000, 0.0))
DROPOUT = ((0, 0.3), (20000, 0.1))
DEFAULT_PROB = ((0, 0.5), (8000, 0.125))
Points = tuple[tuple[float, float], ...]

FRONTEND: dict[str, tuple[Points, float]] = {
    "conv.2.prob": (DEFAULT_PROB, 0.4),
    "conv.5.prob": (DEFAULT_PROB, 0.4),
    "conv.8.prob": (DEFAULT_PROB, 0.4),
    "convnext.hidden_balancer.prob": (DEFAULT_PROB, 0.4),
    "convnext.out_balancer.prob": (DEFAULT_PROB, 0.4),
    "convnext.layerdrop_rate": (((0, 0.2), (20000, 0.015)), 0.0),
    "out_whiten.whitening_limit": (((0, 4), (20000, 8)), 4.0),
    "dropout.p": (DROPOUT, 0.0),
}
FEED_FORWARD: dict[str, tuple[Points, float]] = {
    "hidden_balancer.prob": (DEFAULT_PROB, 0.4),
    "dropout.p": (DROPOUT, 0.0),
    "out_whiten.whitening_limit": (((0, 7.5), (20000, 15)), 7.5),
}
CONV_MODULE: dict[str, tuple[Points, float]] = {
    "balancer1.min_positive": (((0, 0.05), (8000, 0.025)), 0.0),
    "balancer1.max_abs": (((0, 5), (8000, 10)), 1.0),
    "balancer1.prob": (DEFAULT_PROB, 0.4),
    "balancer2.min_positive": (((0, 0.1), (8000, 0.05)), 0.0),
    "balancer2.min_abs": (((0, 0.2), (20000, 0.5)), 0.0),
    "balancer2.prob": (DEFAULT_PROB, 0.4),
    "whiten.whitening_limit": (((0, 7.5), (20000, 15)), 7.5),
}
LAYER: dict[str, tuple[Points, float]] = {
    "attention_skip_rate": (SKIPS, 0.0),
    "conv_skip_rate": (SKIPS, 0.0),
    "ff2_skip_rate": (FF_SKIPS, 0.0),
    "ff3_skip_rate": (FF_SKIPS, 0.0),
    "const_attention_rate": (((0, 0.25), (4000, 0.025)), 0.0),
    "bypass.scale_min": (((0, 0.9), (20000, 0.2)), 0.0),
    "bypass_mid.scale_min": (((0, 0.9), (20000, 0.2)), 0.0),
    "self_attn_weights.pos_emb_skip_rate": (((0, 0.5), (4000, 0.0)), 0.0),
    "self_attn_weights.whiten_keys.whitening_limit": (((0, 3), (20000, 6)), 3.0),
    "self_attn1.whiten.whitening_limit": (((0, 7.5), (20000, 22.5)), 7.5),
    "self_attn2.whiten.whitening_limit": (((0, 7.5), (20000, 22.5)), 7.5),
    "nonlin_attention.balancer.min_positive": (((0, 0.25), (20000, 0.05)), 0.0),
    "nonlin_attention.balancer.max_positive": (((0, 0.75), (20000, 0.95)), 0.0),
    "nonlin_attention.balancer.prob": (DEFAULT_PROB, 0.4),
    "nonlin_attention.whiten1.whitening_limit": (((0, 5), (20000, 10)), 5.0),
    "nonlin_attention.whiten2.whitening_limit": (((0, 5), (20000, 15)), 5.0),
    "balancer_na.min_abs": (((0, 0.004), (4000, 0.02)), 0.0),
    "balancer_ff2.min_abs": (((0, 0.0), (4000, 0.1)), 0.0),
    "balancer_ff3.min_abs": (((0, 0.0), (4000, 0.2)), 0.0),
    "balancer1.prob": (DEFAULT_PROB, 0.4),
    "balancer2.prob": (DEFAULT_PROB, 0.4),
    "whiten.whitening_limit": (((0, 4), (20000, 12)), 4.0),
    **{f"feed_forward{i}.{name}": value for i in (1, 2, 3) for name, value in FEED_FORWARD.items()},
    **{f"conv_module{i}.{name}": value for i in (1, 2) for name, value in CONV_MODULE.items()},
}
FACTORS = (1, 2, 4, 8, 4, 2)


def test_values_between_and_beyond_the_points() -> None:
    schedule = Schedule((0, 0.5), (4000, 0.1), (10000, 0.4), default=7.0)
    values = {-5.0: 0.5, 0.0: 0.5, 1000.0: 0.4, 4000.0: 0.1, 7000.0: 0.25, 10000.0: 0.4, 1e9: 0.4}
    for b, value in values.items():
        assert schedule(b) == pytest.approx(value, abs=1e-12)
    assert schedule(None) == 7.0
    assert Schedule((10, 3.0))(0) == Schedule((10, 3.0))(99) == 3.0


@pytest.mark.parametrize("points", [(), ((1, 0.0), (1, 2.0)), ((5, 0.0), (1, 2.0))])
def test_points_must_increase(points: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(ValueError, match="increasing"):
        Schedule(*points)


def test_a_module_reads_its_schedules_in_training_only() -> None:
    module = ScheduledModule()
    schedule = Schedule((0, 1.0), (10, 2.0), default=-1.0)
    assert module.value(schedule) == -1.0  # no batch count yet
    set_batch_count(nn.Sequential(nn.Identity(), module), 5.0)
    assert module.value(schedule) == 1.5
    assert module.value(0.25) == 0.25
    assert module.eval().value(schedule) == -1.0


def test_batch_count_reaches_every_part_of_a_model() -> None:
    model = small_model()
    set_batch_count(model, 123.0)
    counts = [module.batch_count for module in model.modules() if isinstance(module, ScheduledModule)]
    assert len(counts) > 100
    assert set(counts) == {123.0}


def test_every_schedule_of_the_model_has_the_published_points() -> None:
    model = small_model(num_encoder_layers=(2, 1, 3, 1, 1, 2))
    want = {f"encoder_embed.{name}": value for name, value in FRONTEND.items()}
    for i, (factor, layers) in enumerate(zip(FACTORS, (2, 1, 3, 1, 1, 2), strict=True)):
        stack = f"encoder.encoders.{i}."
        begin, step = 4000 * (i + 1) / 7, 4000 / 7 / layers
        for index in range(layers):
            prefix = f"{stack}layers.{index}." if factor == 1 else f"{stack}encoder.layers.{index}."
            want |= {prefix + name: value for name, value in LAYER.items()}
            drop = ((begin + index * step, 0.5), (begin + (index + 1) * step, 0.035 * factor**0.5))
            want[f"{prefix}bypass.skip_rate"] = (drop, 0.0)
        if factor > 1:
            want[f"{stack}out_combiner.scale_min"] = (((0, 0.9), (20000, 0.2)), 0.0)
    got = dict(named_schedules(model))
    assert set(got) == set(want)
    for name, (points, default) in want.items():
        for b in torch.linspace(0, 60000, 121).tolist():
            assert got[name](b) == pytest.approx(piecewise_linear(points, b), abs=1e-9), (name, b)
        assert got[name](None) == default, name
