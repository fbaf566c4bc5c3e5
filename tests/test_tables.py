"""The tables of the README that are made from benchmark results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.tables import ROOT, table, with_tables

ROW = {"device": "CPU", "unit": "m/s", "command": "python x.py", "date": "2026-01-02"}


def test_a_table_is_made_from_its_file_and_the_rest_is_left_alone(tmp_path: Path) -> None:
    rows = [
        {**ROW, "case": "fast", "ours": 1234.5, "peer": {"name": "snail", "speed": 2.0}, "ratio": 617.25},
        {**ROW, "case": "alone", "ours": 0.01234, "peer": None, "ratio": None},
    ]
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    (tmp_path / "benchmarks/results/x.json").write_text(json.dumps(rows), encoding="utf-8")
    text = "before\n<!-- benchmarks/results/x.json -->\nold\n<!-- end -->\nafter <!-- other -->\n"
    made = with_tables(text, tmp_path)
    assert made.splitlines() == [
        "before",
        "<!-- benchmarks/results/x.json -->",
        "| case | device | unit | ours | peer | ratio |",
        "|---|---|---|---:|---:|---:|",
        "| fast | CPU | m/s | 1,234 | snail: 2 | 617 |",
        "| alone | CPU | m/s | 0.0123 | none | - |",
        "",
        "`python x.py` (2026-01-02)",
        "<!-- end -->",
        "after <!-- other -->",
    ]
    assert with_tables(made, tmp_path) == made
    with pytest.raises(FileNotFoundError):
        with_tables(text.replace("x.json", "y.json"), tmp_path)


def test_rows_may_have_further_columns() -> None:
    row = {**ROW, "case": "fast", "ours": 2.0, "peer": None, "ratio": None}
    made = table([row, {**row, "columns": {"MB": 17.5}}, {**row, "columns": {"PER %": 6.5, "MB": None}}])
    assert made.splitlines()[:5] == [
        "| case | device | unit | ours | peer | ratio | MB | PER % |",
        "|---|---|---|---:|---:|---:|---:|---:|",
        "| fast | CPU | m/s | 2 | none | - | - | - |",
        "| fast | CPU | m/s | 2 | none | - | 17.5 | - |",
        "| fast | CPU | m/s | 2 | none | - | - | 6.5 |",
    ]


def test_those_of_the_readme_are_up_to_date() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_tables(text, ROOT) == text
