"""16-bit copies of parameters for mixed precision: kept, and brought up to date all at once.

Autocast makes a copy of each weight and bias in each pass, which at small batches is a tenth of all launches.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, defaultdict

import torch
from torch import Tensor, nn

CASTS = 64
"""Arrays that are remembered."""

_generation = 0
_lock = threading.Lock()


class _Copy:
    """A copy of a parameter, and of what state of it.

    Args:
        parameter: what is copied; the copy goes with it.
        dtype: of the copy.
    """

    def __init__(self, parameter: Tensor, dtype: torch.dtype) -> None:
        place, copies = id(parameter), _copies[dtype]
        self.parameter = weakref.ref(parameter, lambda _: copies.pop(place, None))
        with torch.inference_mode(False):
            self.value = torch.empty_like(parameter, dtype=dtype, requires_grad=False)
        self.of: tuple[int, int, int] | None = None

    def fits(self, parameter: Tensor) -> bool:
        return self.value.device == parameter.device and self.value.shape == parameter.shape

    @staticmethod
    def state(parameter: Tensor) -> tuple[int, int, int]:
        return _generation, parameter._version, parameter.data_ptr()


_copies: defaultdict[torch.dtype, dict[int, _Copy]] = defaultdict(dict)
"""By the id of the parameter."""
_members: weakref.WeakKeyDictionary[nn.Module, frozenset[int]] = weakref.WeakKeyDictionary()
_present: frozenset[int] = frozenset()


def new_pass(model: nn.Module) -> None:
    """Say that a pass begins, before which the model's parameters may have changed in ways that PyTorch does not count.

    Such as through `.data`. The first of them that is asked for brings the copies of all up to date.
    """
    global _generation, _present
    with _lock:
        if model not in _members:
            _members[model] = frozenset(map(id, model.parameters()))
        _generation, _present = _generation + 1, _members[model]


def copy_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, without gradient: not to be written to, nor kept beyond the next change of x."""
    if x.dtype == dtype:
        return x.detach()
    if not isinstance(x, nn.Parameter) or x.is_inference():
        return x.detach().to(dtype)
    copy = _copies[dtype].get(id(x))
    if copy is not None and copy.of == _Copy.state(x) and copy.parameter() is x:
        return copy.value
    with _lock:
        if copy is None or copy.parameter() is not x or not copy.fits(x):
            _copies[dtype][id(x)] = copy = _Copy(x, dtype)
        _update(dtype, x)
        return copy.value


class _Casts:
    """What was cast in a thread."""

    def __init__(self) -> None:
        self.last: OrderedDict[int, tuple[weakref.ref[Tensor], int, weakref.ref[Tensor]]] = OrderedDict()
        """The last arrays by their ids, and copies, as long as something else keeps both."""
        self.newest: tuple[weakref.ref[Tensor], int, Tensor] | None = None
        """The last of them: its copy is kept as long as itself."""


class _CastsOfThread(threading.local):
    def __init__(self) -> None:
        self.casts = _Casts()


_of_thread = _CastsOfThread()


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in another dtype, not to be written to: several layers share one copy of what they are given in turn."""
    if x.dtype == dtype:
        return x
    casts = _of_thread.casts
    if (newest := casts.newest) is not None and _fits(x, dtype, newest[0], newest[1], newest[2]):
        return newest[2]
    if (before := casts.last.pop(id(x), None)) is not None:
        of, version, made = before
        if (copy := made()) is not None and _fits(x, dtype, of, version, copy):
            casts.last[id(x)] = before
            return copy
    copy = x.detach().to(dtype)
    remember(x, copy)
    return copy


def remember(x: Tensor, copy: Tensor) -> None:
    """Say that there is a copy of x in another dtype, which `cast` is to give."""
    version, casts = _version(x), _of_thread.casts

    def forget(of: weakref.ref[Tensor]) -> None:
        if (newest := casts.newest) is not None and newest[0] is of:
            casts.newest = None

    casts.newest = weakref.ref(x, forget), version, copy
    casts.last[id(x)] = weakref.ref(x), version, weakref.ref(copy)
    if len(casts.last) > CASTS:
        casts.last.popitem(last=False)


def _fits(x: Tensor, dtype: torch.dtype, of: weakref.ref[Tensor], version: int, copy: Tensor) -> bool:
    same = of() is x and version == _version(x) and copy.dtype == dtype
    return same and copy.is_inference() == torch.is_inference_mode_enabled()


def _version(x: Tensor) -> int:
    """Of inference mode's arrays PyTorch does not count changes; nothing changes those that are cast."""
    return 0 if x.is_inference() else x._version


def _update(dtype: torch.dtype, x: Tensor) -> None:
    """Write the copy of x, and with it those of the model whose pass it is, where they are not as their parameters are.

    Not those of other models: a CUDA graph of the pass would go on writing to them.
    """
    stale = []
    for place, copy in list(_copies[dtype].items()):
        p = copy.parameter()
        if p is None or not (p is x or place in _present) or copy.of == _Copy.state(p):
            continue
        if copy.fits(p) and p.device == x.device:
            stale.append((p, copy))
    with torch.inference_mode(False), torch.no_grad():
        torch._foreach_copy_([copy.value for _, copy in stale], [p for p, _ in stale])
    for p, copy in stale:
        copy.of = _Copy.state(p)
