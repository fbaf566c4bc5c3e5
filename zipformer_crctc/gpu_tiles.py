"""How Triton kernels share out an array of rows and channels: a tile for each program.

R rows, C channels.
"""

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


def tile_of(channels: int) -> tuple[int, int]:
    """Rows and channels of a tile, powers of two."""
    wide = min(MAX_TILE_CHANNELS, triton.next_power_of_2(channels))
    return TILE // wide, wide


def grid_of(rows: int, channels: int, tile: tuple[int, int]) -> tuple[int, int]:
    """Programs over (R, C)."""
    return triton.cdiv(rows, tile[0]), triton.cdiv(channels, tile[1])


@triton.jit
def places(rows, channels, block_rows: tl.constexpr, block_channels: tl.constexpr):
    """The rows and channels of this program's tile, and which of its places are inside the array."""
    row = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    channel = tl.program_id(1) * block_channels + tl.arange(0, block_channels)
    return row, channel, (row < rows)[:, None] & (channel < channels)[None, :]


COMPILED = tl.constexpr(isinstance(places, triton.JITFunction))
"""Triton's interpreter knows neither the machine's own functions nor products of bfloat16."""
