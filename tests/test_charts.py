"""Charts as SVG."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest

from zipformer_crctc.bootstrap import Interval
from zipformer_crctc.charts import Bar, HeatMap, Line, bar_chart, heat_map, line_chart

SVG = "{http://www.w3.org/2000/svg}"


def bars(count: int, num_series: int = 1) -> list[Bar]:
    values = [[10.0 + i + s for s in range(num_series)] for i in range(count)]
    return [Bar(f"l{i:02d}", v, [Interval(x - 2, x + 3) for x in v]) for i, v in enumerate(values)]


@pytest.mark.parametrize("num_series", [1, 2])
@pytest.mark.parametrize("count", [1, 20, 90])
def test_bars_never_crowd(count: int, num_series: int) -> None:
    """Labels keep their distance and stay inside, however many there are."""
    parts = ElementTree.fromstring(f"<div>{bar_chart(bars(count, num_series), 'PER %')}</div>").findall(f"{SVG}svg")
    assert len(parts) == {1: 1, 20: 1, 90: 4}[count], "an axis is always near"
    shown = 0
    for root in parts:
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        assert width < 700 and height < 950, "fits into a narrow window and on a page"
        texts = [(t.text or "", float(t.attrib["y"])) for t in root.iter(f"{SVG}text")]
        labels = [y for text, y in texts if text.startswith("l")]
        assert all(b - a >= 14 for a, b in itertools.pairwise(labels)) and all(0 < y < height for y in labels)
        figures = [y for text, y in texts if "[" in text]
        assert len(figures) == len(labels) * num_series
        assert all(b - a >= 13 for a, b in itertools.pairwise(figures)), "higher than their letters"
        assert [text for text, _ in texts].count("0") == 2, "an axis above and below"
        for rect in root.iter(f"{SVG}rect"):
            assert float(rect.attrib["x"]) + float(rect.attrib["width"]) <= width - 124
        shown += len(labels)
    assert shown == count


def test_lines_lie_on_their_axes() -> None:
    lines = [Line("a & b", [(20.0, 4.0), (10.0, 2.0)]), Line("c", [(10.0, 1.0), (20.0, 1.0)], dashed=True)]
    root = ElementTree.fromstring(line_chart(lines, "t", "seconds"))
    first, second = (
        [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
        for line in root.iter(f"{SVG}polyline")
    )
    texts = {t.text: (float(t.attrib["x"]), float(t.attrib["y"])) for t in root.iter(f"{SVG}text")}
    assert {"t", "seconds", "a & b", "c", "0", "20", "4"} <= texts.keys()
    assert first[1][0] == pytest.approx(texts["20"][0], abs=0.1) and first[1][1] == pytest.approx(48.0)
    assert first[1][0] - first[0][0] == pytest.approx((texts["20"][0] - 44) / 2, abs=0.2)
    assert second[0][1] == second[1][1] > first[0][1] > first[1][1]
    assert len(list(root.iter(f"{SVG}circle"))) == 2, "points of what was measured"


def test_bar_lengths_are_in_proportion() -> None:
    root = ElementTree.fromstring(bar_chart([Bar("a", [10.0]), Bar("b", [20.0]), Bar("c", [math.nan])], "x"))
    first, second = (float(rect.attrib["width"]) for rect in root.iter(f"{SVG}rect"))
    assert second == pytest.approx(2 * first, rel=1e-2)


@pytest.mark.parametrize("high", [0.0, 0.4, 7.0, 99.0, 350.0])
def test_axis_reaches_the_highest_value(high: float) -> None:
    root = ElementTree.fromstring(bar_chart([Bar("a", [high])], "x"))
    ticks = {float(t.text or "nan") for t in root.findall(f"{SVG}text") if t.text != "x"}
    assert high <= max(ticks) <= max(1.0, 2 * high) and 3 <= len(ticks) <= 12
    ElementTree.fromstring(bar_chart([], "nothing"))


def test_text_is_escaped() -> None:
    evil = '</text><script>alert("x")</script>'
    charts = (
        bar_chart([Bar(evil, [1.0], note=evil)], evil),
        heat_map(HeatMap([evil], [evil], {(0, 0): 1.0}, {(0, 0): evil}), evil),
    )
    for svg in charts:
        assert "<script" not in svg
        assert not list(ElementTree.fromstring(svg).iter(f"{SVG}script"))


def test_heat_map() -> None:
    content = HeatMap(
        ["p", "b", "inserted"],
        ["p", "b", "deleted"],
        {(0, 0): 0.9, (0, 1): 0.1, (1, 2): 0.001},
        {(0, 1): "p → b: 3"},
        frozenset({(0, 0)}),
        "reference",
        "hypothesis",
    )
    svg = heat_map(content, "confusions")
    root = ElementTree.fromstring(svg)
    cells = root.findall(f"{SVG}g")
    assert [cell.findtext(f"{SVG}title") for cell in cells] == ["", "p → b: 3", ""]
    assert [cell.findtext(f"{SVG}text") for cell in cells] == ["90", "10", None]
    (grey, _), (red, strong), (_, pale) = (
        (r.attrib["fill"], r.attrib["fill-opacity"]) for r in root.iter(f"{SVG}rect")
    )
    assert "--correct" in grey and "--wrong" in red and float(strong) > float(pale)
    labels = [t.text for t in root.findall(f"{SVG}text")]
    assert labels.count("b") == 4 and labels.count("deleted") == 2, "on all sides"
