"""Checkers of the optimizer fixtures: 50 ScaledAdam, 51 Eden, 60 model averaging."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from golden_checks.compare import Comparison, Fixture, compare
from zipformer_crctc.averaging import RunningAverage, range_average
from zipformer_crctc.optim import Eden, ScaledAdam

ADAM_TOLERANCE = 1e-4
DOUBLE_TOLERANCE = 1e-12
"""Both relative."""


OPTIMIZER_OPTIONS = (
    "betas",
    "scalar_lr_scale",
    "eps",
    "param_min_rms",
    "param_max_rms",
    "scalar_max",
    "size_update_period",
    "clipping_update_period",
)
"""Constants of ScaledAdam that a fixture may set."""


def check_scaled_adam(path: Path) -> list[Comparison]:
    """Parameters after the stored steps, the factor on the gradients and the learning rate at every step."""
    fixture = Fixture.read(path)
    config, groups = fixture.config, json.loads(fixture.metadata["groups"])
    params = {name: torch.nn.Parameter(value.clone()) for name, value in fixture.group("in.init.").items()}
    grads = fixture.group("in.grad.")
    rates = [config["base_lr"] * _lr_scale(group[0], config.get("lr_scale", {})) for group in groups]
    optimizer = ScaledAdam(
        [
            {"named_params": [(name, params[name]) for name in group], "lr": rate}
            for group, rate in zip(groups, rates, strict=True)
        ],
        lr=config["base_lr"],
        clipping_scale=config["clipping_scale"],
        **{name: config[name] for name in OPTIMIZER_OPTIONS if name in config},
    )
    eden = dict(config.get("eden") or {})
    epoch, first_batch = eden.pop("epoch", 0), eden.pop("batch0", 0)
    scheduler = Eden(optimizer, **eden) if eden else None
    if scheduler is not None:
        scheduler.step_epoch(epoch)

    results, factors, used_rates = [], [], []
    for step in range(1, config["steps"] + 1):
        for name, param in params.items():
            param.grad = grads[name][step - 1].clone() if name in grads else None
        if scheduler is not None:
            scheduler.step_batch(first_batch + step)
        used_rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        factors.append(optimizer.clip_factors)
        for name, want in fixture.group(f"out.step{step}.").items():
            # A parameter without gradients must not move at all.
            tolerance = ADAM_TOLERANCE if name in grads else 0.0
            results.append(_compare_with_nan(f"step{step}.{name}", params[name].detach(), want, tolerance))
    for name, got in (("clipping_scale", factors), ("lr", used_rates)):
        want = fixture.tensors[f"out.{name}"]
        results.append(compare(name, torch.tensor(got, dtype=want.dtype).T, want, ADAM_TOLERANCE))
    return results


def check_eden(path: Path) -> list[Comparison]:
    """Learning rates at chosen epochs and batches, and in a loop as training does it."""
    fixture = Fixture.read(path)
    config, tensors = fixture.config, fixture.tensors
    results = []
    for base in config["base_lrs"]:
        want = tensors[f"out.lr.base{base:g}"]
        got = torch.zeros_like(want)
        for row, epoch in enumerate(tensors["in.epoch"].tolist()):
            for column, batch in enumerate(tensors["in.batch"].tolist()):
                scheduler = _eden(base, config)
                scheduler.step_epoch(epoch)
                scheduler.step_batch(batch)
                got[row, column] = scheduler.optimizer.param_groups[0]["lr"]
        results.append(compare(f"lr.base{base:g}", got, want, DOUBLE_TOLERANCE))

        want = tensors[f"out.loop.base{base:g}"]
        results.append(compare(f"loop.base{base:g}", _eden_loop(base, config, len(want)), want, DOUBLE_TOLERANCE))
    return results


def _eden_loop(base: float, config: Mapping[str, Any], length: int, batches_per_epoch: int = 5) -> Tensor:
    scheduler = _eden(base, config)
    rates = [scheduler.optimizer.param_groups[0]["lr"]]
    epoch = batch = 0
    while len(rates) < length:
        scheduler.step_epoch(epoch)
        rates.append(scheduler.optimizer.param_groups[0]["lr"])
        for _ in range(batches_per_epoch):
            batch += config["loop_stride"]
            scheduler.step_batch(batch)
            rates.append(scheduler.optimizer.param_groups[0]["lr"])
        epoch += 1
    return torch.tensor(rates, dtype=torch.float64)


def _eden(base: float, config: Mapping[str, Any]) -> Eden:
    names = ("lr_batches", "lr_epochs", "warmup_batches", "warmup_start")
    optimizer = ScaledAdam([torch.nn.Parameter(torch.zeros(2))], lr=base)
    return Eden(optimizer, **{name: config[name] for name in names if name in config})


def _compare_with_nan(name: str, got: Tensor, want: Tensor, rel: float) -> Comparison:
    """As `compare`; spoilt values must be NaN in both."""
    spoilt = want.isnan()
    if torch.equal(spoilt, got.isnan()):
        got, want = got.masked_fill(spoilt, 0.0), want.masked_fill(spoilt, 0.0)
    return compare(name, got, want, rel)


def _lr_scale(param: str, scales: Mapping[str, float]) -> float:
    """Product of the scales of all modules that hold the parameter."""
    scale = 1.0
    for module, factor in scales.items():
        if param == module or param.startswith(f"{module}."):
            scale *= factor
    return scale


def check_averaging(path: Path) -> list[Comparison]:
    """Average over a range of batches from two running averages, and the running average itself."""
    fixture = Fixture.read(path)
    config = fixture.config
    got = range_average(
        fixture.group("in.start."),
        fixture.group("in.end."),
        config["batch_idx_start"],
        config["batch_idx_end"],
        config["average_period"],
    )
    results = []
    for name, want in fixture.group("out.avg.").items():
        exact = not want.is_floating_point()
        results.append(compare(f"avg.{name}", got[name], want, 0.0 if exact else DOUBLE_TOLERANCE))

    average = RunningAverage(fixture.group("in.cur0."))
    for index in range(config["updates"]):
        batch = (index + 1) * config["average_period"]
        average.update(fixture.group(f"in.cur{index}."), batch, config["average_period"])
        state = average.state_dict()
        for name, want in fixture.group(f"out.model_avg{index}.").items():
            results.append(compare(f"model_avg{index}.{name}", state[name], want, DOUBLE_TOLERANCE))
    return results


CHECKERS: dict[str, Callable[[Path], list[Comparison]]] = {
    "50": check_scaled_adam,
    "51": check_eden,
    "60": check_averaging,
}
