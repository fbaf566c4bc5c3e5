"""From peaks to stretches of time."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from zipformer_crctc.forced_alignment import ForcedAlignment, force_align
from zipformer_crctc.search import frame_time, greedy_search
from zipformer_crctc.times import (
    TimeCorrection,
    hypothesis_segments,
    label_centres,
    phone_segments,
    spans,
)
from zipformer_crctc.tokenizer import PhoneTokenizer

CORRECTION = TimeCorrection(inner=0.01, before=0.03, after=0.04, pause=0.3)


def peaky(num_frames: int, peaks: dict[int, tuple[int, float]], pieces: int = 127) -> torch.Tensor:
    """Log-probabilities (T', V): blanks, and in some frames a label with a posterior; the rest is spread evenly."""
    posteriors = torch.full((num_frames, pieces), 1e-9)
    posteriors[:, 0] = 1.0
    for frame, (label, posterior) in peaks.items():
        posteriors[frame, label] = posterior
        posteriors[frame, 0] = 1.0 - posterior
    return posteriors.clamp(min=1e-9).log()


def test_neighbours_meet_in_the_middle_and_the_ends_reach_further() -> None:
    assert spans([0.1, 0.2, 0.34], 1.0, CORRECTION) == [(0.07, 0.16), (0.16, 0.28), (0.28, 0.38)]
    assert spans([], 1.0, CORRECTION) == []
    assert spans([0.5], 1.0, CORRECTION) == [(0.47, 0.54)]


def test_a_pause_parts_them() -> None:
    assert spans([0.1, 0.41, 0.7], 1.0, CORRECTION) == [(0.07, 0.14), (0.38, 0.565), (0.565, 0.74)]


def test_segments_stay_within_the_audio_and_hold_their_centres() -> None:
    assert spans([0.01, 0.99], 1.0, replace(CORRECTION, pause=2.0)) == [(0.0, 0.51), (0.51, 1.0)]
    generator = torch.Generator().manual_seed(0)
    for shift in (-0.5, -0.01, 0.0, 0.02, 0.5):
        centres = (0.045 + torch.rand(200, generator=generator).clamp(min=0.02).cumsum(0) * 0.2).tolist()
        edges = spans(centres, centres[-1] + 0.02, replace(CORRECTION, inner=shift))
        for (start, end), centre in zip(edges, centres, strict=True):
            assert 0 <= start - 1e-4 <= centre <= end + 1e-4
            assert start < end
        assert all(left[1] <= right[0] for left, right in pairwise(edges))
        assert edges[-1][1] <= centres[-1] + 0.0201


@pytest.mark.parametrize("factor", [1, 2])
def test_the_centre_is_the_mean_time_of_the_posteriors(factor: int) -> None:
    log_probs = peaky(12, {3: (5, 0.9), 4: (5, 0.3), 8: (6, 1.0)})
    (alignment,) = force_align(log_probs[None], torch.tensor([12]), [[5, 6]])
    assert (alignment.first, alignment.last) == ([3, 8], [3, 8])
    centres = label_centres(log_probs, alignment, factor)
    step = frame_time(1, factor) - frame_time(0, factor)
    assert centres.seconds[0] == pytest.approx(frame_time(3, factor) + 0.25 * step, abs=1e-6)
    assert centres.seconds[1] == pytest.approx(frame_time(8, factor), abs=1e-6)
    assert centres.confidence == pytest.approx([0.9, 1.0], abs=1e-6)


def test_neighbours_do_not_pull_at_each_others_centres() -> None:
    # The same label twice: the second peak lies within the reach of the first.
    log_probs = peaky(6, {1: (5, 0.8), 3: (5, 0.8)})
    (alignment,) = force_align(log_probs[None], torch.tensor([6]), [[5, 5]])
    assert label_centres(log_probs, alignment).seconds == pytest.approx([frame_time(1), frame_time(3)], abs=1e-6)


def test_a_label_without_posterior_has_the_middle_of_its_frames() -> None:
    log_probs = peaky(9, {})
    alignment = ForcedAlignment([5], [2], [4], -60.0)
    centres = label_centres(log_probs, alignment)
    assert centres.seconds == pytest.approx([frame_time(3)])
    assert centres.confidence == pytest.approx([0.0], abs=1e-6)


def test_word_boundaries_take_no_time() -> None:
    tokenizer = PhoneTokenizer.from_table()
    a, t = tokenizer.encode("at")[1:]
    log_probs = peaky(20, {1: (3, 0.9), 4: (a, 0.9), 6: (3, 0.7), 8: (t, 0.5)})
    (alignment,) = force_align(log_probs[None], torch.tensor([20]), [tokenizer.encode("a t")])
    segments = phone_segments(log_probs, alignment, 0.5, tokenizer, correction=CORRECTION)
    middle = (frame_time(4) + frame_time(8)) / 2 + 0.01
    assert [segment.phone for segment in segments] == ["a", "t"]
    assert [segment.start for segment in segments] == pytest.approx([frame_time(4) - 0.03, middle])
    assert [segment.end for segment in segments] == pytest.approx([middle, frame_time(8) + 0.04])
    assert [segment.confidence for segment in segments] == [0.9, 0.5]


def test_segments_of_a_batch_equal_those_of_each_alone() -> None:
    tokenizer = PhoneTokenizer.from_table()
    generator = torch.Generator().manual_seed(0)
    log_probs = (4 * torch.randn(5, 40, 127, generator=generator)).log_softmax(dim=2)
    lengths = torch.tensor([40, 33, 1, 20, 39])
    durations = [0.02 * int(length) + 0.1 for length in lengths]
    with_path = greedy_search(log_probs, lengths)
    hypotheses = [replace(hypothesis, last_frames=None) for hypothesis in with_path]
    log_probs[torch.arange(40) >= lengths[:, None]] = float("nan")  # padding does not count
    together = hypothesis_segments(log_probs, lengths, hypotheses, durations, tokenizer)
    assert hypothesis_segments(log_probs, lengths, with_path, durations, tokenizer) == together
    for n, hypothesis in enumerate(hypotheses):
        frames = log_probs[n : n + 1, : lengths[n]]
        assert hypothesis_segments(frames, lengths[n : n + 1], [hypothesis], durations[n : n + 1], tokenizer) == [
            together[n]
        ]
        assert [s.phone for s in together[n]] == tokenizer.phones(hypothesis.tokens)
        assert all(0 <= s.confidence <= 1 for s in together[n])
    with pytest.raises(ValueError, match="hypothesis 1 of the batch: NaN"):
        hypothesis_segments(log_probs, torch.full((5,), 40), hypotheses, durations, tokenizer)


def test_corrections_in_files(tmp_path: Path) -> None:
    path = tmp_path / "correction.json"
    path.write_text(CORRECTION.to_json())
    assert TimeCorrection.read(path) == CORRECTION
    for content in ("{}", "[1]", "no JSON", json.dumps({**json.loads(CORRECTION.to_json()), "pause": 0.01})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"correction\.json: is no time correction.*before, after, pause"):
            TimeCorrection.read(path)
    with pytest.raises(ValueError, match="absent"):
        TimeCorrection.read(tmp_path / "absent")


def test_corrections_that_make_no_sense() -> None:
    for inner in (float("nan"), float("inf")):  # JSON as Python reads it has both
        with pytest.raises(ValueError, match="must be a number of seconds"):
            TimeCorrection(inner=inner)
    with pytest.raises(ValueError, match="both must be above 0 seconds"):
        TimeCorrection(before=0.0)
    with pytest.raises(ValueError, match="must be at least before \\+ after"):
        TimeCorrection(before=0.2, after=0.2, pause=0.3)
