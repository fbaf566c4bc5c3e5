"""A Triton kernel for the convolutions of the front-end in inference: with bias and Swoosh, as one matrix product each.

They have few channels, for which cuDNN has slow kernels, and their images are the largest arrays of the model.
N utterances, T' frames, F' bins, C and O channels; images are (N, T', F', C) in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from zipformer_crctc import gpu, lowprecision
from zipformer_crctc.gpu_activations import swooshed
from zipformer_crctc.gpu_tiles import COMPILED, ceil_div, next_power_of_two

BLOCK, STEP = 128, 32
"""Places of the result that a program computes, and terms of their sums that it takes at a time."""
MIN_SIZE = 16
"""Of each side of a matrix product on tensor cores."""


@triton.jit(do_not_specialize=["places", "frames", "frames_y"])
def _convolve(
    x, weight, bias, y, places, frames, frames_y, shift, offset,
    bins: tl.constexpr, bins_y: tl.constexpr, channels: tl.constexpr, outputs: tl.constexpr, size: tl.constexpr,
    frame_step: tl.constexpr, bin_step: tl.constexpr, padding: tl.constexpr,
    block: tl.constexpr, step: tl.constexpr, padded_outputs: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0) * block + tl.arange(0, block)
    output = tl.arange(0, padded_outputs)
    row = place // bins_y
    first_frame = (row // frames_y).to(tl.int64) * frames + row % frames_y * frame_step
    first_bin = place % bins_y * bin_step - padding
    terms: tl.constexpr = size * size * channels
    sums = tl.zeros([block, padded_outputs], dtype=tl.float32)
    for start in tl.static_range(0, terms, step):
        term = start + tl.arange(0, step)
        tap = term // channels
        at = first_bin[:, None] + (tap % size)[None, :]
        inside = (place < places)[:, None] & (term < terms)[None, :] & (at >= 0) & (at < bins)
        of_x = (first_frame[:, None] + (tap // size)[None, :]) * bins + at
        values = tl.load(x + of_x * channels + (term % channels)[None, :], mask=inside, other=0.0)
        of_weight = output[None, :] * terms + term[:, None]
        known = (term < terms)[:, None] & (output < outputs)[None, :]
        values = values.to(weight.dtype.element_ty)
        factors = tl.load(weight + of_weight, mask=known, other=0.0)
        if not COMPILED:
            values, factors = values.to(tl.float32), factors.to(tl.float32)
        sums = tl.dot(values, factors, sums)
    sums += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    of_y = place.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(y + of_y, swooshed(sums, shift, offset), mask=(place < places)[:, None] & (output < outputs)[None, :])


def convolved(x: Tensor, conv: nn.Conv2d, kind: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """Swoosh of a convolution with padding over bins only, in 16 bits: (N, T', F', C) to (N, T'', F'', O)."""
    utterances, frames, bins, channels = x.shape
    (size, _), (frame_step, bin_step), padding = conv.kernel_size, conv.stride, int(conv.padding[1])
    frames_y, bins_y = (frames - size) // frame_step + 1, (bins + 2 * padding - size) // bin_step + 1
    y = x.new_empty(utterances, frames_y, bins_y, conv.out_channels, dtype=dtype)
    weight = lowprecision.copy_of(conv.weight, dtype).permute(0, 2, 3, 1).contiguous()
    places, terms = y.numel() // conv.out_channels, size * size * channels
    with gpu.on_device_of(x):
        _convolve[(ceil_div(places, BLOCK),)](
            x.contiguous(), weight, conv.bias, y, places, frames, frames_y, *kind,
            bins, bins_y, channels, conv.out_channels, size, frame_step, bin_step, padding,
            BLOCK, min(STEP, next_power_of_two(terms)), max(MIN_SIZE, next_power_of_two(conv.out_channels)),
            num_warps=8,
        )  # fmt: skip
    return y
