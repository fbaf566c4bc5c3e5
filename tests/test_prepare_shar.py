from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet

from local.shar import Recording, clear_shards, write_shard
from zipformer_crctc.shar import find_shards, read_shard
from zipformer_crctc.sharwriter import cuts_name, recording_name


def recordings(count: int = 3) -> list[Recording]:
    rng = np.random.default_rng(0)
    return [
        Recording(
            id=f"speaker.1-{number}",
            audio=rng.uniform(-0.9, 0.9, 8000 + number).astype(np.float32),
            text="pʰa ã t͡ʃ",
            language="xx",
            speaker="s1",
            alignment=(("pʰ", 0.05, 0.1), ("a", 0.15, 0.2)),
            custom={"gloss": "goat"},
        )
        for number in range(count)
    ]


def lhotse_cuts(folder: Path, number: int = 0) -> list:
    return list(
        CutSet.from_shar(fields={"cuts": [folder / cuts_name(number)], "recording": [folder / recording_name(number)]})
    )


def test_lhotse_reads_what_was_written(tmp_path: Path) -> None:
    written = recordings()
    stats = write_shard(written, tmp_path, 0)
    cuts = lhotse_cuts(tmp_path)
    assert (stats.cuts, len(cuts), stats.skipped) == (3, 3, [])
    assert stats.seconds == pytest.approx(sum(len(recording.audio) for recording in written) / 16_000)
    for recording, cut in zip(written, cuts, strict=True):
        supervision = cut.supervisions[0]
        assert cut.id == cut.recording.id == recording.id
        assert cut.num_samples == len(recording.audio)
        assert cut.sampling_rate == 16_000
        assert np.abs(cut.load_audio()[0] - recording.audio).max() <= 0.5 / 32_768
        assert (supervision.text, supervision.language, supervision.speaker) == (recording.text, "xx", "s1")
        assert supervision.duration == cut.duration
        assert [tuple(item)[:3] for item in supervision.alignment["phone"]] == list(recording.alignment)
        assert supervision.custom == {"gloss": "goat"}


def test_own_reader_reads_what_was_written(tmp_path: Path) -> None:
    written = recordings()
    write_shard(written, tmp_path / "train", 7)
    (shard,) = find_shards(tmp_path / "train")
    read = list(read_shard(shard, keep_alignment=True))
    assert shard.number == 7
    assert [(u.id, u.num_samples, u.text, u.language, u.speaker, u.alignment) for u in read] == [
        (r.id, len(r.audio), r.text, r.language, r.speaker, r.alignment) for r in written
    ]


def test_same_recordings_same_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_shard(recordings(), tmp_path / name, 0)
    for name in (cuts_name(0), recording_name(0)):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_unusable_audio_is_skipped_and_named_and_loud_audio_counted(tmp_path: Path) -> None:
    silence = np.zeros(0, np.float32)
    broken = np.full(100, np.nan, np.float32)
    loud = np.full(1600, 1.5, np.float32)
    stats = write_shard(
        [Recording("empty", silence, "a"), Recording("nan", broken, "a"), Recording("loud", loud, "a")], tmp_path, 0
    )
    assert stats.skipped == [("empty", "no samples"), ("nan", "NaN or infinity in the audio")]
    assert (stats.cuts, stats.clipped) == (1, 1)
    (cut,) = lhotse_cuts(tmp_path)
    assert cut.load_audio().max() == pytest.approx(32_767 / 32_768)


@pytest.mark.parametrize("identity", ["", "a/b", ".."])
def test_ids_that_cannot_be_file_names_are_refused(tmp_path: Path, identity: str) -> None:
    with pytest.raises(ValueError, match="member name"):
        write_shard([Recording(identity, np.zeros(10, np.float32), "a")], tmp_path, 0)


def test_an_id_used_twice_and_two_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'speaker\.1-0' is used twice"):
        write_shard(recordings(1) * 2, tmp_path, 0)
    with pytest.raises(ValueError, match=r"shape \(10, 2\)"):
        write_shard([Recording("a", np.zeros((10, 2), np.float32), "a")], tmp_path, 0)


def test_an_interrupted_shard_leaves_nothing(tmp_path: Path) -> None:
    def breaks_off() -> Iterator[Recording]:
        yield from recordings(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shard(breaks_off(), tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_clear_shards_leaves_other_files(tmp_path: Path) -> None:
    write_shard(recordings(1), tmp_path, 0)
    (tmp_path / "notes.txt").write_text("mine")
    clear_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
