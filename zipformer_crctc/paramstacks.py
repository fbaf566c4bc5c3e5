"""Parameters of equal shape as one tensor each, and the C kernels that update them; those of a GPU are in gpu_optim.py.

Dimension legend: B parameters of one stack (equal dtype and shape), P steps between two updates of the parameter sizes.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from zipformer_crctc import native

_NORMS = native.Kernel("scaled_adam_norms", "pippf")
_UPDATE = native.Kernel("scaled_adam_update", "pippiip")


@dataclass(frozen=True)
class Stack:
    """Parameters of one group with equal dtype and shape, updated as one tensor; the state lives under the first."""

    params: list[Tensor]

    @property
    def first(self) -> Tensor:
        return self.params[0]

    @property
    def is_scalar(self) -> bool:
        """One element per parameter, whatever the number of axes."""
        return self.first.numel() == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, *shape of one parameter)"""
        return (len(self.params), *self.first.shape)

    @property
    def small_shape(self) -> tuple[int, ...]:
        """(B, 1, ..., 1): shape of a quantity with one value per parameter."""
        return (len(self.params), *(1 for _ in self.first.shape))

    def values(self) -> Tensor:
        """The parameters as (B, ...); a view where there is only one."""
        return self.first.unsqueeze(0) if len(self.params) == 1 else torch.stack(self.params)

    def each_grad(self) -> list[Tensor]:
        """The gradient of each parameter, a missing one as zero: do not write to it."""
        return [torch.zeros_like(p) if (grad := p.grad) is None else grad for p in self.params]

    def grads(self) -> Tensor:
        """The gradients as (B, ...), a missing one as zero; a view where there is only one: do not write to it."""
        grads = self.each_grad()
        return grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)


class Settings(NamedTuple):
    """Numbers of one step of a group, in the order of the C structure."""

    factor: float
    """On the gradients; 0 for infinite ones, which count as zero."""
    beta1: float
    beta2: float
    size_beta2: float
    eps: float
    rate: float
    """Negative, as the next two: added to the parameters."""
    scalar_rate: float
    size_rate: float
    correction: float
    """On the root of the averaged squared gradient, as the next one."""
    scalar_correction: float
    min_rms: float
    max_rms: float
    scalar_max: float

    @classmethod
    def of(cls, group: dict[str, Any], step: int, factor: float) -> Settings:
        """For a step, counted from 0, of a group of the optimizer."""
        (beta1, beta2), period = group["betas"], group["size_update_period"]
        size_beta2 = beta2**period
        correction, size_correction = 1 - beta2 ** (step + 1), 1 - size_beta2 ** ((step + 1) // period)
        numbers = (
            factor,
            beta1,
            beta2,
            size_beta2,
            group["eps"],
            -group["lr"] * (1 - beta1),
            -group["lr"] * (1 - beta1) * group["scalar_lr_scale"],
            -group["lr"] * group["scalar_lr_scale"] * math.sqrt(size_correction),
            1 / math.sqrt(correction) if correction < 0.99 else 1.0,
            1 / math.sqrt(correction),
            group["param_min_rms"],
            group["param_max_rms"],
            group["scalar_max"],
        )
        return cls(*map(float, numbers))


class Kernels:
    """The work on all values of a group in C. For one step: gradients have other addresses in the next.

    Args:
        group: of the optimizer.
        stacks: all of the group.
        states: one for each stack.
    """

    def __init__(self, group: dict[str, Any], stacks: Sequence[Stack], states: Sequence[dict[str, Any]]) -> None:
        self.group = group
        self.params = [p for stack in stacks for p in stack.params]
        self.values = [p.contiguous() for p in self.params]
        self.grads = [grad.contiguous() for stack in stacks for grad in stack.each_grad()]
        self.states: list[Tensor] = []
        self.state_sizes: list[int] = []
        keys = ("delta", "exp_avg_sq", "param_rms", "scale_exp_avg_sq", "scale_grads")
        rows: list[int] = []  # of the C structure: counts, then an address for each key
        for stack, state in zip(stacks, states, strict=True):
            n, size = len(stack.params), stack.first.numel()
            arrays = [state[key] for key in (keys[:2] if stack.is_scalar else keys)]
            self.states += arrays
            self.state_sizes += (n * size, n * size, n, n, n * group["size_update_period"])[: len(arrays)]
            rows += (n, size, *map(Tensor.data_ptr, arrays), *((0,) * (len(keys) - len(arrays))))
        self.stacks = int64(rows), len(stacks)
        self.value_addresses, self.grad_addresses = (int64(map(Tensor.data_ptr, x)) for x in (self.values, self.grads))

    def suit(self) -> bool:
        """Whether the kernels take all arrays: float32 on one device, contiguous, of the expected sizes."""
        arrays = (*self.values, *self.grads, *self.states)
        return (
            set(map(attrgetter("dtype"), arrays)) == {torch.float32}
            and set(map(Tensor.get_device, arrays)) == {self.params[0].get_device()}
            and all(map(Tensor.is_contiguous, self.states))
            and list(map(Tensor.numel, self.states)) == self.state_sizes
        )

    def norms(self) -> Tensor:
        """As ScaledAdam._weighted_norms."""
        norms = torch.empty(len(self.params))
        _NORMS(*self.stacks, self.grad_addresses, norms, self.group["scalar_lr_scale"])
        return norms

    def update(self, step: int, factor: float) -> None:
        """As ScaledAdam._update."""
        period = self.group["size_update_period"]
        self._update(Settings.of(self.group, step, factor), step % period, period)
        for p, value in zip(self.params, self.values, strict=True):
            if value is not p:
                p.copy_(value)
        torch.autograd.graph.increment_version(self.params)

    def _update(self, settings: Settings, slot: int, period: int) -> None:
        """Change the values; slot: of the period, the step's place in scale_grads."""
        numbers = torch.tensor(settings, dtype=torch.float64)
        _UPDATE(*self.stacks, self.value_addresses, self.grad_addresses, slot, period, numbers)


def stacks_of(params: Sequence[Tensor]) -> list[Stack]:
    """Parameters of equal dtype and shape together, sorted by (dtype, shape), scalars first."""
    by_key: dict[tuple[Any, ...], list[Tensor]] = {}
    for p in params:
        by_key.setdefault((str(p.dtype), *p.shape), []).append(p)
    return [Stack(by_key[key]) for key in sorted(by_key)]


def int64(numbers: Iterable[int]) -> Tensor:
    """(number of numbers,), on the CPU"""
    return torch.frombuffer(array("q", [*numbers]), dtype=torch.int64)
