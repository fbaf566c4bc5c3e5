"""Memory and open files of every process of a long run: `python tests/faults/soak.py -- COMMAND`.

Starts the command and looks at it and all its descendants every --interval seconds, until it ends or the minutes are
over (it is then asked to end by SIGTERM). Prints a table of the processes that lived for half of the time, by sixths of
their lives; exit status 1 if one of them grew from the second sixth to the last: in the median of its memory, or in
descriptors, if it never had as few again as it had at most.
Memory is the proportional set size: pages that processes share are counted once. Linux only.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

PARTS = 6
GROWTH = 1.05
"""Memory may vary by so much from one part to another."""
SLACK_MIB = 16


@dataclass(frozen=True)
class Look:
    """A process at a moment."""

    mib: float
    files: int


def descendants(root: int) -> list[int]:
    """A process and all that it, and they, started."""
    children: dict[int, list[int]] = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in brackets may hold anything; the parent is the second field after it.
            children[int(path.read_text().rpartition(")")[2].split()[1])].append(int(path.parent.name))
        except OSError:
            continue
    found = [root]
    for pid in found:
        found += children[pid]
    return found


def look(pid: int) -> Look | None:
    """None for a process that has just ended."""
    folder = Path("/proc") / str(pid)
    try:
        rollup = (folder / "smaps_rollup").read_text().split()
        return Look(int(rollup[rollup.index("Pss:") + 1]) / 1024, len(list((folder / "fd").iterdir())))
    except (OSError, ValueError):
        return None


def name_of(pid: int) -> str:
    """The program, short."""
    try:
        folder = Path("/proc") / str(pid)
        words = (folder / "cmdline").read_text().split("\0")
        script = next((Path(word).name for word in words if word.endswith((".py", ".sh"))), Path(words[0]).name)
        return f"{script} ({(folder / 'comm').read_text().strip()})"
    except OSError:
        return "?"


def watch(
    process: subprocess.Popen[bytes], seconds: float, interval: float
) -> tuple[dict[int, list[Look]], dict[int, str]]:
    """Looks at all processes until the end, and their names."""
    looks: dict[int, list[Look]] = defaultdict(list)
    names: dict[int, str] = {}
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        for pid in descendants(process.pid):
            if (seen := look(pid)) is not None:
                looks[pid].append(seen)
                names[pid] = name_of(pid)
        time.sleep(interval)
    return looks, names


def row(name: str, looks: list[Look], interval: float) -> tuple[str, bool]:
    """A line of the table, and whether the process grew."""
    bounds = [len(looks) * i // PARTS for i in range(PARTS + 1)]
    parts = [looks[a:b] for a, b in itertools.pairwise(bounds)]
    memory = [statistics.median(seen.mib for seen in part) for part in parts]
    files = [max(seen.files for seen in part) for part in parts]
    leaks = min(seen.files for seen in parts[-1]) > files[1]
    grew = memory[-1] > GROWTH * memory[1] + SLACK_MIB or leaks
    cells = [
        name,
        f"{len(looks) * interval / 60:.0f}",
        *(f"{value:.0f}" for value in memory),
        f"{max(seen.mib for seen in looks):.0f}",
        " ".join(map(str, files)),
        "GREW" if grew else "flat",
    ]
    return "| " + " | ".join(cells) + " |", grew


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--interval", type=float, default=10.0, help="seconds")
    parser.add_argument("command", nargs="+")
    args = parser.parse_args()
    process = subprocess.Popen(args.command)
    try:
        looks, names = watch(process, 60 * args.minutes, args.interval)
    finally:
        if process.poll() is None:
            for pid in descendants(process.pid):
                subprocess.run(["kill", str(pid)], stderr=subprocess.DEVNULL, check=False)
            process.wait()
    longest = max(map(len, looks.values()))
    print("| process | minutes | MiB, by sixths |" + " |" * (PARTS - 1) + " peak | files | |")
    print("|---|---:|" + "---:|" * PARTS + "---:|---|---|")
    any_grew = False
    for pid, seen in looks.items():
        if len(seen) >= max(PARTS, longest / 2):
            line, grew = row(names[pid], seen, args.interval)
            any_grew |= grew
            print(line)
    return int(any_grew)


if __name__ == "__main__":
    sys.exit(main())
