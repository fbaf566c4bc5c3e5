from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from shar_folder import RATE, cut, write_shard
from zipformer_crctc.batches import EvalOrder, take_batch
from zipformer_crctc.shar import Shard, find_shards


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
    assert take_batch(durations, 0, 30.0) == (end, full)


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
