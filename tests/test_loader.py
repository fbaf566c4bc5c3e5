from __future__ import annotations

import errno
import logging
import math
import os
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shar_folder import RATE, cut, flac, tone, write_folder, write_shard
from zipformer_crctc import remote
from zipformer_crctc.audio import AudioError
from zipformer_crctc.features import LOG_EPS, Fbank
from zipformer_crctc.loader import (
    AudioReader,
    Batch,
    BatchLoader,
    build_eval_loader,
    build_train_loader,
    change_speed,
    collate,
    speed_factor,
    volume_factor,
)
from zipformer_crctc.preemption import Preemption, outlive_preemption
from zipformer_crctc.shar import DataError, find_shards, read_shard


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    lengths = [0.5, 0.7, 0.9, 1.2]
    write_folder(root / "one", [rng.choice(lengths) for _ in range(50)], per_shard=20, prefix="one")
    write_folder(root / "two", [rng.choice(lengths) for _ in range(30)], per_shard=20, prefix="two")
    return [root / "one", root / "two"]


def train(folders: list[Path], **changes: object) -> BatchLoader:
    arguments: dict[str, object] = {
        "max_duration": 6.0, "num_buckets": 2, "drop_last": False, "num_workers": 0, **changes,
    }  # fmt: skip
    return build_train_loader(folders, **arguments)  # type: ignore[arg-type]


def fingerprint(batch: Batch) -> tuple[object, ...]:
    return (batch.epoch, batch.step, [u.id for u in batch.utterances], batch.features.double().sum().item())


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_utterance_once(folders: list[Path], world_size: int, num_workers: int) -> None:
    loaders = [train(folders, world_size=world_size, rank=rank, num_workers=num_workers) for rank in range(world_size)]
    for epoch in (1, 2):
        ranks = [list(loader) for loader in loaders]
        assert len({len(batches) for batches in ranks}) == 1
        assert {batch.epoch for batches in ranks for batch in batches} == {epoch}
        seen = Counter(u.id for batches in ranks for batch in batches for u in batch.utterances)
        assert seen == Counter([f"one-{i:04d}" for i in range(50)] + [f"two-{i:04d}" for i in range(30)])


def test_workers_do_not_change_a_thing(folders: list[Path]) -> None:
    state = torch.get_rng_state()
    batches = [[fingerprint(b) for b in train(folders, num_workers=n)] for n in (0, 1, 3)]
    assert batches[0] == batches[1] == batches[2]
    assert torch.equal(state, torch.get_rng_state())


def test_contents_of_a_batch(folders: list[Path]) -> None:
    reader, fbank = AudioReader(), Fbank()
    for batch in train(folders, perturbation=False, num_buckets=1):
        assert batch.features.dtype == torch.float32 and batch.num_frames.dtype == torch.int64
        assert not batch.features.is_inference()
        assert batch.num_frames.tolist() == sorted(batch.num_frames.tolist(), reverse=True)
        assert batch.features.shape == (len(batch.utterances), batch.num_frames[0], 80)
        assert batch.texts == ["aba"] * len(batch.utterances)
        assert batch.seconds == pytest.approx(sum(u.duration for u in batch.utterances))
        for features, length, utterance in zip(batch.features, batch.num_frames, batch.utterances, strict=True):
            assert int(length) == (utterance.num_samples + 80) // 160
            assert torch.equal(features[:length], fbank(torch.from_numpy(reader(utterance))))
            assert (features[length:] == LOG_EPS).all()
    reader.close()


def test_features_made_from_the_audio_of_a_batch(folders: list[Path]) -> None:
    made = [batch.to("cpu") for batch in train(folders)]
    left = list(train(folders, only_audio=True, num_workers=1))
    for batch, audio in zip(made, left, strict=True):
        again = audio.to("cpu")
        assert again.mirrored is None and audio.features.shape == (len(audio.utterances), 0, 80)
        assert [u.id for u in again.utterances] == [u.id for u in batch.utterances]
        assert torch.equal(again.num_frames, batch.num_frames)
        torch.testing.assert_close(again.features, batch.features, rtol=0, atol=1e-4)
        mask = torch.arange(batch.features.shape[1]) >= batch.num_frames[:, None]
        assert (again.features[mask] == LOG_EPS).all()
    with pytest.raises(ValueError, match="only_audio"):
        train(folders, only_audio=True, zero_padded=True)


def test_a_worker_that_is_killed_as_it_leaves_does_no_harm(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch systems may signal all processes of a run at any moment; DataLoader then raises as it waits for them."""
    loader = train(folders, num_workers=1)
    next(iter(loader))
    iterator: Any = loader._loader._iterator
    end_workers = iterator._shutdown_workers

    def killed() -> None:
        end_workers()
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")

    monkeypatch.setattr(iterator, "_shutdown_workers", killed)
    loader.close()
    assert not any(worker.is_alive() for worker in iterator._workers)


def test_equal_to_lhotse_audio(folders: list[Path]) -> None:
    lhotse = pytest.importorskip("lhotse", reason="compares with lhotse's reading of the same folder")
    fields = {
        "cuts": [str(shard.cuts) for shard in find_shards(folders[0])],
        "recording": [str(shard.recording) for shard in find_shards(folders[0])],
    }
    ours = [u for shard in find_shards(folders[0]) for u in read_shard(shard)]
    reader = AudioReader()
    for mine, theirs in zip(ours, lhotse.CutSet.from_shar(fields=fields), strict=True):
        assert np.array_equal(reader(mine), theirs.load_audio()[0])
    reader.close()


def test_volume_perturbation(folders: list[Path]) -> None:
    factors = [volume_factor(1, 1, f"u{i}") for i in range(4000)]
    changed = [factor for factor in factors if factor != 1.0]
    assert abs(len(changed) / 4000 - 0.5) < 3 * math.sqrt(0.25 / 4000)
    assert min(changed) >= 0.125 and max(changed) <= 2.0
    assert abs(np.mean(changed) - 1.0625) < 3 * (2.0 - 0.125) / math.sqrt(12 * len(changed))
    assert volume_factor(1, 1, "u0") == factors[0]
    assert [volume_factor(1, 2, f"u{i}") for i in range(50)] != factors[:50] != [
        volume_factor(2, 1, f"u{i}") for i in range(50)
    ]  # fmt: skip
    plain = {b.step: b for b in train(folders, perturbation=False)}
    for batch in train(folders, seed=42):
        for row, utterance in enumerate(batch.utterances):
            shift = 2 * math.log(volume_factor(42, 1, utterance.id))
            difference = batch.features[row, 10:20] - plain[batch.step].features[row, 10:20]
            assert difference.mean().item() == pytest.approx(shift, abs=0.01)


def test_speed_perturbation(folders: list[Path]) -> None:
    factors = [speed_factor(0.1, 1, 1, f"u{i}") for i in range(4000)]
    assert 0.9 <= min(factors) < 0.901 and 1.099 < max(factors) <= 1.1
    assert abs(np.mean(factors) - 1.0) < 3 * 0.2 / math.sqrt(12 * 4000)
    assert speed_factor(0.1, 1, 2, "u0") != factors[0] == speed_factor(0.1, 1, 1, "u0")
    for batch in train(folders, seed=42, speed_perturbation=0.1):
        for length, utterance in zip(batch.num_frames.tolist(), batch.utterances, strict=True):
            samples = utterance.num_samples / speed_factor(0.1, 42, 1, utterance.id)
            assert abs(length - samples / 160) <= 1


def test_a_faster_tone_is_higher_and_shorter() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    faster = change_speed(tone, 1.1)
    assert abs(len(faster) - 16000 / 1.1) <= 1 and faster.dtype == np.float32
    peak = np.abs(np.fft.rfft(faster)).argmax() * 16000 / len(faster)
    assert peak == pytest.approx(1100, abs=2)


def test_position_and_resume(folders: list[Path]) -> None:
    loader = train(folders, num_workers=1)
    first = [fingerprint(b) for b in loader]
    whole = first + [fingerprint(b) for b in loader]
    assert place(loader) == (3, 0)
    again = train(folders, num_workers=1)
    stopped = [fingerprint(b) for b in islice(again, 4)]
    state = again.state_dict()
    assert place(again) == (1, 4)  # not what the worker has read ahead
    resumed = train(folders)
    resumed.load_state_dict(state)
    rest = [fingerprint(b) for b in resumed] + [fingerprint(b) for b in resumed]
    assert stopped + rest == whole
    assert [fingerprint(b) for b in again] == first[4:]  # the loader that was stopped goes on as well


def place(loader: BatchLoader) -> tuple[int, int]:
    state = loader.state_dict()
    return state["epoch"], state["step"]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_resume_from_a_state_within_the_epoch(folders: list[Path], num_workers: int) -> None:
    few: dict[str, object] = {"endless": True, "buffer_size": 10, "max_duration": 3.0}  # states in the middle
    endless = train(folders, num_workers=num_workers, **few)
    whole = [fingerprint(batch) for batch in islice(endless, 40)]
    for stop in (5, 11, 23):
        stopped = train(folders, num_workers=num_workers, **few)
        for _ in islice(stopped, stop):
            pass
        state = stopped.state_dict()
        assert stop == 5 or (place(stopped) == (1, stop) and state["state"]["step"] > 0)
        resumed = train(folders, num_workers=3 - num_workers, **few)
        resumed.load_state_dict(state)
        assert resumed.state_dict()["state"] is state["state"]
        assert [fingerprint(batch) for batch in islice(resumed, 40 - stop)] == whole[stop:]


def test_a_place_that_cannot_be_found_again_is_said(folders: list[Path], caplog: pytest.LogCaptureFixture) -> None:
    loader = train(folders)
    loader.load_state_dict({"epoch": 2, "step": 5})  # as older versions wrote it
    assert place(loader) == (2, 0)
    assert "an older version wrote it: epoch 2 begins anew" in caplog.text
    state = {**train(folders, seed=7).state_dict(), "step": 5}
    loader.load_state_dict(state)
    assert place(loader) == (1, 0) and "the seed" in caplog.text


def test_endless(folders: list[Path]) -> None:
    loader = train(folders)
    whole = [fingerprint(b) for _ in range(3) for b in loader]
    endless = train(folders, endless=True, num_workers=1)
    assert [fingerprint(b) for b in islice(endless, len(whole))] == whole


def test_ranks_with_nothing_left_get_empty_batches(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", [1.0] * 3)
    ranks = [list(train([tmp_path / "train"], max_duration=1.0, world_size=2, rank=rank)) for rank in (0, 1)]
    assert [len(batches) for batches in ranks] == [2, 2]
    assert [b.is_empty for b in ranks[0] + ranks[1]].count(True) == 1
    empty = next(b for b in ranks[1] if b.is_empty)
    assert empty.features.shape == (0, 0, 80) and empty.num_frames.shape == (0,)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_audio_is_skipped_and_named(tmp_path: Path, num_workers: int, caplog: pytest.LogCaptureFixture) -> None:
    good = flac(tone(1.0))
    stereo = flac(np.stack([tone(1.0), tone(1.0)], axis=1))
    audio = [good, good[: len(good) // 8], b"junk" * 100, flac(tone(1.0), 8000), stereo, flac(tone(0.05)), good, b""]
    audio += [flac(tone(3.0)), flac(tone(1.02))]
    write_shard(
        tmp_path, 0, [cut(f"u{i}", RATE) for i in range(10)], [(f"u{i}.flac", data) for i, data in enumerate(audio)]
    )
    loader = build_eval_loader([tmp_path], max_duration=100.0, num_workers=num_workers)
    for _ in range(2):
        with caplog.at_level(logging.WARNING):
            (batch,) = list(loader)
        assert [u.id for u in batch.utterances] == ["u9", "u0", "u6"]
        reasons = {name: reason for name, reason in batch.skipped}
        assert reasons.keys() == {"u1", "u2", "u3", "u4", "u5", "u7", "u8"}
        assert reasons["u2"] == "damaged audio"
        assert reasons["u3"] == "sampling rate 8000 instead of 16000"
        assert reasons["u4"] == "2 channels instead of one"
        assert reasons["u5"] == "fewer than 9 feature frames"
        assert reasons["u8"] == "another length than the manifest says"
        assert loader.skipped.total == 7
        assert all(f"skipped {name}:" in caplog.text for name in reasons)


def test_tar_cut_short_while_in_use(tmp_path: Path) -> None:
    write_folder(tmp_path, [1.0] * 2)
    shard = find_shards(tmp_path)[0]
    utterances = list(read_shard(shard))
    shard.recording.write_bytes(shard.recording.read_bytes()[: utterances[1].offset + 10])
    reader = AudioReader()
    assert len(reader(utterances[0])) == RATE
    with pytest.raises(ValueError, match="tar is truncated"):
        reader(utterances[1])
    reader.close()


def test_a_tar_that_failed_all_tries_is_not_waited_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, [1.0] * 3)
    utterances = list(read_shard(find_shards(tmp_path)[0]))
    tries: list[str] = []

    def fails(*_: Any) -> bytes:
        tries.append("once")
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(os, "pread", fails)
    reader = AudioReader()
    for utterance in utterances:
        with pytest.raises(AudioError, match="Input/output error"):
            reader(utterance)
    assert len(tries) == 3 + 1 + 1
    reader.close()


def test_workers_outlive_signals_in_programs_that_note_them(folders: list[Path]) -> None:
    def start_of_workers() -> Any:
        return build_eval_loader(folders, max_duration=10.0, num_workers=1)._loader.worker_init_fn

    assert start_of_workers() is None
    with Preemption():
        assert start_of_workers() is outlive_preemption


def test_scored_set_is_whole_in_every_pass(folders: list[Path]) -> None:
    loader = build_eval_loader(folders, max_duration=1.0, num_workers=1)
    next(iter(loader))  # a pass that is given up
    for _ in range(2):
        batches = list(loader)
        assert len({u.id for b in batches for u in b.utterances}) == sum(len(b.utterances) for b in batches) == 80
    alone = {b.utterances[0].id: b.features[0] for b in build_eval_loader(folders, max_duration=0.1, num_workers=0)}
    for batch in build_eval_loader(folders, max_duration=20.0, num_workers=0):
        for row, utterance in enumerate(batch.utterances):  # features do not depend on the batch
            assert torch.equal(batch.features[row, : batch.num_frames[row]], alone[utterance.id])


def test_zero_padded_features_depend_on_the_batch(folders: list[Path]) -> None:
    mirrored, padded = (
        next(iter(build_eval_loader(folders, max_duration=1000.0, num_workers=0, zero_padded=zero_padded)))
        for zero_padded in (False, True)
    )
    length = int(padded.num_frames[-1])
    assert torch.allclose(mirrored.features[-1, : length - 2], padded.features[-1, : length - 2], atol=1e-4)
    assert not torch.allclose(mirrored.features[-1, length - 1], padded.features[-1, length - 1], atol=1e-2)


def test_collate_puts_the_longest_first() -> None:
    features, num_frames, order = collate([torch.zeros(3, 80), torch.ones(5, 80), torch.zeros(3, 80)])
    assert order == [1, 0, 2] and num_frames.tolist() == [5, 3, 3]
    assert features.shape == (3, 5, 80)
    assert (features[1, 3:] == LOG_EPS).all() and (features[0] == 1).all()


def test_to_moves_the_tensors(folders: list[Path]) -> None:
    batch = next(iter(train(folders)))
    moved = batch.to("cpu")
    assert torch.equal(moved.features, batch.features) and moved.utterances == batch.utterances


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data folder"):
        build_train_loader([])
    with pytest.raises(DataError, match="no such folder"):
        build_eval_loader([tmp_path / "missing"])
    write_folder(tmp_path / "train", [1.0])
    with pytest.raises(ValueError, match="num_workers: -1"):
        train([tmp_path / "train"], num_workers=-1)
