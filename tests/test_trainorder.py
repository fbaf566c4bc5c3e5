from __future__ import annotations

import io
import logging
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from shar_folder import write_folder
from zipformer_crctc import sharindex
from zipformer_crctc.batches import FINGERPRINTS, State
from zipformer_crctc.buckets import Item
from zipformer_crctc.shar import DataError, Shard, find_shards
from zipformer_crctc.trainorder import OrderSettings, TrainOrder


def settings(world_size: int = 1, rank: int = 0, *, seed: int = 1, drop_last: bool = False) -> OrderSettings:
    return OrderSettings(
        max_duration=30.0, num_buckets=4, seed=seed, drop_last=drop_last, world_size=world_size, rank=rank,
        buffer_size=150, open_shards=3,
    )  # fmt: skip


def all_steps(order: TrainOrder, epoch: int = 1) -> list[list[list[Item]]]:
    return [step for _, step, _ in order.steps(epoch)]


def ids(step: Sequence[Sequence[Item]]) -> list[list[str]]:
    return [[item.utterance.id for item in batch] for batch in step]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_utterance_once(shards: list[Shard], durations: list[float], world_size: int) -> None:
    seen: Counter[str] = Counter()
    lengths, fingerprints = set(), set()
    for rank in range(world_size):
        requests = list(TrainOrder(shards, settings(world_size, rank)).epoch(1))
        fingerprints.add(tuple(request.fingerprint for request in requests))
        assert [request.step for request in requests] == list(range(len(requests)))
        lengths.add(len(requests))
        for request in requests:
            longest = max((u.duration for u in request.utterances), default=0.0)
            assert len(request.utterances) * longest <= 30.0
            seen.update(u.id for u in request.utterances)
    assert len(lengths) == 1  # all ranks make the same number of steps
    (agreed,) = fingerprints
    assert len(set(agreed)) > len(agreed) // 2 and max(agreed) < FINGERPRINTS
    assert seen == Counter(f"u{i:03d}" for i in range(len(durations)))


def test_batches_of_a_step_are_alike(shards: list[Shard]) -> None:
    """Ranks of a step work on one bucket, so that none waits for a much longer batch."""
    steps = all_steps(TrainOrder(shards, settings(2)))[:40]
    spread = [abs(a[0].cost - b[0].cost) for a, b in steps]
    assert sum(spread) / len(spread) < 1.0
    means = {round(sum(item.cost for item in a) / len(a)) for a, _ in steps}
    assert len(means) >= 3  # and steps differ


def test_order_depends_on_seed_and_epoch_only(shards: list[Shard]) -> None:
    def order(seed: int, epoch: int) -> list[list[list[str]]]:
        return [ids(step) for step in all_steps(TrainOrder(shards, settings(2, seed=seed)), epoch)]

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)
    used = TrainOrder(shards, settings(2))
    all_steps(used, 5)
    assert [ids(step) for step in all_steps(used)] == order(1, 1)


def test_shards_and_utterances_mix(shards: list[Shard]) -> None:
    first = [name for step in all_steps(TrainOrder(shards, settings()))[:10] for name in ids(step)[0]]
    assert len({int(name[1:]) // 50 for name in first}) >= 3
    neighbours = sum(int(b[1:]) - int(a[1:]) == 1 for a, b in pairwise(first))
    assert neighbours < len(first) / 4


def test_resume_in_the_middle(shards: list[Shard]) -> None:
    whole = [(request.step, request.utterances) for request in TrainOrder(shards, settings(2, 1)).epoch(3)]
    rest = [(request.step, request.utterances) for request in TrainOrder(shards, settings(2, 1)).epoch(3, 17)]
    assert rest == whole[17:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_drop_last_counts_what_it_drops(shards: list[Shard], world_size: int, caplog: pytest.LogCaptureFixture) -> None:
    order = TrainOrder(shards, settings(world_size, seed=3, drop_last=True))
    with caplog.at_level(logging.WARNING):
        steps = all_steps(order)
    for step in steps:
        for batch in step:
            assert sum(item.cost for item in batch) > 10.0  # with the next one it would not have fitted
    used = sum(len(batch) for step in steps for batch in step)
    dropped = order.skipped.counts["dropped at the end of the epoch (drop_last)"]
    assert used + dropped == 600
    assert 0 < dropped < 150
    assert order.skipped.report() in caplog.text


def test_filter_and_too_long_are_counted(shards: list[Shard], durations: list[float]) -> None:
    order = TrainOrder(
        shards,
        OrderSettings(max_duration=6.0, drop_last=False),
        accept=lambda u: "short" if u.duration < 1.0 else None,
    )
    used = sorted(name for step in all_steps(order) for batch in ids(step) for name in batch)
    assert used == [f"u{i:03d}" for i, d in enumerate(durations) if 1.0 <= d <= 6.0]
    assert order.skipped.counts == {
        "short": sum(d < 1.0 for d in durations),
        "longer than max_duration, 6 s, allows": sum(d > 6.0 for d in durations),
    }


def test_without_shuffling(shards: list[Shard]) -> None:
    plain = OrderSettings(max_duration=30.0, num_buckets=1, shuffle=False, drop_last=False, buffer_size=100)
    names = [name for step in all_steps(TrainOrder(shards, plain)) for name in ids(step)[0]]
    assert names == [f"u{i:03d}" for i in range(600)]


def test_nothing_to_train_on(shards: list[Shard]) -> None:
    order = TrainOrder(shards, settings(), accept=lambda _: "unwanted")
    with pytest.raises(DataError, match=r"not one step.*600 unwanted"):
        list(order.epoch(1))
    with pytest.raises(DataError, match="drop_last False"):
        list(TrainOrder(shards[:1], OrderSettings(max_duration=1e6)).epoch(1))


def test_a_small_set_is_shuffled_too(tmp_path: Path) -> None:
    write_folder(tmp_path, [2.0 + i / 100 for i in range(30)])
    order = TrainOrder(find_shards(tmp_path), OrderSettings(max_duration=12.0, drop_last=False))
    first, second = ([frozenset(ids(step)[0]) for step in all_steps(order, epoch)] for epoch in (1, 2))
    assert len(set(first) & set(second)) < len(first) / 2


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"num_buckets: 0.*max_duration: 0.*rank: 2"):
        OrderSettings(num_buckets=0, max_duration=0, rank=2)


def test_quadratic_duration_is_lhotses(shards: list[Shard]) -> None:
    constraint = pytest.importorskip("lhotse.dataset.sampling.base").TimeConstraint
    quadratic = OrderSettings(max_duration=60.0, quadratic_duration=15.0, drop_last=False, buffer_size=150)
    steps = all_steps(TrainOrder(shards, quadratic))
    assert sum(len(step[0]) for step in steps) == 600
    for step in steps:
        theirs = constraint(max_duration=60.0, quadratic_duration=15.0)
        for item in step[0]:
            theirs.add(item.utterance)
        assert not theirs.exceeded()
    plain = all_steps(TrainOrder(shards, OrderSettings(max_duration=60.0, drop_last=False, buffer_size=150)))
    assert len(plain) < len(steps)


def states(order: TrainOrder, epoch: int = 1) -> dict[int, State]:
    return {step: state for step, _, state in order.steps(epoch) if state is not None}


def after_a_file(state: State) -> State:
    """As it comes back from a checkpoint, which is read without running code."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


def test_from_any_state_the_same_batches_follow(shards: list[Shard]) -> None:
    order = TrainOrder(shards, settings(2))
    whole = [ids(step) for step in all_steps(order)]
    report = order.skipped.report()
    found = states(order)
    assert len(found) > 2 and 0 in found
    for at, state in found.items():
        for start in (at, at + 1, at + 4):
            again = TrainOrder(shards, settings(2))
            rest = list(again.steps(1, start, after_a_file(state)))
            assert [step for step, _, _ in rest] == list(range(start, len(whole)))
            assert [ids(batches) for _, batches, _ in rest] == whole[start:]
            assert again.skipped.report() == report


def test_a_state_spares_what_was_consumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path, [1.0] * 300, per_shard=5)
    small = OrderSettings(max_duration=10.0, num_buckets=1, drop_last=False, buffer_size=20, open_shards=2)
    found = states(TrainOrder(find_shards(tmp_path), small))
    opened: list[Path] = []
    original = sharindex.open_index

    def open_and_note(cuts: Path, tar: Path, cache: Path | None) -> sharindex.ShardIndex:
        opened.append(cuts)
        return original(cuts, tar, cache)

    monkeypatch.setattr("zipformer_crctc.shar.open_index", open_and_note)
    at = sorted(found)[len(found) // 2]
    next(TrainOrder(find_shards(tmp_path), small).steps(1, at, found[at]))
    assert 0 < len(opened) < 20


@pytest.mark.parametrize("start", [3, 16, 30])
@pytest.mark.parametrize(("old", "new"), [(2, 4), (4, 2), (2, 1), (1, 3)])
def test_another_number_of_ranks_loses_and_repeats_nothing(
    shards: list[Shard], old: int, new: int, start: int, caplog: pytest.LogCaptureFixture
) -> None:
    before = TrainOrder(shards, settings(old))
    whole = [ids(step) for step in all_steps(before)]
    start = min(start, len(whole) - 1)
    found = states(before)
    state = found[max(at for at in found if at <= start)]
    after = TrainOrder(shards, settings(new))
    with caplog.at_level(logging.INFO):
        rest = list(after.steps(1, start, state))
    assert f"world_size {old} -> {new}" in caplog.text and "lost or repeated" in caplog.text
    assert all(len(batches) == new for _, batches, _ in rest)
    seen = Counter(name for step in whole[:start] for batch in step for name in batch)
    seen.update(name for _, batches, _ in rest for batch in ids(batches) for name in batch)
    assert seen == Counter(f"u{i:03d}" for i in range(600))
    # and the changed run can be resumed in its turn
    at, state = max((step, state) for step, _, state in rest if state is not None)
    again = list(TrainOrder(shards, settings(new)).steps(1, at + 1, after_a_file(state)))
    assert [ids(batches) for _, batches, _ in again] == [ids(b) for step, b, _ in rest if step > at]


def test_changed_data_begin_the_epoch_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small = OrderSettings(max_duration=10.0, num_buckets=2, drop_last=False, buffer_size=20, open_shards=2)
    write_folder(tmp_path, [1.0] * 100)
    at, state = max(states(TrainOrder(find_shards(tmp_path), small)).items())
    for path in tmp_path.iterdir():
        path.unlink()
    write_folder(tmp_path, [1.0] * 50, per_shard=5)
    steps = list(TrainOrder(find_shards(tmp_path), small).steps(1, at, state))
    assert steps[0][0] == 0 and sum(len(batches[0]) for _, batches, _ in steps) == 50
    assert "when the checkpoint was written: epoch 1 begins anew" in caplog.text


def test_weights_mix_corpora(tmp_path: Path) -> None:
    for name, count in (("a", 40), ("b", 40), ("c", 40)):
        write_folder(tmp_path / name, [1.0] * count, prefix=name, per_shard=20)
    folders = [find_shards(tmp_path / name) for name in "abc"]
    shards = [shard for found in folders for shard in found]
    weights = [weight for found, weight in zip(folders, (1.0, 2.5, 0.25), strict=True) for _ in found]
    order = TrainOrder(shards, OrderSettings(max_duration=10.0, drop_last=False), weights=weights)
    chosen = []
    for epoch in (1, 2):
        seen = Counter(name for step in all_steps(order, epoch) for name in ids(step)[0])
        parts = {name: [count for key, count in seen.items() if key.startswith(name)] for name in "abc"}
        assert parts["a"] == [1] * 40
        assert sorted(parts["b"]) == [2] * 20 + [3] * 20
        assert parts["c"] == [1] * 10
        chosen.append({key for key in seen if key.startswith("c")})
    assert chosen[0] != chosen[1]
    with pytest.raises(ValueError, match="weights"):
        TrainOrder(shards, OrderSettings(), weights=[1.0, 0.0])
    assert TrainOrder(shards, OrderSettings()).fingerprint() != order.fingerprint()
