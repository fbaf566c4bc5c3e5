"""The convolutions of the front-end in inference by a Triton kernel."""

from __future__ import annotations

import pytest
import torch

from gpu_device import DEVICE, kernels
from small_models import draw_parameters
from zipformer_crctc.frontend import Conv2dSubsampling


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("frames", "channels"), [(37, (8, 32, 128)), (9, (3, 4, 6))])
def test_convolutions_of_the_front_end(frames: int, channels: tuple[int, ...], dtype: torch.dtype) -> None:
    """They err by as much as PyTorch's in 16 bits, against float32; the rest of the front-end takes what they give."""
    torch.manual_seed(0)
    front = draw_parameters(Conv2dSubsampling(80, 12, channels, 10), 0.3, 0).to(DEVICE).eval()
    image = torch.randn(2, 1, frames, 80, device=DEVICE)
    with torch.inference_mode():
        want, _ = front._convolved(image)
        with torch.autocast(DEVICE, dtype):
            with kernels():
                found, _ = front._convolved(image)
                y, lengths = front(image[:, 0], torch.tensor([frames, 9], device=DEVICE), isolate=True)
            plain, _ = front._convolved(image) if DEVICE == "cpu" else (None, None)
    assert found.shape == want.shape and found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert y.shape == (2, (frames - 7) // 2, 12) and lengths.tolist() == [(frames - 7) // 2, 1] and y.isfinite().all()
    # Each of three layers rounds what it is given, its weights and its result.
    allowed = 9 * torch.finfo(dtype).eps * float(want.abs().max())
    assert float((found.float() - want).abs().max()) < allowed
    if plain is not None:
        assert float((plain.float() - want).abs().max()) < allowed
