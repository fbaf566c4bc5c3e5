"""Triton kernels of optim.py: ScaledAdam's work on all parameters of a group in four launches.

A chunk is up to CHUNK values side by side of one parameter. A program of `_compare` and `_apply` works on one chunk,
whatever parameter it is of; between them `_total` and `_plan` work on a few numbers of each parameter. Arrays are found
by their addresses, which stand in tables. Sums are made in a fixed order, so results are the same each time.

Dimension legend: K parameters of the group, M chunks of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_crctc.gpu_tiles import ceil_div
from zipformer_crctc.paramstacks import Kernels, Settings, Stack, int64

CHUNK = 2048
CHUNK_WARPS = 8
"""With these, four programs of `_apply` (64 registers) share a multiprocessor: enough reads are under way at once."""
CHUNKS_AT_ONCE = 128
"""Chunks of one parameter whose sums are added side by side."""
PARAMS_AT_ONCE = 128

# Columns of the table of parameters (K, 9): numbers of values, first chunk and number of chunks; addresses, the last
# three 0 for one-element parameters; from one slot of size_grads to the next.
SIZE = tl.constexpr(0)
FIRST_CHUNK = tl.constexpr(1)
CHUNKS = tl.constexpr(2)
DELTA = tl.constexpr(3)
SQUARE = tl.constexpr(4)
RMS = tl.constexpr(5)
SIZE_SQUARE = tl.constexpr(6)
SIZE_GRADS = tl.constexpr(7)
STRIDE = tl.constexpr(8)
COLUMNS = tl.constexpr(9)

# Sums over a chunk (M, 3): squared gradient, value times gradient, squared value.
SUMS = tl.constexpr(3)


@triton.jit
def _at(address, first):
    """Pointer to a number of an array of float32."""
    return (address + 4 * first).to(tl.pointer_type(tl.float32))


@triton.jit(do_not_specialize=["count"])
def _compare(table, chunks, addresses, sums, count, size: tl.constexpr):
    """The sums over each chunk."""
    chunk = tl.program_id(0)
    i = tl.load(chunks + 2 * chunk)
    first = tl.load(chunks + 2 * chunk + 1)
    k = tl.arange(0, size)
    inside = k < tl.load(table + i * COLUMNS + SIZE) - first
    value = tl.load(_at(tl.load(addresses + i), first) + k, mask=inside, other=0.0)
    grad = tl.load(_at(tl.load(addresses + count + i), first) + k, mask=inside, other=0.0)
    tl.store(sums + SUMS * chunk, tl.sum(grad * grad, axis=0))
    tl.store(sums + SUMS * chunk + 1, tl.sum(value * grad, axis=0))
    tl.store(sums + SUMS * chunk + 2, tl.sum(value * value, axis=0))


@triton.jit
def _total(table, sums, totals, norms, scalar_weight, at_once: tl.constexpr):
    """Of each parameter: the weighted norm, and to totals (K, 2) the sum of value times gradient and the rms."""
    i = tl.program_id(0)
    row = table + i * COLUMNS
    count = tl.load(row + CHUNKS).to(tl.int32)
    of_param = sums + SUMS * tl.load(row + FIRST_CHUNK)
    grad_squares = tl.zeros([at_once], dtype=tl.float64)
    products = tl.zeros([at_once], dtype=tl.float64)
    squares = tl.zeros([at_once], dtype=tl.float64)
    for start in range(0, count, at_once):
        k = start + tl.arange(0, at_once)
        grad_squares += tl.load(of_param + SUMS * k, mask=k < count, other=0.0).to(tl.float64)
        products += tl.load(of_param + SUMS * k + 1, mask=k < count, other=0.0).to(tl.float64)
        squares += tl.load(of_param + SUMS * k + 2, mask=k < count, other=0.0).to(tl.float64)
    rms = tl.load(row + RMS)
    weight = tl.load(_at(rms, 0), mask=rms != 0, other=scalar_weight)
    size = tl.load(row + SIZE).to(tl.float64)
    tl.store(norms + i, tl.sqrt(tl.sum(grad_squares, axis=0)).to(tl.float32) * weight)
    tl.store(totals + 2 * i, tl.sum(products, axis=0).to(tl.float32))
    tl.store(totals + 2 * i + 1, tl.sqrt(tl.sum(squares, axis=0) / size).to(tl.float32))


@triton.jit(do_not_specialize=["count", "slot", "period"])
def _plan(
    table, totals, plan, count, slot, period, factor, size_beta2, size_rest2, rest1, eps, rate, scalar_rate, size_rate,
    correction, scalar_correction, min_rms, max_rms, scalar_max, at_once: tl.constexpr,
):  # fmt: skip
    """Size gradients, rms and size step of each parameter, and to plan (K, 4) what `_apply` needs."""
    i = tl.program_id(0) * at_once + tl.arange(0, at_once)
    inside = i < count
    row = table + i * COLUMNS
    rms_address = tl.load(row + RMS, mask=inside, other=0)
    sized = rms_address != 0  # has more than one element
    size_grad = tl.load(totals + 2 * i, mask=inside, other=0.0)
    size_grad = tl.where(factor == 0.0, 0.0, factor * size_grad)
    size_grads = tl.load(row + SIZE_GRADS, mask=inside, other=0)
    stride = tl.load(row + STRIDE, mask=inside, other=0)
    tl.store(_at(size_grads, slot * stride), size_grad, mask=sized)
    rms = tl.load(_at(rms_address, 0), mask=sized, other=1.0)
    resize = tl.zeros([at_once], dtype=tl.float32)
    if slot == period - 1:
        rms = tl.load(totals + 2 * i + 1, mask=sized, other=1.0)
        tl.store(_at(rms_address, 0), rms, mask=sized)
        total = tl.zeros([at_once], dtype=tl.float32)
        squares = tl.zeros([at_once], dtype=tl.float32)
        for earlier in range(slot):
            grad = tl.load(_at(size_grads, earlier * stride), mask=sized, other=0.0)
            total += grad
            squares += grad * grad
        total += size_grad
        squares += size_grad * size_grad
        size_square = _at(tl.load(row + SIZE_SQUARE, mask=inside, other=0), 0)
        square = size_beta2 * tl.load(size_square, mask=sized, other=0.0) + size_rest2 * (squares / period)
        tl.store(size_square, square, mask=sized)
        step = size_rate * total / (tl.sqrt(square) + eps)
        step = tl.where(rms < min_rms, 0.0, step)
        limit = (max_rms - rms) / rms
        resize = tl.where(sized, rest1 * tl.where(limit < step, limit, step), 0.0)
    tl.store(plan + 4 * i, tl.where(sized, rate * tl.where(rms < min_rms, min_rms, rms), scalar_rate), mask=inside)
    tl.store(plan + 4 * i + 1, resize, mask=inside)
    tl.store(plan + 4 * i + 2, tl.where(sized, correction, scalar_correction), mask=inside)
    tl.store(plan + 4 * i + 3, tl.where(sized, float("inf"), scalar_max), mask=inside)


@triton.jit(do_not_specialize=["count"])
def _apply(
    table, chunks, addresses, plan, count, factor, beta1, beta2, rest2, eps, size: tl.constexpr
):  # fmt: skip
    """Averaged squared gradient, change and value of each chunk."""
    # Backwards, because what `_compare` has read last is still in the cache.
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    i = tl.load(chunks + 2 * chunk)
    first = tl.load(chunks + 2 * chunk + 1)
    row = table + i * COLUMNS
    rate = tl.load(plan + 4 * i)
    resize = tl.load(plan + 4 * i + 1)
    correction = tl.load(plan + 4 * i + 2)
    limit = tl.load(plan + 4 * i + 3)
    k = tl.arange(0, size)
    inside = k < tl.load(row + SIZE) - first
    values = _at(tl.load(addresses + i), first) + k
    deltas = _at(tl.load(row + DELTA), first) + k
    squares = _at(tl.load(row + SQUARE), first) + k
    grad = tl.load(_at(tl.load(addresses + count + i), first) + k, mask=inside, other=0.0)
    square = tl.load(squares, mask=inside, other=0.0)
    delta = tl.load(deltas, mask=inside, other=0.0)
    value = tl.load(values, mask=inside, other=0.0)
    grad = tl.where(factor == 0.0, 0.0, factor * grad)
    square = beta2 * square + rest2 * grad * grad
    direction = grad / (tl.sqrt(square) * correction + eps)
    # The limit, for one-element parameters, comes before the step.
    value = tl.where(value > limit, limit, tl.where(value < -limit, -limit, value))
    delta = beta1 * delta + resize * value + rate * direction
    tl.store(squares, square, mask=inside)
    tl.store(deltas, delta, mask=inside)
    tl.store(values, value + delta, mask=inside)


class Tables:
    """What the kernels know of a group, on its device: kept from step to step, renewed where it is no longer true."""

    def __init__(self) -> None:
        self._stacks = self._addresses = int64([0])  # on the CPU: what the others were made of
        self.params: Tensor
        """(K, 9), see SIZE and below"""
        self.chunks: Tensor
        """(M, 2): parameter, first value"""
        self.addresses: Tensor
        """(2 * K,): of values, of gradients"""
        self.sums: Tensor
        """(M, 3)"""
        self.totals: Tensor
        """(K, 2), of `_total`"""
        self.plan: Tensor
        """(K, 4), of `_plan`"""

    def renew(self, stacks: Tensor, addresses: Tensor, device: torch.device) -> None:
        """Make them true of these arrays.

        Args:
            stacks: (number of stacks * 7,), the C structure.
            addresses: (2 * K,), of values, of gradients.
            device: that of the arrays.
        """
        if not torch.equal(stacks, self._stacks):
            self._renew_params(stacks, device)
        if not torch.equal(addresses, self._addresses):
            self._addresses, self.addresses = addresses, _on(device, addresses)

    def _renew_params(self, stacks: Tensor, device: torch.device) -> None:
        rows = stacks.view(-1, 7)
        counts = rows[:, 0]
        first_params = (counts.cumsum(0) - counts).repeat_interleave(counts)
        place = torch.arange(len(first_params), device="cpu") - first_params  # in the stack
        count, size, delta, square, rms, size_square, size_grads = rows.repeat_interleave(counts, dim=0).unbind(1)
        in_small = 4 * place * (rms != 0)  # bytes
        in_large = 4 * place * size
        chunks = (size + CHUNK - 1) // CHUNK
        first_chunks = chunks.cumsum(0) - chunks
        columns = (
            *(size, first_chunks, chunks, delta + in_large, square + in_large),
            *(rms + in_small, size_square + in_small, size_grads + in_small, count),
        )
        param = torch.arange(len(size), device="cpu").repeat_interleave(chunks)
        start = CHUNK * (torch.arange(len(param), device="cpu") - first_chunks[param])
        self._stacks = stacks
        self.params = _on(device, torch.stack(columns, dim=1))
        self.chunks = _on(device, torch.stack((param, start), dim=1))
        self.sums = torch.empty(len(param), 3, dtype=torch.float32, device=device)
        self.totals = torch.empty(len(size), 2, dtype=torch.float32, device=device)
        self.plan = torch.empty(len(size), 4, dtype=torch.float32, device=device)


def _on(device: torch.device, numbers: Tensor) -> Tensor:
    """A copy on a device, without waiting for it: the memory here is not used again before it is done."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers


class GpuKernels(Kernels):
    """As Kernels, in Triton.

    Args:
        group, stacks, states: as there.
        tables: those of the group.
    """

    def __init__(
        self, group: dict[str, Any], stacks: Sequence[Stack], states: Sequence[dict[str, Any]], tables: Tables
    ) -> None:
        super().__init__(group, stacks, states)
        self.tables = tables
        self._norms: Tensor | None = None

    def norms(self) -> Tensor:
        """As ScaledAdam._weighted_norms. Does not wait for the device."""
        tables, first = self.tables, self.values[0]
        count = len(self.params)
        self._norms = norms = torch.empty(count, dtype=torch.float32, device=first.device)
        with torch.cuda.device_of(first):
            tables.renew(self.stacks[0], torch.cat((self.value_addresses, self.grad_addresses)), first.device)
            of_chunks = tables.params, tables.chunks, tables.addresses
            _compare[(len(tables.chunks),)](*of_chunks, tables.sums, count, CHUNK, num_warps=CHUNK_WARPS)
            weight = float(self.group["scalar_lr_scale"])
            _total[(count,)](tables.params, tables.sums, tables.totals, norms, weight, CHUNKS_AT_ONCE)
        return norms

    def _update(self, settings: Settings, slot: int, period: int) -> None:
        if self._norms is None:
            self.norms()
        tables, s, count = self.tables, settings, len(self.params)
        numbers = (
            *(s.factor, s.size_beta2, 1 - s.size_beta2, 1 - s.beta1, s.eps, s.rate, s.scalar_rate, s.size_rate),
            *(s.correction, s.scalar_correction, s.min_rms, s.max_rms, s.scalar_max),
        )
        of_all = s.factor, s.beta1, s.beta2, 1 - s.beta2, s.eps
        of_chunks = tables.params, tables.chunks, tables.addresses, tables.plan, count
        with torch.cuda.device_of(self.values[0]):
            grid = (ceil_div(count, PARAMS_AT_ONCE),)
            _plan[grid](tables.params, tables.totals, tables.plan, count, slot, period, *numbers, PARAMS_AT_ONCE)
            _apply[(len(tables.chunks),)](*of_chunks, *of_all, CHUNK, num_warps=CHUNK_WARPS)
