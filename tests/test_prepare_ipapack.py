from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from local.download_ipapack import REPOSITORIES, download, hub_client
from local.prepare_ipapack import find_sets, kind_of, prepare
from shar_folder import write_folder
from zipformer_crctc.dataconfig import ALIGNABLE_ONLY, load_data_config


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("fleurs/train", "train"),
        ("mls_french/dev", "dev"),
        ("mls_french/test", "test"),
        ("Librispeech-Test-Clean", "test"),
        ("doreco_shar", "test"),
        ("aishell/magicdata", "test"),
        ("pseudo_labels/part1", "unsup"),
        ("unsup_data/shar", "unsup"),
        ("pseudo_labels/dev", "dev"),
    ],
)
def test_names_decide(path: str, kind: str) -> None:
    assert kind_of(path) == kind


def test_folders_are_used_in_place(tmp_path: Path) -> None:
    # The names above the source say nothing about its sets.
    source = tmp_path / "test-disk" / "ipapack"
    for name in ("fleurs/train", "fleurs/dev", "doreco", "pseudo"):
        write_folder(source / name, [1.0], prefix=name.replace("/", "-"))
    config = tmp_path / "data" / "ipapack" / "data.yaml"
    prepare(source, config, ALIGNABLE_ONLY)
    sets = load_data_config(config)
    assert sets.train == [source / "fleurs/train"]
    assert sets.dev == {"fleurs-dev": source / "fleurs/dev"}
    assert sets.test == {"doreco": source / "doreco"}
    assert sets.unsup == [source / "pseudo"]
    assert sets.filters == ALIGNABLE_ONLY
    assert sets.unsup_filters.frame_share == 0.85


def test_the_source_may_be_a_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_folder(tmp_path / "fleurs", [1.0])
    with caplog.at_level(logging.WARNING):
        assert prepare(tmp_path / "fleurs", tmp_path / "data.yaml").train == [tmp_path / "fleurs"]
    assert "no dev set found" in caplog.text


def test_missing_empty_and_unpaired(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        find_sets(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"no cuts\.NNNNNN\.jsonl\.gz in it or below"):
        find_sets(tmp_path)
    write_folder(tmp_path / "a", [1.0, 1.0], per_shard=1)
    (tmp_path / "a/recording.000001.tar").unlink()
    with pytest.raises(ValueError, match=r"a: cuts\.000001\.jsonl\.gz has no recording\.000001\.tar"):
        find_sets(tmp_path)
    (tmp_path / "a/cuts.000001.jsonl.gz").unlink()
    (tmp_path / "a/cuts.000000.jsonl.gz").unlink()
    with pytest.raises(ValueError, match=r"recording\.000000\.tar has no cuts\.000000\.jsonl\.gz"):
        find_sets(tmp_path)


class StandIn:
    """In place of huggingface_hub."""

    def __init__(self, shards: bool = True, fails: bool = False) -> None:
        self.calls: list[dict[str, Any]] = []
        self.shards, self.fails = shards, fails

    def snapshot_download(self, repo_id: str, **options: Any) -> str:
        self.calls.append({"repo_id": repo_id, **options})
        if self.fails:
            raise RuntimeError("no network")
        if self.shards:
            write_folder(Path(options["local_dir"]) / "corpus", [1.0])
        return str(options["local_dir"])


def test_download(tmp_path: Path) -> None:
    client = StandIn()
    folders = download(REPOSITORIES, tmp_path, client, workers=3)
    assert folders == [tmp_path / f"ipapack_plus_train_{number}" for number in (1, 2, 3, 4)]
    assert [call["repo_id"] for call in client.calls] == [f"anyspeech/ipapack_plus_train_{n}" for n in (1, 2, 3, 4)]
    assert {call["repo_type"] for call in client.calls} == {"dataset"}
    assert {call["max_workers"] for call in client.calls} == {3}
    assert len(find_sets(tmp_path).train) == 4


def test_download_problems(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"could not download a/b \(RuntimeError: no network\).*--source"):
        download(["a/b"], tmp_path, StandIn(fails=True))
    with pytest.raises(ValueError, match=r"a/b: no cuts\.NNNNNN"):
        download(["a/b"], tmp_path, StandIn(shards=False))
    client = StandIn()
    for wrong in ("name", "a/..", "a/b/c", "/b"):
        with pytest.raises(ValueError, match="owner/name is expected"):
            download([wrong], tmp_path, client)
    with pytest.raises(ValueError, match="no repository"):
        download([], tmp_path, client)
    assert client.calls == []


def test_the_package_is_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="pip install huggingface_hub"):
        hub_client()
