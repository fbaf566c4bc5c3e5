"""Shar folders: find the shards, index their tars, read their manifests.

A folder holds, for every shard number NNNNNN, ``cuts.NNNNNN.jsonl.gz`` (one lhotse MonoCut per line) and
``recording.NNNNNN.tar`` (per cut ``{cut id}.flac``, then ``{cut id}.json``, in the order of the cuts). Other files,
such as the ``*.idx`` of newer lhotse writers, are left alone. Reading a shard here touches manifests and tar headers
only; the audio is read by ``loader``.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

from zipformer_crctc.features import SAMPLING_RATE

logger = logging.getLogger(__name__)

_CUTS_NAME = re.compile(r"cuts\.(\d{6,})\.jsonl\.gz")
_RECORDING_NAME = re.compile(r"recording\.(\d{6,})\.tar")
_INDEX_VERSION = 1
_NO_AUDIO = -1  # size of a member written as `.nodata`


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the problem and the remedy."""


@dataclass(frozen=True)
class Shard:
    """One numbered pair of files."""

    number: int
    cuts: Path
    recording: Path


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


def find_shards(folder: str | Path) -> list[Shard]:
    """The shards of a folder, sorted by number.

    Raises ``DataError`` if the folder is missing or has no shards, or if a cuts file and its tar do not pair up.
    """
    folder = Path(folder)
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
    problems += [f"{path.name} is empty" for path in (*cuts.values(), *recordings.values()) if not path.stat().st_size]
    if problems:
        shown = "; ".join(problems[:5]) + ("; ..." if len(problems) > 5 else "")
        raise DataError(f"{folder}: {shown}; fetch or prepare the shard again, or remove what is left of it")
    return [Shard(number, cuts[number], recordings[number]) for number in sorted(cuts)]


def read_shard(
    shard: Shard,
    skipped: Skipped | None = None,
    *,
    need_text: bool = True,
    keep_alignment: bool = False,
) -> Iterator[Utterance]:
    """The utterances of a shard in the order of its manifest; no audio is read.

    What cannot be used is counted in ``skipped``, or raises ``DataError`` where ``skipped`` is None. With
    ``need_text=False`` cuts without supervision are taken, their text is "". ``keep_alignment`` fills
    ``Utterance.alignment`` from the supervision's "phone" alignment.
    """
    report = skipped if skipped is not None else _Strict(shard)
    index = _TarIndex(shard.recording, report)
    for name, line in _manifest_lines(shard.cuts, report):
        try:
            cut = json.loads(line)
            utterance_id, fields = _parse_cut(cut, need_text, keep_alignment)
        except _Unusable as problem:
            report.add(str(problem), problem.name or name)
            continue
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            report.add("damaged line in the manifest", name)
            continue
        place = index.find(utterance_id)
        if place is None:
            report.add("audio missing from the tar" + ("" if index.complete else ", which is truncated"), utterance_id)
        elif place[1] == _NO_AUDIO:
            report.add("stored without audio (.nodata)", utterance_id)
        else:
            yield Utterance(id=utterance_id, tar=index.path, offset=place[0], size=place[1], **fields)


class _Unusable(Exception):
    """A cut that is well-formed but not of the kind this layout holds."""

    def __init__(self, reason: str, name: str = "") -> None:
        super().__init__(reason)
        self.name = name


class _Strict(Skipped):
    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self._shard = shard

    def add(self, reason: str, name: str) -> None:
        raise DataError(f"{self._shard.cuts}: {name}: {reason}; prepare or fetch this shard again")


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


def _manifest_lines(path: Path, report: Skipped) -> Iterator[tuple[str, bytes]]:
    """(file name and line number, line) of a gzip file, up to the place where it breaks off."""
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        report.add(f"manifest breaks off, the cuts after it are lost ({error})", f"{path}:{number + 1}")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error}); check the file and its permissions") from error


def _parse_cut(cut: dict[str, Any], need_text: bool, keep_alignment: bool) -> tuple[str, dict[str, Any]]:
    """The id and the other manifest fields of an utterance. Raises ``_Unusable`` or what a damaged object raises."""
    utterance_id = cut["id"]
    if not isinstance(utterance_id, str) or not utterance_id:
        raise ValueError("id")
    kind = cut.get("type", "MonoCut")
    if kind != "MonoCut":
        raise _Unusable(f"{kind} instead of MonoCut", utterance_id)
    recording = cut["recording"]
    if recording["sampling_rate"] != SAMPLING_RATE:
        raise _Unusable(f"sampling rate {recording['sampling_rate']} instead of {SAMPLING_RATE}", utterance_id)
    channels = recording.get("channel_ids") or [0]
    if len(channels) != 1:
        raise _Unusable(f"{len(channels)} channels instead of one", utterance_id)
    supervisions = cut.get("supervisions") or []
    if len(supervisions) > 1:
        raise _Unusable("more than one supervision", utterance_id)
    supervision = supervisions[0] if supervisions else {}
    text = supervision.get("text")
    if text is None:
        if need_text:
            raise _Unusable("no text" if supervisions else "no supervision", utterance_id)
        text = ""
    if not isinstance(text, str):
        raise TypeError("text")
    duration, num_samples = float(cut["duration"]), int(recording["num_samples"])
    if not 0 < duration < float("inf") or num_samples <= 0:
        raise _Unusable("no duration", utterance_id)
    return utterance_id, {
        "duration": duration,
        "num_samples": num_samples,
        "text": text,
        "language": supervision.get("language") or "",
        "speaker": supervision.get("speaker") or "",
        "alignment": _parse_alignment(supervision) if keep_alignment else None,
    }


def _parse_alignment(supervision: dict[str, Any]) -> tuple[tuple[str, float, float], ...] | None:
    items = (supervision.get("alignment") or {}).get("phone")
    if items is None:
        return None
    return tuple((str(item[0]), float(item[1]), float(item[2])) for item in items)


class _TarIndex:
    """Place of each audio member of a tar. The headers are read once and kept in a small file.

    The file lies beside the shar folder (not in it: lhotse takes every file of a folder for a field), or, where that
    is read-only, in the user's cache. One of another size or time than the tar's, or a damaged one, is made again.
    """

    def __init__(self, tar: Path, report: Skipped) -> None:
        self.path = str(tar)
        try:
            stat = tar.stat()
            stamp = {"version": _INDEX_VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
            places = _index_places(tar)
            kept = next((found for place in places if (found := _load_index(place, stamp)) is not None), None)
            if kept is None:
                kept = _scan_tar(tar, stat.st_size)
                _save_index(places, stamp, *kept)
        except OSError as error:
            raise DataError(f"{tar}: cannot be read ({error}); check the file and its permissions") from error
        self._members, self.complete = kept
        if not self.complete:
            report.add("tar breaks off, the audio after it is lost", self.path)
        self._next = 0
        self._by_name: dict[str, int] | None = None

    def find(self, utterance_id: str) -> tuple[int, int] | None:
        """(offset, size) of an utterance's audio; the next member is tried first, as both files have one order."""
        if self._next >= len(self._members) or self._members[self._next][0] != utterance_id:
            if self._by_name is None:
                self._by_name = {member[0]: position for position, member in enumerate(self._members)}
            position = self._by_name.get(utterance_id)
            if position is None:
                return None
            self._next = position
        _, offset, size = self._members[self._next]
        self._next += 1
        return offset, size


_Members = list[tuple[str, int, int]]  # (stem, offset, size) of audio members, in the order of the tar


def _scan_tar(path: Path, file_size: int) -> tuple[_Members, bool]:
    """The audio members, and whether the tar is whole. Seeks from header to header."""
    members: _Members = []
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (info := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                stem, _, suffix = info.name.rpartition(".")
                if not info.isfile() or suffix in ("json", "nometa"):
                    continue
                if info.offset_data + info.size > file_size:
                    return members, False
                members.append((stem, info.offset_data, _NO_AUDIO if suffix == "nodata" else info.size))
            # tarfile stops without a word at a damaged header and at the end of the file; a whole tar ends with zeros.
            file.seek(archive.offset)
            return members, file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, ValueError):
        return members, False


def _index_places(tar: Path) -> list[Path]:
    """Where the index of a tar may be, the preferred place first."""
    folder = tar.resolve().parent
    number = tar.name.split(".")[1]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zipformer-crctc" / "tar-index"
    key = sha256(str(folder / tar.name).encode()).hexdigest()[:24]
    return [folder.parent / f".{folder.name}.index" / f"{number}.json.gz", cache / f"{key}.json.gz"]


def _load_index(path: Path, stamp: dict[str, int]) -> tuple[_Members, bool] | None:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            content = json.load(file)
        if {key: content[key] for key in stamp} != stamp:
            return None
        members = [(str(stem), int(offset), int(size)) for stem, offset, size in content["members"]]
        if any(offset < 0 or size < _NO_AUDIO or offset + size > stamp["size"] for _, offset, size in members):
            return None
        return members, bool(content["complete"])
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None


def _save_index(places: Iterable[Path], stamp: dict[str, int], members: _Members, complete: bool) -> None:
    """Write to the first place that can be written, whole or not at all."""
    data = gzip.compress(json.dumps({**stamp, "complete": complete, "members": members}).encode(), compresslevel=1)
    for place in places:
        temporary = place.with_name(f"{place.name}.{uuid4().hex}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            temporary.replace(place)
            return
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
    logger.debug("no place to keep the index of a tar: its headers are read again each time")
