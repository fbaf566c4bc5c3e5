from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from golden_checks.features import compare_features
from zipformer_crctc.features import BANDS, Fbank, mel_filters, num_feature_frames

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def check_wave(num_samples: int = 8000) -> Tensor:
    """0.1 times a pseudo-random sequence of 64-bit integer arithmetic, the same on every machine."""
    k = torch.arange(num_samples)
    return (0.1 * (((7919 * k * k + 104729 * k + 1299709 * 7 + 12345) % 65537).double() / 32768 - 1)).float()


def test_known_values() -> None:
    features = Fbank()(check_wave())
    assert features.shape == (50, 80)
    want = {(0, 0): (-7.523759, -6.796485, -7.445353), (25, 40): (-0.706740, -0.944752, -0.862657)}
    want[49, 77] = (3.478249, 2.823547, 2.824322)
    for (frame, column), values in want.items():
        assert features[frame, column : column + 3].tolist() == pytest.approx(values, abs=2e-4)
    assert features.mean().item() == pytest.approx(-1.350076, abs=1e-5)


@pytest.mark.parametrize(
    ("num_samples", "frames"), [(0, 0), (79, 0), (80, 1), (239, 1), (240, 2), (8000, 50), (16037, 100)]
)
def test_number_of_frames(num_samples: int, frames: int) -> None:
    assert num_feature_frames(num_samples) == frames
    features = Fbank()(check_wave(num_samples))
    assert features.shape == (frames, 80)
    assert torch.isfinite(features).all()


def test_digital_silence_is_the_floor() -> None:
    assert torch.allclose(Fbank()(torch.zeros(4000)), torch.full((25, 80), -15.942385), atol=1e-5)


def test_a_constant_offset_does_not_matter() -> None:
    wave = check_wave()
    assert torch.allclose(Fbank()(wave), Fbank()(wave + 0.25), atol=2e-3)


def test_a_tone_peaks_in_its_band() -> None:
    time = torch.arange(16000) / 16000
    features = Fbank()(torch.sin(2 * torch.pi * 1000 * time))
    band = int(mel_filters()[32].argmax())  # bin 32 of the FFT is 1000 Hz
    assert (features[5:-5].argmax(dim=1) == band).all()


def test_long_audio_is_the_same_in_blocks() -> None:
    """Frames far from the edges do not depend on what lies around them."""
    wave = check_wave(160 * 700)
    part = Fbank()(wave[160 * 300 : 160 * 500])
    assert torch.allclose(Fbank()(wave)[310:490], part[10:190], atol=1e-5)


def test_batches() -> None:
    waves = [check_wave(n) for n in (8000, 4001, 7990)]
    alone = [Fbank()(wave) for wave in waves]
    assert all(torch.equal(a, b) for a, b in zip(alone, Fbank().batch(waves), strict=True))
    padded = Fbank(zero_padded=True).batch(waves)
    assert torch.equal(padded[0], alone[0])
    assert torch.allclose(padded[1][:-2], alone[1][:-2], atol=1e-5)
    assert (padded[1][-1] - alone[1][-1]).abs().max() > 0.01
    assert Fbank().batch([]) == Fbank(zero_padded=True).batch([]) == []


def test_shape_and_type_are_checked() -> None:
    with pytest.raises(ValueError, match="one channel"):
        Fbank()(torch.zeros(1, 4000))
    with pytest.raises(ValueError, match="int16"):
        Fbank()(torch.zeros(4000, dtype=torch.int16))


@pytest.mark.parametrize("num_samples", [400, 8000, 8079, 8080, 16037, 160 * 300 + 5])
def test_equal_to_lhotse(num_samples: int) -> None:
    lhotse = pytest.importorskip("lhotse", reason="compares with lhotse's Fbank")
    wave = check_wave(num_samples)
    want = torch.as_tensor(lhotse.Fbank().extract(wave, 16000))
    result = compare_features("lhotse", Fbank()(wave), want)
    assert result.ok, result


def test_equal_to_lhotse_in_a_padded_batch() -> None:
    lhotse = pytest.importorskip("lhotse", reason="compares with lhotse's Fbank")
    waves = [check_wave(n) for n in (8000, 4001, 12345)]
    want = lhotse.Fbank().extract_batch([wave.numpy() for wave in waves], 16000)
    for got, features in zip(Fbank(zero_padded=True).batch(waves), want, strict=True):
        result = compare_features("lhotse", got, torch.as_tensor(features))
        assert result.ok, result


def test_golden() -> None:
    from golden_checks.features import CHECKERS

    path = GOLDEN / "80_fbank.safetensors"
    if not path.is_file():
        pytest.skip(f"no reference fixtures: {path} is absent")
    results = CHECKERS["80"](path)
    assert len(results) >= 2
    assert all(result.ok for result in results), results


def test_filters_are_zero_outside_of_the_bands() -> None:
    filters = mel_filters()
    for rows, columns in BANDS:
        filters[rows, columns] = 0.0
    assert not filters.any()
