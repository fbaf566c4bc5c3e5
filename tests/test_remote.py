from __future__ import annotations

import io
import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shar_folder import write_folder
from zipformer_crctc import remote
from zipformer_crctc.dataconfig import load_data_config
from zipformer_crctc.loader import build_train_loader
from zipformer_crctc.shar import DataError, find_shards


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))


def test_tries_again_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    outcomes: list[OSError | int] = [OSError("stale"), OSError("stale"), 3]

    def work() -> int:
        outcome = outcomes.pop(0)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    assert remote.with_retries(work, "x.tar") == 3
    assert caplog.text.count("x.tar: stale; trying again") == 2
    outcomes += [OSError("gone")] * 3
    with pytest.raises(OSError, match="gone"):
        remote.with_retries(work, "x.tar")
    outcomes += [FileNotFoundError("no file"), 1]
    with pytest.raises(FileNotFoundError):
        remote.with_retries(work, "x.tar")
    assert outcomes == [1]


def test_errors_of_a_store_s_own_kind_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ClientError(Exception):
        pass

    outcomes: list[Any] = [ClientError("slow down"), io.BytesIO(b"shard")]

    def opened(*_: Any) -> Any:
        outcome = outcomes.pop(0)
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome

    monkeypatch.setitem(sys.modules, "smart_open", SimpleNamespace(open=opened))
    remote.make_local("s3://bucket/shard.tar", tmp_path / "shard.tar")
    assert (tmp_path / "shard.tar").read_bytes() == b"shard"
    outcomes += [ClientError("no such key")] * 3
    with pytest.raises(OSError, match="ClientError: no such key"):
        remote.make_local("s3://bucket/other.tar", tmp_path / "other.tar")


def test_piped_shards_are_read_like_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = write_folder(tmp_path / "there", [1.0] * 20, per_shard=10)
    shards = find_shards(tmp_path / "there")
    fails_once = f"test -e {tmp_path}/tried || {{ touch {tmp_path}/tried; echo lost >&2; exit 1; }};"
    fields = {
        "cuts": [f"pipe:{fails_once} cat {shards[0].cuts}", str(shards[1].cuts)],
        "recording": [f"pipe:cat {shard.recording}" for shard in shards],
    }
    (tmp_path / "far.json").write_text(json.dumps(fields))
    (tmp_path / "data.yaml").write_text("train: far.json\n")
    (listed,) = load_data_config(tmp_path / "data.yaml").train
    for _ in range(2):
        loader = build_train_loader(
            [listed], max_duration=5.0, drop_last=False, num_workers=0, index_dir=tmp_path / "copies"
        )
        with caplog.at_level(logging.WARNING):
            assert sorted(u.id for batch in loader for u in batch.utterances) == ids
    assert caplog.text.count("exit status 1 lost; trying again") == 1
    fields["cuts"][1] = "pipe:exit 7"
    (tmp_path / "broken.json").write_text(json.dumps(fields))
    loader = build_train_loader([tmp_path / "broken.json"], num_workers=0, index_dir=tmp_path / "copies")
    with pytest.raises(DataError, match=r"shard 1 cannot be read .exit status 7"):
        next(iter(loader))


@pytest.mark.parametrize("content", ["[1]", '{"cuts": ["a"]}', '{"cuts": ["a"], "recording": []}', "{"])
def test_lists_that_are_none(tmp_path: Path, content: str) -> None:
    path = tmp_path / "list.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"(?s)list.json: .*give two lists"):
        find_shards(path)
