"""What is between modules by Triton kernels: residual additions and Downsample in inference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_device import DEVICE, kernels
from zipformer_crctc import lowprecision
from zipformer_crctc.encoder import Downsample
from zipformer_crctc.norms import added

LOW = torch.bfloat16
T, N, C = 13, 3, 37


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mask_of(masked: bool) -> Tensor | None:
    return torch.tensor([[1.0], [0.0], [1.0]], device=DEVICE) if masked else None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("for_products", [False, True])
def test_residual_additions_in_mixed_precision(masked: bool, for_products: bool) -> None:
    """In float32, with a rounded copy of the sum for the products that come next."""
    mask = mask_of(masked)
    x = torch.randn(T, N, C, device=DEVICE, requires_grad=True)
    update = torch.randn(T, N, C, device=DEVICE).to(LOW).requires_grad_()
    cotangent = torch.randn(T, N, C, device=DEVICE)
    with kernels(), torch.autocast(DEVICE, LOW):
        y = added(x, update, mask, for_products)
        assert lowprecision.cast(y, LOW) is lowprecision.cast(y, LOW)
    want = x + (update if mask is None else update * mask)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(lowprecision.cast(y, LOW).float(), want, rtol=2**-7, atol=0.0)
    found, wanted = (torch.autograd.grad(result, [x, update], cotangent) for result in (y, want))
    for got, near in zip(found, wanted, strict=True):
        assert got.dtype == near.dtype
        torch.testing.assert_close(got, near)


@pytest.mark.parametrize("masked", [False, True])
def test_residual_additions_in_float32(masked: bool) -> None:
    x, update = torch.randn(2, T, N, C, device=DEVICE)
    mask = mask_of(masked)
    with kernels():
        y = added(x, update, mask)
    torch.testing.assert_close(y, x + update * (1.0 if mask is None else mask))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, LOW])
def test_downsample_in_inference(factor: int, dtype: torch.dtype) -> None:
    """Each utterance as it would be alone."""
    downsample = Downsample(factor).to(DEVICE)
    torch.nn.init.normal_(downsample.bias)
    x, lengths = torch.randn(T, N, C, device=DEVICE).to(dtype), torch.tensor([T, 5, 8], device=DEVICE)
    with kernels(), torch.inference_mode():
        found = downsample(x, lengths)
    with torch.inference_mode():
        for n, length in enumerate(lengths.tolist()):
            alone = downsample.cpu()(x[:length, n : n + 1].cpu().float())
            got = found[: len(alone), n : n + 1].cpu()
            assert got.dtype == torch.float32 and len(found) == -(-T // factor)
            torch.testing.assert_close(got, alone)
            downsample.to(DEVICE)
