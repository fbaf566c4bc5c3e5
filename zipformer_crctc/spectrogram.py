"""A spectrogram with the phones of hypotheses above it, as SVG text that holds its picture.

Legend: S samples, T columns, F frequencies.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.reportcolours import colour
from zipformer_crctc.text import visible

_WINDOW = 0.008  # seconds: wide-band, so that formants and single glottal pulses show
_STEP = 0.004  # seconds from column to column of a short utterance
_MOST_COLUMNS = 8000
_RANGE = 60.0  # decibels from black to white
_FFT = 256
_PRE_EMPHASIS = 0.97
_SECOND_WIDTH = 240  # pixels of a second
_STRIP_WIDTH = 800  # pixels
_GREY, _PAPER = colour("grey"), colour("paper")


@dataclass(frozen=True)
class Tier:
    """The phones of one system in time."""

    name: str
    colour: str
    spans: Sequence[tuple[str, float, float]]
    """Phone, start and end in seconds; both are the same where only one time is known."""

    def within(self, start: float, end: float) -> Tier:
        """The phones whose middle lies in a stretch of time."""
        return replace(self, spans=[span for span in self.spans if start <= (span[1] + span[2]) / 2 < end])


def levels(samples: NDArray[np.float32], rate: int) -> NDArray[np.uint8]:
    """(F, T): 0 for the loudest, 255 for what is 60 dB below it or less; the highest frequency comes first.

    samples: (S,) in [-1, 1], at `rate` Hz.
    """
    window = max(2, round(_WINDOW * rate))
    if len(samples) < window:
        samples = np.pad(samples, (0, window - len(samples)))
    step = max(round(_STEP * rate), -(-len(samples) // _MOST_COLUMNS), 1)
    emphasised = np.append(samples[:1], samples[1:] - _PRE_EMPHASIS * samples[:-1])
    frames = np.lib.stride_tricks.sliding_window_view(emphasised, window)[::step]  # (T, window)
    power = np.abs(np.fft.rfft(frames * np.hanning(window), n=max(_FFT, window))) ** 2  # (T, F)
    decibels = 10 * np.log10(power + 1e-12)
    below = decibels.max(initial=-120.0) - decibels
    return np.clip(255 * below / _RANGE, 0, 255).astype(np.uint8).T[::-1]


def png(grey: NDArray[np.uint8]) -> bytes:
    """A grey picture (rows, columns) as a PNG file."""
    height, width = grey.shape
    lines = np.concatenate([np.zeros((height, 1), dtype=np.uint8), grey], axis=1)  # each line begins with filter 0

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    picture = zlib.compress(lines.tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", picture) + chunk(b"IEND", b"")


def spectrogram(samples: NDArray[np.float32], rate: int, tiers: Sequence[Tier], strip_width: int = _STRIP_WIDTH) -> str:
    """SVGs of an utterance: its spectrogram from 0 to half the rate, below the phones of each tier at their times.

    Long utterances are cut into strips of one length, which stand below each other as lines of text do.

    samples: (S,) in [-1, 1], at `rate` Hz. strip_width: of the picture, in pixels; 60 more are taken by the labels.
    """
    seconds = len(samples) / rate
    grey = levels(samples, rate)
    num_strips = max(1, min(grey.shape[1], math.ceil(seconds * _SECOND_WIDTH / strip_width - 0.25)))
    long = max(seconds, 1e-3) / num_strips
    width = round(min(strip_width, max(240, long * _SECOND_WIDTH)))
    strips = np.array_split(grey, num_strips, axis=1)
    return "".join(
        _strip(
            strip, number * long, long, width, rate, [tier.within(number * long, (number + 1) * long) for tier in tiers]
        )
        for number, strip in enumerate(strips)
    )


def _strip(grey: NDArray[np.uint8], start: float, seconds: float, width: int, rate: int, tiers: Sequence[Tier]) -> str:
    """SVG of `seconds` from `start` on."""
    left, height, line = 48, 140, 18
    scale, top = width / seconds, 2 * line * len(tiers) + 4
    bottom = top + height
    source = base64.b64encode(png(grey)).decode()
    place = f'x="{left}" y="{top}" width="{width}" height="{height}" preserveAspectRatio="none"'
    parts = [f'<image {place} href="data:image/png;base64,{source}"/>']
    highest = rate // 2000
    for kilohertz in range(highest % 2, highest + 1, 2):
        unit = " kHz" if kilohertz == highest else ""
        parts.append(_label(left - 4, top + height * (1 - 2000 * kilohertz / rate) + 4, f"{kilohertz}{unit}", "end"))
    step = next(s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10, 60) if s * scale >= 45 or s == 60)
    ticks = range(math.ceil(start / step - 1e-6), math.floor((start + seconds) / step + 1e-6) + 1)
    for number in ticks:
        x = left + (number * step - start) * scale
        parts.append(_line(x, bottom, bottom + 4, _GREY))
        parts.append(_label(x, bottom + 15, f"{number * step:g}{' s' if number == ticks[0] else ''}", "middle"))
    for row, tier in enumerate(tiers):
        y = 2 * line * row
        spans = [(phone, left + (t - start) * scale, left + (u - start) * scale) for phone, t, u in tier.spans]
        for x in sorted({round(edge, 1) for _, *edges in spans for edge in edges if left <= edge <= left + width}):
            parts.append(_line(x, y + line, bottom, tier.colour, 'stroke-opacity="0.5" stroke-dasharray="2 3"'))
        parts.append(_phones(spans, y, line, tier.colour))
        parts.append(_label(2, y + line + 3, tier.name, "start"))
    size = f'width="{left + width + 12}" height="{bottom + 20}" viewBox="0 0 {left + width + 12} {bottom + 20}"'
    about = f"spectrogram from {start:.2f} to {start + seconds:.2f} s, 0 to {rate / 2000:g} kHz"
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{about}">{"".join(parts)}</svg>'


def _phones(spans: Sequence[tuple[str, float, float]], y: float, line: int, colour: str) -> str:
    """Phones in the middle of their spans; one that would touch its neighbour stands lower."""
    ends = [-1e9, -1e9]  # where the last phone of either line ends
    parts = []
    for phone, start, end in spans:
        x, half = (start + end) / 2, 4 + 4 * len(phone)
        level = 0 if ends[0] <= x - half else 1 if ends[1] <= x - half or ends[1] < ends[0] else 0
        ends[level] = x + half
        parts.append(
            f'<text x="{x:.1f}" y="{y + (level + 1) * line - 3:.1f}" text-anchor="middle" font-size="15" '
            f'fill="{colour}" stroke="{_PAPER}" stroke-width="3" paint-order="stroke">{escape(visible(phone))}</text>'
        )
    return "".join(parts)


def _line(x: float, y1: float, y2: float, colour: str, kind: str = "") -> str:
    return f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" stroke="{colour}" {kind}/>'


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="11" fill="{_GREY}">{escape(text)}</text>'
