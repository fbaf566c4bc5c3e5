"""Whole configurations by name, and the schedules of runs too short for the published ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from zipformer_crctc.config import Config, DataConfig, ModelConfig, TrainConfig

TINY_STEPS = 4200
"""Batches in a run of the tiny preset unless --num-steps says otherwise."""

PLAIN_CTC_SHARE = 0.4
"""Share of a short run that begins with plain CTC, which learns to align sooner than CR-CTC."""

PLANNED_CLOCK = 400_000
"""Value of the schedules' clock b at the end of a planned run.

The published run ends near 200,000. Schedules have reached their end at 20,000, here after a twentieth of the run: what
they do before that keeps large models from diverging, and only slows a small one.
"""


def small() -> Config:
    """The published small model (64 M parameters) and the published training."""
    return Config()


def large() -> Config:
    """The published large model (300 M parameters)."""
    model = ModelConfig(
        num_encoder_layers=(4, 3, 4, 5, 4, 4),
        feedforward_dim=(768, 768, 1536, 2048, 1536, 768),
        num_heads=(6, 6, 6, 8, 6, 6),
        encoder_dim=(512, 512, 768, 1024, 768, 512),
        encoder_unmasked_dim=(192, 192, 256, 320, 256, 192),
        query_head_dim=(64,),
        value_head_dim=(48,),
    )
    return Config(model=model)


def tiny() -> Config:
    """A model of 4 M parameters for CPUs and tests, with a run of 4200 batches of 20 s.

    The front-end and the stack at 50 Hz are narrow: they cost the most for each channel. Output at 25 Hz leaves CTC's
    plateau of blanks much sooner than at 50 Hz.
    """
    model = ModelConfig(
        num_encoder_layers=(1,),
        feedforward_dim=(192, 256, 384, 512, 384, 256),
        num_heads=(2, 4, 4, 4, 4, 4),
        encoder_dim=(64, 128, 192, 256, 192, 128),
        encoder_unmasked_dim=(64, 96, 128, 128, 128, 96),
        query_head_dim=(16,),
        frontend_channels=(8, 16, 24),
        frontend_hidden=48,
        output_downsampling_factor=2,
    )
    data = DataConfig(max_duration=20, num_buckets=8, num_workers=1)
    return with_planned_schedule(Config(model, data, TrainConfig(num_steps=TINY_STEPS)))


PRESETS: dict[str, Callable[[], Config]] = {"tiny": tiny, "small": small, "large": large}
SHORT_PRESETS = ("tiny",)


def derive_schedule(num_steps: int, max_duration: float, world_size: int = 1) -> dict[str, Any]:
    """TrainConfig fields that let a run of ``num_steps`` batches pass through the whole published schedule.

    The reference duration is chosen so that b = num_steps * max_duration * world_size / ref_duration ends at
    PLANNED_CLOCK. The learning rate begins to fall after a quarter of the run and ends at half its base; how many
    epochs that is does not matter.
    ``max_duration`` is in seconds of audio per batch and process.
    """
    average_period = max(1, num_steps // 100)
    return {
        "ref_duration": num_steps * max_duration * world_size / PLANNED_CLOCK,
        "lr_batches": num_steps / 4,
        "lr_epochs": 100.0,
        "lr_warmup_batches": num_steps / 40,
        "plain_ctc_batches": int(PLAIN_CTC_SHARE * num_steps),
        "average_period": average_period,
        "save_every_n": average_period * max(1, num_steps // (10 * average_period)),
        "valid_interval": 20 * average_period,
    }


def with_planned_schedule(config: Config, keep: frozenset[str] = frozenset()) -> Config:
    """``config`` with the derived schedule for its number of steps (TINY_STEPS if that is 0); ``keep`` stay."""
    num_steps = config.train.num_steps if config.train.num_steps > 0 else TINY_STEPS
    derived = derive_schedule(num_steps, max(1, config.data.max_duration), max(1, config.train.world_size))
    return replace(config, train=replace(config.train, **{k: v for k, v in derived.items() if k not in keep}))
