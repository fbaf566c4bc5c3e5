"""Fixture of the filterbank features."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from golden_checks.compare import Checker, Comparison, Fixture
from zipformer_crctc.features import Fbank

# Near the floor of the features, float32 rounding is all there is; see the caveat of the fixture.
LOUD = -12.0
LOUD_LIMIT, QUIET_LIMIT = 1e-3, 2e-2  # absolute


def compare_features(name: str, got: Tensor, want: Tensor) -> Comparison:
    """Within the absolute limit of each bin: one where the wanted value is above -12, a wider one below."""
    if got.shape != want.shape:
        return Comparison(name, float("inf"), float("inf"), False, f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    if want.numel() == 0:
        return Comparison(name, 0.0, 0.0, True)
    difference = (got.double() - want.double()).abs()
    limit = torch.where(want > LOUD, LOUD_LIMIT, QUIET_LIMIT)
    largest = difference.max().item()
    size = max(want.abs().max().item(), torch.finfo(torch.float32).tiny)
    return Comparison(name, largest, largest / size, bool((difference <= limit).all()))


def check_fbank(path: Path) -> list[Comparison]:
    """Each waveform alone, and all of them in one zero-padded batch."""
    fixture = Fixture.read(path)
    waves = {
        name: wave.float() / 32768 if wave.dtype == torch.int16 else wave.float()
        for name, wave in fixture.group("in.wave.").items()
    }
    alone = {name: Fbank()(wave) for name, wave in waves.items()}
    padded = dict(zip(waves, Fbank(zero_padded=True).batch(list(waves.values())), strict=True))
    results = [compare_features(f"feat.{name}", alone[name], x) for name, x in fixture.group("out.feat.").items()]
    return results + [
        compare_features(f"batch_feat.{name}", padded[name], x) for name, x in fixture.group("out.batch_feat.").items()
    ]


CHECKERS: dict[str, Checker] = {"80": check_fbank}
