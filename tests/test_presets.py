"""Presets and the schedules of short runs."""

import pytest

from zipformer_crctc.checks import validate
from zipformer_crctc.config import Config
from zipformer_crctc.presets import PLANNED_CLOCK, PRESETS, derive_schedule


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name: str) -> None:
    validate(PRESETS[name]())


def test_small_is_the_published_default() -> None:
    assert PRESETS["small"]() == Config()


@pytest.mark.parametrize(("steps", "duration", "world"), [(2000, 40, 1), (30, 40, 1), (700, 120, 2)])
def test_short_runs_pass_through_the_whole_schedule(steps: int, duration: int, world: int) -> None:
    derived = derive_schedule(steps, duration, world)
    assert steps * duration * world / derived["ref_duration"] == pytest.approx(PLANNED_CLOCK)
    assert derived["lr_batches"] / steps == pytest.approx(1 / 4)
    assert 1 <= derived["average_period"] <= derived["save_every_n"] <= derived["valid_interval"] <= steps
