"""What is to be transcribed: files, folders, patterns, standard input and arrays, each as a stream of samples."""

from __future__ import annotations

import glob
import logging
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from zipformer_crctc.audio import BLOCK, FFMPEG_SUFFIXES, AudioError, AudioStream, mono_blocks
from zipformer_crctc.features import SAMPLING_RATE

logger = logging.getLogger(__name__)

STANDARD_INPUT = "-"
AUDIO_SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".oga", ".aif", ".aiff", ".au", ".w64", *FFMPEG_SUFFIXES)
"""The files of a folder that are taken; a file that is named itself may have any suffix."""


class Stream(Protocol):
    """Blocks of mono float32 samples at 16 kHz; iterating may raise AudioError."""

    warning: str | None

    def __iter__(self) -> Iterator[np.ndarray]: ...


@dataclass(frozen=True)
class Source:
    """A recording to transcribe."""

    id: str
    """Unique among those found together: the path below the folder, or the file's name, without suffix."""
    audio: str
    """The path as it was given; `-` for standard input, empty for an array."""
    stream: Stream


class ArrayStream:
    """Samples (S,) or (S, channels) in memory, given as `AudioStream` does; integers are scaled to [-1, 1)."""

    def __init__(self, samples: Any, sampling_rate: float = SAMPLING_RATE, channel: int | None = None) -> None:
        self.samples = np.asarray(samples)
        if self.samples.ndim not in (1, 2):
            raise ValueError(f"audio: an array of shape {self.samples.shape}; give (samples,) or (samples, channels)")
        if not sampling_rate > 0:
            raise ValueError(f"sampling_rate: {sampling_rate}; give the samples per second")
        self.sampling_rate = sampling_rate
        self.channel = channel
        self.warning: str | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        columns = self.samples if self.samples.ndim == 2 else self.samples[:, None]
        blocks = (_as_float(columns[start : start + BLOCK]) for start in range(0, len(columns), BLOCK))
        return mono_blocks(blocks, self.sampling_rate, self.channel)


def _as_float(samples: np.ndarray) -> np.ndarray:
    if not np.issubdtype(samples.dtype, np.integer):
        return samples.astype(np.float32)
    limits = np.iinfo(samples.dtype)
    if limits.min == 0:
        raise AudioError(f"samples of type {samples.dtype}; give signed integers or numbers in [-1, 1]")
    return samples.astype(np.float32) / -float(limits.min)


class StandardInput:
    """The bytes of an audio file on standard input, kept in a temporary file while it is read."""

    def __init__(self, channel: int | None = None) -> None:
        self.channel = channel
        self.warning: str | None = None

    def __iter__(self) -> Iterator[np.ndarray]:
        with tempfile.NamedTemporaryFile() as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
            file.flush()
            stream = AudioStream(Path(file.name), self.channel)
            yield from stream
            self.warning = stream.warning


def find_sources(
    inputs: Sequence[Any], sampling_rate: float = SAMPLING_RATE, channel: int | None = None
) -> list[Source]:
    """Everything that the inputs name, in their order; folders and patterns sorted by path.

    Args:
        inputs: paths of files and folders (searched to the bottom for files with AUDIO_SUFFIXES), patterns (`*`, `?`,
            `[...]`, `**`), `-` for standard input, and arrays. A path that does not exist is a source that fails.
        sampling_rate: of the arrays.
        channel: from 1; None is the mean of all.
    """
    found: list[tuple[str, str, Stream]] = []
    for number, item in enumerate(inputs):
        if not isinstance(item, str | PathLike):
            found.append((f"array-{number}", "", ArrayStream(item, sampling_rate, channel)))
        elif item == STANDARD_INPUT:
            found.append(("stdin", STANDARD_INPUT, StandardInput(channel)))
        else:
            found += [(name, str(path), AudioStream(path, channel)) for name, path in _paths(fspath(item))]
    taken: Counter[str] = Counter()
    sources = []
    for name, audio, stream in found:
        taken[name] += 1
        sources.append(Source(name if taken[name] == 1 else f"{name}-{taken[name]}", audio, stream))
    return sources


def _paths(given: str) -> Iterator[tuple[str, Path]]:
    """Name and path of each file behind a path or pattern."""
    path = Path(given)
    if not path.exists() and re.search(r"[*?\[]", given):
        matches = sorted(glob.glob(given, recursive=True))  # noqa: PTH207 (Path takes no absolute patterns)
        if not matches:
            logger.warning("%s: nothing fits this pattern", given)
        for match in matches:
            if not Path(match).is_dir():
                yield Path(match).stem, Path(match)
    elif path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() or file.is_symlink())
        audio = [file for file in files if file.suffix.lower() in AUDIO_SUFFIXES]
        others = Counter(file.suffix or "no suffix" for file in files if file not in set(audio))
        if others:
            logger.info("%s: files that are not audio by their names: %s", path, _counts(others))
        if not audio:
            logger.warning("%s: no audio file in this folder; known suffixes: %s", path, " ".join(AUDIO_SUFFIXES))
        for file in audio:
            yield str(file.relative_to(path).with_suffix("")), file
    else:
        yield path.stem, path


def _counts(counts: Iterable[str] | Counter[str]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in Counter(counts).most_common())
