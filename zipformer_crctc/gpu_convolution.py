"""Depthwise convolutions on a GPU: what csrc/convolution.c does.

T frames, N utterances, C channels, K taps. Beside so many multiplications for each value that is loaded, a GPU has time
for little else. So taps and sums are in registers: kernels are unrolled for that, and compiled for each K.

For sequences a program is one warp, which works on a few channels and FRAMES frames of an utterance at a time: it loads
the inputs around these once, and has them in registers too.

The rows of an image are frames, and there are more of them than columns. With so many taps there is no room for a run
of inputs. So a warp goes down a column of outputs: with each row of inputs it adds to all sums that need it, of which
one is then complete. The warps of a program have columns side by side, which need much the same inputs at about the
same time, so that most come from the cache.
"""

# Triton has tuples, but no unpacking of them.
# ruff: noqa: RUF005
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_crctc.gpu_tiles import MULTIPROCESSORS

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

_SIZES = ("frames_x", "frames_y", "rows", "columns", "padding", "each", "ranges", "utterances", "parts")
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
    blocks = triton.cdiv(channels, block)
    if rows * kernel_rows > 1:
        assert columns_y == columns
        groups = triton.cdiv(columns, WARPS)
        ranges = triton.cdiv(SHORTER_PROGRAMS, WARPS * blocks * groups * utterances)
        each = triton.cdiv(rows, min(ranges, triton.cdiv(rows, ROWS)))
        _convolve_images[(blocks * groups * utterances * triton.cdiv(rows, each),)](
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
            x_column,
            y_column,
            kernel_rows,
            kernel_columns,
            triton.next_power_of_2(kernel_rows * kernel_columns),
            bool(reverse),
            WARPS,
            block,
            num_warps=WARPS,
            num_stages=1,
        )
        return
    runs = triton.cdiv(columns_y, FRAMES)
    share = triton.cdiv(blocks * utterances * runs, SHORTER_PROGRAMS)
    ranges = triton.cdiv(runs, share)
    _convolve[(blocks * utterances * ranges,)](
        x,
        weight,
        bias,
        y,
        utterances,
        channels,
        columns,
        columns_y,
        padding,
        triton.cdiv(runs, ranges),
        x_utterance,
        x_column,
        y_utterance,
        y_column,
        kernel_columns,
        triton.next_power_of_2(kernel_columns),
        bool(reverse),
        FRAMES,
        block,
        num_warps=1,
        num_stages=1,
    )


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
    blocks, taps, with_bias = triton.cdiv(channels, block), kernel_rows * kernel_columns, grad_bias is not None
    images = rows * kernel_rows > 1
    warps = WARPS if images else 1
    ranges = triton.cdiv(rows, ROWS_OF_GRADIENT)
    pieces = utterances * (triton.cdiv(columns, warps) * ranges if images else triton.cdiv(columns_y, FRAMES))
    each = triton.cdiv(pieces, max(1, PROGRAMS // (blocks * warps)))
    programs = triton.cdiv(pieces, each)
    parts = programs * warps  # each warp has sums of its own
    partial = torch.empty(parts, taps + with_bias, channels, dtype=torch.float32, device=x.device)
    if images:
        assert columns_y == columns
        _sum_products_of_images[(blocks * programs,)](
            x,
            grad,
            partial,
            utterances,
            channels,
            rows,
            columns,
            padding,
            programs,
            ranges,
            x_utterance,
            x_row,
            y_utterance,
            y_row,
            x_column,
            y_column,
            kernel_rows,
            kernel_columns,
            with_bias,
            warps,
            block,
            num_warps=warps,
            num_stages=1,
        )
    else:
        _sum_products[(blocks * programs,)](
            x,
            grad,
            partial,
            utterances,
            channels,
            columns,
            columns_y,
            padding,
            each,
            x_utterance,
            x_column,
            y_utterance,
            y_column,
            taps,
            with_bias,
            FRAMES,
            block,
            num_warps=1,
            num_stages=1,
        )
    _sum_parts[((taps + with_bias) * triton.cdiv(channels, COLUMNS),)](
        partial, grad_weight, grad_bias, channels, parts, taps, with_bias, PARTS, COLUMNS
    )


def _channels_of(x: Tensor) -> int:
    return LINE // x.element_size()


@triton.jit
def _taps_of(weight, first, channels, taps: tl.constexpr, padded_taps: tl.constexpr, block: tl.constexpr):
    """The weights (C, K) of channels from the first, as a vector for each tap, and zeros up to a power of two.

    They are loaded as they lie, the taps of a channel side by side, then halved until each tap is alone.
    """
    c = tl.arange(0, block)[:, None]
    k = tl.arange(0, padded_taps)[None, :]
    inside = (c < channels - first) & (k < taps)
    pieces = (tl.load(weight + first * taps + (c * taps + k), mask=inside, other=0.0).to(tl.float32),)
    for level in tl.static_range(6):  # up to 64 taps
        if padded_taps >> level > 1:
            halves = ()
            for i in tl.static_range(2**level):
                halves_of_piece = tl.reshape(pieces[i], (block, 2, padded_taps >> (level + 1)))
                halves = halves + tl.split(tl.permute(halves_of_piece, (0, 2, 1)))
            pieces = halves
    vectors = ()
    for i in tl.static_range(padded_taps):
        vectors = vectors + (tl.reshape(pieces[i], (block,)),)
    return vectors


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
    kernel = _taps_of(weight, first_channel, channels, taps, padded_taps, block)
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
def _convolve_images(
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
    kernel = _taps_of(weight, first_channel, channels, taps, padded_taps, block)
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
def _sum_products_of_images(
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

    Sums as those of sequences, where each warp of a part has its own. Programs take pieces in turn, so that those that
    run at a time are near each other.
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
