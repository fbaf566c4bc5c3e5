"""The index of a shard: what its manifest says about each cut and where the audio lies in the tar, in one small file.

Published shards have none, so it is made when a shard is first read. It lies beside the shar folder (not in it: lhotse
takes every file of a folder for a field) or, where that cannot be written, in a cache folder. With it a shard is opened
at any cut in milliseconds. An index file is a gzip file of JSON lines: a header with the sizes and times of the shard's
files, then a line for each cut (the fields of ``Entry``) or for each thing that cannot be used ([reason, name]).
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from zipformer_crctc.features import SAMPLING_RATE
from zipformer_crctc.usercache import user_cache

logger = logging.getLogger(__name__)

_VERSION = 2
_NO_AUDIO = -1  # size of a member written as `.nodata`
_BLOCK = tarfile.BLOCKSIZE

Alignment = list[tuple[str, float, float]]


class Entry(NamedTuple):
    """A cut with audio."""

    id: str
    duration: float  # seconds
    num_samples: int
    text: str | None  # None if there is no supervision, or none with a text
    language: str
    speaker: str
    offset: int  # bytes to the FLAC data in the tar
    size: int  # bytes of the FLAC data
    has_supervision: bool
    alignment: Alignment | None  # (phone, start, duration) in seconds


class Problem(NamedTuple):
    """Something in a shard that cannot be used."""

    reason: str
    name: str  # id of the cut, or the place in a file


class ShardIndex:
    """The entries of a shard by number; lines are taken apart only when they are asked for."""

    def __init__(self, lines: list[bytes]) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Entry | Problem:
        fields = json.loads(self._lines[number])
        return Entry(*fields) if len(fields) == len(Entry._fields) else Problem(*fields)


def open_index(cuts: Path, tar: Path, cache: Path | None = None) -> ShardIndex:
    """The index of a shard, made anew where there is none that fits the files.

    `cache` replaces the user's cache folder, where it lies if the data's own place cannot be written. Raises
    OSError where a file of the shard cannot be read.
    """
    stamp = {"version": _VERSION, "cuts": _size_and_time(cuts), "tar": _size_and_time(tar)}
    places = index_places(tar, cache)
    for place in places:
        if (lines := _load(place, stamp)) is not None:
            return ShardIndex(lines)
    lines = [json.dumps(item, ensure_ascii=False).encode() for item in _build(cuts, tar)]
    _save(places, stamp, lines)
    return ShardIndex(lines)


def index_places(tar: Path, cache: Path | None = None) -> list[Path]:
    """Where the index of a shard may be, the preferred place first."""
    folder = tar.resolve().parent
    number = tar.name.split(".")[1]
    cache = cache or index_cache()
    key = sha256(str(folder).encode()).hexdigest()[:24]
    return [folder.parent / f".{folder.name}.index" / f"{number}.jsonl.gz", cache / key / f"{number}.jsonl.gz"]


def index_cache() -> Path:
    """For what cannot lie beside the data."""
    return user_cache("shards")


def _size_and_time(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _load(path: Path, stamp: dict[str, Any]) -> list[bytes] | None:
    try:
        header, *lines = gzip.decompress(path.read_bytes()).split(b"\n")
        content = json.loads(header)
        if content != {**stamp, "entries": len(lines)}:
            return None
        return lines
    except (OSError, EOFError, zlib.error, ValueError):
        return None


def _save(places: Iterable[Path], stamp: dict[str, Any], lines: list[bytes]) -> None:
    """Write to the first place that can be written, whole or not at all, whoever else writes the same file."""
    header = json.dumps({**stamp, "entries": len(lines)}).encode()
    data = gzip.compress(b"\n".join([header, *lines]), compresslevel=1, mtime=0)
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
    logger.debug("no place to keep the index of a shard: it is made again each time")


def _build(cuts: Path, tar: Path) -> Iterator[Entry | Problem]:
    """Entries and problems of a shard in the order of its manifest."""
    for path in (cuts, tar):
        if path.stat().st_size == 0:
            yield Problem("an empty file instead of a shard", str(path))
            return
    members, complete = scan_tar(tar)
    if not complete:
        yield Problem("tar breaks off, the audio after it is lost", str(tar))
    places: dict[str, list[tuple[int, int]]] = {}
    for stem, offset, size in members:
        places.setdefault(stem, []).append((offset, size))
    for name, line in _manifest_lines(cuts):
        if isinstance(line, str):
            yield Problem(line, name)
            continue
        try:
            yield _parse_cut(json.loads(line), places, complete)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            yield Problem("damaged line in the manifest", name)


def _manifest_lines(path: Path) -> Iterator[tuple[str, bytes | str]]:
    """(file name and line number, line) of a gzip file, up to the place where it breaks off: there a str says why."""
    number = 0
    try:
        with gzip.open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield f"{path}:{number + 1}", f"manifest breaks off, the cuts after it are lost ({error})"


def _parse_cut(cut: dict[str, Any], places: dict[str, list[tuple[int, int]]], complete: bool) -> Entry | Problem:
    """The entry of a manifest line. Raises what a damaged object raises."""
    name = cut["id"]
    if not isinstance(name, str) or not name:
        raise ValueError("id")
    if (kind := cut.get("type", "MonoCut")) != "MonoCut":
        return Problem(f"{kind} instead of MonoCut", name)
    recording = cut["recording"]
    if recording["sampling_rate"] != SAMPLING_RATE:
        return Problem(f"sampling rate {recording['sampling_rate']} instead of {SAMPLING_RATE}", name)
    channels = recording.get("channel_ids") or [0]
    if len(channels) != 1:
        return Problem(f"{len(channels)} channels instead of one", name)
    supervisions = cut.get("supervisions") or []
    if len(supervisions) > 1:
        return Problem("more than one supervision", name)
    supervision = supervisions[0] if supervisions else {}
    text = supervision.get("text")
    if not isinstance(text, str | None):
        raise TypeError("text")
    duration, num_samples = float(cut["duration"]), int(recording["num_samples"])
    if not 0 < duration < float("inf") or num_samples <= 0:
        return Problem("no duration", name)
    if name not in places:
        return Problem("audio missing from the tar" + ("" if complete else ", which is truncated"), name)
    found = places[name]
    offset, size = found.pop(0) if len(found) > 1 else found[0]  # an id may stand there twice
    if size == _NO_AUDIO:
        return Problem("stored without audio (.nodata)", name)
    language, speaker = supervision.get("language") or "", supervision.get("speaker") or ""
    return Entry(
        name, duration, num_samples, text, language, speaker, offset, size, bool(supervisions), _alignment(supervision)
    )


def _alignment(supervision: dict[str, Any]) -> Alignment | None:
    items = (supervision.get("alignment") or {}).get("phone")
    return None if items is None else [(str(item[0]), float(item[1]), float(item[2])) for item in items]


Members = list[tuple[str, int, int]]
"""(stem, offset, size) of audio members, in the order of the tar."""


def scan_tar(path: Path) -> tuple[Members, bool]:
    """The audio members of a tar, and whether it is whole. Reads the headers only."""
    members: Members = []
    file_size = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        for name, is_file, offset, size in _headers(file.fileno(), path):
            if name is None:
                return members, bool(is_file)
            stem, _, suffix = name.rpartition(".")
            if not is_file or suffix in ("json", "nometa"):
                continue
            if offset + size > file_size:
                return members, False
            members.append((stem, offset, _NO_AUDIO if suffix == "nodata" else size))
    return members, False


def _headers(descriptor: int, path: Path) -> Iterator[tuple[str | None, bool, int, int]]:
    """(name, is a file, offset, size) of each member; at the end name None, and whether the tar ends as it should.

    Plain headers are taken apart here, at a tenth of the cost of tarfile, which reads the rest if there are others.
    """
    position = 0
    while True:
        header = os.pread(descriptor, _BLOCK, position)
        if len(header) < _BLOCK or not any(header):
            yield None, len(header) == _BLOCK, position, 0  # a whole tar ends with a block of zeros
            return
        if header[156:157] not in (b"0", b"\0"):
            break
        try:
            checksum = int(header[148:156].rstrip(b"\0 ") or b"0", 8)
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
            parts = [header[345:500].split(b"\0")[0], header[:100].split(b"\0")[0]]
            name = b"/".join(part for part in parts if part).decode()
        except ValueError:
            break
        if checksum != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            break
        yield name, True, position + _BLOCK, size
        position += _BLOCK + -(-size // _BLOCK) * _BLOCK
    yield from _other_headers(path, position)


def _other_headers(path: Path, start: int) -> Iterator[tuple[str | None, bool, int, int]]:
    """As `_headers`, from the header at `start` on."""
    with path.open("rb") as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep every header
                    yield info.name, info.isfile(), info.offset_data, info.size
                # tarfile stops without a word at a damaged header and at the end of the file.
                file.seek(archive.offset)
                yield None, file.read(_BLOCK) == bytes(_BLOCK), archive.offset, 0
        except (tarfile.TarError, EOFError, ValueError):
            yield None, False, start, 0
