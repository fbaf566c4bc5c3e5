"""Plans of an epoch and the memory scan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from small_models import random_batch, small_model
from zipformer_crctc.batches import BatchRequest
from zipformer_crctc.loader import Batch
from zipformer_crctc.probe import OutOfMemory, describe, naming_batch, plan_epoch, scan_memory, synthetic_batch
from zipformer_crctc.randomstate import random_state
from zipformer_crctc.shar import Skipped, Utterance

CPU = torch.device("cpu")


def utterances(count: int, seconds: float) -> tuple[Utterance, ...]:
    return tuple(
        Utterance(f"u{seconds}-{i}", seconds, int(16000 * seconds), "ab", "", "", "", 0, 0) for i in range(count)
    )


class Order:
    """Batches as given."""

    def __init__(self, *batches: tuple[Utterance, ...]) -> None:
        self.batches = batches
        self.skipped = Skipped()

    def fingerprint(self) -> str:
        return ""

    def epoch(self, epoch: int, start_step: int = 0, state: Mapping[str, Any] | None = None) -> Iterator[BatchRequest]:
        for step, batch in enumerate(self.batches):
            yield BatchRequest(epoch, step, batch)


def test_a_plan_counts_steps_and_finds_the_largest_batches() -> None:
    many_short, few_short, long, medium = utterances(9, 1.0), utterances(3, 1.1), utterances(1, 9.0), utterances(3, 2.8)
    plan = plan_epoch(Order(few_short, many_short, (), long, medium))
    assert plan.steps == 5
    assert plan.worst == (long, medium, many_short)


def test_a_synthetic_batch_has_the_lengths_and_texts() -> None:
    batch = synthetic_batch([*utterances(2, 1.0), *utterances(1, 2.0)])
    assert batch.num_frames.tolist() == sorted(batch.num_frames.tolist(), reverse=True)
    assert batch.features.shape == (3, int(batch.num_frames[0]), 80)
    assert batch.texts == ["ab", "ab", "ab"]


def test_the_scan_changes_nothing() -> None:
    model = small_model().eval()
    pending = next(model.parameters())
    pending.grad = torch.ones_like(pending)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = random_state(model, CPU)
    sizes: list[int] = []

    def loss_of(batch: Batch) -> Tensor:
        sizes.append(len(batch.utterances))
        log_probs, _ = model(batch.features, batch.num_frames)
        return -log_probs.sum()

    assert scan_memory(model, [utterances(1, 1.5), utterances(2, 1.0)], loss_of, CPU) == 0.0
    assert sizes == [1, 2]
    assert not model.training
    assert torch.equal(pending.grad, torch.ones_like(pending))
    assert all(p.grad is None for p in model.parameters() if p is not pending)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    after = random_state(model, CPU)
    assert torch.equal(after["torch"], state["torch"])
    assert torch.equal(after["python"]["words"], state["python"]["words"])
    assert after["whiten"] == state["whiten"]


def test_out_of_memory_names_the_batch_and_the_remedy() -> None:
    batch = random_batch([120, 90], ["ab", "c"])
    with pytest.raises(OutOfMemory, match=r"2 utterances of 0\.9 to 1\.2 s \(utt0, utt1\).*--max-duration"):  # noqa: SIM117
        with naming_batch([batch.utterances]):
            raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(OutOfMemory), naming_batch([batch.utterances]):
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"^another$"), naming_batch([batch.utterances]):
        raise RuntimeError("another")
    assert describe([]) == "an empty batch"
