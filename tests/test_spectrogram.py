"""Spectrograms."""

from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest

from zipformer_crctc.spectrogram import Tier, levels, png, spectrogram

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
    assert grey.shape[0] == 129 and 1 <= grey.shape[1] <= 10_000


def test_png_is_read_back() -> None:
    image = pytest.importorskip("PIL.Image")
    grey = np.arange(60, dtype=np.uint8).reshape(5, 12)
    assert (np.asarray(image.open(io.BytesIO(png(grey)))) == grey).all()


def test_phones_stand_at_their_times_and_apart() -> None:
    spans = [("a", 0.1, 0.1), ("<b>", 0.12, 0.12), ("tʃ", 0.12, 0.16), ("k", 0.35, 0.45)]
    root = ElementTree.fromstring(spectrogram(sine(500), RATE, [Tier("A", "red", spans)]))
    shown = [t for t in root.iter(f"{SVG}text") if t.attrib.get("fill") == "red"]
    assert [t.text for t in shown] == [phone for phone, _, _ in spans]
    xs = [float(t.attrib["x"]) for t in shown]
    assert (xs[3] - xs[0]) / (xs[1] - xs[0]) == pytest.approx(15, rel=0.05)
    assert shown[0].attrib["y"] != shown[1].attrib["y"]
    lines = [line for line in root.iter(f"{SVG}line") if line.attrib["stroke"] == "red"]
    assert len(lines) == 5, "one for each time"
    (picture,) = root.iter(f"{SVG}image")
    assert picture.attrib["href"].startswith("data:image/png;base64,")


def test_long_utterances_are_cut_into_strips() -> None:
    spans = [("p", 0.5 * i, 0.5 * i + 0.4) for i in range(20)]
    strips = ElementTree.fromstring(f"<div>{spectrogram(sine(500, 10.0), RATE, [Tier('A', 'red', spans)])}</div>")
    assert [strip.attrib["width"] for strip in strips] == ["860"] * 3
    times = [[t.text for t in strip.iter(f"{SVG}text") if t.attrib.get("fill") == "red"] for strip in strips]
    assert sum(map(len, times)) == 20, "each phone once"
    assert "from 3.33 to 6.67 s" in strips[1].attrib["aria-label"]


def test_narrow_pages_get_narrow_strips() -> None:
    strips = ElementTree.fromstring(f"<div>{spectrogram(sine(500, 4.0), RATE, [], strip_width=300)}</div>")
    assert [strip.attrib["width"] for strip in strips] == ["360"] * 3
