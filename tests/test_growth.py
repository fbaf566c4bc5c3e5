"""What the benchmark of growth says about its points; the points themselves are not measured here."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks.growth import attention_memory, plot, verdict
from benchmarks.speed import Case


def point(x: float, time: float, time_by_arithmetic: float) -> dict[str, Any]:
    values = {"time": time, "time_by_arithmetic": time_by_arithmetic, "memory": 1 + x, "memory_by_arithmetic": 1 + x}
    return {"case": f"{x:g} s", "axis": "batch", "size": "tiny", "device": "CPU", "unit": "s", "x": x, **values}


def test_points_are_compared_with_the_cheapest_before_them() -> None:
    """The first has so much overhead that the last is still below its line."""
    rows = [point(10, 2.0, 2.0), point(20, 2.0, 4.0), point(40, 6.0, 8.0)]
    assert verdict(rows, "time", 0.0, 0.1) == "40 s 50 % above"
    assert verdict(rows, "time", 0.0, 0.6) == "nothing grows faster than the arithmetic by over 60 %"
    assert verdict(rows, "memory", 1.0, 0.1).startswith("nothing")


def test_attention_weights_grow_with_the_square_of_the_length() -> None:
    def gib(utterances: int, seconds: float) -> float:
        return attention_memory(Case("growth", "small", utterances, seconds, "cpu", False, 1))

    assert gib(4, 10.0) * 2**30 == 2 * 4 * 4 * (2 * 4 * 496**2 + 6 * 4 * 248**2 + 6 * 4 * 124**2 + 4 * 8 * 62**2)
    assert gib(8, 10.0) == pytest.approx(2 * gib(4, 10.0))
    assert gib(1, 40.0) == pytest.approx(4 * gib(4, 10.0), rel=0.02)


def test_plot_has_panels_of_time_and_memory() -> None:
    rows = [point(10, 2.0, 2.0), point(20, 2.0, 4.0)]
    root = ElementTree.fromstring(plot([*rows, *({**row, "axis": "length"} for row in rows)]))
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count("tiny, CPU: s") == texts.count("tiny, CPU: GiB at most") == 2
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 8
