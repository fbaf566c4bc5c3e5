"""Compare the project with fixtures of the reference implementation: `python tests/golden.py DIR`.

Prints one line for each fixture in the folder, beginning with its file name: largest absolute and relative error and
whether all of it is within tolerance. Exit status 1 if any fails or is of a kind that is not known here.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import torch

from golden_checks import encoder, features, text, training
from golden_checks.compare import Checker, Comparison

CHECKERS: Mapping[str, Checker] = {**encoder.CHECKERS, **features.CHECKERS, **text.CHECKERS, **training.CHECKERS}


def fixtures(folder: Path) -> list[Path]:
    """The fixtures of a folder: its files but the README, and the tokenizer's folder."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the folder that holds the fixtures")
    paths = [p for p in sorted(folder.iterdir()) if p.name.lower() != "readme.md" and not p.name.startswith(".")]
    if not paths:
        raise ValueError(f"{folder}: holds no fixtures")
    return paths


def checker_of(path: Path) -> Checker | None:
    """The checker whose key is the beginning of the file's name up to an underscore or its end."""
    names = [name for name in CHECKERS if path.stem == name or path.stem.startswith(f"{name}_")]
    return CHECKERS[max(names, key=len)] if names else None


def check(path: Path) -> tuple[bool, str]:
    """Whether a fixture passes, and its line."""
    checker = checker_of(path)
    if checker is None:
        return False, f"{path.name}: FAILED, a kind of fixture that is not known here"
    try:
        results = checker(path)
    except Exception as error:
        traceback.print_exc()
        return False, f"{path.name}: FAILED, {type(error).__name__}: {error}"
    failures = [result for result in results if not result.ok]
    ok = bool(results) and not failures
    largest = max((r.abs_error for r in results), default=0.0), max((r.rel_error for r in results), default=0.0)
    line = f"{path.name}: {len(results)} values, abs {largest[0]:.2e}, rel {largest[1]:.2e}, {'ok' if ok else 'FAILED'}"
    return ok, line + "".join(f"\n    {_describe(failure)}" for failure in failures[:10])


def _describe(failure: Comparison) -> str:
    return f"{failure.name}: abs {failure.abs_error:.3e}, rel {failure.rel_error:.3e} {failure.detail}".rstrip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of fixtures")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_default_device(args.device)
    torch.backends.cudnn.allow_tf32 = False
    try:
        paths = fixtures(args.folder)
    except ValueError as error:
        parser.error(str(error))
    passed = True
    for path in paths:
        ok, line = check(path)
        print(line, flush=True)
        passed = passed and ok
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
