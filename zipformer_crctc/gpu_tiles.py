"""How Triton kernels share out an array of rows and channels, a tile for each program, and what else several need.

R rows, C channels, K taps.
"""

# Triton has tuples, but no unpacking of them.
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl

MULTIPROCESSORS = 132
"""Of an H100 or H200."""
PROGRAMS = 8 * MULTIPROCESSORS
"""About so many share out an array where each adds up what all its part gives."""
TILE = 2048
"""Elements of a tile: 16 for each of 128 threads."""
MAX_TILE_CHANNELS = 512


def ceil_div(size: int, part: int) -> int:
    """How many parts it takes. Triton's own function, and that for powers of two, costs as much as a small kernel."""
    return -(-size // part)


def next_power_of_two(size: int) -> int:
    """The least that is not smaller than size, which is at least 1."""
    return 1 << (size - 1).bit_length()


def tile_of(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile, powers of two."""
    wide = min(MAX_TILE_CHANNELS, next_power_of_two(channels))
    return TILE // wide, wide


def grid_of(rows: int, channels: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Programs over (R, C)."""
    return ceil_div(rows, tile[0]), ceil_div(channels, tile[1])


@triton.jit
def places(rows, channels, block_rows: tl.constexpr, block_channels: tl.constexpr):
    """The rows and channels of this program's tile, and which of its places are inside the array."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    return row, channel, (row < rows)[:, None] & (channel < channels)[None, :]


@triton.jit
def taps_of(weight, first, channels, taps: tl.constexpr, padded_taps: tl.constexpr, block: tl.constexpr):
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


COMPILED = tl.constexpr(isinstance(places, triton.JITFunction))
"""Triton's interpreter knows neither the machine's own functions nor products of bfloat16."""
