"""Tables of a report."""

from __future__ import annotations

import math
from dataclasses import replace

from zipformer_crctc.bootstrap import Difference, Interval
from zipformer_crctc.comparison import Change, Comparison
from zipformer_crctc.reporttables import Table, markdown, p_value, verdict, with_interval


def test_markdown_and_html_escape_what_means_something_there() -> None:
    table = Table(["name", "PER"], [["a|b_<i>", "1.0"]])
    assert table.markdown().splitlines() == ["| name | PER |", "| --- | ---: |", "| a\\|b\\_\\<i\\> | 1.0 |"]
    assert '<th scope="row">a|b_&lt;i&gt;</th><td>1.0</td>' in table.html("<i>")
    assert 'aria-label="&lt;i&gt;"' in table.html("<i>")
    assert markdown("[a](http://b)\n| c &lt;") == "[a]\\(http://b) \\| c \\&lt;"


def test_figures() -> None:
    assert with_interval(12.345, Interval(11, 13.5), 1) == "12.3 [11.0, 13.5]"
    assert with_interval(12.345, Interval(), 2) == "12.35" or with_interval(12.345, Interval(), 2) == "12.34"
    assert with_interval(1.5, Interval(-0.5, 2), 1, "+") == "+1.5 [-0.5, +2.0]"
    assert with_interval(math.nan, Interval(), 2) == "–"
    assert p_value(math.nan) == "–"
    assert p_value(0.0123) == "0.012"


def compared(before: float, after: float, interval: Interval) -> Comparison:
    change = Change(9, ((before,) * 3, (after,) * 3), (Difference(after - before, interval, 0.04),) * 3)
    return Comparison(
        change,
        {"de": change, "fr": Change(1, ((1.0,) * 3, (1.0,) * 3), (Difference(0.0, Interval(), 1.0),) * 3)},
        ([], []),
        ([], []),
    )


def test_verdict() -> None:
    assert verdict(compared(30, 25, Interval(-7, -2)), ["x", "y"]) == (
        "y is better: a PER of 25.00 % against 30.00 %, lower by 5.00 points (95 % interval 2.00 to 7.00, p = 0.040), "
        "on the 9 utterances that both have. Its PFER is lower too. By language its PER is lower in 1, higher in 0 and "
        "equal in 1."
    )
    assert verdict(compared(25, 30, Interval(2, 7)), ["x", "y"]).startswith(
        "x is better: a PER of 25.00 % against 30.00 %, lower by 5.00 points (95 % interval 2.00 to 7.00,"
    )
    assert verdict(compared(30, 29, Interval(-3, 1)), ["x", "y"]).startswith(
        "No clear difference: y has a PER of 29.00 % against 30.00 %, lower by 1.00 points, but the interval of the "
        "difference includes 0 (95 % interval -1.00 to 3.00,"
    )
    assert verdict(compared(30, 30, Interval(0, 0)), ["x", "y"]).startswith("No difference: both have a PER of 30.00 %")
    change = compared(30, 25, Interval(-7, -2)).total
    for interval, words in ((Interval(-1, 1), "PFER shows no clear"), (Interval(1, 2), "But its PFER is higher")):
        mixed = replace(change, differences=(*change.differences[:2], Difference(0.5, interval, 0.5)))
        assert words in verdict(Comparison(mixed, {}, ([], []), ([], [])), ["x", "y"])
    assert "too few to compare" in verdict(compared(30, 29, Interval()), ["x", "y"])
