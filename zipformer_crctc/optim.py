"""ScaledAdam and the Eden learning-rate schedule.

Source: Yao et al., "Zipformer: A faster and better encoder for automatic speech recognition", ICLR 2024, section 3
(ScaledAdam and Eden). Constants, state layout and clipping follow the published training system.

Dimension legend: B parameters of one stack (equal dtype and shape), P steps between two updates of the parameter sizes.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from zipformer_crctc import gpu, native
from zipformer_crctc.paramstacks import Kernels, Stack, stacks_of

logger = logging.getLogger(__name__)

EARLY_THRESHOLD_STEPS = (10, 20, 40)
"""Steps at which the clipping threshold is estimated before the first full period, from the norms seen so far."""

STACK_CHUNK_BYTES = 256 * 2**20
"""On an accelerator, stacks are updated together up to this size; on a CPU one by one, which suits its caches."""


class ScaledAdam(Optimizer):
    """Adam whose update of a tensor is proportional to the tensor's rms, with a learnt overall size for each tensor.

    Gradients are clipped per group, relative to the median of past gradient norms; norms weigh a parameter's gradient
    by the parameter's own rms, so they do not depend on how a network is scaled. Infinite gradients are zeroed once a
    threshold exists (after step 10). A NaN, or an infinite gradient before that, is not caught here and spoils the
    parameters: check gradients before the call.

    Args:
        params: groups, each a dict with ``named_params`` [(name, parameter), ...] (names are for messages) or the usual
            ``params``; or an iterable of parameters, or of (name, parameter) pairs.
        lr: learning rate, relative to a tensor's rms.
        clipping_scale: clip at this many times the median gradient norm; None for no clipping.
        betas: decay of the averages of gradient and squared gradient.
        scalar_lr_scale: factor on lr for one-element parameters and for the sizes of tensors.
        eps: added to the root of the averaged squared gradient.
        param_min_rms: a tensor with less rms than this learns as if it had this much.
        param_max_rms: the size update does not take a tensor beyond this rms.
        scalar_max: largest absolute value of a one-element parameter.
        size_update_period: steps between size updates, P.
        clipping_update_period: gradient norms in the median, and steps between its updates.

    After ``step``, ``clip_factors`` holds the factor on the gradients of each group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 3e-2,
        clipping_scale: float | None = None,
        betas: tuple[float, float] = (0.9, 0.98),
        scalar_lr_scale: float = 0.1,
        eps: float = 1e-8,
        param_min_rms: float = 1e-5,
        param_max_rms: float = 3.0,
        scalar_max: float = 10.0,
        size_update_period: int = 4,
        clipping_update_period: int = 100,
    ) -> None:
        defaults = {
            "lr": lr,
            "clipping_scale": clipping_scale,
            "betas": betas,
            "scalar_lr_scale": scalar_lr_scale,
            "eps": eps,
            "param_min_rms": param_min_rms,
            "param_max_rms": param_max_rms,
            "scalar_max": scalar_max,
            "size_update_period": size_update_period,
            "clipping_update_period": clipping_update_period,
        }
        self.clip_factors: list[float] = []
        self._names: dict[int, str] = {}
        self._stacks: list[list[Stack]] = []
        self._tables: list[Any] = []  # what gpu_optim.py keeps of each group
        super().__init__(_as_groups(params), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see the class for its form."""
        group = dict(param_group)
        if "named_params" in group:
            if "params" in group:
                raise ValueError("a parameter group has both named_params and params: give one of them")
            named = list(group.pop("named_params"))
            group["params"] = [p for _, p in named]
            self._names.update((id(p), name) for name, p in named)
        super().add_param_group(group)
        self._stacks.append(stacks_of(self.param_groups[-1]["params"]))
        self._tables.append(None)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict, published ones included.

        Raises:
            ValueError: it belongs to other parameters; nothing has been changed then.
        """
        self._check_state_dict(state_dict)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients; a missing gradient counts as zero."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._create_missing_state()
        kernels = [self._kernels(index) for index in range(len(self.param_groups))]
        self.clip_factors = self._clip_factors(kernels)
        for index, factor in enumerate(self.clip_factors):
            group, stacks, kernel = self.param_groups[index], self._stacks[index], kernels[index]
            if kernel is not None:
                kernel.update(self.state[stacks[0].first]["step"], factor)
            else:
                self._update(group, stacks, factor)
            for stack in stacks:
                self.state[stack.first]["step"] += 1
        return loss

    def _kernels(self, index: int) -> Kernels | None:
        """Of a group; None where PyTorch does the work."""
        group, stacks = self.param_groups[index], self._stacks[index]
        if not stacks or not native.suits(stacks[0].first):
            return None
        states = [self.state[stack.first] for stack in stacks]
        if gpu.takes(stacks[0].first):
            from zipformer_crctc import gpu_optim  # needs Triton

            self._tables[index] = self._tables[index] or gpu_optim.Tables()
            kernels: Kernels = gpu_optim.GpuKernels(group, stacks, states, self._tables[index])
        else:
            kernels = Kernels(group, stacks, states)
        return kernels if kernels.suit() else None

    # State

    def _create_missing_state(self) -> None:
        for group, stacks in zip(self.param_groups, self._stacks, strict=True):
            for index, stack in enumerate(stacks):
                state = self.state[stack.first]
                if state:
                    continue
                first = stack.first
                state["step"] = 0
                state["delta"] = first.new_zeros(stack.shape)
                state["exp_avg_sq"] = first.new_zeros(stack.shape)
                if not stack.is_scalar:
                    state["param_rms"] = _rms(stack.values()).view(stack.small_shape)
                    state["scale_exp_avg_sq"] = first.new_zeros(stack.small_shape)
                    state["scale_grads"] = first.new_zeros((group["size_update_period"], *stack.small_shape))
                if index == 0 and group["clipping_scale"] is not None:
                    self._create_clipping_state(group, state)

    @staticmethod
    def _create_clipping_state(group: dict[str, Any], state: dict[str, Any]) -> None:
        state["model_norms"] = torch.zeros(group["clipping_update_period"], device=state["delta"].device)
        state["num_clipped"] = 0

    def _check_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a state that was not made for these parameters: torch itself checks only how many there are."""
        remedy = "resume with the model and the parameter order that the state was saved with"
        sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        ours = [len(group["params"]) for group in self.param_groups]
        if sizes != ours:
            raise ValueError(f"optimizer state is for groups of {sizes} parameters, here are {ours}: {remedy}")
        if not state_dict["state"]:
            return
        flat = [p for group in self.param_groups for p in group["params"]]
        expected = {id(stack.first): stack for stacks in self._stacks for stack in stacks}
        for index, p in enumerate(flat):
            stack, state = expected.pop(id(p), None), state_dict["state"].get(index)
            name = self._names.get(id(p), f"parameter {index}")
            if (stack is None) != (state is None):
                raise ValueError(f"optimizer state and model disagree on whether {name} leads a stack: {remedy}")
            if stack is not None and state is not None and tuple(state["delta"].shape) != stack.shape:
                got = tuple(state["delta"].shape)
                raise ValueError(f"optimizer state of {name} has shape {got}, expected {stack.shape}: {remedy}")

    # Clipping

    def _clip_factors(self, kernels: Sequence[Kernels | None]) -> list[float]:
        """Factor on the gradients of each group. One transfer from the device, whatever the number of groups."""
        norms: dict[int, tuple[Tensor, Tensor]] = {}
        for index, (group, stacks) in enumerate(zip(self.param_groups, self._stacks, strict=True)):
            if group["clipping_scale"] is not None and stacks and self.state[stacks[0].first]["step"] > 0:
                kernel = kernels[index]
                parts = self._weighted_norms(group, stacks) if kernel is None else kernel.norms()
                norms[index] = (parts, torch.linalg.vector_norm(parts))
        factors = [1.0] * len(self.param_groups)
        if not norms:
            return factors
        totals = [total for _, total in norms.values()]
        host_totals = torch.stack([total.to(totals[0].device, torch.float32) for total in totals]).tolist()
        for (index, (parts, total)), host_total in zip(norms.items(), host_totals, strict=True):
            group, stacks = self.param_groups[index], self._stacks[index]
            factors[index] = self._clip_factor(group, self.state[stacks[0].first], total, host_total)
            if factors[index] < 0.1:
                self._warn_dominating(stacks, parts, factors[index])
        return factors

    def _weighted_norms(self, group: dict[str, Any], stacks: Sequence[Stack]) -> Tensor:
        """One value per parameter, in the order of the stacks: |gradient| times rms, scalars times their lr scale."""
        device = stacks[0].first.device
        zero = torch.zeros((), device=device)
        params = [p for stack in stacks for p in stack.params]
        grads = [p.grad for p in params if p.grad is not None]
        present = iter(torch._foreach_norm(grads) if grads else [])
        norms = torch.stack([zero if p.grad is None else next(present) for p in params]).float()
        weights = [
            torch.full((len(stack.params),), group["scalar_lr_scale"], device=device)
            if stack.is_scalar
            else self.state[stack.first]["param_rms"].float().flatten()
            for stack in stacks
        ]
        return norms * torch.cat(weights)

    def _clip_factor(self, group: dict[str, Any], state: dict[str, Any], norm: Tensor, host_norm: float) -> float:
        if "model_norms" not in state:  # saved by a run without clipping
            self._create_clipping_state(group, state)
        step, period = state["step"], group["clipping_update_period"]
        state["model_norms"][step % period] = norm
        if step % period == 0 or step in EARLY_THRESHOLD_STEPS:
            self._update_threshold(group, state)
        threshold = state.get("model_norm_threshold")
        if threshold is None:
            return 1.0
        # A NaN norm compares false and gives 1, as in the published optimizer.
        factor = min(1.0, float(threshold) / (host_norm + 1e-20))
        if factor < 1.0:
            state["num_clipped"] = state.get("num_clipped", 0) + 1
        return factor

    @staticmethod
    def _update_threshold(group: dict[str, Any], state: dict[str, Any]) -> None:
        step, period = state["step"], group["clipping_update_period"]
        norms = sorted(state["model_norms"].tolist(), key=lambda norm: (math.isnan(norm), norm))
        early = step in EARLY_THRESHOLD_STEPS and step % period != 0
        if early:
            norms = norms[-step:]
        quartiles = [norms[min(len(norms) - 1, n * (len(norms) // 4))] for n in range(5)]
        if not math.isfinite(quartiles[2]):
            raise RuntimeError(
                f"half of the last {len(norms)} gradient norms are infinite or NaN at optimizer step {step}: "
                "look for bad data, or lower the learning rate and resume from an earlier checkpoint"
            )
        threshold = group["clipping_scale"] * quartiles[2] * (2.0 if step in EARLY_THRESHOLD_STEPS else 1.0)
        logger.debug(
            "gradient norm: quartiles %s, clipped above %.3e; %d of the last %d steps were clipped",
            " ".join(f"{q:.3e}" for q in quartiles),
            threshold,
            state.get("num_clipped", 0),
            len(norms),
        )
        state["model_norm_threshold"] = threshold
        state["num_clipped"] = 0

    def _warn_dominating(self, stacks: Sequence[Stack], weighted_norms: Tensor, factor: float) -> None:
        params = [p for stack in stacks for p in stack.params]
        index = int(weighted_norms.argmax())
        p, grad = params[index], params[index].grad
        assert grad is not None  # a missing gradient has norm 0 and cannot dominate
        if factor == 0.0:
            logger.warning("infinite gradients are set to zero; the first is that of %s", self._name(p))
            return
        share = float((weighted_norms[index] / torch.linalg.vector_norm(weighted_norms)) ** 2)
        logger.warning(
            "gradients scaled by %.3g: %s has %.0f%% of the squared norm (its rms is %.3g, its gradient's %.3g)",
            factor,
            self._name(p),
            100 * share,
            float(_rms(p.unsqueeze(0))),
            float(_rms(grad.unsqueeze(0))),
        )

    def _name(self, p: Tensor) -> str:
        return self._names.get(id(p), f"a parameter of shape {tuple(p.shape)}")

    # Updates

    def _update(self, group: dict[str, Any], stacks: Sequence[Stack], factor: float) -> None:
        scalars = [stack for stack in stacks if stack.is_scalar]
        tensors = [stack for stack in stacks if not stack.is_scalar]
        for stack in scalars:
            self._update_scalars(group, stack, factor)
        for chunk in _chunks(tensors):
            self._update_tensors(group, chunk, factor)

    def _update_tensors(self, group: dict[str, Any], stacks: Sequence[Stack], factor: float) -> None:
        """All stacks advance together, so that a few fused calls cover many tensors."""
        beta1, beta2 = group["betas"]
        states = [self.state[stack.first] for stack in stacks]
        step = states[0]["step"]
        values, grads = [stack.values() for stack in stacks], _scaled([stack.grads() for stack in stacks], factor)
        deltas, squares = [state["delta"] for state in states], [state["exp_avg_sq"] for state in states]

        torch._foreach_mul_(deltas, beta1)
        products = torch._foreach_mul(values, grads)
        for state, product in zip(states, products, strict=True):
            slot = state["scale_grads"][step % group["size_update_period"]]
            slot.copy_(product.flatten(1).sum(dim=1).view(slot.shape))
        if step % group["size_update_period"] == group["size_update_period"] - 1:
            for state, value in zip(states, values, strict=True):
                _update_size(group, state, value)

        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        roots = torch._foreach_sqrt(squares)
        correction = 1 - beta2 ** (step + 1)
        if correction < 0.99:
            torch._foreach_div_(roots, math.sqrt(correction))
        torch._foreach_add_(roots, group["eps"])
        directions = torch._foreach_div(grads, roots)
        rates = [state["param_rms"].clamp(min=group["param_min_rms"]) for state in states]
        torch._foreach_mul_(rates, -group["lr"] * (1 - beta1))
        for delta, direction, rate in zip(deltas, directions, rates, strict=True):
            delta.addcmul_(direction, rate)
        torch._foreach_add_([p for stack in stacks for p in stack.params], [row for d in deltas for row in d.unbind(0)])

    def _update_scalars(self, group: dict[str, Any], stack: Stack, factor: float) -> None:
        """One-element parameters: Adam with a smaller learning rate and a limit on the value."""
        beta1, beta2 = group["betas"]
        state = self.state[stack.first]
        (grad,) = _scaled([stack.grads()], factor)
        delta, square = state["delta"], state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        root = (square / (1 - beta2 ** (state["step"] + 1))).sqrt_().add_(group["eps"])
        delta.mul_(beta1).addcdiv_(grad, root, value=-group["lr"] * group["scalar_lr_scale"] * (1 - beta1))
        # The limit comes before the update, as published, so a value may end a little beyond it.
        new = stack.values().clamp(-group["scalar_max"], group["scalar_max"]).add_(delta)
        torch._foreach_copy_(stack.params, list(new.unbind(0)))


def _as_groups(params: Iterable[Any]) -> list[dict[str, Any]]:
    items = list(params)
    if not items:
        raise ValueError("the optimizer got no parameters")
    if isinstance(items[0], dict):
        return items
    return [{"named_params": items}] if isinstance(items[0], tuple) else [{"params": items}]


def _chunks(stacks: Sequence[Stack]) -> Iterable[list[Stack]]:
    limit = STACK_CHUNK_BYTES if stacks and stacks[0].first.device.type != "cpu" else 0
    chunk: list[Stack] = []
    size = 0
    for stack in stacks:
        nbytes = len(stack.params) * stack.first.numel() * stack.first.element_size()
        if chunk and size + nbytes > limit:
            yield chunk
            chunk, size = [], 0
        chunk.append(stack)
        size += nbytes
    if chunk:
        yield chunk


def _rms(values: Tensor) -> Tensor:
    """(B, ...) -> (B,)"""
    return values.flatten(1).square().mean(dim=1).sqrt() if values.ndim > 1 else values.abs()


def _scaled(grads: list[Tensor], factor: float) -> list[Tensor]:
    if factor == 1.0:
        return grads
    if factor == 0.0:  # an infinite norm; zero times infinity would be NaN
        return [torch.zeros_like(grad) for grad in grads]
    return list(torch._foreach_mul(grads, factor))


def _update_size(group: dict[str, Any], state: dict[str, Any], values: Tensor) -> None:
    """Refresh the rms of the parameters (B, ...) and add a step that makes each larger or smaller as a whole."""
    beta1 = group["betas"][0]
    beta2 = group["betas"][1] ** group["size_update_period"]
    rms = state["param_rms"].copy_(_rms(values).view(state["param_rms"].shape))
    scale_grads, square = state["scale_grads"], state["scale_exp_avg_sq"]
    square.mul_(beta2).add_(scale_grads.square().mean(dim=0), alpha=1 - beta2)
    correction = 1 - beta2 ** ((state["step"] + 1) // group["size_update_period"])
    rate = -group["lr"] * group["scalar_lr_scale"] * math.sqrt(correction)
    size_step = rate * scale_grads.sum(dim=0) / (square.sqrt() + group["eps"])
    size_step.masked_fill_(rms < group["param_min_rms"], 0.0)
    size_step = torch.minimum(size_step, (group["param_max_rms"] - rms) / rms)
    state["delta"].addcmul_(values, size_step, value=1 - beta1)


class Eden:
    """Learning rate that falls with the number of batches and of epochs, after a short linear warm-up.

    lr = base * ((k^2 + B^2) / B^2)^(-1/4) * ((e^2 + E^2) / E^2)^(-1/4) * w, with k batches and e whole epochs done and
    w rising from ``warmup_start`` to 1 over ``warmup_batches``. Before the first call of a step the rate is the base.

    Make it before loading an optimizer state, so that the base rate is the one asked for and not the saved one.

    Args:
        optimizer: its groups' learning rates are the base rates.
        lr_batches: B, in batches.
        lr_epochs: E, in epochs.
        warmup_batches: length of the warm-up; 0 for none.
        warmup_start: factor at batch 0.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        lr_batches: float,
        lr_epochs: float,
        warmup_batches: float = 500.0,
        warmup_start: float = 0.5,
    ) -> None:
        if lr_batches <= 0 or lr_epochs <= 0:
            raise ValueError(f"lr_batches ({lr_batches}) and lr_epochs ({lr_epochs}) must be above 0")
        if not 0.0 <= warmup_start <= 1.0:
            raise ValueError(f"warmup_start is {warmup_start}: choose it from 0 to 1")
        self.optimizer = optimizer
        self.lr_batches = lr_batches
        self.lr_epochs = lr_epochs
        self.warmup_batches = warmup_batches
        self.warmup_start = warmup_start
        self.base_lrs: list[float] = [float(group["lr"]) for group in optimizer.param_groups]
        self.batch = 0
        self.epoch = 0
        for group, base in zip(optimizer.param_groups, self.base_lrs, strict=True):
            group["base_lr"] = base

    def step_batch(self, batch: int | None = None) -> None:
        """Set the rates for batch ``batch``, counted over the whole run (default: the next one)."""
        self.batch = self.batch + 1 if batch is None else batch
        self._set_rates()

    def step_epoch(self, epoch: int | None = None) -> None:
        """Set the rates for ``epoch`` whole epochs done, 0 in the first epoch (default: one more)."""
        self.epoch = self.epoch + 1 if epoch is None else epoch
        self._set_rates()

    def rates(self) -> list[float]:
        """Learning rate of each group at the present batch and epoch."""
        by_batch = ((self.batch**2 + self.lr_batches**2) / self.lr_batches**2) ** -0.25
        by_epoch = ((self.epoch**2 + self.lr_epochs**2) / self.lr_epochs**2) ** -0.25
        warmup = 1.0
        if self.batch < self.warmup_batches:
            warmup = self.warmup_start + (1.0 - self.warmup_start) * (self.batch / self.warmup_batches)
        return [base * by_batch * by_epoch * warmup for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """base_lrs, epoch and batch."""
        return {"base_lrs": list(self.base_lrs), "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state_dict: dict[str, Any], restore_base_lrs: bool = False) -> None:
        """Go to the saved epoch and batch and set the rates; the base rates stay those of this run unless asked for."""
        if restore_base_lrs:
            base_lrs = list(state_dict["base_lrs"])
            if len(base_lrs) != len(self.base_lrs):
                raise ValueError(f"scheduler state has {len(base_lrs)} base rates for {len(self.base_lrs)} groups")
            self.base_lrs = base_lrs
        self.epoch = state_dict["epoch"]
        self.batch = state_dict["batch"]
        self._set_rates()

    def _set_rates(self) -> None:
        for group, base, rate in zip(self.optimizer.param_groups, self.base_lrs, self.rates(), strict=True):
            group["base_lr"] = base
            group["lr"] = rate
