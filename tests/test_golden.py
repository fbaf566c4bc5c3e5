"""Every fixture of the reference implementation, and the program that checks a folder of them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

import golden

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "golden"
FIXTURES = golden.fixtures(FOLDER) if FOLDER.is_dir() else []
needs_fixtures = pytest.mark.skipif(not FIXTURES, reason=f"no reference fixtures: {FOLDER} is absent")


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["golden.py", str(folder)])
    return golden.main()


@needs_fixtures
@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.name)
def test_fixture(path: Path) -> None:
    passed, line = golden.check(path)
    assert passed, line
    assert line.startswith(f"{path.name}: ")
    assert line.endswith(", ok")


@needs_fixtures
def test_fixtures_of_all_kinds_are_there() -> None:
    """A folder that lost some would pass without a word."""
    seen = {golden.checker_of(path) for path in FIXTURES}
    assert seen == set(golden.CHECKERS.values())


@needs_fixtures
def test_program_passes_good_fixtures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["01_swoosh.safetensors", "51_eden.safetensors"]
    for name in (*names, "README.md"):
        shutil.copy(FOLDER / name, tmp_path)
    assert run(tmp_path, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == names


@needs_fixtures
@pytest.mark.parametrize("trouble", ["wrong values", "truncated"])
def test_program_fails_on_a_spoilt_fixture(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytearray((FOLDER / "01_swoosh.safetensors").read_bytes())
    if trouble == "wrong values":
        data[-400:] = bytes(400)
    else:
        del data[-100:]
    (tmp_path / "01_swoosh.safetensors").write_bytes(data)
    shutil.copy(FOLDER / "51_eden.safetensors", tmp_path)
    assert run(tmp_path, monkeypatch) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("01_swoosh.safetensors: ") and "FAILED" in lines[0]
    assert lines[-1].startswith("51_eden.safetensors: ") and lines[-1].endswith("ok")


@pytest.mark.parametrize("name", ["99_news.safetensors", "011_swoosh.safetensors", "notes.txt"])
def test_program_fails_on_a_kind_it_does_not_know(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"")
    assert run(tmp_path, monkeypatch) == 1
    assert capsys.readouterr().out.startswith(f"{name}: FAILED, a kind of fixture that is not known")


def test_program_fails_on_an_empty_or_missing_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("no fixtures here")
    for folder, message in ((tmp_path, "holds no fixtures"), (tmp_path / "absent", "no such folder")):
        with pytest.raises(SystemExit) as stop:
            run(folder, monkeypatch)
        assert stop.value.code not in (0, None)
        assert message in capsys.readouterr().err
