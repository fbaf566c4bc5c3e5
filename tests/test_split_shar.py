"""Splitting a folder of shards into parts."""

from __future__ import annotations

from pathlib import Path

import pytest
from lhotse import CutSet

from local.split_shar import part_of, split
from shar_folder import write_folder
from zipformer_crctc.shar import find_shards, read_shard


def test_every_cut_is_in_one_part_with_its_audio(tmp_path: Path) -> None:
    ids = write_folder(tmp_path / "all", [0.2, 0.3, 0.4] * 7, per_shard=6)
    counts = split(tmp_path / "all", tmp_path / "parts", 3)
    parts = [
        [u.id for shard in find_shards(tmp_path / "parts" / name) for u in read_shard(shard)]
        for name in ("1", "2", "3")
    ]
    assert list(map(len, parts)) == counts and min(counts) >= 2
    assert sorted(name for part in parts for name in part) == ids
    assert all(part_of(name, 3) == number for number, part in enumerate(parts, start=1) for name in part)
    original = {cut.id: cut for cut in CutSet.from_shar(in_dir=str(tmp_path / "all"))}
    for cut in CutSet.from_shar(in_dir=str(tmp_path / "parts" / "2")):
        assert (cut.load_audio() == original[cut.id].load_audio()).all()
        assert cut.supervisions[0].text == "aba"


def test_parts_must_hold_something(tmp_path: Path) -> None:
    write_folder(tmp_path / "all", [0.2])
    with pytest.raises(ValueError, match="1 cuts are too few for 2 parts"):
        split(tmp_path / "all", tmp_path / "parts")
    assert not list((tmp_path / "parts").glob(f"{3 - part_of('utt-0000', 2)}/*"))
