"""Spectrograms."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest

from zipformer_crctc.spectrogram import levels, png, spectrogram

RATE = 16_000
SVG = "{http://www.w3.org/2000/svg}"


def sine(frequency: float, seconds: float = 0.5) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.mark.parametrize("frequency", [500.0, 3000.0])
def test_a_tone_is_dark_where_it_belongs(frequency: float) -> None:
    grey = levels(sine(frequency), RATE)
    assert grey.shape == (129, (8000 - 128) // 64 + 1)
    darkest = 128 - grey.mean(axis=1).argmin()
    assert darkest * RATE / 256 == pytest.approx(frequency, abs=70)


@pytest.mark.parametrize("count", [0, 1, 100, 40 * RATE])
def test_lengths(count: int) -> None:
    grey = levels(np.zeros(count, dtype=np.float32), RATE)
    assert grey.shape[0] == 129 and 1 <= grey.shape[1] <= 1600


def test_png_is_read_back() -> None:
    image = pytest.importorskip("PIL.Image")
    grey = np.arange(60, dtype=np.uint8).reshape(5, 12)
    assert (np.asarray(image.open(io.BytesIO(png(grey)))) == grey).all()


def test_phones_stand_at_their_times_and_apart() -> None:
    phones, times = ["a", "<b>", "tʃ", "k"], [0.1, 0.12, 0.14, 0.4]
    root = ElementTree.fromstring(spectrogram(sine(500), RATE, [("A", "red", phones, times), ("B", "blue", ["x"], [])]))
    shown = [t for t in root.iter(f"{SVG}text") if t.attrib.get("fill") == "red"]
    assert [t.text for t in shown] == phones
    xs = [float(t.attrib["x"]) for t in shown]
    assert (xs[3] - xs[0]) / (xs[1] - xs[0]) == pytest.approx(15, rel=0.05)
    assert shown[0].attrib["y"] != shown[1].attrib["y"]
    assert not [t for t in root.iter(f"{SVG}text") if t.attrib.get("fill") == "blue"], "no times, no row"
    (picture,) = root.iter(f"{SVG}image")
    assert picture.attrib["href"].startswith("data:image/png;base64,")
