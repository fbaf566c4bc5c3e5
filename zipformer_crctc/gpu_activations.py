"""Triton kernels of activations.py: Swoosh, gates, and the limit of parameters.

R rows (frames times utterances), N utterances, C channels; arrays (R, C), in memory row by row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from zipformer_crctc.gpu_tiles import COMPILED, PROGRAMS, ceil_div, grid_of, next_power_of_two, places, tile_of

ELEMENTS = 1024


@triton.jit
def _log(x):
    """By the machine's own instruction, which errs by 2e-7 at most for x from 1 to 2; tl.log is a long polynomial."""
    if COMPILED:
        return libdevice.fast_logf(x)
    return tl.log(x)


@triton.jit
def swooshed(x, shift, offset):
    above = x - shift
    # ln(1 + exp(above)), which must not overflow.
    soft = tl.maximum(above, 0.0) + _log(1.0 + tl.exp(-tl.abs(above)))
    return soft - 0.08 * x - offset


@triton.jit(do_not_specialize=["rows", "utterances"])
def _swoosh(
    x, mask, y, rows, utterances, channels, shift, offset, block_rows: tl.constexpr, block_channels: tl.constexpr
):
    row, channel, inside = places(rows, channels, block_rows, block_channels)
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    result = swooshed(tl.load(x + place, mask=inside, other=0.0).to(tl.float32), shift, offset)
    if mask is not None:
        of_mask = (row % utterances)[:, None] * channels + channel[None, :]
        result *= tl.load(mask + of_mask, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, result, mask=inside)


def swoosh(
    x: Tensor, mask: Tensor | None, y: Tensor, rows: int, utterances: int, channels: int, shift: float, offset: float
) -> None:
    """y = Swoosh(x), times the mask (N, C) where there is one."""
    tile = tile_of(channels)
    _swoosh[grid_of(rows, channels, tile)](x, mask, y, rows, utterances, channels, shift, offset, *tile)


@triton.jit(do_not_specialize=["rows", "utterances"])
def _swoosh_gradient(
    x, mask, grad, y, grad_x, rows, utterances, channels, shift, offset,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    row, channel, inside = places(rows, channels, block_rows, block_channels)
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    slope = (tl.sigmoid(value - shift) - 0.08) * tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0
    if mask is not None:
        of_mask = (row % utterances)[:, None] * channels + channel[None, :]
        factor = tl.load(mask + of_mask, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_x + place, slope * factor, mask=inside)
    if y is not None:
        tl.store(y + place, swooshed(value, shift, offset) * factor, mask=inside)


def swoosh_gradient(
    x: Tensor,
    mask: Tensor | None,
    grad: Tensor,
    y: Tensor | None,
    grad_x: Tensor,
    rows: int,
    utterances: int,
    channels: int,
    shift: float,
    offset: float,
) -> None:
    """The gradient of x from that of the result of `swoosh`, and that result again where y is given."""
    tile = tile_of(channels)
    _swoosh_gradient[grid_of(rows, channels, tile)](
        x, mask, grad, y, grad_x, rows, utterances, channels, shift, offset, *tile
    )


@triton.jit
def _opened(gate, is_tanh: tl.constexpr):
    """The function of the gate, and its slope."""
    if is_tanh:
        opening = 2.0 * tl.sigmoid(2.0 * gate) - 1.0
        return opening, 1.0 - opening * opening
    opening = tl.sigmoid(gate)
    return opening, opening * (1.0 - opening)


@triton.jit
def _kept(padding, row, rows, utterances, of_utterance, of_frame):
    """1 for rows that are not padding."""
    place = (row % utterances) * of_utterance + (row // utterances) * of_frame
    return 1.0 - tl.load(padding + place, mask=row < rows, other=0).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["rows", "utterances", "of_utterance", "of_frame"])
def _gate(
    x, gate, padding, y, rows, utterances, channels, x_step, gate_step, of_utterance, of_frame,
    is_tanh: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    row, channel, inside = places(rows, channels, block_rows, block_channels)
    wide = row.to(tl.int64)[:, None]
    value = tl.load(x + wide * x_step + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    opening, _ = _opened(
        tl.load(gate + wide * gate_step + channel[None, :], mask=inside, other=0.0).to(tl.float32), is_tanh
    )
    if padding is not None:
        opening *= _kept(padding, row, rows, utterances, of_utterance, of_frame)
    tl.store(y + wide * channels + channel[None, :], value * opening, mask=inside)


def gate(
    x: Tensor,
    gate: Tensor,
    padding: Tensor | None,
    y: Tensor,
    rows: int,
    utterances: int,
    channels: int,
    x_step: int,
    gate_step: int,
    of_utterance: int,
    of_frame: int,
    is_tanh: bool,
) -> None:
    """y = x times the function of the gate; zero at padding, whose strides are given."""
    tile = tile_of(channels)
    padding = None if padding is None else padding.view(torch.uint8)
    _gate[grid_of(rows, channels, tile)](
        x, gate, padding, y, rows, utterances, channels, x_step, gate_step, of_utterance, of_frame, is_tanh, *tile
    )


@triton.jit(do_not_specialize=["rows", "utterances", "of_utterance", "of_frame"])
def _gate_gradient(
    x, gate, padding, grad, grad_x, grad_gate, rows, utterances, channels, x_step, gate_step, of_utterance, of_frame,
    is_tanh: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    row, channel, inside = places(rows, channels, block_rows, block_channels)
    wide = row.to(tl.int64)[:, None]
    place = wide * channels + channel[None, :]
    value = tl.load(x + wide * x_step + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    opening, slope = _opened(
        tl.load(gate + wide * gate_step + channel[None, :], mask=inside, other=0.0).to(tl.float32), is_tanh
    )
    through = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if padding is not None:
        through *= _kept(padding, row, rows, utterances, of_utterance, of_frame)
    tl.store(grad_x + place, through * opening, mask=inside)
    tl.store(grad_gate + place, through * value * slope, mask=inside)


def gate_gradient(
    x: Tensor,
    gate: Tensor,
    padding: Tensor | None,
    grad: Tensor,
    grad_x: Tensor,
    grad_gate: Tensor,
    rows: int,
    utterances: int,
    channels: int,
    x_step: int,
    gate_step: int,
    of_utterance: int,
    of_frame: int,
    is_tanh: bool,
) -> None:
    """The gradients of both inputs of `gate` from that of its result."""
    tile = tile_of(channels)
    padding = None if padding is None else padding.view(torch.uint8)
    sizes = (rows, utterances, channels, x_step, gate_step, of_utterance, of_frame)
    _gate_gradient[grid_of(rows, channels, tile)](x, gate, padding, grad, grad_x, grad_gate, *sizes, is_tanh, *tile)


@triton.jit
def _limited(x, grad, result, count, minimum, maximum, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    value = tl.load(x + place, mask=place < count, other=0.0).to(tl.float32)
    slope = tl.load(grad + place, mask=place < count, other=0.0).to(tl.float32)
    outwards = ((value < minimum) & (slope > 0.0)) | ((value > maximum) & (slope < 0.0))
    tl.store(result + place, tl.where(outwards, -slope, slope), mask=place < count)


def limited(x: Tensor, grad: Tensor, result: Tensor, count: int, minimum: float, maximum: float) -> None:
    """The gradient, its sign flipped where it would push x further outside the limits."""
    _limited[(ceil_div(count, ELEMENTS),)](x, grad, result, count, minimum, maximum, ELEMENTS)


@triton.jit(do_not_specialize=["rows", "each"])
def _column_sums(x, sums, rows, channels, stride, each, block_rows: tl.constexpr, block_channels: tl.constexpr):
    part = tl.program_id(0)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    total = tl.zeros([block_rows, block_channels], dtype=tl.float32)
    for start in range(part * each, tl.minimum(part * each + each, rows), block_rows):
        row = start + tl.arange(0, block_rows)
        inside = (row < tl.minimum(part * each + each, rows))[:, None] & (channel < channels)[None, :]
        place = row.to(tl.int64)[:, None] * stride + channel[None, :]
        total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums + part * channels + channel, tl.sum(total, axis=0), mask=channel < channels)


def column_sums(x: Tensor) -> Tensor:
    """Sums over the rows of x (R, C), in float32: (C,)."""
    rows, channels = x.shape
    wide = min(128, next_power_of_two(channels))
    columns = ceil_div(channels, wide)
    each = 32 * ceil_div(rows, 32 * max(1, PROGRAMS // columns))
    parts = ceil_div(rows, each)
    sums = torch.empty(parts, channels, dtype=torch.float32, device=x.device)
    _column_sums[(parts, columns)](x, sums, rows, channels, x.stride(0), each, ELEMENTS * 2 // wide, wide)
    return sums.sum(dim=0)
