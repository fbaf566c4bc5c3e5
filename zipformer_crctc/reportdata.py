"""What a report is made from: the JSON lines of one system, and the audio of single utterances."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.results import UtteranceResult, read_json_lines
from zipformer_crctc.shar import Skipped, Utterance, find_shards, read_shard

_SUFFIX = re.compile(r"-((?:iter|epoch)-\d+-avg-\d+.*)$")
_PREFIX = "results-"


@dataclass(frozen=True)
class System:
    """Everything that one system decoded."""

    name: str
    results: list[UtteranceResult]
    corpora: list[str]
    """The test set of each result."""


@dataclass(frozen=True)
class Clip:
    """The audio of an utterance."""

    flac: bytes
    samples: NDArray[np.float32]
    """(S,), mono, in [-1, 1]"""
    rate: int
    """Hz"""


def read_system(path: Path, suffix: str = "") -> System:
    """The results in a JSON-lines file, or in all of a folder (`results-{test set}-{suffix}.jsonl`).

    suffix: which decode of a folder that holds several of one test set.

    Raises:
        ValueError: nothing there, several decodes of a test set, an id that occurs twice in one, or a line that cannot
            be read; with file and line.
    """
    files = {_corpus(path): path} if path.is_file() else _files(path, suffix)
    results: list[UtteranceResult] = []
    corpora: list[str] = []
    for corpus, file in files.items():
        found = read_json_lines(file)
        if not found:
            raise ValueError(f"{file}: holds no results; decode again")
        if twice := [name for name, n in Counter(result.id for result in found).items() if n > 1]:
            raise ValueError(f"{file}: utterance {twice[0]} occurs more than once; decode again")
        results += found
        corpora += [corpus] * len(found)
    name = path.stem.removeprefix(_PREFIX) if path.is_file() else "/".join(path.resolve().parts[-2:])
    return System(f"{name} ({suffix})" if suffix else name, results, corpora)


def _files(folder: Path, suffix: str) -> dict[str, Path]:
    """The result files of a folder by test set."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such file or folder; give a results-*.jsonl of decode.py or the folder of it")
    found = sorted(folder.glob(f"{_PREFIX}*.jsonl"))
    if suffix:
        found = [path for path in found if path.stem.endswith(f"-{suffix}")]
    if not found:
        name = f"{_PREFIX}*-{suffix}.jsonl" if suffix else f"{_PREFIX}*.jsonl"
        raise ValueError(f"{folder}: holds no {name}; decode first, or name another folder or suffix")
    files: dict[str, Path] = {}
    for path in found:
        corpus = path.stem.removeprefix(_PREFIX).removesuffix(f"-{suffix}") if suffix else _corpus(path)
        if corpus in files:
            suffixes = sorted({match[1] for path in found if (match := _SUFFIX.search(path.stem))})
            raise ValueError(
                f"{folder}: holds several decodes of {corpus}; choose one by its suffix ({', '.join(suffixes)}) or "
                "give one file"
            )
        files[corpus] = path
    return files


def _corpus(path: Path) -> str:
    """The test set of a result file; the whole name where it has no known suffix."""
    return _SUFFIX.sub("", path.stem).removeprefix(_PREFIX)


def read_clips(data_config: Path, wanted: Iterable[tuple[str, str]]) -> tuple[dict[tuple[str, str], Clip], list[str]]:
    """The audio of utterances (corpus, id) from the shar folders of a data config, and notes on what is missing.

    A corpus is the set of the data config with that name or with one that it begins with; one without such a set is
    looked for in all sets, by the ids of its utterances.

    Raises:
        ValueError: a data config or shar folder that cannot be read.
    """
    sets = load_data_config(data_config)
    folders = {**sets.dev, **sets.test}
    by_corpus: dict[str, set[str]] = {}
    for corpus, name in wanted:
        by_corpus.setdefault(corpus, set()).add(name)
    clips: dict[tuple[str, str], Clip] = {}
    notes = []
    for corpus, names in by_corpus.items():
        folder = _folder(corpus, folders)
        places = [folder] if folder else list(folders.values())
        found: dict[str, Utterance] = {}
        for place in places:
            found |= _find(place, names - set(found))
        for name, utterance in found.items():
            clip = _read(utterance)
            if clip is None:
                notes.append(f"No audio of {corpus}, {name}: its data cannot be decoded.")
            else:
                clips[corpus, name] = clip
        if missing := sorted(names - set(found)):
            where = ", ".join(map(str, places)) or f"any set of {data_config}"
            notes.append(f"No audio of {corpus}, {', '.join(missing)}: not in {where}.")
    return clips, notes


def _folder(corpus: str, folders: Mapping[str, Path]) -> Path | None:
    fitting = [name for name in folders if corpus == name or corpus.startswith(f"{name}-")]
    if fitting:
        return folders[max(fitting, key=len)]
    # A folder that was named by its path is called by the last two parts of it.
    return next((folder for folder in folders.values() if "-".join(folder.parts[-2:]) == corpus), None)


def _find(folder: Path, names: set[str]) -> dict[str, Utterance]:
    found: dict[str, Utterance] = {}
    for shard in find_shards(folder) if names else []:
        # What cannot be used is not found, and named by the caller.
        for utterance in read_shard(shard, Skipped(), need_text=False):
            if utterance.id in names:
                found[utterance.id] = utterance
        if len(found) == len(names):
            break
    return found


def _read(utterance: Utterance) -> Clip | None:
    with Path(utterance.tar).open("rb") as file:
        file.seek(utterance.offset)
        flac = file.read(utterance.size)
    try:
        samples, rate = soundfile.read(io.BytesIO(flac), dtype="float32", always_2d=True)
    except soundfile.LibsndfileError:
        return None
    return Clip(flac, samples.mean(axis=1), rate)
