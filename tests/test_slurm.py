"""The batch scripts for Slurm, with stand-ins for its commands: what goes back into the queue, and what is started."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path for path in (ROOT / "local/slurm").iterdir())

SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf 'node%s\\n' 1 2; else echo "$@" >>"$CALLS"; fi
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
"""
SAVES = 'trap "echo saved; exit 75" TERM; echo ready; while true; do sleep 0.05; done'
"""A program that saves its state on SIGTERM."""


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """With stand-ins for scontrol and srun, whose calls go to a file."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_NTASKS": "8",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "CALLS": str(tmp_path / "calls"),
    }
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **slurm, **more}


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    return path.read_text().splitlines() if path.exists() else []


def steps(command: str) -> list[str]:
    """A batch script that runs a program in bash as its steps."""
    return ["bash", "-c", 'set -euo pipefail; . local/slurm/common.sh; run_steps bash -c "$0"; echo end', command]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize(
    ("status", "queued", "result"), [(0, False, 0), (75, True, 0), (1, False, 1), (137, False, 137)]
)
def test_only_what_wants_to_go_on_is_queued_again(tmp_path: Path, status: int, queued: bool, result: int) -> None:
    done = subprocess.run(
        steps(f"exit {status}"), cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, check=False
    )
    assert done.returncode == result
    assert calls(tmp_path) == (["requeue 123456"] if queued else [])
    assert ("end" in done.stdout) == (status == 0)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_before_the_time_limit_the_program_saves_and_the_job_is_queued_again(tmp_path: Path, number: int) -> None:
    with subprocess.Popen(
        steps(SAVES), cwd=ROOT, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        output = process.stdout.read()
        assert process.wait() == 0
    assert "saved" in output and "status 75, interrupted: true" in output
    assert calls(tmp_path) == ["requeue 123456"]


def test_training_starts_torchrun_on_every_node(tmp_path: Path) -> None:
    variables = environment(tmp_path, STAGE_FROM="/far/data", STAGE_TO="/near/data", IMAGE="image.sif")
    script = str(ROOT / "local/slurm/train.sbatch")
    subprocess.run(["bash", script, "--exp-dir", "exp/a b"], env=variables, capture_output=True, check=True)
    staged, trained = calls(tmp_path)
    assert "--ntasks=2 --ntasks-per-node=1" in staged and staged.endswith("/far/data /near/data")
    assert f"apptainer exec --nv --bind {ROOT} --bind /near/data image.sif python -m torch.distributed.run" in trained
    assert "--nnodes 2 --nproc-per-node 4" in trained
    assert "--rdzv-endpoint node1:23456 --rdzv-id 123456-0 zipformer_crctc/train.py --resume auto" in trained
    assert trained.endswith("--exp-dir exp/a b")


def test_labelling_starts_a_task_for_each_gpu(tmp_path: Path) -> None:
    script = str(ROOT / "local/slurm/pseudo_label.sbatch")
    subprocess.run(["bash", script, "--source", "data"], env=environment(tmp_path), capture_output=True, check=True)
    (call,) = calls(tmp_path)
    assert '--world-size "$SLURM_NTASKS" --rank "$SLURM_PROCID"' in call
    assert call.endswith(f"{ROOT}/.venv/bin/python zipformer_crctc/pseudo_label.py --source data")


def test_nothing_runs_outside_slurm(tmp_path: Path) -> None:
    variables = {name: value for name, value in environment(tmp_path).items() if name != "SLURM_SUBMIT_DIR"}
    script = str(ROOT / "local/slurm/train.sbatch")
    done = subprocess.run(["bash", script], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "start this script with sbatch" in done.stderr
    assert calls(tmp_path) == []
