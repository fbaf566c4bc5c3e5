"""Attention by matrix products and Triton kernels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gpu_device import DEVICE, kernels
from small_models import draw_parameters
from test_attention import Attention, all_kinds, results, test_weights_take_gradients_of_any_operation
from zipformer_crctc import gpu_attention, native
from zipformer_crctc.attention import AttentionWeights, averaged, relative_positions


@pytest.fixture(autouse=True)
def on_device() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("frames", [1, 7, 63])
@all_kinds
@pytest.mark.parametrize("utterances", [1, 3])
def test_kernels_are_as_good_as_operations(
    frames: int,
    utterances: int,
    masks: str,
    positions: bool,
    penalised: bool,
    key: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two utterances of three for one program, and one for another.
    monkeypatch.setattr(gpu_attention, "_utterances_of_a_program", lambda *sizes: 2)
    with torch.device(DEVICE):
        module = Attention(positions, penalised, key)
        with native.disabled():
            exact = results(module, frames, utterances, masks, torch.float64)
            plain = results(module, frames, utterances, masks, torch.float32)
        with kernels():
            got = results(module, frames, utterances, masks, torch.float32)
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        # Some gradients are zero but for rounding, like that of the bias of keys: hence the error of the operations.
        error = (theirs - want).abs().max() + 1e-5 * want.abs().max() + 1e-5
        assert (ours - want).abs().max() <= 3.0 * error


def test_gradients_of_other_uses() -> None:
    with torch.device(DEVICE), kernels():
        test_weights_take_gradients_of_any_operation()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "channels"), [(1, 1), (1, 4), (3, 4), (2, 6)])
def test_sixteen_bits(dtype: torch.dtype, heads: int, channels: int) -> None:
    frames, utterances, dim = 9, 2, 12
    module = AttentionWeights(dim, dim, heads, query_head_dim=5, pos_head_dim=channels).eval()
    module = draw_parameters(module.to(DEVICE), 0.3)
    x, values = torch.randn(2, frames, utterances, dim, device=DEVICE)

    def results(kind: torch.dtype) -> list[Tensor]:
        module.to(kind)
        given = [x.to(kind).requires_grad_(), values.to(kind).requires_grad_()]
        weights = module(given[0], relative_positions(frames, dim, device=x.device).to(kind))
        averages = averaged(weights, given[1])
        grads = torch.autograd.grad(averages.square().sum(), [*given, *module.parameters()])
        return [weights, averages, *grads]

    module.to(dtype)  # so that all have the same parameters
    with native.disabled():
        exact, plain = results(torch.float64), results(dtype)
    with kernels():
        got = results(dtype)
    for ours, theirs, want in zip(got, plain, exact, strict=True):
        assert ours.dtype == dtype
        error = (theirs - want).abs().max() + torch.finfo(dtype).eps * (want.abs().max() + 1.0)
        assert (ours - want).abs().max() <= 3.0 * error


def test_averages_by_one_head() -> None:
    """These are written to their place at once, in and outside of inference mode."""
    weights, values = torch.randn(1, 3, 7, 7, device=DEVICE), torch.randn(7, 3, 10, device=DEVICE)
    with native.disabled():
        want = averaged(weights, values)
    for inference in (False, True):
        with torch.inference_mode(inference), kernels():
            got = averaged(weights, values.clone())
        assert got.is_contiguous()
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("heads", "utterances", "frames"), [(4, 1, 1), (8, 50, 63), (4, 1024, 499), (4, 1, 4096)])
def test_utterances_of_a_program(heads: int, utterances: int, frames: int) -> None:
    each = gpu_attention._utterances_of_a_program(heads, utterances, frames)
    assert 1 <= each <= gpu_attention.MAX_UTTERANCES
    assert each == 1 or heads * utterances * frames // each >= 8 * gpu_attention.PROGRAMS
