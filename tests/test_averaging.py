from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from golden_checks.training import CHECKERS
from zipformer_crctc.averaging import RunningAverage, mean_of_states, range_average

GOLDEN = Path(__file__).resolve().parents[2] / "shared" / "golden"


def state(value: float, counter: int = 0) -> dict[str, Tensor]:
    return {"weight": torch.full((2, 3), value), "scale": torch.tensor(-value), "counter": torch.tensor([counter])}


def test_golden() -> None:
    path = GOLDEN / "60_averaging.safetensors"
    if not path.is_file():
        pytest.skip(f"no reference fixtures at {GOLDEN}")
    results = CHECKERS["60"](path)
    assert results and all(result.ok for result in results)


def test_running_average_is_the_mean_of_the_snapshots() -> None:
    average = RunningAverage(state(100.0))
    values = [1.0, 4.0, 2.5, -3.0]
    for index, value in enumerate(values):
        average.update(state(value, counter=index), 200 * (index + 1), 200)
    got = average.state_dict()
    assert got["weight"].dtype == torch.float64
    torch.testing.assert_close(got["weight"], torch.full((2, 3), sum(values) / 4, dtype=torch.float64))
    assert got["counter"].tolist() == [3]
    assert got["counter"].dtype == torch.int64


def test_running_average_of_a_module_does_not_follow_it() -> None:
    module = nn.Linear(3, 2)
    average = RunningAverage(module)
    before = module.weight.detach().double()
    with torch.no_grad():
        module.weight.add_(1.0)
    assert torch.equal(average.state_dict()["weight"], before)
    average.update(module, 400, 200)
    torch.testing.assert_close(average.state_dict()["weight"], before + 0.5)
    with pytest.raises(ValueError, match="before the first period"):
        average.update(module, 150, 200)


def test_running_average_resumes_exactly() -> None:
    straight, saved = RunningAverage(state(0.1)), RunningAverage(state(0.1))
    for average in (straight, saved):
        for batch in (10, 20):
            average.update(state(batch / 7), batch, 10)
    resumed = RunningAverage(state(9.0))
    resumed.load_state_dict({name: tensor.clone() for name, tensor in saved.state_dict().items()})
    for average in (straight, resumed):
        average.update(state(0.3), 30, 10)
    assert all(torch.equal(resumed.state_dict()[name], want) for name, want in straight.state_dict().items())


def test_running_average_from_a_float32_state() -> None:
    average = RunningAverage(state(0.0))
    average.load_state_dict(state(2.0))
    assert average.state_dict()["weight"].dtype == torch.float64
    with pytest.raises(ValueError, match=r"weight has shape \(4,\), expected \(2, 3\)"):
        average.load_state_dict({**state(2.0), "weight": torch.zeros(4)})
    with pytest.raises(ValueError, match="missing entries \\['scale'\\]"):
        average.load_state_dict({"weight": torch.zeros(2, 3), "counter": torch.zeros(1)})


def test_range_average_is_the_mean_between() -> None:
    values = [float(i * i) for i in range(1, 11)]
    average = RunningAverage(state(0.0))
    saved = {}
    for index, value in enumerate(values, start=1):
        average.update(state(value, counter=index), 50 * index, 50)
        saved[50 * index] = {name: tensor.clone() for name, tensor in average.state_dict().items()}
    # Batches in between are rounded down to the last update.
    got = range_average(saved[150], saved[400], 163, 449, 50)
    want = sum(values[3:8]) / 5
    torch.testing.assert_close(got["weight"], torch.full((2, 3), want, dtype=torch.float64))
    assert got["counter"].tolist() == [8]
    got["counter"] += 1
    assert saved[400]["counter"].tolist() == [8]


def test_range_average_of_nothing() -> None:
    with pytest.raises(ValueError, match="no update of the running average lies between batches 410 and 590"):
        range_average(state(1.0), state(2.0), 410, 590, 200)
    with pytest.raises(ValueError, match="different models"):
        range_average(state(1.0), {"other": torch.zeros(1)}, 0, 400, 200)


def test_mean_of_states() -> None:
    got = mean_of_states(state(value, counter) for counter, value in enumerate([1.0, 2.0, 6.0]))
    assert torch.equal(got["weight"], torch.full((2, 3), 3.0))
    assert got["weight"].dtype == torch.float32
    assert got["counter"].tolist() == [2]
    with pytest.raises(ValueError, match="no state dict"):
        mean_of_states([])
    with pytest.raises(ValueError, match="unexpected entries \\['extra'\\]"):
        mean_of_states([state(1.0), {**state(1.0), "extra": torch.zeros(1)}])
