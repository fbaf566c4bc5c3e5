"""Whole training runs, very small ones."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tiny_run import read_metrics, train_flags, write_corpus
from zipformer_crctc import checkpoint, runstate, train
from zipformer_crctc.commandline import parse_train_args
from zipformer_crctc.cudagraphs import GraphedPasses
from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.distributed import Process, launch, process_group
from zipformer_crctc.loader import Batch
from zipformer_crctc.objective import Loss
from zipformer_crctc.preemption import REQUEUE, Preemption
from zipformer_crctc.probe import OutOfMemory
from zipformer_crctc.resume import newest_checkpoint

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six batches."""
    exp_dir = tmp_path_factory.mktemp("run")
    train.main(train_flags(corpus, exp_dir))
    return exp_dir


def losses(exp_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(exp_dir, "train")]


def test_a_run_writes_checkpoints_metrics_and_logs(finished: Path) -> None:
    assert sorted(path.name for path in finished.glob("*.pt")) == ["checkpoint-3.pt", "checkpoint-6.pt"]
    assert [record["step"] for record in read_metrics(finished, "train")] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in read_metrics(finished, "valid")] == [3, 6]
    assert len(list((finished / "log").iterdir())) == 1
    assert all(loss > 0 for loss in losses(finished))


def test_a_checkpoint_has_the_published_keys_and_ours(finished: Path) -> None:
    payload = checkpoint.load(finished / "checkpoint-6.pt")
    published = (
        "model",
        "model_avg",
        "optimizer",
        "scheduler",
        "grad_scaler",
        "sampler",
        "batch_idx_train",
        "cur_epoch",
    )
    best = ("best_train_loss", "best_valid_loss", "best_train_epoch", "best_valid_epoch", "average_period", "blank_id")
    assert set(payload) >= {*published, *best, "sos_id", "eos_id", "vocab_size", "base_lr", "config", "tokenizer"}
    assert payload["batch_idx_train"] == 6
    assert all(tensor.dtype == torch.float64 for tensor in payload["model_avg"].values())
    assert all(tensor.dtype == torch.float32 for tensor in payload["model"].values())


def test_same_seed_same_losses_to_the_bit(corpus: Path, finished: Path, tmp_path: Path) -> None:
    train.main(train_flags(corpus, tmp_path / "again"))
    assert losses(tmp_path / "again") == losses(finished)
    train.main(train_flags(corpus, tmp_path / "other", seed=43))
    assert losses(tmp_path / "other") != losses(finished)


def test_resume_goes_on_where_the_checkpoint_was(corpus: Path, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3.pt").write_bytes((finished / "checkpoint-3.pt").read_bytes())
    train.main(train_flags(corpus, tmp_path, start_batch=3, base_lr=0.01))
    records = read_metrics(tmp_path, "train")
    assert [record["step"] for record in records] == [4, 5, 6]
    assert records[0]["learning_rate"] < 0.5 * read_metrics(finished, "train")[3]["learning_rate"]
    place = checkpoint.load(tmp_path / "checkpoint-6.pt")["sampler"]
    assert place == checkpoint.load(finished / "checkpoint-6.pt")["sampler"]


def test_going_back_by_name_leaves_nothing_of_what_came_after(corpus: Path, finished: Path, tmp_path: Path) -> None:
    for number in (3, 6):
        shutil.copy(finished / f"checkpoint-{number}.pt", tmp_path)
    train.main(train_flags(corpus, tmp_path, start_batch=3, num_steps=5, save_every_n=1, keep_last_k=2))
    assert sorted(path.name for path in tmp_path.glob("*.pt*")) == [
        "checkpoint-4.pt",
        "checkpoint-5.pt",
        "checkpoint-6.pt.undone",
    ]


def test_ranks_with_other_data_are_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Process.sum

    def of_others(self: Process, values: torch.Tensor) -> torch.Tensor:
        return own(self, values) + (torch.tensor([0.0, 0.0, 5.0]) if len(values) == 3 else 0.0)

    monkeypatch.setattr(Process, "sum", of_others)
    with pytest.raises(train.TrainingStopped, match="batch 1: the ranks do not read the same utterances"):
        train.main(train_flags(corpus, tmp_path))


def equal(a: Any, b: Any) -> bool:
    """Whether two nested states are equal to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def test_a_resumed_run_is_the_same_to_the_bit(corpus: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "checkpoint-3.pt", tmp_path)
    (tmp_path / "checkpoint-5.pt").write_bytes(b"damaged")
    (tmp_path / ".checkpoint-4.pt.77.tmp").write_bytes(b"half-written")
    train.main(train_flags(corpus, tmp_path, resume="auto", num_workers=2))
    assert losses(tmp_path) == losses(finished)[3:]
    assert not (tmp_path / ".checkpoint-4.pt.77.tmp").exists()
    first, second = (checkpoint.load(folder / "checkpoint-6.pt") for folder in (finished, tmp_path))
    for part in ("model", "model_avg", "scheduler", "sampler", "rank_states"):
        assert equal(first[part], second[part]), part
    assert equal(first["optimizer"]["state"], second["optimizer"]["state"])


@pytest.mark.parametrize("states", ["of two ranks", "none, as published"])
def test_a_checkpoint_without_this_rank_s_random_states_is_good_enough(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: str
) -> None:
    payload = checkpoint.load(finished / "checkpoint-3.pt")
    if states == "of two ranks":
        payload["rank_states"] *= 2
    else:
        for key in ("rank_states", "gradients", "schedule_batch_count", "skipped_steps", "skipped_in_a_row"):
            del payload[key]
        payload["sampler"] = {"epoch": 0, "drop_last": True, "world_size": 1, "rank": 0, "seed": 0, "shuffle": True}
    checkpoint.save(tmp_path / "checkpoint-3.pt", payload)
    warnings: list[str] = []
    monkeypatch.setattr(runstate.logger, "warning", lambda text, *args: warnings.append(text % args))
    train.main(train_flags(corpus, tmp_path, resume="auto", num_steps=4, plain_ctc_batches=2, save_every_n=1))
    assert len(losses(tmp_path)) == 1
    told = "random numbers begin anew" if states == "of two ranks" else "epoch 1 begins anew"
    assert any(told in warning for warning in warnings)


def test_a_signal_within_mixed_training_and_accumulation_changes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data.yaml"
    folder = corpus.parent
    data.write_text(
        f"train: [{folder}/train]\nunsup: [{folder}/dev, {folder}/test]\nfilters: {{min_tokens: 1}}\n"
        "unsup_filters: {min_tokens: 1}\n"
    )
    flags = {"use_unsup_cr_ctc": True, "max_duration": 3, "grad_accumulation": 2, "plain_ctc_batches": 0}
    train.main(train_flags(data, tmp_path / "whole", **flags))

    log = train.Trainer._log

    def log_and_signal(self: train.Trainer, *args: Any) -> None:
        log(self, *args)
        if self.progress.batch_idx_train == 1:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(train.Trainer, "_log", log_and_signal)
    stopped = train_flags(data, tmp_path / "stopped", resume="auto", **flags)
    with pytest.raises(SystemExit) as ended:
        train.main(stopped)
    assert ended.value.code == REQUEUE
    found = newest_checkpoint(tmp_path / "stopped")
    assert found is not None and found[0].name == "preempted.pt" and found[1]["batch_idx_train"] == 2
    train.main(stopped)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    # Batch 3 lies within an accumulation: its gradient is part of the checkpoint.
    (tmp_path / "again").mkdir()
    shutil.copy(tmp_path / "whole" / "checkpoint-3.pt", tmp_path / "again")
    train.main(train_flags(data, tmp_path / "again", resume="auto", **flags))
    first, second = (checkpoint.load(tmp_path / name / "checkpoint-6.pt") for name in ("whole", "again"))
    assert equal(first["model"], second["model"])
    assert equal(first["sampler"], second["sampler"]) and first["sampler"]["unsup"] is not None


def test_a_full_disk_does_not_end_a_run(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int) -> None:
        if len(losses(tmp_path)) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    train.main(train_flags(corpus, tmp_path, num_steps=4, save_every_n=2))
    assert [path.name for path in tmp_path.glob("*.pt")] == ["checkpoint-4.pt"]
    monkeypatch.setattr(train.checkpoint, "save", lambda *args: full_for_ever())
    with pytest.raises(train.TrainingStopped, match="disk"):
        train.main(train_flags(corpus, tmp_path / "full", num_steps=1))


def full_for_ever() -> None:
    raise checkpoint.SaveError("could not be written: look at the disk")


def test_a_dry_run_tells_what_a_run_needs_and_writes_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(train.logger, "info", lambda text, *args: lines.append(text % args))
    exp_dir = tmp_path / "exp"
    train.main(train_flags(corpus, exp_dir, dry_run=True, scan_oom=True))
    assert not exp_dir.exists()
    told = "\n".join(lines)
    assert all(words in told for words in ("M parameters", "fit into memory", "batches in an epoch", "s for a step"))
    assert "h for the 6 batches of the run" in told


def test_the_memory_scan_changes_no_loss(corpus: Path, finished: Path, tmp_path: Path) -> None:
    train.main(train_flags(corpus, tmp_path, scan_oom=True))
    assert losses(tmp_path) == losses(finished)


def test_epochs_end_and_leave_files(corpus: Path, tmp_path: Path) -> None:
    train.main(train_flags(corpus, tmp_path, num_steps=0, num_epochs=2, save_every_n=100))
    names = {path.name for path in tmp_path.glob("*.pt")}
    assert names == {"epoch-1.pt", "epoch-2.pt", "best-train-loss.pt", "best-valid-loss.pt"}
    train.main(train_flags(corpus, tmp_path, num_steps=0, num_epochs=3, start_epoch=3, save_every_n=100))
    assert (tmp_path / "epoch-3.pt").is_file()
    with_numbers = losses(tmp_path)
    (tmp_path / "epoch-3.pt").unlink()
    train.main(train_flags(corpus, tmp_path, num_steps=0, num_epochs=3, resume="auto", save_every_n=100))
    assert losses(tmp_path) == with_numbers


def test_mixed_training_adds_the_pseudo_labelled_loss(corpus: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "data.yaml"
    mixed.write_text(
        f"train: [{corpus.parent}/train]\nunsup: [{corpus.parent}/dev]\nfilters: {{min_tokens: 1}}\n"
        "unsup_filters: {min_tokens: 1}\n"
    )
    flags = train_flags(
        mixed, tmp_path / "run", use_unsup_cr_ctc=True, max_duration=2, num_steps=3, plain_ctc_batches=0
    )
    train.main(flags)
    records = read_metrics(tmp_path / "run", "train")
    assert all(record["unsup_ctc_loss"] > 0 and record["unsup_cr_loss"] > 0 for record in records)


def test_a_run_may_begin_with_plain_ctc(corpus: Path, tmp_path: Path) -> None:
    train.main(train_flags(corpus, tmp_path, plain_ctc_batches=2, num_steps=4))
    consistency = [record["cr_loss"] > 0 for record in read_metrics(tmp_path, "train")]
    assert consistency == [False, False, True, True]


def test_plain_ctc_and_accumulation(corpus: Path, tmp_path: Path) -> None:
    flags = train_flags(corpus, tmp_path, use_cr_ctc=False, enable_spec_aug=True, grad_accumulation=2, num_steps=4)
    train.main(flags)
    payload = checkpoint.load(tmp_path / "checkpoint-4.pt")
    steps = {state["step"] for state in payload["optimizer"]["state"].values()}
    assert steps == {2}
    assert all(record["cr_loss"] == 0 for record in read_metrics(tmp_path, "train"))


def test_gradients_are_exchanged_once_for_each_optimizer_step(corpus: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.yaml"
    folder = corpus.parent
    data.write_text(
        f"train: [{folder}/train]\nunsup: [{folder}/dev]\n"
        "filters: {min_tokens: 1}\nunsup_filters: {min_tokens: 1}\n"
    )
    flags = {"use_unsup_cr_ctc": True, "max_duration": 3, "grad_accumulation": 2, "num_steps": 4}
    args = parse_train_args(train_flags(data, tmp_path / "run", **flags))
    exchanges: list[int] = []

    def exchange(bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        exchanges.append(trainer.progress.batch_idx_train)
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        process = Process(0, 1, torch.device("cpu"))
        trainer = train.Trainer(args.config, process, load_data_config(data), Preemption())
        wrapped = DistributedDataParallel(trainer.model, find_unused_parameters=True)  # all of it is one bucket
        wrapped.register_comm_hook(None, lambda state, bucket: exchange(bucket))
        trainer.passes = wrapped
        trainer.fit()
        trainer.close()
    finally:
        dist.destroy_process_group()
    assert exchanges == [2, 4]


def train_on_two_ranks(rank: int, world_size: int, data: str, exp_dir: str, late: bool) -> None:
    """With gradients averaged by DDP, or as beside recorded passes."""
    args = parse_train_args(train_flags(Path(data), Path(exp_dir), world_size=2, num_threads=1))
    with process_group(rank, world_size, "cpu", 1) as process:
        trainer = train.Trainer(args.config, process, load_data_config(Path(data)), Preemption())
        if late:
            trainer.passes, trainer.average_late = trainer.model, True
        trainer.fit()
        trainer.close()


def test_gradients_that_are_averaged_late_are_those_of_ddp(corpus: Path, tmp_path: Path) -> None:
    """To the bit, with parameters that are used on one rank, or on none, in some steps."""
    for port, late in ((29878, False), (29879, True)):
        launch(train_on_two_ranks, 2, port, str(corpus), str(tmp_path / str(late)), late)
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    by_ddp, ours = (checkpoint.load(tmp_path / name / "checkpoint-6.pt") for name in ("False", "True"))
    assert all(torch.equal(ours["model"][name], p) for name, p in by_ddp["model"].items())


def test_the_validation_loss_falls(corpus: Path, tmp_path: Path) -> None:
    train.main(train_flags(corpus, tmp_path, num_steps=30, valid_interval=5, average_period=5, save_every_n=30))
    values = [record["loss"] for record in read_metrics(tmp_path, "valid")]
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_skips_the_step(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    original, calls = train.Objective.train_loss, []

    def poisoned(self: train.Objective, *args: Any) -> Any:
        loss = original(self, *args)
        calls.append(loss)
        if len(calls) != 2:
            return loss
        if where == "loss":
            return type(loss)(loss.total * float("nan"), loss.sums)
        loss.total.register_hook(lambda gradient: gradient * float("inf"))
        return loss

    monkeypatch.setattr(train.Objective, "train_loss", poisoned)
    train.main(train_flags(corpus, tmp_path, num_steps=3))
    state = checkpoint.load(tmp_path / "checkpoint-3.pt")
    assert state["skipped_steps"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values())
    saved = checkpoint.load(tmp_path / "bad-batch-2-0.pt")
    assert saved["ids"] and saved["batches"][0]["features"].ndim == 3


def test_a_run_without_finite_losses_stops(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = train.Objective.train_loss

    def always_nan(self: train.Objective, *args: Any) -> Any:
        loss = original(self, *args)
        return type(loss)(loss.total * float("nan"), loss.sums)

    monkeypatch.setattr(train.Objective, "train_loss", always_nan)
    with pytest.raises(train.TrainingStopped, match="--max-skipped-steps"):
        train.main(train_flags(corpus, tmp_path, num_steps=5, max_skipped_steps=2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"start_batch": 77, "num_steps": 100}, "checkpoint-77.pt"),
        ({"bpe_model": "nowhere.model"}, "nowhere.model"),
        ({"base_lr": "-1"}, "--base-lr"),
    ],
)
def test_bad_input_ends_with_one_message(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        train.main(train_flags(**{"data_config": corpus, "exp_dir": tmp_path, **change}))
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(
    corpus: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoint-3.pt").write_bytes((finished / "checkpoint-3.pt").read_bytes())
    with pytest.raises(SystemExit):
        train.main([*train_flags(corpus, tmp_path, start_batch=3), "--encoder-dim", "32,32,32,40,32,32"])
    assert "another configuration" in capsys.readouterr().err


def test_two_processes_train(corpus: Path, tmp_path: Path) -> None:
    flags = train_flags(corpus, tmp_path, world_size=2, max_duration=3, num_steps=3, master_port=29871)
    done = subprocess.run(
        [sys.executable, str(ROOT / "zipformer_crctc" / "train.py"), *flags],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2, 3]
    assert checkpoint.load(tmp_path / "checkpoint-3.pt")["world_size"] == 2


def test_terminating_a_run_ends_all_its_processes(corpus: Path, tmp_path: Path) -> None:
    flags = train_flags(corpus, tmp_path, world_size=2, max_duration=3, num_steps=100_000, master_port=29877)
    script = str(ROOT / "zipformer_crctc" / "train.py")
    group = subprocess.Popen([sys.executable, script, *flags], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        wait_for(lambda: (tmp_path / "metrics.jsonl").is_file() and len(losses(tmp_path)) > 1)
        group.terminate()
        assert group.wait(timeout=120) == REQUEUE
        assert newest_checkpoint(tmp_path) is not None
        assert (tmp_path / "preempted.pt").is_file()
        wait_for(lambda: not is_alive(group.pid))
    finally:
        if is_alive(group.pid):
            os.killpg(group.pid, signal.SIGKILL)


def wait_for(condition: Callable[[], bool], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.1)


def is_alive(group: int) -> bool:
    """Whether any process of the group runs."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_agents_save_at_sigterm_and_go_on_from_there(corpus: Path, tmp_path: Path) -> None:
    """As on two nodes: agents that meet by rendezvous, each with a process of the run."""

    def start(run: str, num_steps: int) -> list[subprocess.Popen[bytes]]:
        meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", run]
        program = [sys.executable, "-m", "torch.distributed.run", *meeting, "--rdzv-endpoint", "localhost:29883"]
        flags = train_flags(corpus, tmp_path, max_duration=3, num_steps=num_steps, resume="auto", save_every_n=1000)
        command = [*program, str(ROOT / "zipformer_crctc" / "train.py"), *flags]
        return [subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) for _ in range(2)]

    agents = start("first", 100_000)
    try:
        wait_for(lambda: (tmp_path / "metrics.jsonl").is_file() and len(losses(tmp_path)) > 1)
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(timeout=120)
        saved = int(checkpoint.load(tmp_path / "preempted.pt")["batch_idx_train"])
        agents = start("second", saved + 2)
        assert [agent.wait(timeout=240) for agent in agents] == [0, 0]
        assert [record["step"] for record in read_metrics(tmp_path, "train")] == list(range(1, saved + 3))
    finally:
        for agent in agents:
            if is_alive(agent.pid):
                os.killpg(agent.pid, signal.SIGKILL)


def test_torchrun_starts_it_too(corpus: Path, tmp_path: Path) -> None:
    program = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    flags = train_flags(corpus, tmp_path, max_duration=3, num_steps=2)
    script = str(ROOT / "zipformer_crctc" / "train.py")
    done = subprocess.run([*program, script, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in read_metrics(tmp_path, "train")] == [1, 2]


def test_a_pass_for_which_recordings_leave_no_memory_is_done_again_without_them(
    corpus: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the failed pass left is not added to; without recordings the error stands."""
    forward_and_backward, passes, calls = train.Trainer._forward_and_backward, Mock(spec=GraphedPasses), []

    def limited(trainer: train.Trainer, batch: Batch, scale: float) -> Loss:
        calls.append(batch)
        if len(calls) != 2:
            return forward_and_backward(trainer, batch, scale)
        passes.side_effect = trainer.model
        trainer.passes = passes
        numbers, decisions = torch.get_rng_state(), random.getstate()
        forward_and_backward(trainer, batch, scale)
        torch.set_rng_state(numbers)
        random.setstate(decisions)
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(train.Trainer, "_forward_and_backward", limited)
    passes.holds_memory = True
    train.main(train_flags(corpus, tmp_path / "again"))
    passes.give_up.assert_called_once_with("none left")
    assert losses(tmp_path / "again") == losses(finished)
    calls.clear()
    passes.holds_memory = False
    with pytest.raises(OutOfMemory):
        train.main(train_flags(corpus, tmp_path / "ended"))
