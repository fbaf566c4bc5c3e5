"""Depthwise convolutions by Triton kernels against PyTorch's in float64; without a GPU, interpreted."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import golden
from gpu_device import DEVICE, kernels
from zipformer_crctc import convolution, gpu_convolution, native
from zipformer_crctc.convolution import depthwise_conv, depthwise_conv2d

FIXTURE = Path(__file__).resolve().parents[2] / "shared" / "golden" / "05_conv_module_k15.safetensors"
Conv = nn.Conv1d | nn.Conv2d
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
ROUNDING = 0.501 if DEVICE == "cuda" else 1.0
"""How much may be lost of the last bit: Triton's interpreter rounds bfloat16 towards zero."""


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    with kernels():
        yield


def random(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def conv_of(channels: int, kernel: int, padding: int | None = None, bias: bool = True) -> nn.Conv1d:
    padding = kernel // 2 if padding is None else padding
    return nn.Conv1d(channels, channels, kernel, padding=padding, groups=channels, bias=bias, device=DEVICE)


def image(utterances: int, channels: int, frames: int, bins: int, dtype: torch.dtype = FP32) -> Tensor:
    return random(utterances, frames, bins, channels, dtype=dtype).permute(0, 3, 1, 2)


def image_conv(channels: int, kernel: int | tuple[int, int] = 7, bias: bool = True) -> nn.Conv2d:
    rows, columns = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    padding = rows // 2, columns // 2
    return nn.Conv2d(channels, channels, (rows, columns), padding=padding, groups=channels, bias=bias, device=DEVICE)


def forward(x: Tensor, conv: Conv) -> Tensor:
    return depthwise_conv(x, conv) if isinstance(conv, nn.Conv1d) else depthwise_conv2d(x, conv)


def run(x: Tensor, conv: Conv, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of input, weight and bias."""
    x = x.detach().requires_grad_()
    y = forward(x, conv)
    return [y.detach(), *torch.autograd.grad(y, [x, *conv.parameters()], grad)]


def exact(x: Tensor, conv: Conv, grad: Tensor) -> list[Tensor]:
    """The same in float64 by PyTorch's layer itself, which has frames last."""
    over_time = isinstance(conv, nn.Conv1d)
    x, grad = (z.detach().cpu().double() for z in (x, grad))
    if over_time:
        x, grad = x.permute(1, 2, 0), grad.permute(1, 2, 0)
    conv, x = deepcopy(conv).cpu().double(), x.requires_grad_()
    y = conv(x)
    grad_x, *others = torch.autograd.grad(y, [x, *conv.parameters()], grad)
    return [*(z.detach().permute(2, 0, 1) if over_time else z.detach() for z in (y, grad_x)), *others]


def check(x: Tensor, conv: Conv, grad: Tensor) -> None:
    """All sums are of float32; what has few bits was rounded once."""
    assert convolution._suits(x, conv)
    dtypes = [x.dtype, x.dtype, *(p.dtype for p in conv.parameters())]
    for ours, want, dtype in zip(run(x, conv, grad), exact(x, conv, grad), dtypes, strict=True):
        assert ours.shape == want.shape and ours.dtype is dtype and ours.device == x.device
        rounding = 0.0 if dtype is FP32 else ROUNDING * torch.finfo(dtype).eps
        scale = max(1.0, want.abs().max().item())
        torch.testing.assert_close(ours.cpu().double(), want, rtol=rounding, atol=2e-6 * scale)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("frames", "utterances", "channels", "kernel"),
    [(5, 1, 37, 31), (18, 3, 24, 31), (33, 1, 96, 31), (18, 3, 37, 15), (2, 2, 1, 15), (17, 2, 96, 7), (5, 1, 24, 1)],
)
def test_sequences(frames: int, utterances: int, channels: int, kernel: int, dtype: torch.dtype) -> None:
    torch.manual_seed(frames + channels + kernel)
    x, grad = random(2, frames, utterances, channels, dtype=dtype)
    check(x, conv_of(channels, kernel), grad)


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("frames", "bins", "utterances", "channels"), [(17, 6, 1, 70), (2, 19, 2, 24), (1, 3, 2, 1), (9, 1, 1, 128)]
)
def test_images(frames: int, bins: int, utterances: int, channels: int, dtype: torch.dtype) -> None:
    torch.manual_seed(frames + channels + bins)
    x, grad = (image(utterances, channels, frames, bins, dtype) for _ in range(2))
    check(x, image_conv(channels), grad)


@pytest.mark.parametrize("kernel", [1, 3, (1, 5), (5, 1), (3, 21)])
@pytest.mark.parametrize("frames", [1, 4])
def test_other_kernels_of_images(frames: int, kernel: int | tuple[int, int]) -> None:
    torch.manual_seed(0)
    check(image(2, 8, frames, 5), image_conv(8, kernel), image(2, 8, frames, 5))


@pytest.mark.parametrize("kernel", [1, 2, 15])
@pytest.mark.parametrize("padding", [0, 1, 17])
def test_other_paddings(kernel: int, padding: int) -> None:
    """Causal convolutions get their padding before; outputs may be fewer or more than inputs."""
    torch.manual_seed(kernel)
    x = random(18, 1, 24, dtype=BF16)
    check(x, conv_of(24, kernel, padding), random(18 + 2 * padding - kernel + 1, 1, 24, dtype=BF16))


def test_an_even_number_of_many_taps() -> None:
    torch.manual_seed(0)
    x = random(8, 1, 16)
    check(x, conv_of(16, 34), random(9, 1, 16))


def test_arrays_with_gaps() -> None:
    torch.manual_seed(0)
    conv = conv_of(24, 7)
    check(random(20, 2, 60, dtype=BF16)[5:15, :, 7:31], conv, random(2, 10, 24, dtype=BF16).transpose(0, 1))
    check(random(2, 10, 24).transpose(0, 1), conv, random(10, 1, 24).expand(10, 2, 24))
    check(random(10, 2, 48).chunk(2, dim=-1)[1], conv, random(24, 2, 10).permute(2, 1, 0))
    check(random(10, 2, 24), conv, torch.ones(1, device=DEVICE).expand(10, 2, 24))
    gaps = random(2, 8, 9, 40)[:, 3:, 2:8, 8:32].permute(0, 3, 1, 2)
    check(gaps, image_conv(24, 3), random(2, 24, 5, 6))
    check(gaps, image_conv(24, 3), torch.ones(1, device=DEVICE).expand(2, 24, 5, 6))


def test_numbers_of_few_bits() -> None:
    torch.manual_seed(0)
    x, grad = random(2, 10, 2, 24, dtype=FP16)
    check(x, conv_of(24, 7), grad)
    check(x, conv_of(24, 7).to(FP16), grad)
    check(image(1, 24, 5, 6, FP16), image_conv(24, 3).to(FP16), image(1, 24, 5, 6, FP16))


def test_several_runs_for_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_convolution, "PROGRAMS", 4)
    monkeypatch.setattr(gpu_convolution, "SHORTER_PROGRAMS", 8)
    torch.manual_seed(0)
    for frames, utterances in ((66, 2), (33, 3)):
        x, grad = random(2, frames, utterances, 72, dtype=BF16)
        check(x, conv_of(72, 3), grad)
    check(image(2, 72, 9, 10), image_conv(72, 3), image(2, 72, 9, 10))


def test_several_programs_for_each_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_convolution, "ROWS", 4)
    monkeypatch.setattr(gpu_convolution, "ROWS_OF_GRADIENT", 3)
    torch.manual_seed(0)
    check(image(2, 8, 14, 5), image_conv(8, 5), image(2, 8, 14, 5))


def test_many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_convolution, "PARTS", 2)
    torch.manual_seed(0)
    x, grad = random(2, 37, 2, 40)
    check(x, conv_of(40, 3), grad)


@pytest.mark.parametrize("of_images", [False, True])
def test_without_bias_or_some_of_the_gradients(of_images: bool) -> None:
    torch.manual_seed(0)
    x, grad = (image(2, 24, 4, 3) for _ in range(2)) if of_images else random(2, 10, 2, 24)
    plain, conv = (
        (image_conv(24, 3, False), image_conv(24, 3)) if of_images else (conv_of(24, 7, None, False), conv_of(24, 7))
    )
    check(x, plain, grad)
    whole = run(x, conv, grad)
    forward(x, conv).backward(grad)
    assert conv.weight.grad is not None and torch.equal(conv.weight.grad, whole[2])
    conv.requires_grad_(False)
    x.requires_grad_()
    forward(x, conv).backward(grad)
    assert x.grad is not None and torch.equal(x.grad, whole[1])
    with torch.inference_mode():
        assert torch.equal(forward(x.detach(), conv), whole[0])


@pytest.mark.parametrize("of_images", [False, True])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast(dtype: torch.dtype, of_images: bool) -> None:
    """Inputs are rounded, as by PyTorch's convolution; parameters are not; gradients are float32 again."""
    torch.manual_seed(0)
    x, grad = (image(2, 24, 4, 3) for _ in range(2)) if of_images else random(2, 10, 2, 24)
    conv = image_conv(24, 3) if of_images else conv_of(24, 7)
    with torch.autocast(DEVICE, dtype):
        inner = run(x, conv, grad.to(dtype))
    want = run(x.to(dtype), conv, grad.to(dtype))
    assert [z.dtype for z in inner] == [dtype, FP32, FP32, FP32]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(inner, want, strict=True))


def test_what_kernels_do_not_take() -> None:
    x, conv = random(20, 2, 24), conv_of(24, 15)
    assert not convolution._suits(x.double(), conv.double())
    assert not convolution._suits(random(80, 2, 24), conv_of(24, 65))
    with native.disabled():
        assert not convolution._suits(x, conv_of(24, 15))
    for z, kernel in ((image(1, 8, 5, 4), 9), (random(1, 8, 5, 4), 7), (image(1, 8, 5, 4), 4)):
        conv2d = image_conv(8, kernel)
        assert not convolution._suits(z, conv2d)
        assert torch.equal(depthwise_conv2d(z, conv2d), conv2d(z))


@pytest.mark.skipif(not FIXTURE.is_file(), reason=f"no fixture of the reference implementation at {FIXTURE}")
def test_the_module_of_the_reference_implementation() -> None:
    with torch.device(DEVICE):
        passed, line = golden.check(FIXTURE)
    assert passed, line
