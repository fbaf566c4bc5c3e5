"""Values that change while training goes on.

Rates of skips and dropouts, limits of regularisers and the like are functions of the adjusted batch count b, which
counts reference batches (`ref_duration` seconds of audio each), so that they do not depend on the batch size.
Source: Zipformer (Yao et al., ICLR 2024), section 3.5 and its appendix on the training set-up.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

from torch import nn


class Schedule:
    """A piecewise linear function of b, constant outside its points.

    Args:
        points: (b, value) pairs with b increasing.
        default: the value in evaluation mode, or while no b is set.
    """

    def __init__(self, *points: tuple[float, float], default: float = 0.0) -> None:
        self.counts = [float(b) for b, _ in points]
        self.values = [float(value) for _, value in points]
        self.default = float(default)
        if not points or any(a >= b for a, b in zip(self.counts, self.counts[1:], strict=False)):
            raise ValueError(f"a schedule needs points with increasing batch counts, got {points}")

    def __call__(self, b: float | None) -> float:
        """The value at the adjusted batch count b; the default where b is None."""
        if b is None:
            return self.default
        right = bisect.bisect_right(self.counts, b)
        if right == 0:
            return self.values[0]
        if right == len(self.counts):
            return self.values[-1]
        b0, b1 = self.counts[right - 1 : right + 1]
        v0, v1 = self.values[right - 1 : right + 1]
        return v0 + (v1 - v0) * (b - b0) / (b1 - b0)

    def __repr__(self) -> str:
        points = ", ".join(f"({b:g}, {value:g})" for b, value in zip(self.counts, self.values, strict=True))
        return f"Schedule({points}, default={self.default:g})"


class ScheduledModule(nn.Module):
    """A module some of whose attributes are schedules, read at its own `batch_count`."""

    batch_count: float | None = None

    def value(self, scheduled: float | Schedule) -> float:
        """The present value of a number or a schedule; evaluation mode gives the schedule's default."""
        if isinstance(scheduled, Schedule):
            return scheduled(self.batch_count if self.training else None)
        return scheduled


def set_batch_count(model: nn.Module, b: float | None) -> None:
    """Set the adjusted batch count b of every scheduled value in the model."""
    for module in model.modules():
        if isinstance(module, ScheduledModule):
            module.batch_count = b


def named_schedules(model: nn.Module) -> Iterator[tuple[str, Schedule]]:
    """Every schedule in the model with the dotted path of the attribute that holds it."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, Schedule):
                yield (f"{path}.{name}" if path else name), value
