"""Shar folders: find the shards, read what they hold.

A folder holds, for every shard number NNNNNN, ``cuts.NNNNNN.jsonl.gz`` (one lhotse MonoCut per line) and
``recording.NNNNNN.tar`` (per cut ``{cut id}.flac``, then ``{cut id}.json``, in the order of the cuts). Other files,
such as the ``*.idx`` of newer lhotse writers, are left alone. Nothing here reads audio, which ``loader`` does; a shard
is read through its index (``sharindex``).
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from zipformer_crctc.remote import copy_folder, make_local, read_list, with_retries
from zipformer_crctc.sharindex import Problem, index_cache, open_index

logger = logging.getLogger(__name__)

_CUTS_NAME = re.compile(r"cuts\.(\d{6,})\.jsonl\.gz")
_RECORDING_NAME = re.compile(r"recording\.(\d{6,})\.tar")


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the problem and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One numbered pair of files."""

    number: int
    cuts: Path
    recording: Path
    index_dir: Path | None = None
    """folder for its index where that cannot lie beside the data; None is the user's cache"""
    remote: tuple[str, str] | None = None
    """where cuts and recording are copied from, see ``remote``"""

    @property
    def name(self) -> str:
        """Folder and number: the same wherever the data lie."""
        return f"{self.cuts.parent.name}/{self.number}"


@dataclass(frozen=True, slots=True)
class Utterance:
    """One supervised cut and the place of its audio in a tar."""

    id: str
    duration: float  # seconds
    num_samples: int  # at 16 kHz
    text: str  # as the supervision has it, not normalised
    language: str  # "" if the supervision names none
    speaker: str  # "" likewise
    tar: str  # path of the tar
    offset: int  # bytes to the FLAC data
    size: int  # bytes of the FLAC data
    alignment: tuple[tuple[str, float, float], ...] | None = None  # (phone, start, duration) in seconds, on request


@dataclass
class Skipped:
    """What was left out: a count for every reason, and the names of the first few (of all with ``max_examples=None``).

    With ``announce`` the first case of each reason is logged when it happens, for streams that run for days.
    """

    max_examples: int | None = 3
    announce: bool = False
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        """Count one case of ``reason``; ``name`` is an utterance id or a file."""
        if self.announce and reason not in self.counts:
            logger.warning("skipped %s: %s (more of this kind are counted, not logged)", name, reason)
        self.counts[reason] += 1
        names = self.examples.setdefault(reason, [])
        if self.max_examples is None or len(names) < self.max_examples:
            names.append(name)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def report(self) -> str:
        """One line: ``"12 skipped: 9 shorter than 1 s (a, b, c, ...); 3 no text (d, e, f)"``; empty if nothing was."""
        if not self.counts:
            return ""
        parts = []
        for reason, count in self.counts.most_common():
            names = self.examples[reason]
            parts.append(f"{count} {reason} ({', '.join(names)}{', ...' if count > len(names) else ''})")
        return f"{self.total} skipped: {'; '.join(parts)}"


def find_shards(folder: str | Path, index_dir: Path | None = None) -> list[Shard]:
    """The shards of a folder, sorted by number, or of a list of remote ones; no file of them is read.

    Raises ``DataError`` if the folder is missing or has no shards, or if a cuts file and its tar do not pair up.
    """
    folder = Path(folder)
    if folder.is_file():
        return _remote_shards(folder, index_dir)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; prepare the data first or correct the path")
    cuts = _numbered_files(folder, _CUTS_NAME)
    recordings = _numbered_files(folder, _RECORDING_NAME)
    if not cuts and not recordings:
        raise DataError(
            f"{folder}: no shards (cuts.NNNNNN.jsonl.gz with recording.NNNNNN.tar); "
            "prepare the data first or correct the path"
        )
    problems = [
        f"{path.name} has no recording.{path.name.split('.')[1]}.tar"
        for number, path in cuts.items()
        if number not in recordings
    ]
    problems += [
        f"{path.name} has no cuts.{path.name.split('.')[1]}.jsonl.gz"
        for number, path in recordings.items()
        if number not in cuts
    ]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise DataError(f"{folder}: {shown}; fetch or prepare the shard again, or remove what is left of it")
    return [Shard(number, cuts[number], recordings[number], index_dir) for number in sorted(cuts)]


class ShardReader:
    """The utterances of a shard by number; no audio is read.

    With ``need_text=False`` cuts without supervision are taken, their text is "". ``keep_alignment`` fills
    ``Utterance.alignment`` from the supervision's "phone" alignment. Raises ``DataError`` where a file of the shard
    cannot be read.
    """

    def __init__(self, shard: Shard, *, need_text: bool = True, keep_alignment: bool = False) -> None:
        try:
            for source, path in zip(shard.remote or (), (shard.cuts, shard.recording), strict=False):
                make_local(source, path)
            self._index = with_retries(
                lambda: open_index(shard.cuts, shard.recording, shard.index_dir), str(shard.cuts)
            )
        except OSError as error:
            raise DataError(
                f"{shard.cuts.parent}: shard {shard.number} cannot be read ({error}); check its files and their "
                "permissions"
            ) from error
        self.path = shard.cuts
        self._tar = str(shard.recording)
        self._need_text, self._keep_alignment = need_text, keep_alignment

    def __len__(self) -> int:
        """How many numbers there are, those of problems included."""
        return len(self._index)

    def get(self, number: int) -> Utterance | Problem:
        """The utterance with a number, or why there is none."""
        entry = self._index[number]
        if isinstance(entry, Problem):
            return entry
        if entry.text is None and self._need_text:
            return Problem("no text" if entry.has_supervision else "no supervision", entry.id)
        alignment = None
        if self._keep_alignment and entry.alignment is not None:
            alignment = tuple((phone, start, duration) for phone, start, duration in entry.alignment)
        return Utterance(
            id=entry.id,
            duration=entry.duration,
            num_samples=entry.num_samples,
            text=entry.text or "",
            language=entry.language,
            speaker=entry.speaker,
            tar=self._tar,
            offset=entry.offset,
            size=entry.size,
            alignment=alignment,
        )


def read_shard(
    shard: Shard,
    skipped: Skipped | None = None,
    *,
    need_text: bool = True,
    keep_alignment: bool = False,
) -> Iterator[Utterance]:
    """The utterances of a shard in the order of its manifest, as ``ShardReader`` gives them.

    What cannot be used is counted in ``skipped``, or raises ``DataError`` where ``skipped`` is None.
    """
    reader = ShardReader(shard, need_text=need_text, keep_alignment=keep_alignment)
    for number in range(len(reader)):
        item = reader.get(number)
        if not isinstance(item, Problem):
            yield item
        elif skipped is not None:
            skipped.add(item.reason, item.name)
        else:
            raise DataError(f"{shard.cuts}: {item.name}: {item.reason}; prepare or fetch this shard again")


def _remote_shards(path: Path, index_dir: Path | None) -> list[Shard]:
    try:
        sources = read_list(path)
    except ValueError as error:
        raise DataError(str(error)) from error
    folder = copy_folder(path, index_dir or index_cache())
    return [
        Shard(number, folder / f"cuts.{number:06d}.jsonl.gz", folder / f"recording.{number:06d}.tar", index_dir, source)
        for number, source in enumerate(sources)
    ]


def _numbered_files(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = pattern.fullmatch(path.name)
        if match:
            number = int(match[1])
            if number in found:
                raise DataError(f"{folder}: {found[number].name} and {path.name} have the same number; remove one")
            found[number] = path
    return found
