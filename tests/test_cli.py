"""The command zipa, and what the wheel says it needs."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from zipformer_crctc import cli

ROOT = Path(__file__).resolve().parents[1]


def status(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    code = 0
    try:
        cli.main(argv)
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_program_is_there() -> None:
    for name in cli.PROGRAMS:
        assert callable(importlib.import_module(f"zipformer_crctc.{name}").main), name


def test_the_readme_lists_every_program() -> None:
    (listed,) = re.findall(r"`zipa ([\w-]+(?:\|[\w-]+)+)`", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed.replace("-", "_").split("|")) == sorted(cli.PROGRAMS)
    assert set(cli.ALIASES.values()) <= set(cli.PROGRAMS)


def test_a_program_gets_its_flags(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = status(capsys, "transcribe", "--model", "m.pt", "a.wav", "--print-config")
    assert code == 0 and json.loads(out)["inputs"] == ["a.wav"]
    code, out, _ = status(capsys, "time-errors", "--help")
    assert code == 0 and out.startswith("usage: zipa time-errors")


def test_help_and_unknown_programs(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = status(capsys)
    assert code == 0 and all(name in out for name in (*cli.PROGRAMS, cli.PREPARE))
    code, _, err = status(capsys, "transscribe")
    assert code == 2 and "no program 'transscribe'" in err


def test_prepare_is_the_shell_script_of_a_checkout(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cli.PREPARE_SCRIPT == ROOT / "prepare.sh" and cli.PREPARE_SCRIPT.is_file()
    script = tmp_path / "prepare.sh"
    monkeypatch.setattr(cli, "PREPARE_SCRIPT", script)
    code, _, err = status(capsys, "prepare", "--corpus", "espeak")
    assert code == 2 and "only a checkout of the project has" in err
    script.write_text('#!/bin/sh\n[ "$2" = espeak ] && exit 7\n')
    script.chmod(0o755)
    assert status(capsys, "prepare", "--corpus", "espeak")[0] == 7


def test_a_missing_package_is_named_with_its_extra(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data.yaml").write_text("train: []\n")
    monkeypatch.setitem(sys.modules, "yaml", None)
    exp_dir = str(tmp_path)
    code, _, err = status(capsys, "decode", "--exp-dir", exp_dir, "--data-config", str(tmp_path / "data.yaml"))
    assert code == 2 and "pip install 'zipformer-crctc[train]'" in err


def test_requirements_and_extras_name_the_same_packages() -> None:
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")
    base = re.findall(r'^  "([\w-]+)>=', project[0], flags=re.M)
    extras = re.findall(r'"([\w-]+)>=', project[1].split("[project.scripts]")[0])
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), flags=re.M)
    assert set(pinned) <= {*base, *extras}
    assert set(base) <= set(pinned)
