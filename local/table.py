"""Read a table of recordings: audio, text and optional language, speaker, split and id columns."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from local.command import stable_hash
from local.corpus import SPLITS, Row, Skipped, safe_id
from zipformer_crctc.audiotable import find_columns, read_cells

OPTIONAL = ("language", "speaker", "split", "id")
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "test": "test",
}
DEV_PERCENT = 5
TEST_PERCENT = 5
MIN_SPEAKERS = 20
"""With fewer speakers, whole speakers cannot make splits of 5 %: single recordings are split instead."""


def read_table(path: Path) -> tuple[dict[str, list[Row]], list[Skipped]]:
    """Rows by split, in the order of the table, and the rows that cannot be used.

    Audio paths are relative to the table's folder. Raises ValueError for a table without the columns audio and text,
    without rows, or that is not UTF-8.
    """
    header, lines = read_cells(path)
    columns = find_columns(path, header, OPTIONAL)
    rows: list[tuple[Row, str, str]] = []  # row, its split if given, its audio as the table has it
    skipped: list[Skipped] = []
    taken: Counter[str] = Counter()
    for number, cells in lines:
        problem = "" if len(cells) == len(header) else f"line {number} has {len(cells)} cells, the header {len(header)}"
        # strip(): a line with too few cells still gets a name in the list of what was skipped.
        value = {name: cells[index].strip() if index < len(cells) else "" for name, index in columns.items()}
        identity = _unique(safe_id(value.get("id") or re.sub(r"\.\w{1,5}$", "", value["audio"])), taken)
        split = value.get("split", "")
        if not problem and not value["audio"]:
            problem = f"line {number} has no audio"
        if not problem and split and split.lower() not in SPLIT_NAMES:
            problem = f"line {number}: split {split!r} is not one of {', '.join(SPLIT_NAMES)}"
        if problem:
            skipped.append(Skipped(split, identity, value["audio"], problem))
            continue
        audio = path.parent / Path(value["audio"]).expanduser()
        row = Row(identity, audio, value["text"], value.get("language", ""), value.get("speaker", ""))
        rows.append((row, SPLIT_NAMES.get(split.lower(), ""), value["audio"]))
    return _split(rows), skipped


def _unique(identity: str, taken: Counter[str]) -> str:
    """`identity`, or with -2, -3, ... behind it when it was used before."""
    taken[identity] += 1
    if taken[identity] == 1:
        return identity
    return _unique(f"{identity}-{taken[identity]}", taken)


def _split(rows: Sequence[tuple[Row, str, str]]) -> dict[str, list[Row]]:
    """Rows with a split go there; the others by a hash of the speaker, or of the audio path with few speakers.

    A hash of its own name alone decides about a row, so adding recordings moves none of the others (until the number
    of speakers passes MIN_SPEAKERS).
    """
    open_rows = [row for row, split, _ in rows if not split]
    by_speaker = len({row.speaker for row in open_rows if row.speaker}) >= MIN_SPEAKERS
    if open_rows:
        logging.info(
            "%d rows without a split: split by %s, %d %% dev and %d %% test",
            len(open_rows),
            "speaker" if by_speaker else f"audio file (fewer than {MIN_SPEAKERS} speakers are named)",
            DEV_PERCENT,
            TEST_PERCENT,
        )
    result: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for row, split, audio in rows:
        result[split or hashed_split(row.speaker if by_speaker and row.speaker else audio)].append(row)
    return result


def hashed_split(key: str) -> str:
    """The split of a speaker or file: the same in every run and on every machine."""
    percent = stable_hash(key) % 100
    if percent < DEV_PERCENT:
        return "dev"
    return "test" if percent < DEV_PERCENT + TEST_PERCENT else "train"
