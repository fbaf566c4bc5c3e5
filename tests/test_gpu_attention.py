"""Attention by matrix products and Triton kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gpu_device import DEVICE, kernels
from test_attention import Attention, all_kinds, results, test_weights_take_gradients_of_any_operation
from zipformer_crctc import native


@pytest.fixture(autouse=True)
def on_device() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("frames", [1, 7, 63])
@all_kinds
@pytest.mark.parametrize("utterances", [1, 3])
def test_kernels_are_as_good_as_operations(
    frames: int, utterances: int, masks: str, positions: bool, penalised: bool, key: nn.Module
) -> None:
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
