"""Gradients of two gloo processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from small_models import SMALL_MODEL, random_batch
from zipformer_crctc import distributed
from zipformer_crctc.config import Config, DataConfig, TrainConfig
from zipformer_crctc.distributed import ProcessDied, choose_device, launch, process_group
from zipformer_crctc.loader import Batch
from zipformer_crctc.model import build_model
from zipformer_crctc.objective import Objective, TargetEncoder
from zipformer_crctc.preemption import REQUEUE
from zipformer_crctc.tokenizer import PhoneTokenizer

TESTS = Path(__file__).resolve().parent
TEXTS = ("abc", "deaf", "kid", "lomba")
FRAMES = (120, 120, 120, 120)


def gradients(batch: Batch, distributed: bool) -> dict[str, Tensor]:
    """Gradients of the plain CTC loss of a fixed model: evaluation mode, so neither dropout nor regularisers act."""
    tokenizer = PhoneTokenizer.from_table()
    torch.manual_seed(1)
    model = build_model(SMALL_MODEL.with_values({"use_cr_ctc": False}), tokenizer.vocab_size).eval()
    config = Config(SMALL_MODEL.with_values({"use_cr_ctc": False}), DataConfig(), TrainConfig())
    objective = Objective(config, TargetEncoder(tokenizer))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True) if distributed else model
    objective.train_loss(wrapped, batch, torch.autocast("cpu", enabled=False)).total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def worker(rank: int, world_size: int, folder: str) -> None:
    with process_group(rank, world_size, "cpu", 1) as process:
        rows = slice(2 * rank, 2 * rank + 2)
        whole = random_batch(FRAMES, TEXTS)
        part = Batch(whole.features[rows], whole.num_frames[rows], whole.utterances[rows])
        torch.save(gradients(part, distributed=True), Path(folder) / f"{process.rank}.pt")


def test_averaged_gradients_are_those_of_the_joint_batch(tmp_path: Path) -> None:
    joint = gradients(random_batch(FRAMES, TEXTS), distributed=False)
    launch(worker, 2, 29875, str(tmp_path))
    for rank in range(2):
        averaged = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(averaged) >= set(joint)
        largest = max(float(g.abs().max()) for g in joint.values())
        for name, gradient in joint.items():
            torch.testing.assert_close(averaged[name], gradient / 2, rtol=1e-4, atol=1e-5 * largest, msg=name)


def end_groups(rank: int, world_size: int, folder: str) -> None:
    """DDP is there for longer than its group, whose threads get the interpreter only where it is let go of."""
    import torch.distributed.nn.functional  # as DDP does, and what it finds then it holds for good

    sys.setswitchinterval(60)
    for number in range(10):
        os.environ["MASTER_PORT"] = str(29890 + number)
        with process_group(rank, world_size, "cpu", 1) as process:
            wrapped = DistributedDataParallel(torch.nn.Linear(3, 3))
            process.gather(rank)
        del wrapped
    (Path(folder) / f"{rank} has ended").touch()


def test_a_process_ends_that_lets_go_of_ddp_last(tmp_path: Path) -> None:
    launch(end_groups, 2, 29890, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def end_amid_exchanges(rank: int, world_size: int, ending: str) -> None:
    """Each array is left to a thread of the group, which needs the interpreter to forget it."""
    with process_group(rank, world_size, "cpu", 1) as process:
        process.barrier()
        for _ in range(20):
            dist.all_reduce(torch.ones(1 << 20), async_op=True)
        if ending == "failure":
            raise RuntimeError("as wanted")
    if ending == "exit":
        sys.exit(REQUEUE)


@pytest.mark.parametrize("number", range(3))
def test_a_process_ends_whose_threads_are_busy(number: int) -> None:
    launch(end_amid_exchanges, 2, 29900 + number, "return")


@pytest.mark.parametrize("number, ending, status", [(0, "return", 0), (1, "exit", REQUEUE), (2, "failure", 1)])
def test_statuses_of_processes_that_torchrun_started(number: int, ending: str, status: int) -> None:
    """Also without a standard output."""
    code = f"from test_distributed import *; launch(end_amid_exchanges, 2, 0, {ending!r})"
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(29903 + number)}
    paths = os.pathsep.join(map(str, (TESTS, TESTS.parent)))
    ranks = [
        subprocess.Popen(
            ["sh", "-c", f'exec "$0" -c "$1" {">&-" if rank else ""}', sys.executable, code],
            env={**os.environ, **meeting, "RANK": str(rank), "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [status, status], errors
    assert all(("RuntimeError: as wanted" in error) == (ending == "failure") for error in errors)


def average_some(rank: int, world_size: int, folder: str) -> None:
    distributed.BUCKET_BYTES = 40
    with process_group(rank, world_size, "cpu", 1) as process:
        arrays = [torch.full((2, 3), float(rank)), torch.arange(12.0).view(4, 3).t() * rank, torch.tensor(4.0)]
        process.average_(arrays)
        process.take_from_main_([main := torch.full((3,), float(rank + 5))])
        torch.save([*arrays, main], Path(folder) / f"{rank}.pt")


def test_arrays_are_averaged_in_place_and_taken_from_the_main_process(tmp_path: Path) -> None:
    """Of any layout, more than are exchanged at a time, and larger ones."""
    launch(average_some, 2, 29877, str(tmp_path))
    wanted = [torch.full((2, 3), 0.5), torch.arange(12.0).view(4, 3).t() / 2, torch.tensor(4.0), torch.full((3,), 5.0)]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert all(torch.equal(got, want) for got, want in zip(found, wanted, strict=True))


def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--world-size"):
        choose_device("auto", local_rank=1)
    assert choose_device("cpu", local_rank=1) == torch.device("cpu")


def test_torchrun_and_world_size_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="torchrun"):
        launch(worker, 2, 29876, "nowhere")


def die_on_rank_1(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_a_dead_process_is_named_and_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "DEATH_GRACE", 0)
    with pytest.raises(ProcessDied, match=r"rank 1 \(process \d+\) was killed by SIGKILL.*--resume auto"):
        launch(die_on_rank_1, 2, 29885)


class EndsBetweenLooks(BaseProcess):
    """A process that runs at the first look and is killed by the second."""

    pid = 7

    def __init__(self) -> None:
        self.codes = iter([None, -9])

    @property
    def exitcode(self) -> int | None:
        return next(self.codes)


def test_a_process_that_ends_between_two_looks_is_named_by_its_signal() -> None:
    processes: list[BaseProcess] = [EndsBetweenLooks()]
    assert distributed._failure(processes) == ""
    assert distributed._failure(processes) == "rank 0 (process 7) was killed by SIGKILL"


def ask_for_requeue(rank: int, world_size: int) -> None:
    sys.exit(REQUEUE)


def test_a_run_that_was_asked_to_end_passes_its_status_on() -> None:
    with pytest.raises(SystemExit) as ended:
        launch(ask_for_requeue, 2, 29886)
    assert ended.value.code == REQUEUE
