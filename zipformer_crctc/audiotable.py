"""A table of audio files and their transcriptions, read into batches without making shards first.

The table has a header line with the columns audio and text, and perhaps id, language and speaker; audio paths are
relative to its folder. Shapes: N utterances, T frames of 10 ms, 80 mel bins.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from zipformer_crctc.audio import AudioError, load_audio
from zipformer_crctc.features import SAMPLING_RATE, Fbank, num_feature_frames
from zipformer_crctc.loader import MIN_FRAMES, Batch, collate
from zipformer_crctc.shar import Skipped, Utterance

logger = logging.getLogger(__name__)

REQUIRED = ("audio", "text")
OPTIONAL = ("id", "language", "speaker")


@dataclass(frozen=True)
class AudioRow:
    """One line of the table."""

    id: str
    audio: Path
    text: str
    language: str = ""
    speaker: str = ""


def read_audio_table(path: Path, skipped: Skipped) -> list[AudioRow]:
    """The rows of a table; lines that cannot be used are counted in ``skipped``.

    Raises ValueError for a table that cannot be read, has no rows, or lacks a column.
    """
    header, lines = read_cells(path)
    columns = find_columns(path, header, OPTIONAL)
    rows: list[AudioRow] = []
    taken: Counter[str] = Counter()
    for number, cells in lines:
        if len(cells) != len(header):
            skipped.add(f"another number of cells than the header's {len(header)}", f"{path}:{number}")
            continue
        value = {name: cells[index].strip() for name, index in columns.items()}
        if not value["audio"]:
            skipped.add("no audio", f"{path}:{number}")
            continue
        name = value.get("id") or re.sub(r"\.\w{1,5}$", "", value["audio"])
        taken[name] += 1
        unique = name if taken[name] == 1 else f"{name}-{taken[name]}"
        audio = path.parent / Path(value["audio"]).expanduser()
        rows.append(AudioRow(unique, audio, value["text"], value.get("language", ""), value.get("speaker", "")))
    return rows


def table_batches(rows: Sequence[AudioRow], max_duration: float, skipped: Skipped) -> Iterator[Batch]:
    """Batches of at most ``max_duration`` seconds, padding included, in the order of the rows.

    An utterance longer than that is a batch of its own. Audio that cannot be used is counted in ``skipped``.
    """
    fbank = Fbank()
    held: list[tuple[Utterance, torch.Tensor]] = []
    for row in rows:
        try:
            samples, _ = load_audio(row.audio)
            if num_feature_frames(len(samples)) < MIN_FRAMES:
                raise AudioError(f"fewer than {MIN_FRAMES} feature frames")
        except AudioError as error:
            skipped.add(str(error), f"{row.id} ({row.audio})")
            continue
        utterance = Utterance(
            id=row.id,
            duration=len(samples) / SAMPLING_RATE,
            num_samples=len(samples),
            text=row.text,
            language=row.language,
            speaker=row.speaker,
            tar=str(row.audio),
            offset=0,
            size=row.audio.stat().st_size,
        )
        longest = max([utterance.duration, *(other.duration for other, _ in held)])
        if held and longest * (len(held) + 1) > max_duration:
            yield _batch(held)
            held = []
        held.append((utterance, fbank(torch.from_numpy(samples))))
    if held:
        yield _batch(held)


def _batch(held: Sequence[tuple[Utterance, torch.Tensor]]) -> Batch:
    features, num_frames, order = collate([features for _, features in held])
    return Batch(features, num_frames, [held[i][0] for i in order])


def read_cells(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and (line number, cells) of every line that is not empty.

    A table whose name ends in .tsv or .tab is parted by tabs and knows no quotation marks; another one by what its
    header has most of, tab, comma or semicolon. Raises ValueError for a table that cannot be read or has no rows.
    """
    if not path.is_file():
        raise ValueError(f"table {path} does not exist: name a tsv or csv file with the columns audio and text")
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"table {path} is not UTF-8 ({error}): save it as UTF-8") from error
    first = content.split("\n", 1)[0]
    delimiter = "\t" if path.suffix.lower() in (".tsv", ".tab") else max("\t,;", key=first.count)
    lines = io.StringIO(content, newline="")
    # In tab-separated tables a quotation mark is a letter like others (X-SAMPA stress, for one).
    if delimiter == "\t":
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=delimiter)
    try:
        cells = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise ValueError(f"table {path}, line {reader.line_num}: {error}") from error
    if len(cells) < 2:
        raise ValueError(f"table {path} has no rows: a header line with audio and text, then a line for each recording")
    return [cell.strip().lower() for cell in cells[0][1]], cells[1:]


def find_columns(path: Path, header: Sequence[str], optional: Sequence[str]) -> dict[str, int]:
    """Place of each column that is there, REQUIRED and ``optional`` ones; the others are logged.

    Raises ValueError for a column that is missing or stands twice.
    """
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise ValueError(
            f"table {path} has no column {' and no column '.join(missing)}; its first line gives "
            f"{', '.join(map(repr, header))}, expected audio, text and perhaps {', '.join(optional)}"
        )
    twice = [name for name in (*REQUIRED, *optional) if header.count(name) > 1]
    if twice:
        raise ValueError(f"table {path} has the column {twice[0]} {header.count(twice[0])} times: keep one")
    ignored = [name for name in header if name not in (*REQUIRED, *optional)]
    if ignored:
        logger.info("columns not used: %s", ", ".join(map(repr, ignored)))
    return {name: header.index(name) for name in (*REQUIRED, *optional) if name in header}
