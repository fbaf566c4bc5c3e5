from __future__ import annotations

import random
from itertools import pairwise

from zipformer_crctc.buckets import BucketPool, Item, bucket_limits, leftover_steps
from zipformer_crctc.shar import Utterance


def items(count: int) -> list[Item]:
    rng = random.Random(0)
    costs = [round(rng.uniform(0.5, 8.0), 2) for _ in range(count)]
    return [Item(cost, 0, n, Utterance(f"u{n}", cost, 1, "", "", "", "", 0, 0)) for n, cost in enumerate(costs)]


def test_buckets_have_equal_total_cost() -> None:
    costs = [item.cost for item in items(600)]
    limits = bucket_limits(costs, 4)
    assert len(limits) == 3
    edges = [0.0, *limits, float("inf")]
    sums = [sum(d for d in costs if low <= d < high) for low, high in pairwise(edges)]
    assert max(sums) - min(sums) < 3 * max(costs)
    assert bucket_limits([1.0], 4) == []
    assert bucket_limits([], 4) == []


def test_a_step_comes_from_one_bucket() -> None:
    pool = BucketPool([2.0, 5.0], True, random.Random(1))
    for item in items(300):
        pool.add(item)
    drawn = 0
    while (step := pool.draw(2, 30.0)) is not None:
        assert len(step) == 2
        buckets = {sum(item.cost >= limit for limit in pool.limits) for batch in step for item in batch}
        assert len(buckets) == 1
        drawn += sum(len(batch) for batch in step)
    assert pool.count == 300 - drawn == len(pool.empty())
    assert pool.count == 0


def test_leftovers_are_all_there() -> None:
    rest = items(50)
    full, partial = leftover_steps(rest, 3, 20.0, True, random.Random(2))
    found = [item.number for step in [*full, partial] for batch in step for item in batch]
    assert sorted(found) == list(range(50))
    assert all(len(step) == 3 for step in full) and len(partial) in (0, 3)
