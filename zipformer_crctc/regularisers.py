"""Modules and functions that are the identity in the forward pass and change the gradient in the backward pass.

They act in training mode only. Yes/no decisions come from Python's own random generator, once per call, so that they
cost no host synchronisation. All arithmetic is float32 at least.
Source: Zipformer (Yao et al., ICLR 2024), section 3.5 and appendix; the Balancer and Whiten modules.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from zipformer_crctc import gpu, native
from zipformer_crctc.autograd import Function
from zipformer_crctc.native import Kernel
from zipformer_crctc.products import linear, mixed_precision, over_rows
from zipformer_crctc.schedule import Schedule, ScheduledModule


def at_least_float32(x: Tensor) -> Tensor:
    """x itself if float32 or float64, else a float32 copy."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _mean_over_std(positive_share: float) -> float:
    """The mean/std of a distribution, close to normal, with this share of positive values."""
    eps = 1e-10
    y = 2.0 * positive_share - 1.0
    return 0.8139535143 * 0.5 * (math.log(1.0 + y + eps) - math.log(1.0 - y + eps))


_moments_kernel = Kernel("moments", "pppiii")
_balance_kernel = Kernel("balance", "ppppppiiiiifffff")
_centred_kernel = Kernel("centred", "pppiii")
_whitening_kernel = Kernel("whitening", "ppii")
_pushed_kernel = Kernel("pushed", "pppif")
_limited_kernel = Kernel("limited", "pppiff")


def _rows(x: Tensor, dim: int) -> Tensor | None:
    """x as (R, C) for the kernels, its channels from axis `dim`; None where they do not take it.

    It is a view of x, but for what lies otherwise in the memory of a GPU: to copy it is one launch more, and to do
    without the kernels many.
    """
    last = x if dim == -1 else x.movedim(dim, -1)
    if not native.suits(last):
        if not (gpu.takes(last) and native.suits(last.new_empty(1))):
            return None
        last = last.contiguous()
    if gpu.takes(last):
        return last.reshape(-1, last.shape[-1])
    try:
        return last.view(-1, last.shape[-1])
    except RuntimeError:
        return None


def _wide_rows(x: Tensor, dim: int) -> tuple[Tensor, Tensor | None]:
    """x and its rows for the kernels, or for PyTorch's operations: float32 at least where it is not the GPU's."""
    if gpu.takes(x) and (rows := _rows(x, dim)) is not None:
        return x, rows
    x = at_least_float32(x)
    return x, _rows(x, dim)


@dataclass(frozen=True)
class _Moments:
    """Of the channels of an array or of a part of it, in the shape that broadcasts over it."""

    count: int
    """values of a channel"""
    mean: Tensor
    variance: Tensor

    @staticmethod
    def of(x: Tensor, dim: int) -> _Moments:
        others = [axis for axis in range(x.dim()) if axis != dim % x.dim()]
        count = x.numel() // x.shape[dim]
        x, rows = _wide_rows(x, dim)
        if rows is not None:
            mean, variance = x.new_empty(2, rows.shape[1], dtype=torch.float32)
            _moments_kernel(rows, mean, variance, *rows.shape, rows.stride(0))
            shape = [1] * x.dim()
            shape[dim] = -1
            return _Moments(count, mean.view(shape), variance.view(shape))
        mean = x.mean(others, keepdim=True)
        # A difference of sums of squares would cancel where a channel hardly varies.
        return _Moments(count, mean, torch.linalg.vector_norm(x - mean, dim=others, keepdim=True).square() / count)

    @staticmethod
    def of_all(parts: Sequence[_Moments]) -> _Moments:
        if len(parts) == 1:
            return parts[0]
        count = sum(part.count for part in parts)
        mean = torch.stack([part.mean * (part.count / count) for part in parts]).sum(dim=0)
        spread = [(part.variance + (part.mean - mean).square()) * (part.count / count) for part in parts]
        return _Moments(count, mean, torch.stack(spread).sum(dim=0))


class Parts:
    """What the calls of a Balancer for the parts of one array share: the decision, and the statistics of them all."""

    def __init__(self) -> None:
        self.acts: bool | None = None
        self.moments: list[_Moments] = []


class _BalancerFunction(Function):
    """Adds to the gradient g the term |g| * G, G pushing each channel's statistics into their limits.

    With mean m, second moment e2 and s = std, r = rms of a channel, the loss whose gradient is G is
    |m/s - clip(m/s)| + |ln(clip(r)/r)|; G is linear in x within a channel, so channel statistics are all it takes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        limits: tuple[float, float, float, float],
        scale: float,
        dim: int,
        parts: list[_Moments],
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limits, ctx.scale, ctx.dim, ctx.parts = limits, scale, dim, parts
        parts.append(_Moments.of(x, dim))  # all are there before the backward pass of any
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None, None]:
        (saved,) = ctx.saved_tensors
        (grad,) = grad_outputs
        moments = _Moments.of_all(ctx.parts)
        mean, variance = moments.mean, moments.variance
        x, rows = _wide_rows(saved, ctx.dim)
        grads = _rows(grad, ctx.dim)
        if rows is not None and grads is not None:
            results = torch.empty_like(grads, memory_format=torch.contiguous_format)
            work = None if gpu.takes(x) else x.new_empty(2, rows.shape[1])
            _balance_kernel(
                *(rows, mean, variance, grads, results, work, *rows.shape),
                *(rows.stride(0), grads.stride(0), results.stride(0), ctx.scale, *ctx.limits),
            )
            result = results.view(grad.movedim(ctx.dim, -1).shape).movedim(-1, ctx.dim)
            return result, None, None, None, None
        min_mean, max_mean, min_rms, max_rms = ctx.limits
        std = variance.clamp(min=1e-20).sqrt()
        rms = (variance + mean.square()).clamp(min=1e-20).sqrt()
        ratio = mean / std
        mean_sign = (ratio > max_mean).to(x.dtype) - (ratio < min_mean).to(x.dtype)
        rms_sign = (rms > max_rms).to(x.dtype) - (rms < min_rms).to(x.dtype)
        # G = constant + slope * (x - mean)
        constant = mean_sign / std + rms_sign * mean / rms.square()
        slope = rms_sign / rms.square() - mean_sign * mean / std.pow(3)
        rms_of_g = torch.hypot(constant, slope * variance.sqrt())
        # A channel within its limits, or all zero, is left alone.
        factor = torch.where(rms_of_g > 1e-20, ctx.scale / rms_of_g, 0.0)
        push = torch.addcmul(constant * factor, slope * factor, x - mean)
        wide_grad = at_least_float32(grad)
        return torch.addcmul(wide_grad, wide_grad.abs(), push).to(grad.dtype), None, None, None, None


class Balancer(ScheduledModule):
    """Keeps each channel's share of positive values and its root mean square within limits, through the gradient.

    Args:
        channel_dim: axis of the channels.
        min_positive, max_positive: limits of the share of positive values, in [0, 1].
        min_abs, max_abs: limits of the mean absolute value, as if normally distributed.
        grad_scale: size of the added gradient relative to the incoming one.
        prob: probability of acting on a call.
    """

    def __init__(
        self,
        channel_dim: int,
        min_positive: float | Schedule = 0.05,
        max_positive: float | Schedule = 0.95,
        min_abs: float | Schedule = 0.2,
        max_abs: float | Schedule = 100.0,
        grad_scale: float = 0.04,
        prob: float | Schedule | None = None,
    ) -> None:
        super().__init__()
        self.channel_dim = channel_dim
        self.min_positive = min_positive
        self.max_positive = max_positive
        self.min_abs = min_abs
        self.max_abs = max_abs
        self.grad_scale = grad_scale
        self.prob = Schedule((0, 0.5), (8000, 0.125), default=0.4) if prob is None else prob

    def limits(self) -> tuple[float, float, float, float]:
        """Present limits: (min mean/std, max mean/std, min rms, max rms) of a channel."""
        to_rms = 1.25331413732  # rms of a normal variable over its mean absolute value, sqrt(pi / 2)
        return (
            _mean_over_std(self.value(self.min_positive)),
            _mean_over_std(self.value(self.max_positive)),
            to_rms * self.value(self.min_abs),
            to_rms * self.value(self.max_abs),
        )

    def forward(self, x: Tensor, parts: Parts | None = None) -> Tensor:
        """x; where it is one of the parts of an array, all calls for them are given one `Parts`."""
        if not (self.training and x.requires_grad):
            return x
        parts = parts or Parts()
        if parts.acts is None:
            parts.acts = random.random() < self.value(self.prob)
        if not parts.acts:
            return x
        return _BalancerFunction.apply(x, self.limits(), self.grad_scale, self.channel_dim, parts.moments)


def whitening_metric(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """How far the channels within each group are from having equal, uncorrelated variance; 1 is perfect.

    Args:
        x: (..., C), C = num_groups * channels per group.
        num_groups: groups of channels that are whitened separately.

    Returns:
        the metric, a scalar, and its gradient with respect to x, shaped like x.

    Raises:
        ValueError: C is no multiple of num_groups.
    """
    metric, slope = _whitening(x, num_groups)
    return metric, slope()


def _check_groups(channels: int, num_groups: int) -> None:
    if channels % num_groups:
        raise ValueError(f"{channels} channels cannot be shared out among {num_groups} groups of equal size")


def _whitening(x: Tensor, num_groups: int) -> tuple[Tensor, Callable[[], Tensor]]:
    """The metric, and what computes its gradient, which takes as long again and is hardly ever asked for."""
    channels = x.shape[-1]
    _check_groups(channels, num_groups)
    rows = x.reshape(-1, channels)
    if native.suits(rows) and not gpu.takes(rows):
        centred, metric = torch.empty_like(rows, memory_format=torch.contiguous_format), x.new_empty(())
        _centred_kernel(rows, x.new_empty(channels), centred, *rows.shape, rows.stride(0))
        covariance = over_rows(centred, centred)
        _whitening_kernel(covariance, metric, channels, num_groups)
        return metric, lambda: linear(centred, covariance).view(x.shape)
    groups = (rows - rows.mean(dim=0)).chunk(num_groups, dim=1)  # (frames, C/G) each
    covariances = [over_rows(group, group) for group in groups]  # (C/G, C/G) each
    mean_diagonal = torch.stack([cov.diagonal().sum() for cov in covariances]).sum() / channels
    mean_square = torch.stack([cov.square().sum() for cov in covariances]).sum() / channels
    denominator = mean_diagonal.square() + 1e-20
    metric = mean_square / denominator

    def slope() -> Tensor:
        diagonal = (metric * mean_diagonal).expand(channels // num_groups).diag()
        pushes = [linear(group, cov - diagonal) for group, cov in zip(groups, covariances, strict=True)]
        return (torch.cat(pushes, dim=1) * (4.0 / (channels * denominator))).view(x.shape)

    return metric, slope


class _WhitenFunction(Function):
    """Adds to the gradient a multiple of the metric's gradient where the metric is above the limit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: Whiten) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module = module
        ctx.limit = module.value(module.whitening_limit)
        # The range of float16 is too small for what is not yet scaled.
        ctx.dtype = torch.bfloat16 if mixed_precision(x) is torch.bfloat16 else torch.float32
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        module: Whiten = ctx.module
        with torch.autocast(x.device.type, enabled=False):
            rows, grads = (_rows(x, -1), _rows(grad, -1)) if gpu.takes(x) else (None, None)
            if rows is not None and grads is not None:
                _check_groups(x.shape[-1], module.num_groups)
                result = torch.empty_like(grads, memory_format=torch.contiguous_format)
                found = x.new_empty(2, dtype=torch.float32)
                settings = module.num_groups, ctx.limit, module.grad_scale, ctx.dtype
                gpu.launch("whiten", (rows, grads, result, found, *settings))
                module.expect(found)
                return result.view(grad.shape), None
            metric, slope = _whitening(at_least_float32(x), module.num_groups)
            if metric < ctx.limit:
                module.prob = module.min_prob
                return grad, None
            module.prob = module.max_prob
            wide_grad, push = at_least_float32(grad), slope()
            if native.suits(wide_grad, push) and wide_grad.is_contiguous():
                result = torch.empty_like(push)
                _pushed_kernel(wide_grad, push, result, push.numel(), module.grad_scale)
                return result.to(grad.dtype), None
            size = module.grad_scale * wide_grad.norm() / (push.norm() + 1e-20)
            return torch.addcmul(wide_grad, push, size).to(grad.dtype), None


class _Arriving:
    """A tensor on its way to the host, where reading it waits until it is there.

    The host launches work ahead of a GPU, which it would wait for if it read a result at once.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = x.to("cpu", non_blocking=True)  # from a GPU into pinned memory
        self._event: torch.cuda.Event | None = None
        if x.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(x.device))

    def tolist(self) -> list[float]:
        if self._event is not None:
            self._event.synchronize()
        return self._x.tolist()


class Whiten(ScheduledModule):
    """Pushes the covariance of the channels towards a multiple of the identity where its metric is over a limit.

    Args:
        num_groups: groups of channels that are whitened separately.
        whitening_limit: the metric below which nothing is done.
        grad_scale: norm of the added gradient relative to the incoming one.
    """

    min_prob = 0.025
    max_prob = 0.25

    def __init__(self, num_groups: int, whitening_limit: float | Schedule, grad_scale: float) -> None:
        super().__init__()
        self.num_groups = num_groups
        self.whitening_limit = whitening_limit
        self.grad_scale = grad_scale
        self.prob = self.max_prob
        self._replayed: Tensor | None = None

    @property
    def prob(self) -> float:
        """Probability of a check, which is rare while the metric stays below the limit."""
        if self._expected is not None:
            _, at_limit = self._expected.tolist()
            self.prob = self.max_prob if at_limit else self.min_prob
        return self._prob

    @prob.setter
    def prob(self, value: float) -> None:
        self._prob = value
        self._expected: _Arriving | Tensor | None = None

    def expect(self, found: Tensor) -> None:
        """Let the last check decide about the next: the metric, and whether it is not below the limit, on a GPU."""
        if found.is_cuda and torch.cuda.is_current_stream_capturing():
            # Each replay of the CUDA graph writes to it. It was made before, outside of the memory of graphs.
            assert self._replayed is not None
            self._replayed.copy_(found)
            self._expected = self._replayed
            return
        if self._replayed is None:
            self._replayed = torch.empty_like(found)
        self._expected = _Arriving(found)

    def __getstate__(self) -> dict[str, Any]:
        """The module's attributes; what is on its way cannot be copied, so it is waited for."""
        self.prob = self.prob
        return vars(self)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and x.requires_grad) or random.random() >= self.prob:
            return x
        return _WhitenFunction.apply(x, self)


class _LimitFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, minimum: float, maximum: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.minimum, ctx.maximum = minimum, maximum
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        (grad,) = grad_outputs
        if native.suits(x, grad) and x.is_contiguous() and grad.is_contiguous():
            result = torch.empty_like(grad)
            _limited_kernel(x, grad, result, x.numel(), ctx.minimum, ctx.maximum)
            return result, None, None
        outwards = ((x < ctx.minimum) & (grad > 0)) | ((x > ctx.maximum) & (grad < 0))
        return torch.where(outwards, -grad, grad), None, None


def limit_parameter(x: Tensor, minimum: float, maximum: float, prob: float = 0.6) -> Tensor:
    """Flip the sign of gradient elements that would push a parameter further outside [minimum, maximum].

    Acts with probability `prob` per call; the value itself is not clipped. Callers use it in training only.
    """
    return _LimitFunction.apply(x, minimum, maximum) if random.random() < prob else x


class _PenaltyFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float, penalty: float) -> Tensor:
        over = (x > limit).to(torch.int8) - (x < -limit).to(torch.int8)
        ctx.save_for_backward(over)
        ctx.penalty = penalty
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (over,) = ctx.saved_tensors
        return grad_outputs[0].add(over, alpha=ctx.penalty), None, None


def penalise_large_values(x: Tensor, limit: float, penalty: float) -> Tensor:
    """As if penalty * sum(max(|x| - limit, 0)) were part of the loss, with weight one whatever the loss scale."""
    return _PenaltyFunction.apply(x, limit, penalty)


class _ScaleGradFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0] * ctx.alpha, None


class ScaleGrad(nn.Module):
    """Scales the gradient by alpha, in training."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return _ScaleGradFunction.apply(x, self.alpha) if self.training else x
