"""Copy cuts of a shar shard, changed or not, with their audio as it is."""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from zipformer_crctc.shar import Shard, Skipped, read_shard
from zipformer_crctc.sharwriter import open_shard, remove_shard


def copy_shard(
    shard: Shard,
    folder: Path,
    change: Callable[[Mapping[str, Any]], Mapping[str, Any] | None],
    skipped: Skipped | None = None,
) -> int:
    """Copy the cuts of a shard to a shard of the same number in `folder`, with their audio as it is.

    change: gives the cut to write for a cut that can be read, or None to leave it out.
    skipped: counts what cannot be read; None where that is known already. Of an id that comes twice nobody can tell
        which audio is meant, so neither is copied.

    Returns the number of cuts written; of a shard without any there is no file.
    """
    skipped = Skipped() if skipped is None else skipped
    readable = list(read_shard(shard, skipped, need_text=False))
    times = Counter(utterance.id for utterance in readable)
    places = {utterance.id: utterance for utterance in readable if times[utterance.id] == 1}
    for name in (name for name, count in times.items() if count > 1):
        skipped.add("id used more than once in its shard", name)
    count = 0
    with shard.recording.open("rb") as tar, open_shard(folder, shard.number) as add:
        for cut in _cuts(shard.cuts):
            place = places.get(cut.get("id", ""))
            changed = change(cut) if place is not None else None
            if place is not None and changed is not None:
                tar.seek(place.offset)
                add(changed, tar.read(place.size))
                count += 1
    if not count:
        remove_shard(folder, shard.number)
    return count


def _cuts(path: Path) -> Iterator[dict[str, Any]]:
    """The cuts of a manifest, without damaged ones: `read_shard` counts those."""
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                try:
                    cut = json.loads(line)
                except ValueError:
                    continue
                if isinstance(cut, dict):
                    yield cut
    except (EOFError, zlib.error, gzip.BadGzipFile):
        return
