"""How a fixture is read and how two tensors are compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass(frozen=True)
class Comparison:
    """One value of a fixture against the project's."""

    name: str
    abs_error: float
    rel_error: float
    ok: bool
    detail: str = ""


Checker = Callable[[Path], list[Comparison]]


def compare(name: str, got: Tensor, want: Tensor, rel: float, floor: float = 0.0) -> Comparison:
    """Largest difference, relative to max(max|want|, floor); shapes must be equal."""
    if got.shape != want.shape:
        return Comparison(name, float("inf"), float("inf"), False, f"shape {tuple(got.shape)}, not {tuple(want.shape)}")
    if want.numel() == 0:
        return Comparison(name, 0.0, 0.0, True)
    got64, want64 = got.detach().cpu().to(torch.float64), want.cpu().to(torch.float64)
    difference = (got64 - want64).abs().max().item()
    size = max(want64.abs().max().item(), floor)
    relative = 0.0 if difference == 0.0 else difference / size if size > 0.0 else float("inf")
    return Comparison(name, difference, relative, relative <= rel)


def compare_abs(name: str, got: Tensor, want: Tensor, limit: float) -> Comparison:
    """As `compare`, with a limit on the absolute difference."""
    result = compare(name, got, want, rel=float("inf"))
    ok = result.detail == "" and result.abs_error <= limit
    return Comparison(name, result.abs_error, result.rel_error, ok, result.detail)


def exact(name: str, got: Any, want: Any) -> Comparison:
    """Equality of anything; tensors must agree in every element."""
    if isinstance(want, Tensor):
        equal = got.shape == want.shape and bool(torch.equal(got.cpu().to(want.dtype), want.cpu()))
    else:
        equal = got == want
    error = 0.0 if equal else float("inf")
    return Comparison(name, error, error, equal, "" if equal else f"got {got!r}, want {want!r}"[:300])


@dataclass(frozen=True)
class Fixture:
    """One safetensors fixture: its tensors by key, its arguments and its calls."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> Fixture:
        with safe_open(str(path), "pt", device=str(torch.get_default_device())) as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        return cls(path, tensors, metadata, json.loads(metadata.get("config", "{}")))

    @property
    def args(self) -> Mapping[str, Any]:
        return self.config.get("args") or {}

    @property
    def calls(self) -> Mapping[str, Mapping[str, Any]]:
        return self.config.get("calls") or {}

    def group(self, prefix: str) -> dict[str, Tensor]:
        """Tensors whose key begins with `prefix`, by the rest of their key."""
        return {key[len(prefix) :]: tensor for key, tensor in self.tensors.items() if key.startswith(prefix)}


def advised_tolerances(path: Path, default_out: float, default_grad: float) -> tuple[float, float]:
    """Relative tolerances of outputs and gradients: from the table in the folder's README.md, else the defaults."""
    readme = path.parent / "README.md"
    if readme.is_file():
        for line in readme.read_text(encoding="utf-8").splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if len(cells) >= 8 and cells[0] == path.name:
                return _number(cells[6], default_out), _number(cells[7], default_grad)
    return default_out, default_grad


def _number(cell: str, default: float) -> float:
    try:
        return float(cell)
    except ValueError:
        return default
