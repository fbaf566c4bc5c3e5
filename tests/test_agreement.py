"""How far several models agree."""

from __future__ import annotations

import pytest

from zipformer_crctc.agreement import AgreementMeter, distribution, limit_of_best
from zipformer_crctc.metrics import FeatureDistance


def test_the_label_is_the_hypothesis_closest_to_the_others() -> None:
    meter = AgreementMeter()
    rows = [[["p", "a", "t"], ["b", "a", "t"], ["b", "a", "d"]], [["a"], ["a"], ["a"]], [[], [], ["k"]]]
    first, second, third = meter.measure(["x", "y", "z"], [1.0, 2.0, 3.0], rows)
    assert (first.id, first.label, first.label_of, first.duration) == ("x", "bat", 1, 1.0)
    assert first.hypotheses == ["pat", "bat", "bad"]
    distance = FeatureDistance()
    pairs = [("pat", "bat"), ("pat", "bad"), ("bat", "bad")]
    assert first.pfer == pytest.approx(sum(distance.distance(*pair) for pair in pairs) / 3, abs=1e-6)
    assert first.pfer_per_phone == pytest.approx(first.pfer / 3, abs=1e-6)
    assert (second.label, second.label_of, second.pfer) == ("a", 0, 0.0)
    assert (third.label, third.label_of) == ("", 0)
    assert third.score(per_phone=False) == third.score(per_phone=True) > 0


def test_of_two_models_the_first_gives_the_label() -> None:
    (found,) = AgreementMeter().measure(["x"], [1.0], [[["p"], ["m"]]])
    assert (found.label, found.label_of) == ("p", 0)


def test_symbols_that_count_for_nothing_are_counted() -> None:
    meter = AgreementMeter()
    (found,) = meter.measure(["x"], [1.0], [[["a", "<unk>", "ʡ"], ["a"]]])
    assert found.label == "aʡ" and found.pfer == 0.0
    assert meter.left_out == {"<unk>": 1}
    assert meter.unknown_to_panphon == {"ʡ": 1}


def test_one_model_agrees_with_nobody() -> None:
    with pytest.raises(ValueError, match="two or more"):
        AgreementMeter().measure(["x"], [1.0], [[["a"]]])
    assert AgreementMeter().measure([], [], []) == []


def test_the_limit_of_a_percentage() -> None:
    scores = [0.5, 0.1, 0.4, 0.2, 0.3]
    assert [limit_of_best(scores, percent) for percent in (1, 20, 40, 41, 100)] == [0.1, 0.1, 0.2, 0.3, 0.5]
    with pytest.raises(ValueError, match="no utterance has a label"):
        limit_of_best([], 50)


def test_a_distribution() -> None:
    found = distribution([0.0, 1.0, 2.0, 3.0, 4.0])
    assert (found["mean"], found["p0"], found["p25"], found["p50"], found["p100"]) == (2.0, 0.0, 1.0, 2.0, 4.0)
    assert found["std"] == pytest.approx(2**0.5, abs=1e-6)
    assert distribution([]) == {}
