from __future__ import annotations

from pathlib import Path

from shar_folder import RATE, cut, flac, tone, write_shard
from zipformer_crctc.shar import Skipped, find_shards, read_shard
from zipformer_crctc.sharcopy import copy_shard


def test_an_id_that_stands_there_twice_is_not_copied(tmp_path: Path) -> None:
    audio = [("a.flac", flac(tone(1.0))), ("b.flac", flac(tone(1.0))), ("a.flac", flac(tone(2.0)))]
    write_shard(tmp_path / "from", 0, [cut("a", RATE), cut("b", RATE), cut("a", 2 * RATE)], audio)
    skipped = Skipped()
    assert copy_shard(find_shards(tmp_path / "from")[0], tmp_path / "to", lambda cut: cut, skipped) == 1
    assert [utterance.id for utterance in read_shard(find_shards(tmp_path / "to")[0])] == ["b"]
    assert skipped.counts == {"id used more than once in its shard": 1}
