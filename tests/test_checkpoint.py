from __future__ import annotations

import json
import os
import pickle
import re
import stat
import zipfile
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zipformer_crctc import checkpoint
from zipformer_crctc.checkpoint import CheckpointError, Choice, choose_checkpoints, load, save
from zipformer_crctc.optim import Eden, ScaledAdam


class Attack:
    """Unpickling one runs a command."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def small_model(vocabulary: int = 5, width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Linear(width, vocabulary))


def rewrite_pickle(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes of the pickle inside a checkpoint file."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            if name.endswith("data.pkl"):
                assert re.search(old, content)
                content = re.sub(old, new, content)
            archive.writestr(name, content)


def training_payload(batch: int = 8, model: nn.Module | None = None, **params: Any) -> dict[str, Any]:
    model = model or small_model()
    optimizer = ScaledAdam([{"named_params": list(model.named_parameters())}], lr=0.045, clipping_scale=2.0)
    scheduler = Eden(optimizer, 7500, 3.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    scheduler.step_batch(batch)
    optimizer.step()
    return checkpoint.make_payload(
        model.state_dict(),
        model_avg={name: tensor.double() for name, tensor in model.state_dict().items()},
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(),
        sampler={"epoch": 1, "position": 17},
        params={
            "batch_idx_train": batch,
            "cur_epoch": 1,
            "average_period": 2,
            "best_valid_loss": float("inf"),
            **params,
        },
        config={"model": {"encoder_dim": (192, 256), "causal": False}, "data": {"bpe_model": None}},
        tokenizer=b"\x00\xff sentencepiece",
    )


# Saving and loading


def test_round_trip(tmp_path: Path) -> None:
    payload = training_payload(exp_dir=Path("exp") / "a")
    save(tmp_path / "new" / "checkpoint-8.pt", payload)
    got = load(tmp_path / "new" / "checkpoint-8.pt")
    assert got["tokenizer"] == b"\x00\xff sentencepiece"
    assert got["config"] == payload["config"]
    assert got["exp_dir"] == str(Path("exp") / "a")
    assert (got["batch_idx_train"], got["cur_epoch"], got["best_valid_loss"]) == (8, 1, float("inf"))
    assert got["sampler"] == {"epoch": 1, "position": 17} and got["grad_scaler"] == {}
    assert got["model_avg"]["0.weight"].dtype == torch.float64
    assert all(torch.equal(got["model"][name], tensor) for name, tensor in payload["model"].items())
    optimizer = ScaledAdam([{"named_params": list(small_model().named_parameters())}])
    optimizer.load_state_dict(got["optimizer"])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["checkpoint-8.pt"]


def test_module_prefix_is_dropped(tmp_path: Path) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in small_model().state_dict().items()}
    payload = checkpoint.make_payload(wrapped, model_avg=wrapped, params={}, config={}, tokenizer=b"")
    assert set(payload["model"]) == set(payload["model_avg"]) == set(small_model().state_dict())
    assert set(checkpoint.model_state({"model": wrapped})) == set(small_model().state_dict())


def test_parameter_names_cannot_hide_a_part() -> None:
    with pytest.raises(ValueError, match=r"\['optimizer'\]"):
        checkpoint.make_payload({}, params={"optimizer": "adam"}, config={}, tokenizer=b"")


def test_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "epoch-1.pt"
    save(path, {"model": {"w": torch.ones(2)}})
    with pytest.raises((AttributeError, pickle.PicklingError, TypeError)):
        save(path, {"model": {"w": torch.zeros(2)}, "bad": lambda: None})
    assert load(path)["model"]["w"].tolist() == [1.0, 1.0]
    assert list(tmp_path.iterdir()) == [path]


def test_copy(tmp_path: Path) -> None:
    save(tmp_path / "epoch-1.pt", {"model": {"w": torch.ones(2)}})
    checkpoint.copy(tmp_path / "epoch-1.pt", tmp_path / "best-valid-loss.pt")
    assert load(tmp_path / "best-valid-loss.pt")["model"]["w"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("kept_as", "want"),
    [
        (b"pathlib\nPosixPath", PurePosixPath("/data/ipa/exp")),
        (b"pathlib._local\nPosixPath", PurePosixPath("/data/ipa/exp")),
        (b"pathlib\nWindowsPath", PureWindowsPath("/data/ipa/exp")),
        (b"pathlib._local\nWindowsPath", PureWindowsPath("/data/ipa/exp")),
    ],
)
def test_pickled_paths_are_read_on_every_system(tmp_path: Path, kept_as: bytes, want: PurePath) -> None:
    """Published training checkpoints hold a path object, named as in the Python that wrote it."""
    path = tmp_path / "checkpoint-1.pt"
    model = small_model()
    torch.save({"model": model.state_dict(), "exp_dir": PurePosixPath("/data/ipa/exp"), "batch_idx_train": 1}, path)
    rewrite_pickle(path, rb"pathlib(\._local)?\nPurePosixPath", kept_as)
    got = load(path)
    assert got["exp_dir"] == want and type(got["exp_dir"]) is type(want)
    checkpoint.load_model(small_model(), checkpoint.model_state(got, path), path)


def test_this_systems_path_is_read(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(1)}, "exp_dir": tmp_path}, tmp_path / "raw.pt")
    assert str(load(tmp_path / "raw.pt")["exp_dir"]) == str(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_is_refused(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "evil.pt"
    target = tmp_path / "attacked"
    payload = {"model": {"w": torch.ones(2)}, "exp_dir": Attack(target)}
    torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"evil\.pt: refused.*(posix|nt)\.system"):
        load(path)
    assert not target.exists()


def test_other_functions_of_pathlib_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    torch.save({"model": {"w": torch.ones(2)}, "exp_dir": PurePosixPath("/x")}, path)
    rewrite_pickle(path, rb"pathlib(\._local)?\nPurePosixPath", b"pathlib\nos.system")
    with pytest.raises(CheckpointError, match="refused"):
        load(path)


@pytest.mark.parametrize("size", [0, 10, 1000, -200, -1])
def test_truncated_file(tmp_path: Path, size: int) -> None:
    path = tmp_path / "checkpoint-8.pt"
    save(path, training_payload())
    content = path.read_bytes()
    path.write_bytes(content[:size] if size >= 0 else content[: len(content) + size])
    with pytest.raises(CheckpointError, match=r"checkpoint-8\.pt: not a checkpoint, or a damaged one"):
        load(path)


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint\n")
    with pytest.raises(CheckpointError, match=r"notes\.txt: not a checkpoint"):
        load(tmp_path / "notes.txt")
    (tmp_path / "table.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match=r"table\.json: not a checkpoint"):
        load(tmp_path / "table.json")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match=r"tensor\.pt: holds a Tensor"):
        load(tmp_path / "tensor.pt")
    with pytest.raises(CheckpointError, match=r"is a folder; .*: tensor\.pt"):
        load(tmp_path)
    with pytest.raises(CheckpointError, match=r"other\.pt: no such checkpoint; its folder holds: tensor\.pt"):
        load(tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        load(tmp_path / "nowhere" / "other.pt")


# Models in checkpoints


def test_model_state() -> None:
    state = small_model().state_dict()
    assert set(checkpoint.model_state(state)) == set(state)
    assert set(checkpoint.model_state({"model": state, "cur_epoch": 3})) == set(state)
    for payload in ({"cur_epoch": 3, "lr": 0.1}, {}, {"model": None}, {"model": {"w": 3}}):
        with pytest.raises(CheckpointError, match=r"file\.pt: holds no model"):
            checkpoint.model_state(payload, "file.pt")


def test_load_model() -> None:
    model, other = small_model(), small_model()
    with torch.no_grad():
        other[0].weight.zero_()  # type: ignore[operator]
    checkpoint.load_model(model, {name: tensor.double() for name, tensor in other.state_dict().items()})
    assert model[0].weight.dtype == torch.float32
    assert not model[0].weight.any()  # type: ignore[operator]


def test_model_of_another_configuration_is_refused() -> None:
    model = small_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = (
        r"raw\.pt: of another configuration: 0\.weight has shape \(6, 3\) in the checkpoint, \(4, 3\) in the model; "
    )
    with pytest.raises(CheckpointError, match=wanted):
        checkpoint.load_model(model, small_model(width=6).state_dict(), "raw.pt")
    fewer: dict[str, Tensor] = dict(before)
    del fewer["1.bias"]
    fewer["2.bias"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match=r"1\.bias is missing in the checkpoint; 2\.bias is not in the model"):
        checkpoint.load_model(model, fewer)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_model_of_another_vocabulary_is_refused() -> None:
    def with_head(size: int) -> nn.Module:
        return nn.ModuleDict(
            {"body": nn.Linear(2, 4), "ctc_output": nn.Sequential(nn.Dropout(0.1), nn.Linear(4, size))}
        )

    with pytest.raises(CheckpointError, match=r"of another vocabulary: ctc_output\.1\.weight .* Use the tokenizer"):
        checkpoint.load_model(with_head(127), with_head(90).state_dict())


# Choice of checkpoints


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def names(choice: Choice) -> list[str]:
    return [path.name for path in choice.files]


def test_choice_by_batch(tmp_path: Path) -> None:
    touch(tmp_path, *(f"checkpoint-{n}.pt" for n in (400, 800, 1200, 1600, 2000)), "checkpoint-x.pt", "epoch-1.pt")
    assert names(choose_checkpoints(tmp_path, 30, 1600, 3, True)) == ["checkpoint-400.pt", "checkpoint-1600.pt"]
    assert names(choose_checkpoints(tmp_path, 30, 1999, 2, True)) == ["checkpoint-800.pt", "checkpoint-1600.pt"]
    plain = choose_checkpoints(tmp_path, 30, 9999, 3, False)
    assert names(plain) == ["checkpoint-1200.pt", "checkpoint-1600.pt", "checkpoint-2000.pt"]
    assert not plain.by_running_average
    assert names(choose_checkpoints(tmp_path, 30, 400, 1, False)) == ["checkpoint-400.pt"]
    with pytest.raises(
        CheckpointError, match=r"needs 6 files .* there are 5; the folder holds: checkpoint-400\.pt, .*"
    ):
        choose_checkpoints(tmp_path, 30, 2000, 5, True)
    with pytest.raises(CheckpointError, match=r"needs 4 files checkpoint-N\.pt with N up to 1200, there are 3"):
        choose_checkpoints(tmp_path, 30, 1200, 4, False)


def test_choice_by_epoch(tmp_path: Path) -> None:
    touch(tmp_path, *(f"epoch-{n}.pt" for n in (1, 2, 3, 4, 10)))
    ranged = choose_checkpoints(tmp_path, 4, 0, 3, True)
    assert names(ranged) == ["epoch-1.pt", "epoch-4.pt"] and ranged.by_running_average
    assert names(choose_checkpoints(tmp_path, 4, 0, 2, False)) == ["epoch-3.pt", "epoch-4.pt"]
    assert names(choose_checkpoints(tmp_path, 3, 0, 9, False)) == ["epoch-1.pt", "epoch-2.pt", "epoch-3.pt"]
    assert names(choose_checkpoints(tmp_path, 10, 0, 1, False)) == ["epoch-10.pt"]
    with pytest.raises(CheckpointError, match="starts at epoch 0, the first is 1"):
        choose_checkpoints(tmp_path, 4, 0, 4, True)
    with pytest.raises(CheckpointError, match=r"needs epoch-9\.pt; the folder holds: .*epoch-4\.pt, epoch-10\.pt"):
        choose_checkpoints(tmp_path, 10, 0, 2, False)


def test_impossible_choices(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="--avg is 0"):
        choose_checkpoints(tmp_path, 1, 0, 0, False)
    with pytest.raises(CheckpointError, match="no such folder"):
        choose_checkpoints(tmp_path / "exp", 1, 0, 1, False)
    with pytest.raises(CheckpointError, match="the folder holds: none"):
        choose_checkpoints(tmp_path, 1, 0, 1, False)


def test_prune(tmp_path: Path) -> None:
    touch(tmp_path, *(f"checkpoint-{n}.pt" for n in (9, 10, 100, 1000)), "epoch-1.pt", "bad-model-0.pt")
    assert [path.name for path in checkpoint.prune(tmp_path, 2)] == ["checkpoint-9.pt", "checkpoint-10.pt"]
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["bad-model-0.pt", "checkpoint-100.pt", "checkpoint-1000.pt", "epoch-1.pt"]
    assert checkpoint.prune(tmp_path, 2) == []
    with pytest.raises(ValueError, match="keep_last_k is 0"):
        checkpoint.prune(tmp_path, 0)


# Averaging of files


def save_constant(folder: Path, batch: int, model: float, average: float, period: int = 100) -> Path:
    path = folder / f"checkpoint-{batch}.pt"
    payload = {
        "model": {"module.w": torch.full((2,), model)},
        "model_avg": {"module.w": torch.full((2,), average, dtype=torch.float64)},
        "batch_idx_train": batch,
        "average_period": period,
    }
    save(path, payload)
    return path


def test_average_of_files(tmp_path: Path) -> None:
    for batch, model, average in ((100, 1.0, 1.0), (200, 2.0, 1.5), (300, 6.0, 3.0)):
        save_constant(tmp_path, batch, model, average)
    ranged = checkpoint.average_checkpoints(choose_checkpoints(tmp_path, 0, 300, 2, True))
    assert ranged["w"].dtype == torch.float32
    torch.testing.assert_close(ranged["w"], torch.full((2,), 4.0))  # of the snapshots at 200 and 300
    plain = checkpoint.average_checkpoints(choose_checkpoints(tmp_path, 0, 300, 3, False))
    torch.testing.assert_close(plain["w"], torch.full((2,), 3.0))


def test_files_that_cannot_be_averaged(tmp_path: Path) -> None:
    first = save_constant(tmp_path, 100, 1.0, 1.0)
    other_period = save_constant(tmp_path, 200, 1.0, 1.0, period=50)
    with pytest.raises(CheckpointError, match=r"average periods differ \(100 and 50 batches\)"):
        checkpoint.average_checkpoints(Choice((first, other_period), True))
    near = save_constant(tmp_path, 150, 1.0, 1.0)
    with pytest.raises(CheckpointError, match=r"checkpoint-150\.pt: no update of the running average lies between"):
        checkpoint.average_checkpoints(Choice((first, near), True))
    bare = tmp_path / "bare.pt"
    save(bare, {"w": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"bare\.pt: has no model_avg and no batch_idx_train"):
        checkpoint.average_checkpoints(Choice((first, bare), True))


def test_whatever_byte_of_a_file_s_directory_is_wrong_the_check_fails_with_our_error(tmp_path: Path) -> None:
    save(tmp_path / "good.pt", {"x": torch.zeros(3)})
    content = (tmp_path / "good.pt").read_bytes()
    start = content.index(b"PK\x01\x02")  # the first entry of the directory at the end
    refused = 0
    for place in range(start, len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 0x11
        (tmp_path / "bad.pt").write_bytes(damaged)
        try:
            checkpoint.verify(tmp_path / "bad.pt")
        except CheckpointError:
            refused += 1
    assert refused > 100


def test_a_file_system_without_folder_fsync_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError("invalid argument")

    monkeypatch.setattr(os, "fsync", refuses_folders)
    save(tmp_path / "a.pt", {"x": 1})
    assert load(tmp_path / "a.pt") == {"x": 1}
