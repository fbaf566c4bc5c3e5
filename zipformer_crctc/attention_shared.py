"""What attention on a CPU and on a GPU share, above all the gradient of its weights as the products it is made of.

T frames, N utterances, E channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

MASKED_SCORE = -1000.0
SCORE_LIMIT = 25.0
SCORE_PENALTY = 1e-4
"""In some training calls, as if so much for each unit of a score beyond the limit were part of the loss."""


def by_head(x: Tensor, heads: int) -> Tensor:
    """(T, N, E) as (heads, N, T, E / heads)."""
    return x.unflatten(-1, (heads, -1)).permute(2, 1, 0, 3)


@dataclass(frozen=True)
class Use:
    """Of attention weights, for averages by some heads."""

    grad: Tensor
    """gradient of the averages by head, (heads, N, T, E / heads)"""
    values: Tensor
    """shaped like it"""
    first: int
    """the first of these heads"""


class Products(Tensor):
    """The gradient of attention weights (H, N, T, T), kept as what it is the product of: far smaller arrays.

    The gradient of each use would else be written, added to the others and read again, and no array of a layer is as
    large. The backward pass of the weights adds them up where they are used; any other operation gets them as a whole.
    """

    uses: list[Use]

    @staticmethod
    def __new__(cls, shape: Sequence[int], uses: list[Use]) -> Products:
        kind = uses[0].grad
        products = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=kind.dtype, device=kind.device)
        products.uses = uses
        return products

    def whole(self) -> Tensor:
        """As a plain tensor."""
        total = torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        for use in self.uses:
            total[use.first : use.first + len(use.grad)] += torch.matmul(use.grad, use.values.transpose(2, 3))
        return total

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operation = func.overloadpacket
        if operation is torch.ops.aten.add and not kwargs and all(isinstance(x, Products) for x in args):
            return Products(args[0].shape, [use for x in args for use in x.uses])
        if operation is torch.ops.aten.slice_backward:  # of weights[:1], say
            grad, shape, dim, start, _, step = args
            if dim == 0 and step == 1 and start >= 0:
                return Products(shape, [replace(use, first=use.first + start) for use in grad.uses])
        if func._schema.is_mutable and isinstance(args[0], Products):
            raise RuntimeError(f"{func} changes the gradient of attention weights in place: use what returns a new one")
        args, kwargs = tree_map_only(Products, Products.whole, (args, kwargs or {}))
        return func(*args, **kwargs)
