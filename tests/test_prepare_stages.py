"""prepare.sh and shared/parse_options.sh, from the outside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_prepare_tsv import write_audio, write_table
from test_prepare_tusom2021 import make_repository
from zipformer_crctc.dataconfig import ALIGNABLE_ONLY, load_data_config
from zipformer_crctc.filters import FilterLimits

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        text=True,
        capture_output=True,
        timeout=300,
        check=False,
    )


def prepare(*options: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run(ROOT / "prepare.sh", "--default-config", "", *options, cwd=cwd)


@pytest.fixture
def table(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        write_audio(tmp_path / f"{name}.wav", seconds=1.5)
    return write_table(tmp_path, "audio\ttext\tsplit", "a.wav\tpapapa\ttrain", "b.wav\tpa\tdev")


def test_stages_are_done_once(tmp_path: Path, table: Path) -> None:
    options = ("--corpus", "tsv", "--source", table, "--output", tmp_path / "out", "--jobs", "1")
    first = prepare(*options)
    assert first.returncode == 0, first.stderr
    assert "train: 1 cuts, 0.00 h" in first.stderr
    assert "filters keep 1 cuts" in first.stderr
    shard = tmp_path / "out/train/cuts.000000.jsonl.gz"
    before = shard.stat().st_mtime_ns
    sets = load_data_config(tmp_path / "out/data.yaml")
    assert sets.train == [tmp_path / "out/train"]
    assert list(sets.dev) == ["tsv-dev"]
    assert sets.filters == FilterLimits()

    # The same source, named from another folder.
    second = prepare("--corpus", "tsv", "--source", table.name, "--output", "out", cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("done before") == 4
    assert shard.stat().st_mtime_ns == before

    # Limits are no matter of the shards: only the later stages are done again.
    third = prepare(*options, "--filters", "alignable")
    assert third.returncode == 0, third.stderr
    assert third.stdout.count("done before") == 2
    assert shard.stat().st_mtime_ns == before
    assert load_data_config(tmp_path / "out/data.yaml").filters == ALIGNABLE_ONLY

    # Another table is one: nothing is replaced without being asked for.
    write_table(tmp_path, "audio\ttext\tsplit", "a.wav\ttatata\ttrain")
    fourth = prepare(*options)
    assert fourth.returncode == 1
    assert "was made with other options" in fourth.stderr
    assert shard.stat().st_mtime_ns == before
    fifth = prepare(*options, "--force", "true")
    assert fifth.returncode == 0, fifth.stderr
    assert shard.stat().st_mtime_ns != before
    assert not list((tmp_path / "out/dev").glob("cuts*"))
    assert load_data_config(tmp_path / "out/data.yaml").dev == {}


def test_stop_stage(tmp_path: Path, table: Path) -> None:
    options = ("--corpus", "tsv", "--source", table, "--output", tmp_path / "out")
    assert prepare(*options, "--stop-stage=1").returncode == 0
    assert not (tmp_path / "out/data.yaml").exists()
    rest = prepare(*options, "--stage", "2", "--stop-stage", "2")
    assert rest.returncode == 0, rest.stderr
    assert (tmp_path / "out/data.yaml").is_file()
    assert (tmp_path / "out/lang/unigram.model").is_file()
    assert "stage 3" not in rest.stdout


def test_foreign_shards_are_not_replaced(tmp_path: Path, table: Path) -> None:
    foreign = tmp_path / "out/train/cuts.000000.jsonl.gz"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    result = prepare("--corpus", "tsv", "--source", table, "--output", tmp_path / "out")
    assert result.returncode == 1
    assert "holds shards that prepare.sh did not make" in result.stderr
    assert foreign.read_text() == "precious"


def test_a_failed_stage_is_not_marked(tmp_path: Path) -> None:
    table = write_table(tmp_path, "audio\ttext", "absent.wav\tpa")
    options = ("--corpus", "tsv", "--source", table, "--output", tmp_path / "out")
    for _ in range(2):
        result = prepare(*options)
        assert result.returncode == 1
        assert "nothing is left of the corpus: 1 rows were skipped" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_tusom2021_is_cloned(tmp_path: Path) -> None:
    origin = make_repository(tmp_path / "origin")
    for command in (
        ["init", "--quiet"],
        ["add", "."],
        ["-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "--quiet", "-m", "data"],
    ):
        assert run("git", *command, cwd=origin).returncode == 0
    options = ("--corpus", "tusom2021", "--output", tmp_path / "out", "--stop-stage", "2")
    result = prepare(*options, "--repository", origin.as_uri())
    assert result.returncode == 0, result.stderr
    assert "this split is left out" in result.stderr
    assert load_data_config(tmp_path / "out/data.yaml").filters == ALIGNABLE_ONLY
    failed = prepare(
        "--corpus", "tusom2021", "--output", tmp_path / "other", "--repository", (tmp_path / "no").as_uri()
    )
    assert failed.returncode == 1
    assert "without a network, copy the repository and give --source DIR" in failed.stderr


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        (["--hour", "3"], ["unknown option --hour"]),
        (["-x"], ["unknown option -x"]),
        (["--PATH", "x"], ["unknown option --PATH"]),
        (["--hours"], ["option --hours needs a value"]),
        (["--hours", "--jobs", "2"], ["option --hours needs a value"]),
        (["--force", "maybe"], ["--force is 'maybe', expected true or false"]),
        (["--corpus", "timit"], ["--corpus is 'timit'"]),
        (["--corpus", "tsv"], ["--corpus tsv needs --source"]),
        (["--corpus", "tsv", "--source", "/absent.tsv"], ["--source /absent.tsv does not exist"]),
        (["--source", "/"], ["--source is an option of --corpus tusom2021 tsv ipapack, not of espeak"]),
        (["--hours", "0"], ["--hours is '0'"]),
        (
            ["--stage", "9", "--jobs", "none", "--seed", "-1", "--filters", "all", "more"],
            [
                "--stage is '9'",
                "--jobs is 'none'",
                "--seed is '-1'",
                "--filters is 'all'",
                "unexpected argument 'more'",
            ],
        ),
    ],
)
def test_wrong_options(tmp_path: Path, options: list[str], messages: list[str]) -> None:
    result = prepare("--output", tmp_path / "out", *options)
    assert result.returncode == 1
    for message in messages:
        assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_help_is_the_head_of_the_script() -> None:
    result = prepare("--help")
    assert result.returncode == 0
    assert result.stdout.startswith("Prepare a corpus")
    assert "--stop-stage N" in result.stdout
    assert "set -euo" not in result.stdout


def test_parse_options(tmp_path: Path) -> None:
    script = tmp_path / "script.sh"
    script.write_text(
        f'set -euo pipefail\nlong_name=1\nflag=false\nempty=x\n. "{ROOT}/shared/parse_options.sh"\n'
        'echo "$long_name|$flag|$empty|$*"\n'
    )
    for arguments, expected in (
        ([], "1|false|x|"),
        (["--long-name", "a b", "--flag=true", "--empty="], "a b|true||"),
        (["--empty", "", "--long-name=-1=2", "rest", "--flag"], "-1=2|false||rest --flag"),
        (["--", "--flag"], "1|false|x|--flag"),
    ):
        result = run("bash", script, *arguments)
        assert (result.returncode, result.stdout) == (0, expected + "\n"), result.stderr
