"""Checkpoint files: written atomically, read safely, chosen and averaged for decoding.

A training checkpoint is a dict with the published keys (``model``, ``model_avg``, ``optimizer``, ``scheduler``,
``grad_scaler``, ``sampler`` and every run parameter beside them) and four of ours: ``config``, ``tokenizer``,
``rank_states`` (what differs from rank to rank, such as random generators) and ``gradients`` (those of an accumulation
that is under way).
A published averaged model is a bare state dict.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from zipformer_crctc.averaging import mean_of_states, range_average

State = dict[str, Tensor]

STATE_KEYS = (
    *("model", "model_avg", "optimizer", "scheduler", "grad_scaler", "sampler", "config", "tokenizer"),
    *("gradients", "rank_states"),
)
"""Keys that are not run parameters."""

PATH_GLOBALS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (pure, f"{module}.{name}")
    for module in ("pathlib", "pathlib._local")  # the latter is where Python 3.13 keeps them
    for pure, names in (
        (PurePosixPath, ("PosixPath", "PurePosixPath")),
        (PureWindowsPath, ("WindowsPath", "PureWindowsPath")),
    )
    for name in names
]
"""All that a file may hold besides tensors and plain values: paths, as published files do. They are read as pure paths,
which exist on every system."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, unreadable, unsafe or of another model."""


class SaveError(OSError):
    """A checkpoint that could not be written; what was there before is there still."""


def make_payload(
    model: Mapping[str, Tensor],
    *,
    params: Mapping[str, Any],
    config: Mapping[str, Any],
    tokenizer: bytes,
    model_avg: Mapping[str, Tensor] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    grad_scaler: Mapping[str, Any] | None = None,
    sampler: Mapping[str, Any] | None = None,
    gradients: Mapping[str, Tensor] | None = None,
    rank_states: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """A training checkpoint with the published keys.

    Args:
        model: state dict; a ``module.`` prefix is dropped.
        params: run parameters (flags, batch_idx_train, cur_epoch, ...), stored flat beside the other keys.
        config: the whole configuration as nested plain data.
        tokenizer: the bytes of the sentencepiece model.
        model_avg: running average, in float64.
        optimizer, scheduler, grad_scaler, sampler: their state dicts, where there are any.
        gradients: means over the ranks, where an accumulation is under way.
        rank_states: for each rank what is its own.
    """
    if taken := sorted(set(params) & set(STATE_KEYS)):
        raise ValueError(f"run parameters {taken} have the names of other parts of a checkpoint: rename them")
    return {
        **{name: str(value) if isinstance(value, PurePath) else value for name, value in params.items()},
        "model": strip_module_prefix(model),
        "model_avg": None if model_avg is None else strip_module_prefix(model_avg),
        "optimizer": optimizer,
        "scheduler": scheduler,
        "grad_scaler": grad_scaler or {},
        "sampler": sampler,
        "gradients": gradients,
        "rank_states": rank_states,
        "config": config,
        "tokenizer": tokenizer,
    }


def save(path: str | Path, payload: Mapping[str, Any]) -> None:
    """Write a checkpoint; the file is complete or not there at all, whenever the process or the machine dies.

    Raises:
        SaveError: the disk is full or cannot be written to; an older file of this name stays as it was.
    """
    _replace(Path(path), lambda file: torch.save(dict(payload), file))


def copy(source: str | Path, target: str | Path) -> None:
    """Copy a checkpoint, as atomically as ``save``."""
    with Path(source).open("rb") as opened:
        _replace(Path(target), lambda file: shutil.copyfileobj(opened, file))


def _replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch's writer makes RuntimeErrors of what the file system says
        first_line = str(error).splitlines()[0]
        raise SaveError(f"{path} could not be written ({first_line}): make room or look at the disk") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    if os.name == "posix":  # make the rename last, too, on file systems that can
        with contextlib.suppress(OSError):
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def remove_stale(exp_dir: Path) -> list[Path]:
    """Delete what ``save`` left behind when its process was killed in the middle; returns those deleted."""
    stale = list(exp_dir.glob(".*.pt.*.tmp"))
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def load(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU without running code from it: tensors, plain values and paths only.

    Args:
        path: of the file.
        mmap: leave the tensors on the disk until they are used, to look at the rest only.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or it holds anything else.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder; name a checkpoint file, such as one of: {_listing(path)}")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; its folder holds: {_listing(path.parent)}")
    try:
        with torch.serialization.safe_globals(PATH_GLOBALS):
            payload = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        raise CheckpointError(_unreadable(path, error)) from error
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{path}: holds a {type(payload).__name__}, not a checkpoint; name another file")
    return dict(payload)


def verify(path: Path) -> None:
    """Compare the check sums in a checkpoint with its content, which ``load`` does not do for tensors.

    Raises:
        CheckpointError: a byte has changed since the file was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (MemoryError, PermissionError):
        raise
    except Exception as error:  # of a damaged directory zipfile believes the strangest things
        raise CheckpointError(_unreadable(path, error)) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged, the check sum of {damaged} is wrong; use another checkpoint")


def _unreadable(path: Path, error: Exception) -> str:
    if isinstance(error, pickle.UnpicklingError):
        found = re.search(r"GLOBAL (\S+)|unrecognized function (.+)", str(error))
        if found:
            what = found[1] or found[2]
            return (
                f"{path}: refused, loading it would run code or make an object of a kind not allowed ({what}); "
                "only tensors, plain values and paths are read: get the file from its authors again, or have it saved "
                "with those only"
            )
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    return (
        f"{path}: not a checkpoint, or a damaged one of {path.stat().st_size} bytes ({first_line[:200]}); "
        "copy or download it again, or use another checkpoint"
    )


def _listing(folder: Path, pattern: str = "*.pt*", limit: int = 10) -> str:
    """Names of files in a folder for a message."""
    if not folder.is_dir():
        return "nothing, there is no such folder"
    return _shorten(sorted(folder.glob(pattern), key=_natural), limit)


def _shorten(paths: Iterable[Path], limit: int = 10) -> str:
    names = [path.name for path in paths if not path.name.startswith(".")]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "") or "none"


def _natural(path: Path) -> tuple[str, int]:
    """Sort key that puts checkpoint-900 before checkpoint-1000."""
    number = re.search(r"(\d+)\D*$", path.name)
    return re.sub(r"\d+", "", path.name), int(number[1]) if number else 0


def strip_module_prefix(state: Mapping[str, Tensor]) -> State:
    """Drop the ``module.`` that DistributedDataParallel puts before each key."""
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def model_state(payload: Mapping[str, Any], source: str | Path = "checkpoint") -> State:
    """The model's state dict in a training checkpoint, or the payload itself where it is a bare state dict."""
    state = payload.get("model", payload)
    if not isinstance(state, Mapping) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(sorted(map(str, payload))[:8]) or "none"
        raise CheckpointError(f"{source}: holds no model, its keys are: {keys}; name a checkpoint of a model")
    return strip_module_prefix(state)


def load_model(model: nn.Module, state: Mapping[str, Tensor], source: str | Path = "checkpoint") -> None:
    """Load a state dict into a model of the same configuration and vocabulary.

    Raises:
        CheckpointError: keys or shapes differ; the model is unchanged then.
    """
    own = model.state_dict()
    problems = [
        f"{name} has shape {tuple(state[name].shape)} in the checkpoint, {tuple(tensor.shape)} in the model"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    other_vocabulary = bool(problems) and all(problem.startswith("ctc_output.") for problem in problems)
    problems += [f"{name} is missing in the checkpoint" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    if problems:
        what = "vocabulary" if other_vocabulary else "configuration"
        remedy = "the tokenizer" if other_vocabulary else "the model sizes (layers, dimensions, heads, --causal)"
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise CheckpointError(f"{source}: of another {what}: {shown}. Use {remedy} that it was trained with")
    model.load_state_dict(dict(state))


# Choice of files


@dataclass(frozen=True)
class Choice:
    """Files to average, oldest first."""

    files: tuple[Path, ...]
    by_running_average: bool
    """True: two files, whose running averages give the mean over the batches between; False: mean of the models."""


def find_checkpoints(exp_dir: Path, up_to: int | None = None) -> list[tuple[int, Path]]:
    """(N, checkpoint-N.pt) with N at most ``up_to``, in ascending order."""
    found = []
    for path in exp_dir.glob("checkpoint-*.pt"):
        match = re.fullmatch(r"checkpoint-(\d+)\.pt", path.name)
        if match and (up_to is None or int(match[1]) <= up_to):
            found.append((int(match[1]), path))
    return sorted(found)


def prune(exp_dir: Path, keep_last_k: int) -> list[Path]:
    """Delete all checkpoint-N.pt but the ``keep_last_k`` with the highest N; returns those deleted."""
    if keep_last_k < 1:
        raise ValueError(f"keep_last_k is {keep_last_k}: keep at least 1 checkpoint")
    outdated = [path for _, path in find_checkpoints(exp_dir)[:-keep_last_k]]
    for path in outdated:
        path.unlink(missing_ok=True)
    return outdated


def choose_checkpoints(exp_dir: str | Path, epoch: int, iter: int, avg: int, use_averaged_model: bool) -> Choice:
    """Files to average for decoding.

    Args:
        exp_dir: folder of the checkpoints.
        epoch: last epoch-N.pt; used where ``iter`` is 0.
        iter: if above 0, the last checkpoint-N.pt has at most this N.
        avg: checkpoints to average. With ``use_averaged_model`` the span between the ends of the range; one more file
            is needed, whose batches are left out.
        use_averaged_model: average all batches of the range, not only the checkpoints.

    Raises:
        CheckpointError: there are not enough files; the message lists those there are.
    """
    exp_dir = Path(exp_dir)
    if avg < 1:
        raise CheckpointError(f"--avg is {avg}: average at least 1 checkpoint")
    if not exp_dir.is_dir():
        raise CheckpointError(f"{exp_dir}: no such folder; --exp-dir is the folder that training wrote to")
    if iter > 0:
        return _choose_by_batch(exp_dir, iter, avg, use_averaged_model)
    return _choose_by_epoch(exp_dir, epoch, avg, use_averaged_model)


def _choose_by_batch(exp_dir: Path, last: int, avg: int, use_averaged_model: bool) -> Choice:
    found = [path for _, path in find_checkpoints(exp_dir, last)]
    needed = avg + 1 if use_averaged_model else avg
    if len(found) < needed:
        remedy = "lower --avg or raise --iter" + (", or --use-averaged-model False" if len(found) >= avg else "")
        raise CheckpointError(
            f"{exp_dir}: --iter {last} --avg {avg} needs {needed} files checkpoint-N.pt with N up to {last}, there are "
            f"{len(found)}; the folder holds: {_listing(exp_dir)}. Choose others: {remedy}"
        )
    files = found[-needed:]
    return Choice((files[0], files[-1]) if use_averaged_model else tuple(files), use_averaged_model)


def _choose_by_epoch(exp_dir: Path, last: int, avg: int, use_averaged_model: bool) -> Choice:
    start = last - avg if use_averaged_model else max(1, last - avg + 1)
    if last < 1 or start < 1:
        raise CheckpointError(
            f"{exp_dir}: --epoch {last} --avg {avg} starts at epoch {start}, the first is 1; the folder holds: "
            f"{_listing(exp_dir)}. Lower --avg or raise --epoch, or --use-averaged-model False, or give --iter"
        )
    epochs = (start, last) if use_averaged_model else tuple(range(start, last + 1))
    files = tuple(exp_dir / f"epoch-{epoch}.pt" for epoch in epochs)
    if missing := [path for path in files if not path.is_file()]:
        raise CheckpointError(
            f"{exp_dir}: --epoch {last} --avg {avg} needs {_shorten(missing)}; the folder holds: {_listing(exp_dir)}. "
            "Choose others by --epoch and --avg, or by --iter"
        )
    return Choice(files, use_averaged_model)


def average_checkpoints(choice: Choice) -> State:
    """Averaged model of the chosen files, floating-point entries in float32; at most two files in memory at a time."""
    if choice.by_running_average:
        averaged = _range_average_of_files(*choice.files)
    else:
        averaged = mean_of_states(model_state(load(path), path) for path in choice.files)
    return {name: t.float() if t.is_floating_point() else t for name, t in averaged.items()}


def _range_average_of_files(first: Path, last: Path) -> State:
    states, batches, periods = [], [], []
    for path in (first, last):
        payload = load(path)
        if missing := [key for key in ("model_avg", "batch_idx_train", "average_period") if payload.get(key) is None]:
            raise CheckpointError(
                f"{path}: has no {' and no '.join(missing)}, so it cannot be averaged over a range of batches; "
                "use --use-averaged-model False"
            )
        states.append(strip_module_prefix(payload["model_avg"]))
        batches.append(payload["batch_idx_train"])
        periods.append(payload["average_period"])
    if periods[0] != periods[1]:
        raise CheckpointError(
            f"{first} and {last}: their average periods differ ({periods[0]} and {periods[1]} batches); "
            "average files of one run, or use --use-averaged-model False"
        )
    try:
        return range_average(states[0], states[1], batches[0], batches[1], periods[1])
    except ValueError as error:
        raise CheckpointError(f"{first} and {last}: {error}") from error
