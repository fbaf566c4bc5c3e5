"""Depthwise convolutions: kernels in C against PyTorch's operations."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from zipformer_crctc import convolution, native
from zipformer_crctc.convolution import depthwise_conv, depthwise_conv2d

needs_kernels = pytest.mark.skipif(
    not native.suits(torch.zeros(1)), reason="no C kernels: no compiler, or ZIPA_NATIVE=0"
)
Conv = nn.Conv1d | nn.Conv2d


def run(x: Tensor, conv: Conv, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    y = depthwise_conv(x, conv) if isinstance(conv, nn.Conv1d) else depthwise_conv2d(x, conv)
    wanted = [x, *conv.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, grad)]


def exact(x: Tensor, conv: Conv, grad: Tensor) -> list[Tensor]:
    """The same in float64 by PyTorch's layer itself, which has frames last."""
    over_time = isinstance(conv, nn.Conv1d)
    x, grad = (z.detach().double().permute(1, 2, 0) if over_time else z.detach().double() for z in (x, grad))
    conv, x = deepcopy(conv).double(), x.requires_grad_()
    y = conv(x)
    grad_x, *others = torch.autograd.grad(y, [x, *conv.parameters()], grad)
    return [*(z.detach().permute(2, 0, 1) if over_time else z.detach() for z in (y, grad_x)), *others]


def check(x: Tensor, conv: Conv, grad: Tensor) -> None:
    assert convolution._suits(x, conv)
    got = run(x, conv, grad)
    with native.disabled():
        assert not convolution._suits(x, conv)
        same = run(x, conv, grad)
    for ours, theirs, want in zip(got, same, exact(x, conv, grad), strict=True):
        assert ours.shape == theirs.shape == want.shape
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(ours.double(), want, rtol=0, atol=2e-6 * scale)


def image(utterances: int, channels: int, frames: int, bins: int) -> Tensor:
    return torch.randn(utterances, frames, bins, channels).permute(0, 3, 1, 2)


def sequence_conv(channels: int, kernel: int, padding: int | None = None, bias: bool = True) -> nn.Conv1d:
    padding = kernel // 2 if padding is None else padding
    return nn.Conv1d(channels, channels, kernel, padding=padding, groups=channels, bias=bias)


def image_conv(channels: int, kernel: int = 7) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)


@needs_kernels
@pytest.mark.parametrize("kernel", [3, 15, 31])
@pytest.mark.parametrize("channels", [1, 8, 24, 65])
@pytest.mark.parametrize("utterances", [1, 3])
@pytest.mark.parametrize("frames", [1, 5, 40])
def test_sequences(frames: int, utterances: int, channels: int, kernel: int) -> None:
    torch.manual_seed(frames + channels + kernel)
    x, grad = torch.randn(2, frames, utterances, channels)
    check(x, sequence_conv(channels, kernel), grad)


@needs_kernels
@pytest.mark.parametrize("frames", range(13, 24))
def test_every_remainder_of_frames(frames: int) -> None:
    torch.manual_seed(frames)
    x, grad = torch.randn(2, frames, 2, 16)
    check(x, sequence_conv(16, 5), grad)


@needs_kernels
@pytest.mark.parametrize("kernel", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("padding", [0, 1, 40])
def test_other_kernels_and_paddings(kernel: int, padding: int) -> None:
    """Causal convolutions get their padding before; outputs may be fewer or more than inputs."""
    torch.manual_seed(kernel)
    x = torch.randn(800, 2, 40)  # several tiles
    check(x, sequence_conv(40, kernel, padding), torch.randn(800 + 2 * padding - kernel + 1, 2, 40))


@needs_kernels
@pytest.mark.parametrize("bins", [1, 19])
@pytest.mark.parametrize("channels", [8, 24, 65])
@pytest.mark.parametrize("utterances", [1, 3])
@pytest.mark.parametrize("frames", [1, 5, 40])
def test_images(frames: int, utterances: int, channels: int, bins: int) -> None:
    torch.manual_seed(frames + channels + bins)
    x, grad = image(utterances, channels, frames, bins), image(utterances, channels, frames, bins)
    check(x, image_conv(channels), grad)


@needs_kernels
@pytest.mark.parametrize(("kernel", "channels", "frames", "bins"), [(7, 160, 30, 80), (3, 16, 90, 200), (5, 24, 20, 7)])
def test_images_of_several_tiles(kernel: int, channels: int, frames: int, bins: int) -> None:
    torch.manual_seed(kernel)
    x, grad = image(2, channels, frames, bins), image(2, channels, frames, bins)
    check(x, image_conv(channels, kernel), grad)


@needs_kernels
def test_arrays_with_gaps() -> None:
    torch.manual_seed(0)
    conv = sequence_conv(24, 15)
    check(torch.randn(50, 2, 60)[5:45, :, 7:31], conv, torch.randn(2, 40, 24).transpose(0, 1))
    check(torch.randn(2, 40, 24).transpose(0, 1), conv, torch.randn(40, 1, 24).expand(40, 2, 24))
    check(torch.randn(40, 2, 24), conv, torch.randn(24, 2, 40).permute(2, 1, 0))
    check(torch.randn(40, 2, 24), conv, torch.ones(1).expand(40, 2, 24))
    gaps = torch.randn(2, 30, 25, 40)[:, 3:, 2:21, 8:32].permute(0, 3, 1, 2)
    check(gaps, image_conv(24), torch.randn(2, 24, 27, 19))


def test_channels_that_are_not_side_by_side() -> None:
    torch.manual_seed(0)
    x, conv, plain = torch.randn(24, 2, 40).permute(2, 1, 0), sequence_conv(24, 15), torch.randn(2, 24, 9, 19)
    assert not convolution._suits(x, conv) and not convolution._suits(plain, image_conv(24))
    assert torch.allclose(depthwise_conv(x, conv), depthwise_conv(x.contiguous(), conv), atol=1e-6)


@needs_kernels
def test_without_bias_or_some_of_the_gradients() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 40, 2, 24)
    check(x, sequence_conv(24, 15, bias=False), grad)
    conv = sequence_conv(24, 15)
    whole = run(x, conv, grad)
    depthwise_conv(x, conv).backward(grad)
    assert conv.weight.grad is not None and torch.equal(conv.weight.grad, whole[2])
    conv.requires_grad_(False)
    x.requires_grad_()
    depthwise_conv(x, conv).backward(grad)
    assert x.grad is not None and torch.equal(x.grad, whole[1])
    with torch.inference_mode():
        assert torch.equal(depthwise_conv(x.detach(), conv), whole[0])


@needs_kernels
def test_results_do_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    x, grad, conv = image(3, 65, 40, 19), image(3, 65, 40, 19), image_conv(65)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(run(x, conv, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_kernels
def test_only_input_and_weight_are_kept() -> None:
    x, conv = torch.randn(40, 2, 24, requires_grad=True), sequence_conv(24, 15)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        depthwise_conv(x, conv)
    assert kept == [x.data_ptr(), conv.weight.data_ptr()]


def test_a_sequence_shorter_than_the_kernel_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        depthwise_conv(torch.randn(4, 2, 4), sequence_conv(4, 5, padding=0))


def test_what_kernels_do_not_take() -> None:
    x, conv = torch.randn(40, 2, 24), sequence_conv(24, 15)
    assert not convolution._suits(x.double(), conv.double())
    assert not convolution._suits(torch.randn(80, 2, 24), sequence_conv(24, 65))
    assert not convolution._suits(torch.zeros(0, 2, 24), sequence_conv(24, 15))
    y = depthwise_conv(x.double(), conv)
    assert torch.allclose(y, conv(x.double().permute(1, 2, 0)).permute(2, 0, 1))
