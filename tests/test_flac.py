from __future__ import annotations

import io
import random
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from zipformer_crctc import flac

RNG = np.random.default_rng(0)


def encode(samples: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, **{"format": "FLAC", **options})
    return buffer.getvalue()


def speechlike(num_samples: int) -> np.ndarray:
    """Noise through a resonance, so that all kinds of linear prediction come up."""
    noise = RNG.normal(size=num_samples + 200)
    return np.convolve(noise, 0.98 ** np.arange(200) * np.sin(0.3 * np.arange(200)), "valid")[:num_samples] * 0.02


def reference(data: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


@pytest.mark.parametrize("subtype", ["PCM_S8", "PCM_16", "PCM_24"])
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_equal_to_libsndfile_to_the_bit(subtype: str, level: float) -> None:
    for samples in (speechlike(20_001), np.zeros(5000), RNG.uniform(-1, 1, 9000), np.ones(17)):
        data = encode(samples, subtype=subtype, compression_level=level)
        decoded, rate = flac.decode(data)
        assert rate == 16_000 and decoded.dtype == np.float32
        assert np.array_equal(decoded, reference(data))
        decoded *= 0.5  # can be written to


@pytest.mark.parametrize("module", [None, SimpleNamespace(lib=object())])
def test_without_miniaudio_or_with_one_of_other_names(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(speechlike(5000))
    expected, _ = flac.decode(data)
    monkeypatch.setattr(flac, "miniaudio", module)
    assert np.array_equal(flac.decode(data)[0], expected)


def test_other_data_go_to_libsndfile() -> None:
    stereo = np.stack([speechlike(5000)] * 2, axis=1)
    assert flac.decode(encode(stereo))[0].shape == (5000, 2)
    wav = encode(speechlike(5000), format="WAV")
    assert np.array_equal(flac.decode(wav)[0], reference(wav))
    with pytest.raises(RuntimeError):
        flac.decode(b"fLaC and nothing else")


def test_damage_gives_what_libsndfile_gives() -> None:
    whole = encode(speechlike(30_000))
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.randrange(200, len(damaged))] ^= 1 << rng.randrange(8)
        assert_same(bytes(damaged))
    for size in (8, 41, 42, 200, len(whole) // 2, len(whole) - 1):
        assert_same(whole[:size])


def test_a_damaged_count_of_samples_gives_what_libsndfile_gives() -> None:
    whole = encode(speechlike(30_000))
    for bit in range(1, 36):
        damaged = bytearray(whole)
        damaged[25 - bit // 8] ^= 1 << bit % 8
        assert_same(bytes(damaged))


def assert_same(data: bytes) -> None:
    try:
        expected = reference(data)
    except (RuntimeError, MemoryError) as error:
        with pytest.raises(ValueError if isinstance(error, MemoryError) else RuntimeError):
            flac.decode(data)
        return
    assert np.array_equal(flac.decode(data)[0], expected)
