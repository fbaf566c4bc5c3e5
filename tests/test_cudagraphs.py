"""Training passes as CUDA graphs: replays give what the passes give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from zipformer_crctc import cudagraphs
from zipformer_crctc.cudagraphs import GraphedPasses
from zipformer_crctc.model import build_model
from zipformer_crctc.presets import tiny

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


@pytest.fixture
def model() -> nn.Module:
    """Without anything random: only the model itself is in training mode."""
    torch.manual_seed(0)
    made = build_model(tiny().model, 40).cuda().eval()
    made.training = True
    return made


def batch(frames: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, frames, 80, device="cuda"), torch.tensor([frames, frames - 20], device="cuda")


def gradients(passes: object, model: nn.Module, given: tuple[Tensor, Tensor], low: bool) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=low):
        log_probs, lengths = passes(*given)  # type: ignore[operator]
    slope = torch.linspace(-1, 1, log_probs.numel(), device="cuda").view(log_probs.shape)
    (log_probs * slope).sum().backward()
    found = [log_probs.detach().clone(), lengths.clone()]
    return found + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("low", [False, True])
def test_replays_give_what_passes_give(model: nn.Module, low: bool) -> None:
    """Also of changed weights, in other batches, and when shapes take turns."""
    passes, plain = GraphedPasses(model), copy.deepcopy(model)
    for step in range(8):
        given = batch(90 if step % 2 else 120)
        got, want = gradients(passes, model, given, low), gradients(plain, plain, given, low)
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-9)
        with torch.no_grad():
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                if q.grad is not None:
                    p.sub_(q.grad, alpha=1e-3 / float(q.grad.norm() + 1e-9))
                    q.copy_(p)
    assert passes.seconds_of_last_recording > 0


def test_recordings_are_made_anew(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraphs, "REPLAYS", 2)
    monkeypatch.setattr(cudagraphs, "MAX_RECORDINGS", 1)
    passes = GraphedPasses(model)
    made: list[int] = []
    record = passes._recorded

    def counted(features: Tensor, num_frames: Tensor) -> object:
        made.append(features.shape[1])
        return record(features, num_frames)

    monkeypatch.setattr(passes, "_recorded", counted)
    for frames in (90, 90, 90, 90, 120, 120, 90):
        gradients(passes, model, batch(frames), low=False)
    assert made == [90, 90, 120, 90]
    passes.clear()
    assert not passes._recordings


def test_without_gradients_or_training_the_model_is_called(model: nn.Module) -> None:
    passes = GraphedPasses(model)
    with torch.no_grad():
        for _ in range(3):
            passes(*batch(90))
    assert not passes._recordings
