"""Tables of a report."""

from __future__ import annotations

import math

from zipformer_crctc.bootstrap import Interval
from zipformer_crctc.reporttables import Table, p_value, with_interval


def test_markdown_and_html_escape_what_means_something_there() -> None:
    table = Table(["name", "PER"], [["a|b_<i>", "1.0"]])
    assert table.markdown().splitlines() == ["| name | PER |", "| --- | ---: |", "| a\\|b\\_\\<i\\> | 1.0 |"]
    assert "<th>a|b_&lt;i&gt;</th><td>1.0</td>" in table.html()


def test_figures() -> None:
    assert with_interval(12.345, Interval(11, 13.5), 1) == "12.3 [11.0, 13.5]"
    assert with_interval(12.345, Interval(), 2) == "12.35" or with_interval(12.345, Interval(), 2) == "12.34"
    assert with_interval(math.nan, Interval(), 2) == "–"
    assert p_value(math.nan) == "–"
    assert p_value(0.0123) == "0.012"
