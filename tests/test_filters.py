from __future__ import annotations

import pytest

from zipformer_crctc.filters import (
    PSEUDO_LABEL_LIMITS,
    FilterLimits,
    TrainingFilter,
    alignment_problem,
    frames_needed,
    num_output_frames,
)
from zipformer_crctc.shar import Utterance


def encode(text: str) -> list[int]:
    """The boundary piece, then one id per letter."""
    return [3, *map(ord, text)] if text else []


def reason(text: str, seconds: float, limits: FilterLimits | None = None) -> str | None:
    return TrainingFilter(encode, limits).reason(text, seconds, round(seconds * 16000))


def letters(count: int) -> str:
    return "".join("ab"[i % 2] for i in range(count))


def test_a_text_of_unknown_symbols_is_left_out() -> None:
    unknown = TrainingFilter(lambda text: [3, 2], FilterLimits(min_tokens=1))
    assert unknown.reason("QQ", 2.0, 32000) == "no known phone"
    assert TrainingFilter(lambda text: [3, 2, 5], FilterLimits(min_tokens=1)).reason("QQb", 2.0, 32000) is None


def test_output_frames() -> None:
    assert [num_output_frames(n) for n in (0, 8 * 160, 9 * 160, 16000, 24 * 16000)] == [0, 0, 1, 46, 1196]
    assert [num_output_frames(n, 2) for n in (0, 9 * 160, 16000, 16160 + 160)] == [0, 1, 23, 24]


def test_an_utterance_must_be_long_enough_at_its_fastest() -> None:
    tokens = [4, 5] * 11  # 1 s makes 23 frames at 25 Hz, 21 at 1.1 times the speed
    limits = FilterLimits(min_tokens=1)
    reasons = [TrainingFilter(lambda text: tokens, limits, 2, speed).reason("", 1.0, 16000) for speed in (1.0, 1.1)]
    assert reasons[0] is None and reasons[1] is not None


def test_frames_needed() -> None:
    assert frames_needed([]) == 0
    assert frames_needed([3, 4, 5]) == 3
    assert frames_needed([3, 4, 4, 4, 5, 5]) == 9


def test_alignment_needs_a_blank_between_equal_neighbours() -> None:
    assert alignment_problem(list(range(46)), 16000) is None
    assert alignment_problem(list(range(23)), 16000, factor=2) is None
    assert alignment_problem(list(range(24)), 16000, factor=2) is not None
    assert alignment_problem([*range(45), 44], 16000) is not None


@pytest.mark.parametrize(
    ("text", "seconds", "problem"),
    [
        ("abab", 1.0, None),
        ("abab", 0.99, "shorter"),
        ("abab", 24.0, None),
        ("abab", 24.01, "longer"),
        ("aba", 1.0, "fewer than 5"),
        ("", 1.0, "fewer than 5"),
        (letters(511), 20.0, None),
        (letters(512), 20.0, "more than 512"),
        # 1 s: 99 frames by float floor division, T = 47, 0.9 T = 42.3
        (letters(41), 1.0, None),
        (letters(42), 1.0, "more than 0.9 tokens"),
        # 38 tokens with 36 repeats pass the published rule and cannot be aligned with 46 frames
        ("a" * 37, 1.0, "more tokens (with a blank"),
    ],
)
def test_published_limits(text: str, seconds: float, problem: str | None) -> None:
    found = reason(text, seconds)
    assert found is None if problem is None else found is not None and problem in found


def test_pseudo_labels() -> None:
    assert reason("abab", 0.5, PSEUDO_LABEL_LIMITS) is None
    assert reason("abab", 30.0, PSEUDO_LABEL_LIMITS) is None
    assert reason(letters(39), 1.0, PSEUDO_LABEL_LIMITS) is not None  # 40 > 0.85 * 47
    assert reason(letters(38), 1.0, PSEUDO_LABEL_LIMITS) is None


def test_limits_are_parameters() -> None:
    assert reason("aba", 0.6, FilterLimits(min_duration=0.3, min_tokens=2)) is None
    with pytest.raises(ValueError, match="min_duration: 3"):
        FilterLimits(min_duration=3.0, max_duration=2.0)
    with pytest.raises(ValueError, match=r"frame_share.*"):
        FilterLimits(frame_share=0.0)


def test_as_an_accept_function() -> None:
    utterance = Utterance("u", 2.0, 32000, "abab", "", "", "x.tar", 0, 1)
    assert TrainingFilter(encode)(utterance) is None
    assert TrainingFilter(encode, FilterLimits(min_tokens=6))(utterance) == "fewer than 6 tokens"
