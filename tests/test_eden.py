"""The schedule of learning rates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from golden_checks.training import CHECKERS
from zipformer_crctc.optim import Eden, ScaledAdam

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def eden(base: float = 0.045, **options: float) -> Eden:
    return Eden(ScaledAdam([nn.Parameter(torch.zeros(2))], lr=base), 7500, 3.5, **options)


@pytest.mark.parametrize(
    ("epoch", "batch", "want"),
    [(0, 250, 0.03374063), (1, 7500, 0.03710522), (3, 30000, 0.01931055), (9, 100000, 0.00740894)],
)
def test_values(epoch: int, batch: int, want: float) -> None:
    scheduler = eden()
    assert scheduler.optimizer.param_groups[0]["lr"] == 0.045  # before anything
    scheduler.step_epoch(epoch)
    scheduler.step_batch(batch)
    assert scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(want, abs=5e-9)


def test_golden() -> None:
    path = GOLDEN / "51_eden.safetensors"
    if not path.is_file():
        pytest.skip(f"no reference fixtures at {GOLDEN}")
    assert all(result.ok for result in CHECKERS["51"](path))


def test_counts_by_itself() -> None:
    counted, told = eden(), eden()
    for batch in range(1, 4):
        counted.step_batch()
        told.step_batch(batch)
    counted.step_epoch()
    told.step_epoch(1)
    assert counted.rates() == told.rates()


def test_warmup_options() -> None:
    assert eden(warmup_batches=0).rates() == [0.045]
    assert eden(warmup_start=0.1).rates() == pytest.approx([0.0045])
    with pytest.raises(ValueError, match=r"warmup_start is 1\.5"):
        eden(warmup_start=1.5)
    with pytest.raises(ValueError, match="lr_batches"):
        Eden(ScaledAdam([nn.Parameter(torch.zeros(2))]), 0, 3.5)


def test_resume_honours_the_new_base_rate() -> None:
    old = eden(0.045)
    old.step_epoch(2)
    old.step_batch(9000)
    state = old.state_dict()
    assert state == {"base_lrs": [0.045], "epoch": 2, "batch": 9000}

    new = eden(0.015)
    new.load_state_dict(state)
    assert new.rates() == pytest.approx([rate / 3 for rate in old.rates()])
    assert new.optimizer.param_groups[0]["lr"] == new.rates()[0]
    same_base = eden(0.015)
    same_base.load_state_dict(state, restore_base_lrs=True)
    assert same_base.rates() == old.rates()
    with pytest.raises(ValueError, match="2 base rates for 1 groups"):
        new.load_state_dict({**state, "base_lrs": [0.1, 0.2]}, restore_base_lrs=True)


def test_after_loading_an_optimizer() -> None:
    """The order of a resumed run: make both, then load both; the saved learning rates do not come back."""
    saved = eden(0.045)
    saved.step_batch(600)
    resumed = eden(0.015)
    resumed.optimizer.load_state_dict(saved.optimizer.state_dict())
    resumed.load_state_dict(saved.state_dict())
    resumed.step_batch()
    group = resumed.optimizer.param_groups[0]
    assert group["base_lr"] == 0.015
    assert group["lr"] == pytest.approx(0.015 * ((601**2 + 7500**2) / 7500**2) ** -0.25)
