from __future__ import annotations

import logging
import random
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest

from shar_folder import RATE, cut, write_folder, write_shard
from zipformer_crctc.batches import EvalOrder, OrderSettings, TrainOrder, bucket_limits, take_batch
from zipformer_crctc.shar import DataError, Shard, Utterance, find_shards


@pytest.fixture(scope="module")
def durations() -> list[float]:
    rng = random.Random(0)
    return [round(rng.uniform(0.5, 8.0), 2) for _ in range(600)]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, durations: list[float]) -> list[Shard]:
    """600 utterances in 12 shards; no audio, as the order must not read any."""
    folder = tmp_path_factory.mktemp("data") / "train"
    for number in range(12):
        part = range(number * 50, number * 50 + 50)
        cuts = [cut(f"u{i:03d}", round(durations[i] * RATE)) for i in part]
        write_shard(folder, number, cuts, [(f"u{i:03d}.flac", b"no audio") for i in part])
    return find_shards(folder)


def settings(world_size: int = 1, rank: int = 0, *, seed: int = 1, drop_last: bool = False) -> OrderSettings:
    return OrderSettings(
        max_duration=30.0, num_buckets=4, seed=seed, drop_last=drop_last, world_size=world_size, rank=rank,
        buffer_size=150, open_shards=3,
    )  # fmt: skip


def ids(step: list[list[Utterance]]) -> list[list[str]]:
    return [[utterance.id for utterance in batch] for batch in step]


def utterance(duration: float, name: str = "u") -> Utterance:
    return Utterance(name, duration, round(duration * RATE), "", "", "", "", 0, 0)


@pytest.mark.parametrize(
    ("durations", "end", "full"),
    [
        ([10.0] * 5, 3, True),
        ([10.0] * 3, 3, True),  # a fourth would not fit
        ([10.0] * 2, 2, False),
        ([5.0, 5.0, 16.0], 2, True),  # the third would make three of 16 s
        ([31.0, 1.0], 1, True),
        ([31.0], 1, True),
        ([1.0], 1, False),
    ],
)
def test_take_batch(durations: list[float], end: int, full: bool) -> None:
    assert take_batch([utterance(d) for d in durations], 0, 30.0) == (end, full)


def test_buckets_have_equal_total_duration(durations: list[float]) -> None:
    limits = bucket_limits(durations, 4)
    assert len(limits) == 3
    edges = [0.0, *limits, float("inf")]
    sums = [sum(d for d in durations if low <= d < high) for low, high in pairwise(edges)]
    assert max(sums) - min(sums) < 3 * max(durations)
    assert bucket_limits([1.0], 4) == []
    assert bucket_limits([], 4) == []


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_utterance_once(shards: list[Shard], durations: list[float], world_size: int) -> None:
    seen: Counter[str] = Counter()
    lengths = set()
    for rank in range(world_size):
        requests = list(TrainOrder(shards, settings(world_size, rank)).epoch(1))
        assert [request.step for request in requests] == list(range(len(requests)))
        lengths.add(len(requests))
        for request in requests:
            longest = max((u.duration for u in request.utterances), default=0.0)
            assert len(request.utterances) * longest <= 30.0
            seen.update(u.id for u in request.utterances)
    assert len(lengths) == 1  # all ranks make the same number of steps
    assert seen == Counter(f"u{i:03d}" for i in range(len(durations)))


def test_batches_of_a_step_are_alike(shards: list[Shard]) -> None:
    """Ranks of a step work on one bucket, so that none waits for a much longer batch."""
    steps = list(TrainOrder(shards, settings(2)).steps(1))[:40]
    spread = [abs(a[0].duration - b[0].duration) for a, b in steps]
    assert sum(spread) / len(spread) < 1.0
    means = {round(sum(u.duration for u in a) / len(a)) for a, _ in steps}
    assert len(means) >= 3  # and steps differ


def test_order_depends_on_seed_and_epoch_only(shards: list[Shard]) -> None:
    def order(seed: int, epoch: int) -> list[list[list[str]]]:
        return [ids(step) for step in TrainOrder(shards, settings(2, seed=seed)).steps(epoch)]

    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2)
    assert order(1, 1) != order(2, 1)
    used = TrainOrder(shards, settings(2))
    list(used.steps(5))
    assert [ids(step) for step in used.steps(1)] == order(1, 1)


def test_shards_and_utterances_mix(shards: list[Shard]) -> None:
    first = [u.id for step in islice(TrainOrder(shards, settings()).steps(1), 10) for u in step[0]]
    assert len({int(name[1:]) // 50 for name in first}) >= 3
    neighbours = sum(int(b[1:]) - int(a[1:]) == 1 for a, b in pairwise(first))
    assert neighbours < len(first) / 4


def test_resume_in_the_middle(shards: list[Shard]) -> None:
    whole = list(TrainOrder(shards, settings(2, 1)).epoch(3))
    assert list(TrainOrder(shards, settings(2, 1)).epoch(3, start_step=17)) == whole[17:]


@pytest.mark.parametrize("world_size", [2, 4])
def test_drop_last_counts_what_it_drops(shards: list[Shard], world_size: int, caplog: pytest.LogCaptureFixture) -> None:
    order = TrainOrder(shards, settings(world_size, drop_last=True))
    with caplog.at_level(logging.WARNING):
        steps = list(order.steps(1))
    for step in steps:
        for batch in step:
            assert sum(u.duration for u in batch) > 10.0  # with the next one it would not have fitted
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
    used = sorted(u.id for step in order.steps(1) for batch in step for u in batch)
    assert used == [f"u{i:03d}" for i, d in enumerate(durations) if 1.0 <= d <= 6.0]
    assert order.skipped.counts == {
        "short": sum(d < 1.0 for d in durations),
        "longer than max_duration, 6 s": sum(d > 6.0 for d in durations),
    }


def test_without_shuffling(shards: list[Shard]) -> None:
    plain = OrderSettings(max_duration=30.0, num_buckets=1, shuffle=False, drop_last=False, buffer_size=100)
    names = [u.id for step in TrainOrder(shards, plain).steps(1) for u in step[0]]
    assert names == [f"u{i:03d}" for i in range(600)]


def test_count_steps(shards: list[Shard], caplog: pytest.LogCaptureFixture) -> None:
    order = TrainOrder(shards, settings(2, drop_last=True))
    with caplog.at_level(logging.INFO):
        count = order.count_steps(1)
    assert caplog.text == ""
    assert count == len(list(order.steps(1)))


def test_nothing_to_train_on(shards: list[Shard]) -> None:
    order = TrainOrder(shards, settings(), accept=lambda _: "unwanted")
    with pytest.raises(DataError, match=r"not one step.*600 unwanted"):
        list(order.epoch(1))
    with pytest.raises(DataError, match="drop_last False"):
        list(TrainOrder(shards[:1], OrderSettings(max_duration=1e6)).epoch(1))


def test_a_small_set_is_shuffled_too(tmp_path: Path) -> None:
    write_folder(tmp_path, [2.0 + i / 100 for i in range(30)])
    order = TrainOrder(find_shards(tmp_path), OrderSettings(max_duration=12.0, drop_last=False))
    first, second = ([frozenset(u.id for u in step[0]) for step in order.steps(epoch)] for epoch in (1, 2))
    assert len(set(first) & set(second)) < len(first) / 2


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match=r"num_buckets: 0.*max_duration: 0.*rank: 2"):
        OrderSettings(num_buckets=0, max_duration=0, rank=2)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_scored_sets_are_whole(shards: list[Shard], world_size: int) -> None:
    orders = [EvalOrder(shards, 6.0, world_size, rank) for rank in range(world_size)]
    ranks = [list(order.epoch()) for order in orders]
    assert len({len(requests) for requests in ranks}) == 1
    seen = Counter(u.id for requests in ranks for request in requests for u in request.utterances)
    assert seen == Counter(f"u{i:03d}" for i in range(600))  # also those longer than max_duration
    assert ranks[0] == list(orders[0].epoch())
    for request in ranks[0]:
        batch = request.utterances
        assert len(batch) <= 1 or len(batch) * batch[0].duration <= 6.0


def test_scored_sets_list_what_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cuts = [cut(f"u{i}", RATE, text=None if i < 5 else "a") for i in range(7)]
    write_shard(tmp_path, 0, cuts, [(f"u{i}.flac", b"x") for i in range(7)])
    order = EvalOrder(find_shards(tmp_path), 10.0)
    assert len(next(order.epoch()).utterances) == 2
    assert order.skipped.examples == {"no supervision": ["u0", "u1", "u2", "u3", "u4"]}
    assert caplog.text.count("5 skipped: 5 no supervision (u0, u1, u2, u3, u4)") == 1
    assert len(next(EvalOrder(find_shards(tmp_path), 10.0, need_text=False).epoch()).utterances) == 7
