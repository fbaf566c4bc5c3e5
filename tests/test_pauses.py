"""Pauses in noise and in music."""

from __future__ import annotations

import numpy as np
import pytest

from zipformer_crctc.features import Fbank
from zipformer_crctc.pauses import PauseFinder

RATE = 16_000
FBANK = Fbank()


def voice(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """A buzz of 120 Hz that comes and goes four times a second, never quite."""
    time = np.arange(round(seconds * RATE)) / RATE
    buzz = sum(np.sin(2 * np.pi * 120 * k * time + rng.uniform(0, 6)) / k for k in range(1, 40))
    return 0.1 * buzz * (0.55 + 0.45 * np.sin(2 * np.pi * 4 * time))


def pink(count: int, rng: np.random.Generator) -> np.ndarray:
    """Noise whose power falls with the frequency."""
    spectrum = np.fft.rfft(rng.standard_normal(count))
    noise = np.fft.irfft(spectrum / np.sqrt(np.maximum(np.arange(len(spectrum)), 20 * count / RATE)), count)
    return noise / noise.std()


def cuts(samples: np.ndarray, finder: PauseFinder | None = None) -> list[int]:
    """Where the samples are cut, silence being cut in its middle."""
    found: list[int] = []
    for end, speech in (finder or PauseFinder(0.3, FBANK)).stretches(samples, ended=False):
        if speech:
            found.append(end)
        else:
            found[-1] = (found[-1] + end) // 2 // 160 * 160
    return found


def talk(pauses: list[float], rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Voice with pauses, and where these begin and end in seconds."""
    parts, spans, now = [voice(2.0, rng)], [], 2.0
    for pause in pauses:
        seconds = rng.uniform(1.0, 4.0)
        parts += [np.zeros(round(pause * RATE)), voice(seconds, rng)]
        spans.append((now, now + pause))
        now = sum(map(len, parts)) / RATE
    return np.concatenate(parts), spans


@pytest.mark.parametrize("decibels", [60, 30, 20, 10, 5])
@pytest.mark.parametrize("colour", ["white", "pink", "hum"])
def test_pauses_are_found_in_noise(decibels: int, colour: str) -> None:
    rng = np.random.default_rng(decibels)
    speech, spans = talk([0.4, 0.35, 0.8, 0.5, 1.2, 0.1, 0.4], rng)
    noise = rng.standard_normal(len(speech)) if colour == "white" else pink(len(speech), rng)
    if colour == "hum":
        noise = 0.1 * noise + np.sqrt(2) * np.sin(2 * np.pi * 50 * np.arange(len(speech)) / RATE)
    samples = speech + noise * np.sqrt((speech**2).mean() / 10 ** (decibels / 10))
    found = cuts(samples.astype(np.float32))
    long_enough = [span for span in spans if span[1] - span[0] > 0.3]
    assert len(found) == len(long_enough)
    for cut, (begin, end) in zip(found, long_enough, strict=True):
        assert begin + 0.1 < cut / RATE < end - 0.1
        assert cut % 160 == 0


def test_the_level_makes_no_difference() -> None:
    rng = np.random.default_rng(0)
    speech, spans = talk([0.4, 0.5, 0.6], rng)
    samples = (speech + 0.003 * rng.standard_normal(len(speech))).astype(np.float32)
    found = cuts(samples)
    assert len(found) == len(spans)
    assert cuts(samples / 8) == found


@pytest.mark.parametrize("sound", ["zeros", "white", "pink", "voice", "chords"])
def test_nothing_is_found_where_nothing_stands_out(sound: str) -> None:
    rng = np.random.default_rng(0)
    count = 30 * RATE
    chords = sum(np.sin(2 * np.pi * f * np.arange(count) / RATE) for f in (220, 277, 330, 660, 990))
    samples = {
        "zeros": np.zeros(count),
        "white": 0.01 * rng.standard_normal(count),
        "pink": 0.01 * pink(count, rng),
        "voice": voice(30.0, rng),
        "chords": 0.05 * chords + 0.001 * rng.standard_normal(count),
    }
    assert cuts(samples[sound].astype(np.float32)) == []


def test_the_middle_of_a_long_pause_is_silence() -> None:
    rng = np.random.default_rng(0)
    samples, ((begin, end),) = talk([5.0], rng)
    samples = (samples + 1e-4 * rng.standard_normal(len(samples))).astype(np.float32)
    finder = PauseFinder(0.3, FBANK)
    (first, before), (second, between) = finder.stretches(samples, ended=True)
    assert before and not between
    assert first / RATE == pytest.approx(begin + 0.3, abs=0.1) and second / RATE == pytest.approx(end - 0.3, abs=0.1)
    some = samples[: first + 2 * RATE + 7]
    assert finder.stretches(some, ended=True) == [(first, True), (len(some), False)]
    short = samples[: first + RATE // 5]
    assert len(finder.stretches(short, ended=False)) == 1 and finder.stretches(short, ended=True) == []
    (again, _), (later, silent) = finder.stretches(some, ended=False)  # the pause may end there
    assert again == first and later == pytest.approx(len(some) - 0.3 * RATE, abs=160) and not silent
    finder.advance(later)
    assert finder.stretches(samples[later:], ended=True) == [(second - later, False)]
    finder.advance(second - later)
    assert finder.stretches(samples[second:], ended=True) == []


def test_the_half_minute_before_counts() -> None:
    """A stretch that is all voice has no pause, though half a second of it is soft."""
    rng = np.random.default_rng(0)
    before, _ = talk([0.5] * 8, rng)
    loud, soft = voice(3.0, rng), 0.02 * voice(0.5, rng)
    noise = 1e-4 * rng.standard_normal(len(before) + len(loud) + len(soft) + len(loud))
    samples = (np.concatenate([before, loud, soft, loud]) + noise).astype(np.float32)
    begin = len(before) // 160 * 160
    assert cuts(samples[begin:]) != []
    finder = PauseFinder(0.3, FBANK)
    assert len(cuts(samples[:begin], finder)) == 8
    finder.advance(begin)
    assert cuts(samples[begin:], finder) == []
