"""Depthwise convolutions on a GPU: what csrc/convolution.c does.

T frames, N utterances, C channels, K taps. Beside so many multiplications for each value that is loaded, a GPU has time
for little else. So taps and sums are in registers: kernels are unrolled for that, and compiled for each K.

For sequences a program is one warp, which works on a few channels and FRAMES frames of an utterance at a time: it loads
the inputs around these once, and has them in registers too. Those for images are in gpu_depthwise_images.py.
"""

# Triton has tuples, but no unpacking of them.
# ruff: noqa: RUF005
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_crctc.gpu_depthwise_images import convolve_images, sum_products_of_images
from zipformer_crctc.gpu_tiles import MULTIPROCESSORS, ceil_div, next_power_of_two, taps_of

FRAMES = 16
"""A run of frames: outputs that a program works on at a time. With more, registers would run out."""
LINE = 128
"""Bytes of a frame that a program loads, so that each thread has 4."""
PROGRAMS = 12 * MULTIPROCESSORS
"""Warps of weight gradients: a multiprocessor has registers for 12."""
SHORTER_PROGRAMS = 2 * PROGRAMS
"""Warps of convolutions: more than run at a time, so that it matters little when the last ones end."""
PARTS, COLUMNS = 32, 32
"""Tiles in which partial sums are added up."""
WARPS = 4
"""Of a program for images: so many columns."""
ROWS = 16
"""The fewest rows of outputs for a program, which has to begin with the rows before, and with the taps."""
ROWS_OF_GRADIENT = 128
"""The most rows of a piece of the weight gradient: programs share out pieces."""

_SIZES = ("frames_x", "frames_y", "padding", "each", "utterances", "parts")
"""They change from batch to batch, which is no reason to compile again."""


def depthwise(
    x: Tensor,
    weight: Tensor,
    by_tap: None,
    bias: Tensor | None,
    y: Tensor,
    utterances: int,
    channels: int,
    rows: int,
    columns: int,
    columns_y: int,
    kernel_rows: int,
    kernel_columns: int,
    padding: int,
    reverse: int,
    x_utterance: int,
    x_row: int,
    x_column: int,
    y_utterance: int,
    y_row: int,
    y_column: int,
) -> None:
    """As in csrc/convolution.c. Sequences are images of one row, whose columns are frames. It needs no `by_tap`."""
    block = _channels_of(x)
    blocks = ceil_div(channels, block)
    if rows * kernel_rows > 1:
        assert columns_y == columns
        groups = ceil_div(columns, WARPS)
        ranges = ceil_div(SHORTER_PROGRAMS, WARPS * blocks * groups * utterances)
        each = ceil_div(rows, min(ranges, ceil_div(rows, ROWS)))
        convolve_images[(blocks * groups * utterances * ceil_div(rows, each),)](
            x, weight, bias, y, utterances, channels, rows, columns, padding, each,
            x_utterance, x_row, y_utterance, y_row, x_column, y_column,
            kernel_rows, kernel_columns, next_power_of_two(kernel_rows * kernel_columns), bool(reverse),
            WARPS, block, num_warps=WARPS, num_stages=1,
        )  # fmt: skip
        return
    runs = ceil_div(columns_y, FRAMES)
    share = ceil_div(blocks * utterances * runs, SHORTER_PROGRAMS)
    ranges = ceil_div(runs, share)
    _convolve[(blocks * utterances * ranges,)](
        x, weight, bias, y, utterances, channels, columns, columns_y, padding, ceil_div(runs, ranges),
        x_utterance, x_column, y_utterance, y_column,
        kernel_columns, next_power_of_two(kernel_columns), bool(reverse), FRAMES, block, num_warps=1, num_stages=1,
    )  # fmt: skip


def depthwise_weight_gradient(
    x: Tensor,
    grad: Tensor,
    sums: None,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    utterances: int,
    channels: int,
    rows: int,
    columns: int,
    columns_y: int,
    kernel_rows: int,
    kernel_columns: int,
    padding: int,
    x_utterance: int,
    x_row: int,
    x_column: int,
    y_utterance: int,
    y_row: int,
    y_column: int,
) -> None:
    """As in csrc/convolution.c. Room for `sums` is taken here.

    Sums of parts are added up in order, so that results are the same each time.
    """
    block = _channels_of(x)
    blocks, taps, with_bias = ceil_div(channels, block), kernel_rows * kernel_columns, grad_bias is not None
    images = rows * kernel_rows > 1
    warps = WARPS if images else 1
    ranges = ceil_div(rows, ROWS_OF_GRADIENT)
    pieces = utterances * (ceil_div(columns, warps) * ranges if images else ceil_div(columns_y, FRAMES))
    each = ceil_div(pieces, max(1, PROGRAMS // (blocks * warps)))
    programs = ceil_div(pieces, each)
    parts = programs * warps  # each warp has sums of its own
    partial = torch.empty(parts, taps + with_bias, channels, dtype=torch.float32, device=x.device)
    if images:
        assert columns_y == columns
        sum_products_of_images[(blocks * programs,)](
            x, grad, partial, utterances, channels, rows, columns, padding, programs, ranges,
            x_utterance, x_row, y_utterance, y_row, x_column, y_column,
            kernel_rows, kernel_columns, with_bias, warps, block, num_warps=warps, num_stages=1,
        )  # fmt: skip
    else:
        _sum_products[(blocks * programs,)](
            x, grad, partial, utterances, channels, columns, columns_y, padding, each,
            x_utterance, x_column, y_utterance, y_column,
            taps, with_bias, FRAMES, block, num_warps=1, num_stages=1,
        )  # fmt: skip
    _sum_parts[((taps + with_bias) * ceil_div(channels, COLUMNS),)](
        partial, grad_weight, grad_bias, channels, parts, taps, with_bias, PARTS, COLUMNS
    )


def _channels_of(x: Tensor) -> int:
    return LINE // x.element_size()


@triton.jit
def _rows_of(x, first, frames, step, c, inside, number: tl.constexpr):
    """So many frames from the first as they are, of channels c; those outside are zeros. x points to frame 0."""
    rows = ()
    x += first.to(tl.int64) * step
    begin, end = -first, frames - first
    for j in tl.static_range(number):
        rows = rows + (tl.load(x + c, mask=inside & (begin <= j) & (j < end), other=0.0),)
        x += step
    return rows


@triton.jit(do_not_specialize=_SIZES)
def _convolve(
    x,
    weight,
    bias,
    y,
    utterances,
    channels,
    frames_x,
    frames_y,
    padding,
    each,
    x_utterance,
    x_frame,
    y_utterance,
    y_frame,
    taps: tl.constexpr,
    padded_taps: tl.constexpr,
    reverse: tl.constexpr,
    run: tl.constexpr,
    block: tl.constexpr,
):
    """Programs by channels, utterances, and `each` runs of frames."""
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, block)
    first_channel = program % blocks * block
    c = first_channel + tl.arange(0, block)
    n = (program // blocks % utterances).to(tl.int64)
    first_run = program // blocks // utterances * each
    inside = c < channels
    kernel = taps_of(weight, first_channel, channels, taps, padded_taps, block)
    start = tl.zeros((block,), tl.float32)
    if bias is not None:
        start = tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    x += n * x_utterance
    y += n * y_utterance
    for index in range(first_run, tl.minimum(first_run + each, tl.cdiv(frames_y, run))):
        t = index * run
        rows = _rows_of(x, t - padding, frames_x, x_frame, c, inside, run + taps - 1)
        sums = (start,) * run
        for j in tl.static_range(run + taps - 1):
            row = rows[j].to(tl.float32)
            for r in tl.static_range(run):
                if j - r >= 0 and j - r < taps:
                    more = kernel[taps - 1 - (j - r) if reverse else j - r] * row
                    sums = sums[:r] + (sums[r] + more,) + sums[r + 1 :]
        out = y + t.to(tl.int64) * y_frame
        for r in tl.static_range(run):
            tl.store(out + c, sums[r].to(y.dtype.element_ty), mask=inside & (t + r < frames_y))
            out += y_frame


@triton.jit(do_not_specialize=_SIZES)
def _sum_products(
    x,
    grad,
    sums,
    utterances,
    channels,
    frames_x,
    frames_y,
    padding,
    each,
    x_utterance,
    x_frame,
    y_utterance,
    y_frame,
    taps: tl.constexpr,
    with_bias: tl.constexpr,
    run: tl.constexpr,
    block: tl.constexpr,
):
    """Programs by channels and parts: of `each` runs of frames, those of one utterance after another.

    Sums (parts, taps, C) of the gradient times the input of each tap; with a bias one more row, of the gradient.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(channels, block)
    c = program % blocks * block + tl.arange(0, block)
    part = program // blocks
    inside = c < channels
    runs = tl.cdiv(frames_y, run)
    totals = (tl.zeros((block,), tl.float32),) * (taps + with_bias)
    for index in range(part * each, tl.minimum((part + 1) * each, utterances * runs)):
        n = (index // runs).to(tl.int64)
        t = index % runs * run
        grads = _rows_of(grad + n * y_utterance, t, frames_y, y_frame, c, inside, run)
        rows = _rows_of(x + n * x_utterance, t - padding, frames_x, x_frame, c, inside, run + taps - 1)
        for j in tl.static_range(run + taps - 1):
            row = rows[j].to(tl.float32)
            for r in tl.static_range(run):
                if j - r >= 0 and j - r < taps:
                    more = grads[r].to(tl.float32) * row
                    totals = totals[: j - r] + (totals[j - r] + more,) + totals[j - r + 1 :]
        if with_bias:
            for r in tl.static_range(run):
                totals = totals[:taps] + (totals[taps] + grads[r].to(tl.float32),)
    sums += part.to(tl.int64) * (taps + with_bias) * channels
    for k in tl.static_range(taps + with_bias):
        tl.store(sums + k * channels + c, totals[k], mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _sum_parts(
    sums,
    grad_weight,
    grad_bias,
    channels,
    parts,
    taps: tl.constexpr,
    with_bias: tl.constexpr,
    number: tl.constexpr,
    block: tl.constexpr,
):
    """Programs by taps and channels: the sums (parts, taps, C) of all parts into (C, K) and (C)."""
    k = tl.program_id(0) % (taps + with_bias)
    c = tl.program_id(0) // (taps + with_bias) * block + tl.arange(0, block)
    inside = c < channels
    row = tl.arange(0, number)
    total = tl.zeros((number, block), tl.float32)
    for first in range(0, parts, number):
        part = first + row
        here = sums + (part.to(tl.int64) * (taps + with_bias) + k)[:, None] * channels + c[None, :]
        total += tl.load(here, mask=(part < parts)[:, None] & inside[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if k < taps:
        tl.store(grad_weight + c * taps + k, result.to(grad_weight.dtype.element_ty), mask=inside)
    elif with_bias:
        tl.store(grad_bias + c, result.to(grad_bias.dtype.element_ty), mask=inside)
