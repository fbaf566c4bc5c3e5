"""Depthwise convolutions of sequences on a GPU: what csrc/convolution.c does, for images of one row.

T frames, N utterances, C channels, K taps. Beside so many multiplications for each value that is loaded, a GPU has time
for little else. So a program is one warp, which works on a few channels and FRAMES frames of an utterance at a time: it
loads the inputs around these once, and has them, the taps and the sums in registers. Kernels are unrolled for that, and
compiled for each K.
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
"""Of weight gradients: a multiprocessor has registers for 12."""
SHORTER_PROGRAMS = 2 * PROGRAMS
"""Of convolutions: more than run at a time, so that it matters little when the last ones end."""
PARTS, COLUMNS = 32, 32
"""Tiles in which partial sums are added up."""

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
    """As in csrc/convolution.c, for sequences: images of one row, whose columns are frames. It needs no `by_tap`."""
    assert rows == kernel_rows == 1
    block = _channels_of(x)
    blocks, runs = triton.cdiv(channels, block), triton.cdiv(columns_y, FRAMES)
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
    """As in csrc/convolution.c, for sequences. Room for `sums` is taken here.

    Programs have sums of their own, which are added up in order, so that results are the same each time.
    """
    assert rows == kernel_rows == 1
    block = _channels_of(x)
    blocks, runs = triton.cdiv(channels, block), utterances * triton.cdiv(columns_y, FRAMES)
    each = triton.cdiv(runs, max(1, PROGRAMS // blocks))
    parts = triton.cdiv(runs, each)
    with_bias = grad_bias is not None
    partial = torch.empty(parts, kernel_columns + with_bias, channels, dtype=torch.float32, device=x.device)
    _sum_products[(blocks * parts,)](
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
        kernel_columns,
        with_bias,
        FRAMES,
        block,
        num_warps=1,
        num_stages=1,
    )
    _sum_parts[((kernel_columns + with_bias) * triton.cdiv(channels, COLUMNS),)](
        partial, grad_weight, grad_bias, channels, parts, kernel_columns, with_bias, PARTS, COLUMNS
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
