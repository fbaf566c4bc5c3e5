"""Triton kernels of gpu_convolution.py for images, which launches them.

N utterances, C channels, K taps; the rows of an image are frames, and there are more of them than columns. With so many
taps there is no room in registers for the inputs of a run of outputs, as for sequences. So a warp goes down a column of
outputs: with each row of inputs it adds to all sums that need it, of which one is then complete. The warps of a program
have columns side by side, which need much the same inputs at about the same time, so that most come from the cache.
"""

# Triton has tuples, but no unpacking of them.
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

from zipformer_crctc.gpu_tiles import taps_of

_SIZES = ("rows", "columns", "padding", "each", "ranges", "utterances", "parts")
"""They change from batch to batch, which is no reason to compile again."""


@triton.jit
def _with_more(sums, k: tl.constexpr, more):
    return sums[:k] + (sums[k] + more,) + sums[k + 1 :]


@triton.jit
def _row_of(x, row, rows, step, column: tl.constexpr, there):
    """As many columns of one row as there are masks, as float32; those outside are zeros. x points to row 0."""
    x += row.to(tl.int64) * step
    inside = row.to(tl.uint32) < rows.to(tl.uint32)  # one comparison, and rows before the first are far behind the last
    values = ()
    for j in tl.static_range(len(there)):
        values = values + (tl.load(x + j * column, mask=there[j] & inside, other=0.0).to(tl.float32),)
    return values


@triton.jit
def _masks_of(first, columns, inside, number: tl.constexpr):
    """For so many columns from the first, and some channels, whether they are in the image."""
    masks = ()
    for j in tl.static_range(number):
        masks = masks + (inside & ((first + j).to(tl.uint32) < columns.to(tl.uint32)),)
    return masks


@triton.jit(do_not_specialize=_SIZES)
def convolve_images(
    x,
    weight,
    bias,
    y,
    utterances,
    channels,
    rows,
    columns,
    padding,
    each,
    x_utterance,
    x_row,
    y_utterance,
    y_row,
    x_column: tl.constexpr,
    y_column: tl.constexpr,
    kernel_rows: tl.constexpr,
    kernel_columns: tl.constexpr,
    padded_taps: tl.constexpr,
    reverse: tl.constexpr,
    warps: tl.constexpr,
    block: tl.constexpr,
):
    """Programs by channels, columns, utterances, and `each` rows."""
    program = tl.program_id(0)
    blocks, groups = tl.cdiv(channels, block), tl.cdiv(columns, warps)
    first_channel = program % blocks * block
    column = program // blocks % groups * warps + tl.arange(0, warps)[:, None]
    n = (program // blocks // groups % utterances).to(tl.int64)
    begin = program // blocks // groups // utterances * each
    c = first_channel + tl.arange(0, block)[None, :]
    inside = c < channels
    taps: tl.constexpr = kernel_rows * kernel_columns
    kernel = taps_of(weight, first_channel, channels, taps, padded_taps, block)
    start = tl.zeros((warps, block), tl.float32)
    if bias is not None:
        start += tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    there, wanted = _masks_of(column - padding, columns, inside, kernel_columns), inside & (column < columns)
    x += n * x_utterance + ((column - padding) * x_column + c)
    y += n * y_utterance + (column * y_column + c)
    sums = (start,) * (kernel_rows - 1)
    first = begin - (kernel_rows - 1) // 2
    values = _row_of(x, first, rows, x_row, x_column, there)
    for i in range(tl.minimum(each, rows - begin) + kernel_rows - 1):
        following = _row_of(x, first + i + 1, rows, x_row, x_column, there)
        sums = (start,) + sums  # of outputs that need this row, the last one first
        for k in tl.static_range(taps):
            more = kernel[taps - 1 - k if reverse else k] * values[k % kernel_columns]
            sums = _with_more(sums, k // kernel_columns, more)
        row = begin + (i - (kernel_rows - 1))
        tl.store(
            y + row.to(tl.int64) * y_row, sums[kernel_rows - 1].to(y.dtype.element_ty), mask=wanted & (row >= begin)
        )
        sums = sums[: kernel_rows - 1]
        values = following


@triton.jit(do_not_specialize=_SIZES)
def sum_products_of_images(
    x,
    grad,
    sums,
    utterances,
    channels,
    rows,
    columns,
    padding,
    parts,
    ranges,
    x_utterance,
    x_row,
    y_utterance,
    y_row,
    x_column: tl.constexpr,
    y_column: tl.constexpr,
    kernel_rows: tl.constexpr,
    kernel_columns: tl.constexpr,
    with_bias: tl.constexpr,
    warps: tl.constexpr,
    block: tl.constexpr,
):
    """Programs by channels and parts, whose pieces are ranges of rows of a few columns of an utterance.

    Sums (parts, K, C) as those of `gpu_convolution._sum_products`, where each warp of a part has its own. Programs take
    pieces in turn, so that those that run at a time are near each other.
    """
    program = tl.program_id(0)
    blocks, groups = tl.cdiv(channels, block), tl.cdiv(columns, warps)
    part = program // blocks
    warp = tl.arange(0, warps)[:, None]
    c = program % blocks * block + tl.arange(0, block)[None, :]
    inside = c < channels
    taps: tl.constexpr = kernel_rows * kernel_columns
    height = tl.cdiv(rows, ranges)
    none = tl.zeros((warps, block), tl.float32)
    totals = (none,) * (taps + with_bias)
    for index in range(part, utterances * ranges * groups, parts):
        column = index % groups * warps + warp
        begin = index // groups % ranges * height
        end = tl.minimum(begin + height, rows)
        n = (index // groups // ranges).to(tl.int64)
        there, wanted = _masks_of(column - padding, columns, inside, kernel_columns), (inside & (column < columns),)
        x_here = x + n * x_utterance + ((column - padding) * x_column + c)
        grad_here = grad + n * y_utterance + (column * y_column + c)
        grads = (none,) * (kernel_rows - 1)  # of rows before, the last one first
        first = begin - (kernel_rows - 1) // 2
        values = _row_of(x_here, first, rows, x_row, x_column, there)
        new = _row_of(grad_here, begin, end, y_row, y_column, wanted)
        for i in range(end - begin + kernel_rows - 1):
            following = _row_of(x_here, first + i + 1, rows, x_row, x_column, there)
            next_new = _row_of(grad_here, begin + i + 1, end, y_row, y_column, wanted)
            grads = new + grads
            for k in tl.static_range(taps):
                totals = _with_more(totals, k, grads[k // kernel_columns] * values[k % kernel_columns])
            if with_bias:
                totals = _with_more(totals, taps, grads[0])
            grads = grads[: kernel_rows - 1]
            values, new = following, next_new
    sums += (part * warps + warp).to(tl.int64) * (taps + with_bias) * channels
    for k in tl.static_range(taps + with_bias):
        tl.store(sums + k * channels + c, totals[k], mask=inside)
