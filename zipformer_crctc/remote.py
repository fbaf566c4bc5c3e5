"""Files that may fail for a while: tries again with growing pauses, and copies of shards that are named by URL.

Remote shards are listed in a JSON or YAML file as lhotse takes them: ``{"cuts": [...], "recording": [...]}``, where an
item is ``pipe:`` and a shell command whose output is the file, a URL for the optional package smart_open, or a path.
A shard is copied as a whole when it is first read, by one process of a machine while the others wait, and is then read
like any other. Copies are not removed, so there must be room for all.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import subprocess
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

PAUSES = (1.0, 4.0, 16.0)
"""Seconds between tries."""
LIST_SUFFIXES = (".json", ".yaml", ".yml")
_PIPE = "pipe:"

Result = TypeVar("Result")


def with_retries(work: Callable[[], Result], what: str) -> Result:
    """The result of ``work``, which is called again after an OSError, but not where a file is missing or forbidden."""
    for pause in PAUSES:
        try:
            return work()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError as error:
            logger.warning("%s: %s; trying again in %g s", what, error, pause)
            time.sleep(pause)
    return work()


def read_list(path: Path) -> list[tuple[str, str]]:
    """(cuts, recording) of each shard in a list. Raises ValueError where it is none."""
    remedy = "give two lists of one length, cuts and recording, as for lhotse's CutSet.from_shar(fields=...)"
    import yaml  # installations that only transcribe can do without

    cuts: Any
    recordings: Any
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no list of shards ({error}); {remedy}") from error
    cuts, recordings = (content.get(key) if isinstance(content, dict) else None for key in ("cuts", "recording"))
    if not _is_text_list(cuts) or not _is_text_list(recordings):
        raise ValueError(f"{path}: no list of shards; {remedy}")
    if not cuts or len(cuts) != len(recordings):
        raise ValueError(f"{path}: {len(cuts)} cuts for {len(recordings)} recordings; {remedy}")
    return list(zip(cuts, recordings, strict=True))


def _is_text_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def copy_folder(path: Path, cache: Path) -> Path:
    """Where the copies of a list's shards lie."""
    return cache / "remote" / f"{path.stem}-{sha256(str(path.resolve()).encode()).hexdigest()[:12]}"


def make_local(source: str, target: Path) -> None:
    """Copy ``source`` to ``target`` unless that is there. Raises OSError after the last try."""
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.is_file():  # another process has made it meanwhile
            return
        part = target.with_name(f".{target.name}.part")
        with_retries(lambda: _fetch(source, part), source)
        part.replace(target)


def _fetch(source: str, part: Path) -> None:
    with part.open("wb") as file:
        if source.startswith(_PIPE):
            command = source.removeprefix(_PIPE)
            done = subprocess.run(command, shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
            if done.returncode:
                message = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
                raise OSError(f"exit status {done.returncode} {' '.join(message)}")
        elif "://" in source:
            try:
                import smart_open  # optional
            except ImportError as error:
                raise ValueError(
                    f"{source}: URLs need smart_open: pip install smart-open, or give pipe:COMMAND"
                ) from error
            try:
                with smart_open.open(source, "rb") as stream:
                    shutil.copyfileobj(stream, file)
            except OSError:
                raise
            except Exception as error:  # each kind of store has errors of its own
                raise OSError(f"{type(error).__name__}: {error}") from error
        else:
            with Path(source).open("rb") as stream:
                shutil.copyfileobj(stream, file)
