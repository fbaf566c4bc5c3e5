"""The table of error rates."""

from __future__ import annotations

import pytest

from zipformer_crctc.results import UtteranceResult
from zipformer_crctc.table import score_table

RESULTS = [
    UtteranceResult("a", list("kæt"), list("kat"), "eng", "s1"),
    UtteranceResult("b", list("kat"), list("kat"), "eng", "s2"),
    UtteranceResult("c", list("pat"), [], "deu", "s1"),
    UtteranceResult("d", ["a", "ⱱ", "<unk>"], ["a", "ⱱ"], "", "s1"),
    UtteranceResult("e", [], ["p"], "deu", "s1"),
]


def test_rows_and_notes() -> None:
    table = score_table(RESULTS)
    assert [row.group for row in table.groups] == ["(none)", "deu", "eng"]
    english, total = table.groups[2], table.total
    assert (english.utterances, english.counts.reference_phones) == (2, 6)
    assert english.counts.per == pytest.approx(100 / 6)
    assert english.pfer.mean == pytest.approx(1 / 48)
    assert english.pfer_percent == pytest.approx(100 / 24 / 6)
    assert (total.utterances, total.counts.errors, total.counts.reference_phones) == (4, 5, 12)
    assert total.pfer.mean == pytest.approx((1 / 24 + 2.7708333333) / 4)
    assert total.pfer_percent == pytest.approx(100 * (1 / 24 + 2.7708333333) / 10)
    assert table.notes[0] == "1 utterances have an empty reference and are not scored: e"
    assert "2 x 'ⱱ' (U+2C71" in table.notes[1]
    assert "1 x '<unk>'" in table.notes[1]


def test_plain() -> None:
    lines = score_table(RESULTS[:3]).plain().splitlines()
    assert lines == [
        "language  utterances  phones   PER %  ins  del  sub  PFER mean  PFER %",
        "----------------------------------------------------------------------",
        "deu                1       3  100.00    0    3    0      2.771   92.36",
        "eng                2       6   16.67    0    0    1      0.021    0.69",
        "----------------------------------------------------------------------",
        "total              3       9   44.44    0    3    1      0.938   31.25",
    ]


def test_markdown_by_speaker() -> None:
    table = score_table(RESULTS[:3], key=lambda result: result.speaker, title="speaker").markdown()
    assert table.splitlines() == [
        "| speaker | utterances | phones | PER % | ins | del | sub | PFER mean | PFER % |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| s1 | 2 | 6 | 66.67 | 0 | 3 | 1 | 1.406 | 46.88 |",
        "| s2 | 1 | 3 | 0.00 | 0 | 0 | 0 | 0.000 | 0.00 |",
        "| total | 3 | 9 | 44.44 | 0 | 3 | 1 | 0.938 | 31.25 |",
    ]


def test_nothing_scored() -> None:
    table = score_table([])
    assert table.total.cells() == ("total", "0", "0", "-", "0", "0", "0", "-", "-")
    assert len(table.plain().splitlines()) == 3
