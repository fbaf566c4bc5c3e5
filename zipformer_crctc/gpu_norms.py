"""Triton kernels of norms.py: BiasNorm and bypasses.

R rows (frames times utterances), N utterances, C channels; arrays (R, C), in memory row by row. Scales are (C,) or
(N, C), with so many rows of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_crctc.gpu_tiles import PROGRAMS, ceil_div, grid_of, next_power_of_two, places, tile_of


@triton.jit(do_not_specialize=["rows", "scale_rows"])
def _bias_norm(
    x, bias, original, scale, y, factors, gain, rows, scale_rows, channels,
    block: tl.constexpr, rows_each: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * rows_each + tl.arange(0, rows_each)
    channel = tl.arange(0, block)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    away = tl.where(inside, value - tl.load(bias + channel, mask=channel < channels, other=0.0)[None, :], 0.0)
    factor = tl.load(gain) / tl.sqrt(tl.sum(away * away, axis=1) / channels)
    tl.store(factors + row, factor, mask=row < rows)
    result = value * factor[:, None]
    if original is not None:
        before = tl.load(original + place, mask=inside, other=0.0).to(tl.float32)
        of_scale = (row % scale_rows)[:, None] * channels + channel[None, :]
        result = before + (result - before) * tl.load(scale + of_scale, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, result, mask=inside)


def bias_norm(
    x: Tensor,
    bias: Tensor,
    original: Tensor | None,
    scale: Tensor | None,
    y: Tensor,
    factors: Tensor,
    gain: Tensor,
    rows: int,
    scale_rows: int,
    channels: int,
) -> None:
    """y = x * gain / rms(x - bias), or what a bypass makes of it; factors (R,): what the rows are multiplied by."""
    block, rows_each = _rows_of_a_program(channels)
    _bias_norm[(ceil_div(rows, rows_each),)](
        x, bias, original, scale, y, factors, gain, rows, scale_rows, channels, block, rows_each
    )


@triton.jit(do_not_specialize=["utterances", "each"])
def _bias_norm_gradient(
    x, bias, original, scale, factors, grad, gain, grad_x, grad_original, sums, scale_sums,
    utterances, channels, each, block: tl.constexpr,
):  # fmt: skip
    # This program's rows are those of one utterance, or of all where they share a scale, every so many.
    first = tl.program_id(0)
    utterance = tl.program_id(1)
    channel = tl.arange(0, block)
    inside = channel < channels
    square_of_gain = tl.load(gain) * tl.load(gain)
    middle = tl.load(bias + channel, mask=inside, other=0.0)
    of_bias = tl.zeros([block], dtype=tl.float32)
    of_scale = tl.zeros([block], dtype=tl.float32)
    of_log = 0.0
    if scale is not None:
        weight = tl.load(scale + utterance * channels + channel, mask=inside, other=0.0).to(tl.float32)
    for number in range(first, each, tl.num_programs(0)):
        row = (number * utterances + utterance).to(tl.int64)
        place = row * channels + channel
        value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        factor = tl.load(factors + row)
        if original is not None:
            before = tl.load(original + place, mask=inside, other=0.0).to(tl.float32)
            of_scale += slope * (value * factor - before)
            through = slope * weight
            tl.store(grad_original + place, slope - through, mask=inside)
            slope = through
        along = tl.sum(slope * value, axis=0)
        inwards = (along * factor * factor * factor / (channels * square_of_gain)) * tl.where(
            inside, value - middle, 0.0
        )
        tl.store(grad_x + place, slope * factor - inwards, mask=inside)
        of_bias += inwards
        of_log += along * factor
    part = utterance * tl.num_programs(0) + first
    tl.store(sums + part * (channels + 1) + channel, of_bias, mask=inside)
    tl.store(sums + part * (channels + 1) + channels, of_log)
    if original is not None:
        tl.store(scale_sums + part * channels + channel, of_scale, mask=inside)


def bias_norm_gradient(
    x: Tensor,
    bias: Tensor,
    original: Tensor | None,
    scale: Tensor | None,
    factors: Tensor,
    grad: Tensor,
    grad_x: Tensor,
    grad_bias: Tensor,
    grad_original: Tensor | None,
    grad_scale: Tensor | None,
    grad_log: Tensor,
    gain: Tensor,
    rows: int,
    scale_rows: int,
    channels: int,
) -> None:
    """Gradients of all inputs of `bias_norm`; grad_log is that of ln(gain)."""
    utterances = scale_rows  # 1: all rows share one
    each = rows // utterances
    parts = max(1, min(each, ceil_div(PROGRAMS, utterances)))
    sums = torch.empty(utterances, parts, channels + 1, dtype=torch.float32, device=x.device)
    scale_sums = None if scale is None else torch.empty(utterances, parts, channels, device=x.device)
    block = next_power_of_two(channels)
    _bias_norm_gradient[(parts, utterances)](
        x, bias, original, scale, factors, grad, gain, grad_x, grad_original, sums, scale_sums,
        utterances, channels, each, block,
    )  # fmt: skip
    total = sums.sum(dim=(0, 1))
    grad_bias.copy_(total[:channels])
    grad_log.copy_(total[channels])
    if grad_scale is not None and scale_sums is not None:
        grad_scale.copy_(scale_sums.sum(dim=1).view(grad_scale.shape))


def _rows_of_a_program(channels: int) -> tuple[int, int]:
    """Channels that a program holds at once, all of them, and rows."""
    block = next_power_of_two(channels)
    return block, max(1, 2048 // block)


@triton.jit(do_not_specialize=["rows", "utterances", "scale_rows"])
def _bypass(
    original, x, scale, y, rows, utterances, channels, scale_rows, repeat: tl.constexpr,
    block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    row, channel, inside = places(rows, channels, block_rows, block_channels)
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    utterance = row % utterances
    of_x = ((row // utterances) // repeat * utterances + utterance).to(tl.int64)[:, None] * channels + channel[None, :]
    before = tl.load(original + place, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(x + of_x, mask=inside, other=0.0).to(tl.float32)
    of_scale = (utterance % scale_rows)[:, None] * channels + channel[None, :]
    weight = tl.load(scale + of_scale, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, before + (value - before) * weight, mask=inside)


def bypass(
    original: Tensor,
    x: Tensor,
    scale: Tensor,
    y: Tensor,
    frames: int,
    utterances: int,
    channels: int,
    scale_rows: int,
    repeat: int,
) -> None:
    """y = original + (x - original) * scale, each frame of x for as many of the original as `repeat` says."""
    tile = tile_of(channels)
    rows = frames * utterances
    _bypass[grid_of(rows, channels, tile)](original, x, scale, y, rows, utterances, channels, scale_rows, repeat, *tile)


@triton.jit(do_not_specialize=["frames", "utterances", "scale_rows", "low_frames"])
def _bypass_gradient(
    original, x, scale, grad, grad_original, grad_x, sums, frames, utterances, channels, scale_rows, low_frames,
    repeat: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    # Frames of x of one utterance, every so many, and all frames of the original that they serve.
    first = tl.program_id(0)
    utterance = tl.program_id(1)
    channel = tl.program_id(2) * block + tl.arange(0, block)
    inside = channel < channels
    weight = tl.load(scale + (utterance % scale_rows) * channels + channel, mask=inside, other=0.0).to(tl.float32)
    of_scale = tl.zeros([block], dtype=tl.float32)
    for low in range(first, low_frames, tl.num_programs(0)):
        of_x = (low * utterances + utterance).to(tl.int64) * channels + channel
        value = tl.load(x + of_x, mask=inside, other=0.0).to(tl.float32)
        through = tl.zeros([block], dtype=tl.float32)
        for number in tl.static_range(repeat):
            frame = low * repeat + number
            here = inside & (frame < frames)
            place = (frame * utterances + utterance).to(tl.int64) * channels + channel
            slope = tl.load(grad + place, mask=here, other=0.0).to(tl.float32)
            before = tl.load(original + place, mask=here, other=0.0).to(tl.float32)
            of_scale += slope * (value - before)
            tl.store(grad_original + place, slope - slope * weight, mask=here)
            through += slope * weight
        tl.store(grad_x + of_x, through, mask=inside)
    tl.store(sums + (utterance * tl.num_programs(0) + first) * channels + channel, of_scale, mask=inside)


def bypass_gradient(
    original: Tensor,
    x: Tensor,
    scale: Tensor,
    grad: Tensor,
    grad_original: Tensor,
    grad_x: Tensor,
    grad_scale: Tensor,
    frames: int,
    utterances: int,
    channels: int,
    scale_rows: int,
    repeat: int,
) -> None:
    """Gradients of all inputs of `bypass`."""
    low_frames = len(x)
    block = min(512, next_power_of_two(channels))
    parts = max(1, min(low_frames, ceil_div(PROGRAMS, utterances)))
    sums = torch.empty(utterances, parts, channels, device=x.device)
    _bypass_gradient[(parts, utterances, ceil_div(channels, block))](
        original, x, scale, grad, grad_original, grad_x, sums, frames, utterances, channels, scale_rows, low_frames,
        repeat, block,
    )  # fmt: skip
    grad_scale.copy_(sums.sum(dim=(0, 1) if scale_rows == 1 else 1).view(grad_scale.shape))
