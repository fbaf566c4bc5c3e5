"""Training passes as CUDA graphs: which are recorded, and that replays give what the passes give."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zipformer_crctc import cudagraphs
from zipformer_crctc.cudagraphs import GraphedPasses
from zipformer_crctc.model import build_model
from zipformer_crctc.presets import tiny
from zipformer_crctc.schedule import set_batch_count

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def model() -> nn.Module:
    """Without anything random: only the model itself is in training mode."""
    torch.manual_seed(0)
    made = build_model(tiny().model, 40).to(DEVICE).eval()
    made.training = True
    return made


def batch(frames: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, frames, 80, device=DEVICE), torch.tensor([frames, frames - 20], device=DEVICE)


def gradients(passes: Any, model: nn.Module, given: tuple[Tensor, Tensor], low: bool) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16, enabled=low):
        log_probs, lengths = passes(*given)
    slope = torch.linspace(-1, 1, log_probs.numel(), device=DEVICE).view(log_probs.shape)
    (log_probs * slope).sum().backward()
    found = [log_probs.detach().clone(), lengths.clone()]
    return found + [p.grad.clone() for p in model.parameters() if p.grad is not None]


@needs_gpu
@pytest.mark.parametrize("low", [False, True])
def test_replays_give_what_passes_give(model: nn.Module, low: bool) -> None:
    """Also of changed weights, in other batches, when shapes take turns, and after a longer utterance."""
    passes, plain = GraphedPasses(model), copy.deepcopy(model)
    for step in range(8):
        if step == 6:
            with torch.no_grad():  # the table of positions grows
                model(*batch(2400))
            _ = [torch.full((1000, 100), float("nan"), device=DEVICE) for _ in range(100)]
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


@needs_gpu
def test_training_with_all_regularisers(model: nn.Module) -> None:
    """Whiten's probabilities come back from replays, and losses fall as they do without graphs."""
    model.train()
    set_batch_count(model, 60_000.0)
    passes, losses = GraphedPasses(model), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):
        losses.append(float(trained(passes, optimizer).detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert passes.seconds_of_last_recording > 0


@needs_gpu
def test_training_goes_on_where_the_last_pass_is_kept(model: nn.Module) -> None:
    """Its graph may make a recording fail, in the middle of random numbers."""
    model.train()
    set_batch_count(model, 60_000.0)
    passes, losses = GraphedPasses(model), []
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(20):
        losses.append(trained(passes, optimizer))
    assert float(losses[-1]) < 0.5 * float(losses[0])


def trained(passes: GraphedPasses, optimizer: torch.optim.Optimizer) -> Tensor:
    """The loss of a step."""
    torch.manual_seed(1)
    log_probs, _ = passes(*batch(120))
    loss = -log_probs[:, :, 3].mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


@dataclass
class FakeRecording:
    batch_count: float
    replays: int = 0


class Fake(GraphedPasses):
    """Passes that tell what they do in place of doing it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.did: list[str] = []

    def _recorded(self, features: Tensor, num_frames: Tensor, decide_again: Any) -> Any:
        self.did.append("record")
        return FakeRecording(self._batch_count())


@pytest.fixture
def passes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake(model)
    monkeypatch.setattr(fake, "model", model)
    monkeypatch.setattr(model, "forward", lambda *given: fake.did.append("pass"))
    monkeypatch.setattr(cudagraphs._Replay, "apply", lambda *given: fake.did.append("replay"))
    return fake


def test_a_shape_is_recorded_when_it_comes_again_and_anew_after_some_replays(
    passes: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cudagraphs, "REPLAYS", 2)
    for _ in range(6):
        passes(*batch(90))
    assert passes.did == ["pass", *2 * ["record", "replay", "replay"], "record", "replay"][:9]


def test_the_shape_that_was_not_used_for_longest_goes_first(passes: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudagraphs, "MAX_RECORDINGS", 1)
    for frames in (90, 90, 120, 120, 90):
        passes(*batch(frames))
    assert passes.did == ["pass", "record", "replay", "pass", "record", "replay", "record", "replay"]
    passes.clear()
    passes(*batch(90))
    assert passes.did[-1] == "pass"


def test_nothing_is_recorded_while_schedules_change_fast(passes: Fake) -> None:
    for b in range(0, 1000, 10):  # as in a short run
        set_batch_count(passes.model, float(b))
        passes(*batch(90))
    assert set(passes.did) == {"pass"}


def test_a_recording_is_made_anew_when_schedules_have_moved_on(passes: Fake) -> None:
    for b in range(10_000, 11_200, 10):
        set_batch_count(passes.model, float(b))
        passes(*batch(90))
    assert passes.did.count("record") == 2
    set_batch_count(passes.model, 60_000.0)  # beyond all changes
    passes(*batch(90))
    set_batch_count(passes.model, 90_000.0)
    passes(*batch(90))
    assert passes.did.count("record") == 3


def test_training_goes_on_where_recording_fails(passes: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> None:
        random.random()
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(passes, "_recorded", fails)
    state = random.getstate()
    for _ in range(3):
        passes(*batch(90))
    assert passes.did == 3 * ["pass"]
    assert random.getstate() == state


def test_without_gradients_the_model_is_called(passes: Fake) -> None:
    with torch.no_grad():
        for _ in range(3):
            passes(*batch(90))
    assert passes.did == 3 * ["pass"]
