"""Averages of models: a running one during training, and averages over saved ones. All work on state dicts.

Only floating-point tensors are averaged; others, such as counters, are taken from the newest state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]


class RunningAverage:
    """Mean in float64 of snapshots of a model, taken every ``period`` batches.

    Args:
        model: the initial model, or its state dict. It counts only until the first update.
    """

    def __init__(self, model: nn.Module | State) -> None:
        self._average = {name: _as_double(tensor) for name, tensor in _state(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module | State, batch: int, period: int) -> None:
        """Take in a snapshot after ``batch`` batches, a multiple of ``period``.

        The average is then the mean of the snapshots at period, 2 * period, ..., batch.
        """
        if batch < period:
            raise ValueError(f"update at batch {batch}, before the first period of {period} batches has passed")
        state = _state(model)
        _check_same_keys(state, self._average)
        weight = period / batch
        real = [name for name, tensor in self._average.items() if tensor.is_floating_point()]
        averages = [self._average[name] for name in real]
        # The share of the snapshot is rounded to the model's precision, as published; the sum is not.
        shares = torch._foreach_mul([state[name].detach() for name in real], weight)
        torch._foreach_mul_(averages, 1 - weight)
        torch._foreach_add_(averages, [share.to(old) for share, old in zip(shares, averages, strict=True)])
        for name, average in self._average.items():
            if not average.is_floating_point():
                average.copy_(state[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The average, floating-point entries in float64; the tensors are those that updates change."""
        return dict(self._average)

    def load_state_dict(self, state: State) -> None:
        """Go on from a saved average; published ones are float32."""
        _check_same_keys(state, self._average)
        for name, average in self._average.items():
            if state[name].shape != average.shape:
                shapes = f"{tuple(state[name].shape)}, expected {tuple(average.shape)}"
                raise ValueError(f"averaged model: {name} has shape {shapes}: is it of the same model sizes?")
            average.copy_(state[name])


def range_average(start: State, end: State, batch_start: int, batch_end: int, period: int) -> dict[str, Tensor]:
    """Mean of the snapshots after ``batch_start`` up to ``batch_end``, from the running averages at these two batches.

    Args:
        start: running average at ``batch_start``.
        end: running average at ``batch_end``.
        batch_start, batch_end: batches over the whole run; rounded down to multiples of ``period``.
        period: batches between two updates of the running averages.

    Returns:
        a new state dict; each tensor has the dtype it has in ``end``.

    Raises:
        ValueError: no snapshot lies between the two, or the states are of different models.
    """
    updates_start, updates_end = batch_start // period * period, batch_end // period * period
    if updates_end <= updates_start:
        raise ValueError(
            f"no update of the running average lies between batches {batch_start} and {batch_end} "
            f"(one every {period} batches): average over checkpoints that are further apart"
        )
    _check_same_keys(start, end)
    weight = updates_end / (updates_end - updates_start)
    return {
        name: (last + start[name].to(last) * ((1 - weight) / weight)) * weight
        if last.is_floating_point()
        else last.clone()
        for name, last in end.items()
    }


def mean_of_states(states: Iterable[State]) -> dict[str, Tensor]:
    """Plain mean of state dicts, oldest first; an iterator may load them one at a time.

    Sums are kept in float64; each tensor of the result has the dtype it has in the last state.
    """
    total: dict[str, Tensor] = {}
    last: State = {}
    count = 0
    for last in states:
        count += 1
        if not total:
            total = {name: _as_double(tensor) for name, tensor in last.items()}
            continue
        _check_same_keys(last, total)
        for name, tensor in last.items():
            if tensor.is_floating_point():
                total[name] += tensor.to(total[name])
    if not count:
        raise ValueError("no state dict to average")
    return {
        name: (total[name] / count).to(tensor.dtype) if tensor.is_floating_point() else tensor.clone()
        for name, tensor in last.items()
    }


def _state(model: nn.Module | State) -> State:
    return model.state_dict() if isinstance(model, nn.Module) else model


def _as_double(tensor: Tensor) -> Tensor:
    """A copy, in float64 if it is a floating-point tensor."""
    return tensor.detach().to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _check_same_keys(state: State, reference: State) -> None:
    if state.keys() == reference.keys():
        return
    missing = sorted(reference.keys() - state.keys())[:3]
    extra = sorted(state.keys() - reference.keys())[:3]
    raise ValueError(
        f"cannot average different models: missing entries {missing or 'none'}, unexpected entries {extra or 'none'} "
        "(first three of each); choose checkpoints of one run"
    )
