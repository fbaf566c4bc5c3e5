"""Settings and shared data of all tests."""

from __future__ import annotations

import os
import random

# The models here are small: more threads do not make them faster, and threads that wait for each other on a busy
# machine make them many times slower. Processes that the tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from shar_folder import RATE, cut, write_shard
from zipformer_crctc import activations
from zipformer_crctc.shar import Shard, find_shards

# The small arrays of tests go the way of large ones.
activations.KEPT_BYTES = {}


@pytest.fixture(scope="session")
def durations() -> list[float]:
    rng = random.Random(0)
    return [round(rng.uniform(0.5, 8.0), 2) for _ in range(600)]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, durations: list[float]) -> list[Shard]:
    """600 utterances in 12 shards; no audio, as the order must not read any."""
    folder = tmp_path_factory.mktemp("data") / "train"
    for number in range(12):
        part = range(number * 50, number * 50 + 50)
        cuts = [cut(f"u{i:03d}", round(durations[i] * RATE)) for i in part]
        write_shard(folder, number, cuts, [(f"u{i:03d}.flac", b"no audio") for i in part])
    return find_shards(folder)
