"""Write shar shards as IPAPack++ has them: cuts.NNNNNN.jsonl.gz beside recording.NNNNNN.tar.

The same cuts give the same bytes: time stamps in the gzip and tar headers are zero.
Nothing here imports torch: the processes that make synthetic speech live for one shard each.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Add = Callable[[Mapping[str, Any], bytes], None]
"""Takes a lhotse MonoCut as plain data, and its audio as the bytes of a FLAC file."""


def cuts_name(number: int) -> str:
    """The manifest of a shard."""
    return f"cuts.{number:06d}.jsonl.gz"


def recording_name(number: int) -> str:
    """The audio of a shard."""
    return f"recording.{number:06d}.tar"


def remove_shard(folder: Path, number: int) -> None:
    """Remove a shard if it is there, the cuts first: what is left of it is never taken for a shard."""
    for name in (cuts_name(number), recording_name(number)):
        (folder / name).unlink(missing_ok=True)


@contextmanager
def open_shard(folder: Path, number: int) -> Iterator[Add]:
    """Write one shard of `folder` with the function given, replacing an older one of the same number.

    Both files are written under temporary names and renamed at the end, the cuts last: a shard whose cuts file exists
    is whole. An exception in the block leaves an older shard as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cuts_path, tar_path = folder / cuts_name(number), folder / recording_name(number)
    # Not `cuts.*.part`: readers that glob "cuts*" must not see half a file.
    cuts_part, tar_part = folder / f".part-{cuts_path.name}", folder / f".part-{tar_path.name}"
    try:
        with (
            tarfile.open(tar_part, "w", format=tarfile.PAX_FORMAT) as tar,
            cuts_part.open("wb") as raw,
            gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as cuts,
        ):

            def add(cut: Mapping[str, Any], flac: bytes) -> None:
                _add_member(tar, f"{cut['id']}.flac", flac)
                _add_member(tar, f"{cut['id']}.json", _json_line(cut["recording"]))
                cuts.write(_json_line(cut) + b"\n")

            yield add
        cuts_path.unlink(missing_ok=True)
        tar_part.replace(tar_path)
        cuts_part.replace(cuts_path)
    finally:
        tar_part.unlink(missing_ok=True)
        cuts_part.unlink(missing_ok=True)


def _json_line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
