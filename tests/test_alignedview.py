"""Phones under phones."""

from __future__ import annotations

from xml.etree import ElementTree

from zipformer_crctc.alignedview import aligned_table, columns
from zipformer_crctc.metrics import align


def test_one_system() -> None:
    assert columns([align("kæt", "kat")]) == [("k", "k"), ("æ", "a"), ("t", "t")]
    assert columns([align("", "ab")]) == [(None, "a"), (None, "b")]
    assert columns([align("", "")]) == []


def test_two_systems_share_places() -> None:
    merged = columns([align("ab", "axb"), align("ab", "b")])
    assert merged == [("a", "a", None), (None, "x", None), ("b", "b", "b")]
    merged = columns([align("a", "axy"), align("a", "az")])
    assert merged == [("a", "a", "a"), (None, "x", "z"), (None, "y", None)]


def test_table() -> None:
    html = aligned_table(["<A>", "B"], [align("ab", "ax"), align("ab", "b")])
    assert "<A>" not in html
    rows = ElementTree.fromstring(html).findall("tr")
    assert [row.findtext("th") for row in rows] == ["reference", "<A>", "B"]
    kinds = [[cell.attrib.get("class", "") for cell in row.findall("td")] for row in rows]
    texts = [["".join(cell.itertext()) for cell in row.findall("td")] for row in rows]
    assert texts == [["a", "b"], ["a", "x"], ["∅", "b"]]
    assert kinds == [["", ""], ["", "sub"], ["del", ""]]


def test_long_utterances_are_wrapped_and_marks_have_a_carrier() -> None:
    phones = ["a", "\u0303"] * 20
    html = aligned_table(["hypothesis"], [align(phones, phones)])
    tables = ElementTree.fromstring(f"<div>{html}</div>").findall("table")
    assert [len(table.findall("tr/td")) for table in tables] == [44, 36]
    assert "".join(tables[1].find("tr").itertext()) == "reference" + 9 * "a◌\u0303"  # type: ignore[union-attr]
