"""The speed tables of the README, made from the rows in benchmarks/results.

    python benchmarks/tables.py            # rewrites README.md
    python benchmarks/tables.py --check    # fails where README.md is not up to date

A table stands between the lines `<!-- benchmarks/results/NAME.json -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TABLE = re.compile(r"(?<=^<!-- )(benchmarks/results/\w+\.json)( -->\n).*?(?=^<!-- end -->$)", re.DOTALL | re.MULTILINE)
COLUMNS = ("case", "device", "unit", "ours", "peer", "ratio")
ALIGNMENT = "|---|---|---|---:|---:|---:|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 where a table is outdated")
    args = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = with_tables(text, ROOT)
    if args.check:
        sys.exit("README.md: tables are outdated; run python benchmarks/tables.py" if made != text else 0)
    readme.write_text(made, encoding="utf-8")


def with_tables(text: str, root: Path) -> str:
    """The text with its tables made anew from the files they name, below `root`."""
    return TABLE.sub(lambda found: found[1] + found[2] + table(json.loads((root / found[1]).read_text("utf-8"))), text)


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, with the further `columns` that some of them have, and the commands that made them."""
    further = list(dict.fromkeys(name for row in rows for name in row.get("columns", {})))
    lines = [f"| {' | '.join([*COLUMNS, *further])} |\n", ALIGNMENT + len(further) * "---:|" + "\n"]
    for row in rows:
        cells = [row["case"], row["device"], row["unit"], number(row["ours"]), peer(row["peer"]), number(row["ratio"])]
        cells += [number(row.get("columns", {}).get(name)) for name in further]
        lines.append(f"| {' | '.join(cells)} |\n")
    commands = dict.fromkeys(f"`{row['command']}` ({row['date']})" for row in rows)
    return "".join(lines) + "\n" + "; ".join(commands) + "\n"


def peer(value: dict[str, Any] | str | None) -> str:
    """Who was measured in the same run, and its figure."""
    if isinstance(value, dict):
        return f"{value['name']}: {number(value['speed'])}"
    return value or "none"


def number(value: float | None) -> str:
    """Three digits, more before the point."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
