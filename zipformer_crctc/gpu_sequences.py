"""Triton kernels for what is between modules: residual additions and Downsample.

T frames, N utterances, C channels; sequences (T, N, C), in memory row by row, a row being a frame of an utterance.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from zipformer_crctc import gpu
from zipformer_crctc.gpu_tiles import ceil_div, grid_of, places, tile_of


@triton.jit(do_not_specialize=["rows", "utterances"])
def _added(x, update, mask, y, low, rows, utterances, channels, block_rows: tl.constexpr, block_channels: tl.constexpr):
    row, channel, inside = places(rows, channels, block_rows, block_channels)
    place = row.to(tl.int64)[:, None] * channels + channel[None, :]
    more = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
    if mask is not None:
        more *= tl.load(mask + row % utterances, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    result = tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + more
    tl.store(y + place, result, mask=inside)
    if low is not None:
        tl.store(low + place, result, mask=inside)


def added(x: Tensor, update: Tensor, mask: Tensor | None, low: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """x + update, each update times what the mask (N, 1) has for its utterance, and the same in a lower precision."""
    y = torch.empty_like(x, dtype=torch.promote_types(x.dtype, update.dtype))
    copy = None if low is None else torch.empty_like(x, dtype=low)
    _, utterances, channels = x.shape
    rows, tile = x.numel() // channels, tile_of(channels)
    with gpu.on_device_of(x):
        _added[grid_of(rows, channels, tile)](x, update, mask, y, copy, rows, utterances, channels, *tile)
    return y, copy


@triton.jit(do_not_specialize=["rows", "utterances"])
def _weighted_sums(
    x, weights, lengths, y, rows, utterances, channels,
    factor: tl.constexpr, block_rows: tl.constexpr, block_channels: tl.constexpr,
):  # fmt: skip
    row, channel, inside = places(rows, channels, block_rows, block_channels)
    utterance = row % utterances
    last = tl.load(lengths + utterance, mask=row < rows, other=1).to(tl.int32) - 1
    total = tl.zeros([block_rows, block_channels], dtype=tl.float32)
    for number in tl.static_range(factor):
        frame = tl.maximum(tl.minimum(row // utterances * factor + number, last), 0)
        place = (frame.to(tl.int64) * utterances + utterance)[:, None] * channels + channel[None, :]
        total += tl.load(weights + number) * tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64)[:, None] * channels + channel[None, :], total, mask=inside)


def weighted_sums(x: Tensor, weights: Tensor, lengths: Tensor) -> Tensor:
    """Sums of groups of frames times the weights (F,), float32: (T, N, C) to (ceil(T / F), N, C).

    From its length (N,) on an utterance's last frame is repeated.
    """
    frames, utterances, channels = x.shape
    factor = len(weights)
    y = x.new_empty(ceil_div(frames, factor), utterances, channels, dtype=torch.promote_types(x.dtype, weights.dtype))
    rows, tile = y.numel() // channels, tile_of(channels)
    with gpu.on_device_of(x):
        _weighted_sums[grid_of(rows, channels, tile)](x, weights, lengths, y, rows, utterances, channels, factor, *tile)
    return y
