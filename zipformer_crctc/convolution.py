"""Depthwise convolutions: over time and, in the front-end, of images; by kernels on a CPU or a GPU.

T frames, N utterances, C channels, K taps. Sequences are (T, N, C), images (N, C, T', F') with channels last in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zipformer_crctc import gpu, native
from zipformer_crctc.autograd import Function
from zipformer_crctc.products import mixed_precision

MAX_TAPS = 64
"""As in csrc/convolution.c."""

_CONVOLVE = native.Kernel("depthwise", "ppppp" + "i" * 15)
_WEIGHT_GRADIENT = native.Kernel("depthwise_weight_gradient", "ppppp" + "i" * 14)


def depthwise_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Depthwise convolution over the first axis of (T, N, C), with the weight, bias and padding of `conv`."""
    padding = conv.padding[0]
    assert isinstance(padding, int)
    if (dtype := mixed_precision(x)) is not None:
        x = x.to(dtype)  # as PyTorch's convolution does
    if len(x) + 2 * padding >= conv.kernel_size[0] and _suits(x, conv):
        return _Depthwise.apply(x, conv.weight, conv.bias, padding)
    # The sequence is, as it lies in memory, an image of T rows, N columns and C channels in channels-last order, for
    # which PyTorch's convolution is several times faster than for (N, C, T).
    image = x.permute(2, 0, 1)[None]
    y = F.conv2d(image, conv.weight[..., None], conv.bias, padding=(padding, 0), groups=conv.groups)
    return y[0].permute(1, 2, 0)


def depthwise_conv2d(image: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` of an image, (N, C, T', F') to the same shape: depthwise, its kernel odd and its padding half of that."""
    if (dtype := mixed_precision(image)) is not None:
        image = image.to(dtype)  # as above
    if _suits(image, conv):
        return _Depthwise.apply(image, conv.weight, conv.bias, conv.kernel_size[1] // 2)
    return conv(image)


def _suits(x: Tensor, conv: nn.Conv1d | nn.Conv2d) -> bool:
    if x.dim() == 4 and not all(size % 2 for size in conv.kernel_size):
        return False
    channels_last = x if x.dim() == 3 else x.permute(0, 2, 3, 1)
    enough = x.numel() > 0 and conv.weight[0].numel() <= MAX_TAPS and conv.weight.is_contiguous()
    return enough and native.suits(channels_last, conv.weight, conv.bias)


class _Depthwise(Function):
    """Of a sequence with a weight (C, 1, K), or an image with a weight (C, 1, K, K'); keeps only these two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        return _convolved(x, weight, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        (grad,) = grad_outputs
        if grad.stride(-1 if grad.dim() == 3 else 1) != 1:
            grad = grad.contiguous(memory_format=_layout(grad))
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            # An output gives back to the same inputs that it was made from.
            grad_x = _convolved(grad, weight, None, weight.shape[-1] - 1 - ctx.padding, reverse=True)
        if needs_weight or needs_bias:
            grad_weight, grad_bias = torch.empty_like(weight), weight.new_empty(len(weight)) if needs_bias else None
            sizes, steps = _sizes(x, grad, weight)
            sums = None if gpu.takes(x) else x.new_empty(sizes[0], weight[0].numel() + 1, len(weight))
            _WEIGHT_GRADIENT(x, grad, sums, grad_weight, grad_bias, *sizes, ctx.padding, *steps)
        return grad_x, grad_weight, grad_bias, None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, reverse: bool = False) -> Tensor:
    """With so many zeros before the first frame of a sequence, or the first column of an image.

    With a reversed kernel it is the gradient of the input from that of the output.
    """
    along = 0 if x.dim() == 3 else 3
    shape = list(x.shape)
    shape[along] += 2 * padding - weight.shape[-1] + 1
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))
    sizes, steps = _sizes(x, y, weight)
    by_tap = None if gpu.takes(x) else torch.empty_like(weight)
    _CONVOLVE(x, weight, by_tap, bias, y, *sizes, padding, int(reverse), *steps)
    return y


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.dim() == 3 else torch.channels_last


def _sizes(x: Tensor, y: Tensor, weight: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What both kernels are told: sizes, and how far utterances, rows and columns of both images are apart.

    A sequence is an image of one row.
    """
    if x.dim() == 3:
        columns, utterances, channels = x.shape
        sizes = utterances, channels, 1, columns, len(y), 1, weight.shape[-1]
        return sizes, tuple(step for z in (x, y) for step in (z.stride(1), 0, z.stride(0)))
    utterances, channels, rows, columns = x.shape
    sizes = utterances, channels, rows, columns, y.shape[3], *weight.shape[2:]
    return sizes, tuple(z.stride(axis) for z in (x, y) for axis in (0, 2, 3))
