"""Rows of benchmark results, as every script of this folder writes them."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any


def result_path(name: str) -> Path:
    """Where the rows of a script go unless --output says otherwise."""
    return Path(__file__).with_name("results") / f"{name}.json"


def row(case: str, unit: str, ours: float, peer: Any = None, ratio: float | None = None, **more: Any) -> dict[str, Any]:
    """One row; `ratio` above 1 means that ours is faster, None that there is no peer."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {
        "case": case,
        "device": "cpu",
        "unit": unit,
        "ours": ours,
        "peer": peer,
        "ratio": ratio,
        **more,
        "command": command,
        "date": date.today().isoformat(),
    }


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows, and write them as a JSON list."""
    for item in rows:
        print(json.dumps(item, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
