"""Depthwise convolutions: over time and, in the front-end, of images; on a CPU by kernels in C.

T frames, N utterances, C channels, K taps. Sequences are (T, N, C), images (N, C, T', F') with channels last in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from zipformer_crctc import native

MAX_TAPS = 64
"""As in csrc/convolution.c."""

_CONVOLVE = native.Kernel("depthwise", "pppp" + "i" * 15)
_WEIGHT_GRADIENT = native.Kernel("depthwise_weight_gradient", "ppp" + "i" * 14)


def depthwise_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """Depthwise convolution over the first axis of (T, N, C), with the weight, bias and padding of `conv`."""
    padding = conv.padding[0]
    assert isinstance(padding, int)
    if _suits(x, conv):
        return _Depthwise.apply(x, conv.weight, conv.bias, padding)
    # The sequence is, as it lies in memory, an image of T rows, N columns and C channels in channels-last order, for
    # which PyTorch's convolution is several times faster than for (N, C, T).
    image = x.permute(2, 0, 1)[None]
    y = F.conv2d(image, conv.weight[..., None], conv.bias, padding=(padding, 0), groups=conv.groups)
    return y[0].permute(1, 2, 0)


def depthwise_conv2d(image: Tensor, conv: nn.Conv2d) -> Tensor:
    """`conv` of an image, (N, C, T', F') to the same shape: depthwise, its kernel odd and its padding half of that."""
    if _suits(image, conv):
        return _Depthwise.apply(image, conv.weight, conv.bias, conv.kernel_size[1] // 2)
    return conv(image)


def _suits(x: Tensor, conv: nn.Conv1d | nn.Conv2d) -> bool:
    enough = x.numel() > 0 and conv.weight[0].numel() <= MAX_TAPS
    return enough and native.suits(_as_image(x), conv.weight, conv.bias)


class _Depthwise(torch.autograd.Function):
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
        if _as_image(grad).stride(-1) != 1:
            grad = grad.contiguous(memory_format=_layout(grad))
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            # An output gives back to the same inputs that it was made from.
            grad_x = _convolved(grad, weight, None, weight.shape[-1] - 1 - ctx.padding, reverse=True)
        if needs_weight or needs_bias:
            inputs, grads = _as_image(x), _as_image(grad)
            sums = x.new_empty(len(inputs), weight[0].numel() + 1, len(weight))
            sizes = _sizes(inputs, grads, weight)
            _WEIGHT_GRADIENT(x, grad, sums, *sizes, ctx.padding, *inputs.stride()[:3], *grads.stride()[:3])
            by_tap = sums.sum(dim=0)
            grad_weight = by_tap[:-1].t().reshape(weight.shape)
            grad_bias = by_tap[-1] if needs_bias else None
        return grad_x, grad_weight, grad_bias, None


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int, reverse: bool = False) -> Tensor:
    """With so many zeros before the first frame of a sequence, or the first column of an image.

    With a reversed kernel it is the gradient of the input from that of the output.
    """
    along = 0 if x.dim() == 3 else 3
    shape = list(x.shape)
    shape[along] += 2 * padding - weight.shape[-1] + 1
    y = torch.empty(shape, dtype=x.dtype, memory_format=_layout(x))
    inputs, outputs = _as_image(x), _as_image(y)
    by_tap = weight.flatten(1).t().contiguous()  # (K, C)
    sizes = _sizes(inputs, outputs, weight)
    _CONVOLVE(x, by_tap, bias, y, *sizes, padding, int(reverse), *inputs.stride()[:3], *outputs.stride()[:3])
    return y


def _as_image(x: Tensor) -> Tensor:
    """The order of axes of the kernels, (N, rows, columns, C), where a sequence is one row."""
    return x.transpose(0, 1)[:, None] if x.dim() == 3 else x.permute(0, 2, 3, 1)


def _layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.dim() == 3 else torch.channels_last


def _sizes(x: Tensor, y: Tensor, weight: Tensor) -> tuple[int, ...]:
    """What both kernels are told first."""
    utterances, rows, columns, channels = x.shape
    return utterances, channels, rows, columns, y.shape[2], weight[0].numel() // weight.shape[-1], weight.shape[-1]
