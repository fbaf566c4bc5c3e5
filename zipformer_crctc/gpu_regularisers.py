"""Triton kernels of regularisers.py: the statistics of channels, Balancer and Whiten.

R rows, C channels, G groups of S channels; arrays (R, C) are rows some stride apart. Sums over rows are taken in parts,
one for each program, which are then added in a fixed order. Strides and channels are always the same few numbers, so
that kernels may be compiled for multiples of 16 among them, which are read sixteen bytes at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_crctc.gpu_tiles import PROGRAMS, ceil_div, grid_of, next_power_of_two, places
from zipformer_crctc.products import product

TILE = 2048
"""Elements that a program takes at a time."""
BLOCK = 1024
"""Elements of a covariance for each program, and sums that are added at a time."""
PRODUCTS = 128
"""Tiles, of 128 by 128, of the products of parts of the rows that make up a covariance."""
MIN_CHUNK = 1024
"""Rows of such a part at least."""


def _tile(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile, powers of two: many rows, as each column's sums or factors cost something."""
    wide = min(64, max(8, next_power_of_two(columns)))
    return TILE // wide, wide


def _shares(rows: int, columns: int, others: int = 1) -> tuple[tuple[int, int, int], int, tuple[int, int]]:
    """How programs share out `others` arrays of rows and columns: their grid, the rows of each, and its tile."""
    tall, wide = _tile(columns)
    blocks = ceil_div(columns, wide)
    parts = max(1, PROGRAMS // (blocks * others))
    each = tall * max(1, ceil_div(rows, parts * tall))
    return (ceil_div(rows, each), blocks, others), each, (tall, wide)


@triton.jit(do_not_specialize=["rows", "each"])
def _part_moments(x, means, squares, rows, channels, stride, each, tall: tl.constexpr, wide: tl.constexpr):
    lane = tl.arange(0, tall)
    channel = tl.program_id(1) * wide + tl.arange(0, wide)
    inside = channel < channels
    first = tl.program_id(0) * each
    count = tl.minimum(each, rows - first)
    # Deviations from one of the channel's values are exact where it hardly varies.
    origin = tl.load(x + first.to(tl.int64) * stride + channel, mask=inside, other=0.0).to(tl.float32)
    mean = tl.zeros([tall, wide], dtype=tl.float32)
    square = tl.zeros([tall, wide], dtype=tl.float32)
    for start in range(0, each, tall):
        row = first + start + lane
        here = (row < rows)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * stride + channel[None, :]
        value = tl.load(x + place, mask=here, other=0.0).to(tl.float32) - origin[None, :]
        away = tl.where(here, value - mean, 0.0)
        mean += away * (1.0 / (start // tall + 1))
        square += away * (value - mean)
    seen = ((count - lane + tall - 1) // tall).to(tl.float32)[:, None]  # by each lane
    middle = tl.sum(mean * seen, axis=0) / count
    away = mean - middle[None, :]
    place = tl.program_id(0) * channels + channel
    tl.store(means + place, origin + middle, mask=inside)
    tl.store(squares + place, tl.sum(square + away * away * seen, axis=0), mask=inside)


@triton.jit(do_not_specialize=["rows", "each", "parts"])
def _merged_moments(
    means, squares, mean, variance, rows, channels, each, parts, tall: tl.constexpr, wide: tl.constexpr
):
    lane = tl.arange(0, tall)
    channel = tl.program_id(0) * wide + tl.arange(0, wide)
    inside = channel < channels
    origin = tl.load(means + channel, mask=inside, other=0.0)
    sums = tl.zeros([tall, wide], dtype=tl.float32)
    for start in range(0, parts, tall):
        part = start + lane
        here = (part < parts)[:, None] & inside[None, :]
        count = tl.minimum(each, rows - part * each).to(tl.float32)[:, None]
        away = tl.load(means + part[:, None] * channels + channel[None, :], mask=here, other=0.0) - origin[None, :]
        sums += tl.where(here, away * count, 0.0)
    middle = tl.sum(sums, axis=0) / rows
    total = tl.zeros([tall, wide], dtype=tl.float32)
    for start in range(0, parts, tall):
        part = start + lane
        here = (part < parts)[:, None] & inside[None, :]
        place = part[:, None] * channels + channel[None, :]
        count = tl.minimum(each, rows - part * each).to(tl.float32)[:, None]
        away = tl.load(means + place, mask=here, other=0.0) - origin[None, :] - middle[None, :]
        total += tl.where(here, tl.load(squares + place, mask=here, other=0.0) + away * away * count, 0.0)
    tl.store(mean + channel, origin + middle, mask=inside)
    tl.store(variance + channel, tl.sum(total, axis=0) / rows, mask=inside)


def moments(x: Tensor, mean: Tensor, variance: Tensor, rows: int, channels: int, stride: int) -> None:
    """Mean and variance (C,) of each channel, in float32, by Chan's formula: a difference of sums would cancel."""
    (parts, blocks, _), each, tile = _shares(rows, channels)
    means, squares = torch.empty(2, parts, channels, dtype=torch.float32, device=x.device)
    _part_moments[(parts, blocks)](x, means, squares, rows, channels, stride, each, *tile)
    _merged_moments[(ceil_div(channels, 16),)](
        means, squares, mean, variance, rows, channels, each, parts, TILE // 16, 16
    )


@triton.jit
def _beyond(x, minimum, maximum):
    return tl.where(x > maximum, 1.0, 0.0) - tl.where(x < minimum, 1.0, 0.0)


@triton.jit(do_not_specialize=["rows"])
def _balance(
    x, mean, variance, grad, result, rows, channels, x_stride, grad_stride, result_stride,
    scale, min_ratio, max_ratio, min_rms, max_rms, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row, channel, inside = places(rows, channels, tall, wide)
    middle = tl.load(mean + channel, mask=channel < channels, other=0.0)
    spread = tl.load(variance + channel, mask=channel < channels, other=0.0)
    std = tl.sqrt(tl.maximum(spread, 1e-20))
    square = tl.maximum(spread + middle * middle, 1e-20)
    of_ratio = _beyond(middle / std, min_ratio, max_ratio)
    of_rms = _beyond(tl.sqrt(square), min_rms, max_rms)
    value = of_ratio / std + of_rms * middle / square
    rise = of_rms / square - of_ratio * middle / (std * std * std)
    # The root of the sum of both squares, which may be too large for a float.
    one, other = tl.abs(value), tl.abs(rise * tl.sqrt(spread))
    larger = tl.maximum(one, other)
    share = tl.minimum(one, other) / tl.maximum(larger, 1e-20)
    size = larger * tl.sqrt(1.0 + share * share)
    # A channel within its limits, or all zero, is left alone.
    factor = tl.where(size > 1e-20, scale / tl.maximum(size, 1e-20), 0.0)

    far = row.to(tl.int64)[:, None]
    away = tl.load(x + far * x_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32) - middle[None, :]
    slope = tl.load(grad + far * grad_stride + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    changed = slope + tl.abs(slope) * ((value * factor)[None, :] + (rise * factor)[None, :] * away)
    tl.store(result + far * result_stride + channel[None, :], changed, mask=inside)


def balance(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    grad: Tensor,
    result: Tensor,
    work: None,
    rows: int,
    channels: int,
    x_stride: int,
    grad_stride: int,
    result_stride: int,
    scale: float,
    min_ratio: float,
    max_ratio: float,
    min_rms: float,
    max_rms: float,
) -> None:
    """result = grad + |grad| G, G the gradient that pushes each channel's mean / std and rms into their limits."""
    tile = _tile(channels)
    _balance[grid_of(rows, channels, tile)](
        *(x, mean, variance, grad, result, rows, channels, x_stride, grad_stride, result_stride),
        *map(float, (scale, min_ratio, max_ratio, min_rms, max_rms)),
        *tile,
    )


@triton.jit(do_not_specialize=["rows", "padded"])
def _centred(x, mean, centred, rows, padded, size, stride, tall: tl.constexpr, wide: tl.constexpr):
    row, column, inside = places(padded, size, tall, wide)
    here = inside & (row < rows)[:, None]
    group = tl.program_id(2)
    channel = group * size + column
    value = tl.load(x + row.to(tl.int64)[:, None] * stride + channel[None, :], mask=here, other=0.0).to(tl.float32)
    value -= tl.load(mean + channel, mask=column < size, other=0.0)[None, :]
    place = (group.to(tl.int64) * padded + row)[:, None] * size + column[None, :]
    tl.store(centred + place, tl.where(here, value, 0.0), mask=inside)


@triton.jit(do_not_specialize=["rows", "chunks"])
def _covariance(products, covariance, sums, rows, chunks, size, block: tl.constexpr):
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < size * size
    group = tl.program_id(1).to(tl.int64)
    total = tl.zeros([block], dtype=tl.float32)
    for chunk in range(chunks):
        total += tl.load(products + (group * chunks + chunk) * size * size + place, mask=inside, other=0.0)
    total = total / rows
    tl.store(covariance + group * size * size + place, total, mask=inside)
    number = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + number, tl.sum(tl.where(place // size == place % size, total, 0.0), axis=0))
    count = tl.num_programs(0) * tl.num_programs(1)
    tl.store(sums + count + number, tl.sum(total * total, axis=0))


@triton.jit
def _total(sums, count, block: tl.constexpr):
    total = tl.zeros([block], dtype=tl.float32)
    for start in range(0, count, block):
        place = start + tl.arange(0, block)
        total += tl.load(sums + place, mask=place < count, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _slope(covariance, sums, matrix, found, channels, size, count, tiny, limit, block: tl.constexpr):
    mean = _total(sums, count, block) / channels
    metric = _total(sums + count, count, block) / channels / (mean * mean + tiny)
    place = tl.program_id(0) * block + tl.arange(0, block)
    inside = place < size * size
    far = tl.program_id(1).to(tl.int64) * size * size + place
    value = tl.load(covariance + far, mask=inside, other=0.0)
    value -= tl.where(place // size == place % size, metric * mean, 0.0)
    tl.store(matrix + far, value / tl.maximum(mean, 1e-30), mask=inside)  # of a size near one
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(found, metric)
        tl.store(found + 1, tl.where(metric < limit, 0.0, 1.0))


@triton.jit(do_not_specialize=["rows", "padded", "each"])
def _sizes(grad, push, found, sums, rows, padded, size, stride, each, tall: tl.constexpr, wide: tl.constexpr):
    group = tl.program_id(2)
    column = tl.program_id(1) * wide + tl.arange(0, wide)
    read = tl.where(tl.load(found + 1) > 0.0, rows, 0)  # nothing below the limit
    grads = tl.zeros([tall, wide], dtype=tl.float32)
    pushes = tl.zeros([tall, wide], dtype=tl.float32)
    for start in range(0, each, tall):
        row = tl.program_id(0) * each + start + tl.arange(0, tall)
        here = (row < read)[:, None] & (column < size)[None, :]
        place = row.to(tl.int64)[:, None] * stride + (group * size + column)[None, :]
        slope = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
        grads += slope * slope
        place = (group.to(tl.int64) * padded + row)[:, None] * size + column[None, :]
        change = tl.load(push + place, mask=here, other=0.0).to(tl.float32)
        pushes += change * change
    number = (group * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
    tl.store(sums + number, tl.sum(tl.sum(grads, axis=1), axis=0))
    count = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    tl.store(sums + count + number, tl.sum(tl.sum(pushes, axis=1), axis=0))


@triton.jit(do_not_specialize=["rows", "padded", "each", "count"])
def _pushed(
    grad, push, found, sums, result, rows, padded, channels, size, stride, each, count, scale,
    block: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    column = tl.program_id(1) * wide + tl.arange(0, wide)
    acts = tl.load(found + 1) > 0.0
    read = tl.where(acts, rows, 0)
    of_grad, of_push = _total(sums, count, block), _total(sums + count, count, block)
    factor = scale * tl.sqrt(of_grad) / (tl.sqrt(of_push) + 1e-20)
    for start in range(0, each, tall):
        row = tl.program_id(0) * each + start + tl.arange(0, tall)
        inside = (row < rows)[:, None] & (column < size)[None, :]
        here = inside & (row < read)[:, None]
        channel = (group * size + column)[None, :]
        far = row.to(tl.int64)[:, None]
        slope = tl.load(grad + far * stride + channel, mask=inside, other=0.0).to(tl.float32)
        place = (group.to(tl.int64) * padded + row)[:, None] * size + column[None, :]
        change = tl.load(push + place, mask=here, other=0.0).to(tl.float32)
        changed = tl.where(acts, slope + factor * change, slope)
        tl.store(result + far * channels + channel, changed, mask=inside)


def whiten(
    x: Tensor,
    grad: Tensor,
    result: Tensor,
    found: Tensor,
    groups: int,
    limit: float,
    scale: float,
    dtype: torch.dtype,
) -> None:
    """What Whiten makes of a gradient; nothing waits for the device. There is no C kernel of this name.

    Args:
        x, grad: (R, C).
        result: (R, C), without gaps: the gradient with what pushes the metric down where that is not below the limit.
        found: (2,) in float32: the metric, and one where that is not below the limit, else zero.
        groups: G, of which C is a multiple.
        limit: the metric from which on anything is added.
        scale: the norm of what is added over that of the gradient.
        dtype: of the factors of matrix products. In bfloat16 rows are rounded after their means are gone, by errors
            that are independent: of an entry of the covariance that is 2^-9 / sqrt(R), and less still of the metric.
    """
    (rows, channels), size = x.shape, x.shape[1] // groups
    # A covariance is a small product of long arrays, so parts of them are multiplied side by side.
    chunks = max(1, min(PRODUCTS // (groups * ceil_div(size, 128) ** 2), rows // MIN_CHUNK))
    chunk = 32 * ceil_div(rows, 32 * chunks)
    padded = chunks * chunk
    shares, each, tile = _shares(rows, size, groups)

    mean, variance = x.new_empty(2, channels, dtype=torch.float32)
    moments(x, mean, variance, rows, channels, x.stride(0))
    centred = x.new_empty(groups, padded, size, dtype=dtype)
    _centred[(ceil_div(padded, tile[0]), shares[1], groups)](x, mean, centred, rows, padded, size, x.stride(0), *tile)
    parts = centred.view(groups * chunks, chunk, size)
    products = product(parts.transpose(1, 2), parts, torch.float32)  # (G * chunks, S, S)

    covariance = x.new_empty(groups, size, size, dtype=torch.float32)
    grid = ceil_div(size * size, BLOCK), groups
    count = grid[0] * grid[1]
    sums = x.new_empty(2 * count, dtype=torch.float32)
    _covariance[grid](products, covariance, sums, rows, chunks, size, BLOCK)
    matrix = torch.empty_like(covariance, dtype=dtype)
    tiny = 1e-20 / (rows * rows)
    _slope[grid](covariance, sums, matrix, found, channels, size, count, tiny, float(limit), BLOCK)

    push = torch.bmm(centred, matrix)  # (G, padded R, S)
    count = shares[0] * shares[1] * shares[2]
    sums = x.new_empty(2 * count, dtype=torch.float32)
    _sizes[shares](grad, push, found, sums, rows, padded, size, grad.stride(0), each, *tile)
    _pushed[shares](
        *(grad, push, found, sums, result, rows, padded, channels, size, grad.stride(0), each, count, float(scale)),
        *(BLOCK, *tile),
    )
