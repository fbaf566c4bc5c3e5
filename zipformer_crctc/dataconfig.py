"""Which folders are trained on, validated on and scored: a small YAML file, read and written here.

    train: [train]                    # folders of shar shards; with a weight: {folder: train, weight: 2.5}
    dev:   {espeak-dev: dev}          # name of the set: its folder
    test:  {espeak-test: test}
    unsup: []                         # pseudo-labelled shards, for --use-unsup-cr-ctc
    filters: {min_duration: 0.5}      # optional limits of the train sets: the fields of filters.FilterLimits
    unsup_filters: {frame_share: 0.8} # the same for the pseudo-labelled sets

A weight says how often the utterances of a train or unsup folder come in an epoch on average; without one, once. A JSON
or YAML file in place of a folder lists remote shards (see ``remote``). Relative folders are relative to the YAML file,
so a prepared corpus can be moved as a whole. All keys are optional; limits that are not given are the published ones.
Sets that are scored (dev, test) are never filtered.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zipformer_crctc.filters import PSEUDO_LABEL_LIMITS, FilterLimits
from zipformer_crctc.remote import LIST_SUFFIXES

DEFAULT_DATA_CONFIG = Path("data/shar.yaml")
"""Read when no data config is given; prepare.sh writes it."""

HOW_TO_MAKE = "./prepare.sh --corpus espeak|tusom2021|tsv|ipapack (see data/README.md)"


class DataConfigError(ValueError):
    """A data config that cannot be used; the text names the file, the key, the value and the remedy."""


ALIGNABLE_ONLY = FilterLimits(min_duration=None, max_duration=None, min_tokens=1, frame_share=1.0)
"""For corpora of single words: besides empty texts, only what CTC cannot align is dropped."""


@dataclass(frozen=True)
class DataSets:
    """The folders of shar shards a run reads."""

    train: list[Path] = field(default_factory=list)
    dev: dict[str, Path] = field(default_factory=dict)
    test: dict[str, Path] = field(default_factory=dict)
    unsup: list[Path] = field(default_factory=list)
    filters: FilterLimits = field(default_factory=FilterLimits)
    unsup_filters: FilterLimits = PSEUDO_LABEL_LIMITS
    weights: dict[Path, float] = field(default_factory=dict)
    """of the folders under train and unsup that have one"""
    source: Path | None = None
    """the file it was read from, for error messages"""

    def require(self, *kinds: str) -> DataSets:
        """Raise DataConfigError unless every kind ("train", "dev", "test", "unsup") lists a folder; return self."""
        empty = [kind for kind in kinds if not getattr(self, kind)]
        if empty:
            raise DataConfigError(
                f"{self.source or 'data config'}: no folder under {', '.join(empty)}: list at least one"
            )
        return self


def load_data_config(path: str | Path | None = None) -> DataSets:
    """Read and check a data config; None means the default place, data/shar.yaml.

    Every problem of the file is collected and raised once, as DataConfigError, before any data is touched.
    """
    import yaml  # installations that only transcribe can do without

    file = Path(path) if path is not None else DEFAULT_DATA_CONFIG
    if not file.is_file():
        raise DataConfigError(f"data config {file} does not exist: make it with {HOW_TO_MAKE}, or name another file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataConfigError(f"data config {file} is not valid YAML: {error}") from error
    if not isinstance(content, dict):
        raise DataConfigError(f"data config {file} is empty or no table: it needs keys such as train and dev")

    problems: list[str] = []
    keys = ("train", "dev", "test", "unsup", "filters", "unsup_filters")
    problems += [f"unknown key {key!r} (known: {', '.join(keys)})" for key in content if key not in keys]
    base = file.parent
    weights: dict[Path, float] = {}
    sets = DataSets(
        train=_folder_list(content, "train", base, problems, weights),
        dev=_named_folders(content, "dev", base, problems),
        test=_named_folders(content, "test", base, problems),
        unsup=_folder_list(content, "unsup", base, problems, weights),
        filters=_filters(content, "filters", FilterLimits(), problems),
        unsup_filters=_filters(content, "unsup_filters", PSEUDO_LABEL_LIMITS, problems),
        weights=weights,
        source=file,
    )
    _check_leaks(sets, problems)
    if problems:
        raise DataConfigError("\n".join([f"data config {file}:", *(f"  {problem}" for problem in problems)]))
    return sets


def write_data_config(path: Path, sets: DataSets, comment: str = "") -> None:
    """Write `sets` to `path`, folders below the file's own folder as relative ones."""
    base = path.parent.resolve()

    def shown(folder: Path) -> str:
        absolute = folder.resolve()
        return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)

    def weighted(folder: Path) -> str | dict[str, Any]:
        return {"folder": shown(folder), "weight": sets.weights[folder]} if folder in sets.weights else shown(folder)

    content: dict[str, Any] = {
        "train": [weighted(folder) for folder in sets.train],
        "dev": {name: shown(folder) for name, folder in sets.dev.items()},
        "test": {name: shown(folder) for name, folder in sets.test.items()},
        "unsup": [weighted(folder) for folder in sets.unsup],
        "filters": dataclasses.asdict(sets.filters),
        "unsup_filters": dataclasses.asdict(sets.unsup_filters),
    }
    import yaml

    header = "".join(f"# {line}\n" for line in comment.splitlines())
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    part.write_text(header + yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    part.replace(path)


def _folder(value: object, where: str, base: Path, problems: list[str]) -> Path | None:
    if not isinstance(value, str) or not value:
        problems.append(f"{where}: {value!r} is no folder name")
        return None
    folder = base / Path(value).expanduser()
    if not folder.is_dir() and not (folder.is_file() and folder.suffix in LIST_SUFFIXES):
        problems.append(f"{where}: folder {folder} does not exist: make it with {HOW_TO_MAKE}, or correct the path")
        return None
    return folder


def _folder_list(
    content: Mapping[str, Any], key: str, base: Path, problems: list[str], weights: dict[Path, float]
) -> list[Path]:
    value = content.get(key)
    values = [] if value is None else [value] if isinstance(value, str | dict) else value
    if not isinstance(values, list):
        problems.append(f"{key}: {value!r} is no list of folders")
        return []
    folders = []
    for item in values:
        weight: Any = None
        if isinstance(item, dict):
            if set(item) != {"folder", "weight"}:
                problems.append(f"{key}: {item!r}: a folder with a weight has the two keys folder and weight")
                continue
            item, weight = item["folder"], item["weight"]
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                problems.append(f"{key}: {item}: weight {weight!r} is no number above 0")
                continue
        folder = _folder(item, key, base, problems)
        if folder is not None:
            folders.append(folder)
            if weight is not None:
                weights[folder] = float(weight)
    return folders


def _named_folders(content: Mapping[str, Any], key: str, base: Path, problems: list[str]) -> dict[str, Path]:
    value = content.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.append(f"{key}: {value!r} is no table of name: folder")
        return {}
    folders = {}
    for name, item in value.items():
        # The name becomes part of the names of the decoding output files.
        if not isinstance(name, str) or not name or "/" in name or any(letter.isspace() for letter in name):
            problems.append(f"{key}: {name!r} cannot name a set: use letters, digits, - and _")
            continue
        folder = _folder(item, f"{key}: {name}", base, problems)
        if folder is not None:
            folders[name] = folder
    return folders


def _filters(content: Mapping[str, Any], key: str, default: FilterLimits, problems: list[str]) -> FilterLimits:
    value = content.get(key)
    if value is None:
        return default
    known = [item.name for item in dataclasses.fields(FilterLimits)]
    if not isinstance(value, dict):
        problems.append(f"{key}: {value!r} is no table (known keys: {', '.join(known)})")
        return default
    wrong = [f"unknown {name!r} (known: {', '.join(known)})" for name in value if name not in known]
    wrong += [
        f"{name} is {limit!r}, expected a number" + (" or null" if name.endswith("_duration") else "")
        for name, limit in value.items()
        if name in known and not _is_limit(name, limit)
    ]
    if not wrong:
        try:
            return dataclasses.replace(default, **value)
        except ValueError as error:
            wrong.append(str(error))
    problems.extend(f"{key}: {text}" for text in wrong)
    return default


def _is_limit(name: str, value: object) -> bool:
    if value is None:
        return name.endswith("_duration")
    whole = name.endswith("_tokens")
    return not isinstance(value, bool) and isinstance(value, int if whole else (int, float))


def _check_leaks(sets: DataSets, problems: list[str]) -> None:
    """A set that is scored must not be trained on."""
    trained = {folder.resolve(): folder for folder in [*sets.train, *sets.unsup]}
    for kind, named in (("dev", sets.dev), ("test", sets.test)):
        problems.extend(
            f"{kind}: {name}: folder {folder} is trained on as well (train or unsup): remove one of the two"
            for name, folder in named.items()
            if folder.resolve() in trained
        )
