"""Prefix beam search: against sums over all alignments, and against a plain search with dictionaries."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from zipformer_crctc.beam import BeamOptions, prefix_beam_search
from zipformer_crctc.ngram import Fusion, NgramLM
from zipformer_crctc.search import Hypothesis, greedy_search

WIDE = BeamOptions(beam=400, nbest=400)
"""Keeps every prefix of the cases below."""
Prefix = tuple[int, ...]


def random_log_probs(generator: torch.Generator, *shape: int, peaky: float = 1.0) -> Tensor:
    return (peaky * torch.randn(shape, generator=generator)).log_softmax(dim=-1)


def random_lm(generator: torch.Generator, vocab: int, num_states: int = 5) -> NgramLM:
    """Tables of random scores and transitions, more general than any n-gram model."""
    scores = random_log_probs(generator, num_states, vocab + 1)
    following = torch.randint(num_states, (num_states, vocab), generator=generator, dtype=torch.int32)
    return NgramLM(scores[:, :vocab].contiguous(), following, scores[:, vocab].clone(), start=2, order=3)


def collapse(path: Iterable[int]) -> Prefix:
    return tuple(token for token, _ in itertools.groupby(path) if token)


def brute_force(log_probs: Tensor, fusion: Fusion | None = None) -> dict[Prefix, float]:
    """The score of every label sequence: the log of a sum over all V ** T paths, with what the fusion adds."""
    frames = log_probs.double().numpy()
    length, vocab = frames.shape
    sums: dict[Prefix, list[float]] = defaultdict(list)
    for path in itertools.product(range(vocab), repeat=length):
        sums[collapse(path)].append(sum(frames[t, token] for t, token in enumerate(path)))
    scores = {labels: float(np.logaddexp.reduce(values)) for labels, values in sums.items()}
    return {labels: score + added(labels, fusion) for labels, score in scores.items() if score > float("-inf")}


def added(labels: Prefix, fusion: Fusion | None) -> float:
    if fusion is None:
        return 0.0
    lm = 0.0 if fusion.lm is None else fusion.weight * fusion.lm.score(labels)
    return lm + fusion.bonus * len(labels)


def assert_equal_lists(found: list[Hypothesis], wanted: dict[Prefix, float]) -> None:
    assert [hypothesis.score for hypothesis in found] == sorted((h.score for h in found), reverse=True)
    assert {tuple(hypothesis.tokens): hypothesis.score for hypothesis in found} == pytest.approx(wanted, abs=1e-5)
    assert len(found) == len(wanted)


def fusions(generator: torch.Generator, vocab: int) -> list[Fusion | None]:
    return [None, Fusion(bonus=0.7), Fusion(random_lm(generator, vocab), weight=0.6, bonus=0.3)]


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["alone", "bonus", "lm"])
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "inventory"])
def test_a_wide_beam_equals_the_sum_over_all_alignments(kind: int, restricted: bool) -> None:
    """60 batches of 3 utterances of 0 to 5 frames in each of six ways."""
    generator = torch.Generator().manual_seed(kind)
    for _ in range(60):
        vocab = int(torch.randint(2, 5, (), generator=generator))
        log_probs = random_log_probs(generator, 3, 5, vocab, peaky=2.0)
        lengths = torch.randint(0, 6 if vocab < 4 else 5, (3,), generator=generator)
        fusion = fusions(generator, vocab)[kind]
        allowed = torch.rand(vocab, generator=generator) < 0.6 if restricted else None
        found = prefix_beam_search(log_probs, lengths, WIDE, allowed=allowed, fusion=fusion)
        for n in range(3):
            frames = log_probs[n, : lengths[n]]
            if allowed is not None:
                forbidden = ~allowed
                forbidden[0] = False
                frames = frames.masked_fill(forbidden, float("-inf"))
            assert_equal_lists(found[n], brute_force(frames, fusion))


def plain_search(
    log_probs: Tensor, beam: int, fusion: Fusion | None, extend: Callable[[Tensor], set[int]]
) -> list[tuple[Prefix, float]]:
    """Prefix beam search of one utterance with a dictionary."""
    hypotheses: dict[Prefix, tuple[float, float]] = {(): (0.0, float("-inf"))}

    def prior(labels: Prefix, end: bool) -> float:
        if fusion is None:
            return 0.0
        total = added(labels, fusion)
        if fusion.lm is not None and not end:
            total -= fusion.weight * fusion.lm.token_scores(labels)[-1]
        return total

    for frame in log_probs.double():
        allowed = extend(frame)
        values = frame.tolist()
        new: dict[Prefix, tuple[float, float]] = defaultdict(lambda: (float("-inf"), float("-inf")))
        for labels, (blank, token) in hypotheses.items():
            both = float(np.logaddexp(blank, token))
            new[labels] = (
                float(np.logaddexp(new[labels][0], both + values[0])),
                float(np.logaddexp(new[labels][1], token + values[labels[-1]])) if labels else new[labels][1],
            )
            for c in range(1, len(values)):
                if c in allowed or (*labels, c) in hypotheses:
                    mass = (blank if labels and labels[-1] == c else both) + values[c]
                    longer = (*labels, c)
                    old = new[longer]
                    new[longer] = (old[0], float(np.logaddexp(old[1], mass)))
        ranked = sorted(new, key=lambda labels: -np.logaddexp(*new[labels]) - prior(labels, end=False))
        hypotheses = {labels: new[labels] for labels in ranked[:beam]}
    scores = {labels: float(np.logaddexp(*masses)) + prior(labels, end=True) for labels, masses in hypotheses.items()}
    return sorted(scores.items(), key=lambda item: -item[1])


@pytest.mark.parametrize("kind", [0, 1, 2], ids=["alone", "bonus", "lm"])
@pytest.mark.parametrize("top_tokens", [0, 3])
@pytest.mark.parametrize("beam", [1, 2, 4, 9])
def test_a_narrow_beam_equals_a_plain_search(kind: int, top_tokens: int, beam: int) -> None:
    """Candidates that are left out because they cannot win change nothing."""
    generator = torch.Generator().manual_seed(beam)
    log_probs = random_log_probs(generator, 6, 25, 8, peaky=2.5)
    lengths = torch.tensor([25, 24, 11, 1, 0, 25])
    fusion = fusions(generator, 8)[kind]

    def extend(frame: Tensor) -> set[int]:
        return set((frame[1:].topk(top_tokens).indices + 1).tolist()) if top_tokens else set(range(8))

    found = prefix_beam_search(log_probs, lengths, BeamOptions(beam, beam, top_tokens=top_tokens), fusion=fusion)
    for n in range(6):
        wanted = plain_search(log_probs[n, : lengths[n]], beam, fusion, extend)
        assert [tuple(hypothesis.tokens) for hypothesis in found[n]] == [labels for labels, _ in wanted]
        assert [hypothesis.score for hypothesis in found[n]] == pytest.approx([score for _, score in wanted], abs=1e-4)


def search(log_probs: Tensor, lengths: list[int], **more: Any) -> list[list[Hypothesis]]:
    return prefix_beam_search(log_probs, torch.tensor(lengths), BeamOptions(beam=8, nbest=8), **more)


@pytest.mark.parametrize("kind", [0, 2], ids=["alone", "lm"])
@pytest.mark.parametrize("blank_skip", [0.0, 0.5])
def test_a_batch_equals_its_utterances_one_by_one(kind: int, blank_skip: float) -> None:
    generator = torch.Generator().manual_seed(3)
    log_probs = random_log_probs(generator, 7, 150, 20, peaky=4.0)
    lengths = [150, 3, 149, 1, 0, 70, 128]
    fusion = fusions(generator, 20)[kind]
    options = BeamOptions(beam=8, nbest=8, blank_skip=blank_skip)
    together = prefix_beam_search(log_probs, torch.tensor(lengths), options, fusion=fusion)
    for n, length in enumerate(lengths):
        (alone,) = prefix_beam_search(log_probs[n : n + 1, :length], torch.tensor([length]), options, fusion=fusion)
        assert [(h.tokens, h.frames) for h in together[n]] == [(h.tokens, h.frames) for h in alone]
        assert [h.score for h in together[n]] == pytest.approx([h.score for h in alone], abs=1e-9)


def test_padding_is_not_looked_at() -> None:
    generator = torch.Generator().manual_seed(4)
    log_probs = random_log_probs(generator, 2, 10, 6)
    spoilt = log_probs.clone()
    spoilt[0, 4:] = float("nan")
    assert search(log_probs, [4, 10]) == search(spoilt, [4, 10])


def test_nan_is_refused() -> None:
    log_probs = random_log_probs(torch.Generator().manual_seed(5), 2, 10, 6)
    log_probs[1, 3, 2] = float("nan")
    for find in (search, lambda x, n: greedy_search(x, torch.tensor(n))):
        with pytest.raises(ValueError, match="NaN in row 1, frame 3"):
            find(log_probs, [10, 10])
        find(log_probs, [10, 3])


def test_no_utterance_no_frame_and_one_frame() -> None:
    assert search(torch.zeros(0, 5, 4), []) == []
    assert search(torch.zeros(2, 0, 4), [0, 0]) == 2 * [[Hypothesis([], [], 0.0, acoustic=0.0)]]
    (found,) = search(torch.tensor([[[0.2, 0.5, 0.3]]]).log(), [1])
    assert [(h.tokens, h.frames) for h in found] == [([1], [0]), ([2], [0]), ([], [])]
    assert [h.score for h in found] == pytest.approx([math.log(p) for p in (0.5, 0.3, 0.2)])
    fusion = Fusion(random_lm(torch.Generator().manual_seed(6), 4), weight=0.5)
    ((empty,),) = search(torch.zeros(1, 0, 4), [0], fusion=fusion)
    assert fusion.lm is not None
    assert empty.score == pytest.approx(0.5 * fusion.lm.score([])) and empty.acoustic == 0.0


def peaks(*path: int, vocab: int = 5) -> Tensor:
    """(1, T', V) with nine tenths on a path."""
    ids = torch.tensor([path])
    return torch.full((*ids.shape, vocab), 0.1 / (vocab - 1)).scatter(2, ids.unsqueeze(2), 0.9).log()


def test_the_frames_are_those_of_the_peaks() -> None:
    """Also where a wide beam holds the prefix long before its token is likely."""
    path = (0, 0, 0, 3, 3, 0, 0, 3, 0, 2, 0, 0)
    best = prefix_beam_search(peaks(*path), torch.tensor([12]), BeamOptions(beam=64), factor=2)[0][0]
    assert (best.tokens, best.frames, best.factor) == ([3, 3, 2], [3, 7, 9], 2)


def test_skipped_blanks_leave_tokens_and_frames_as_they_are() -> None:
    log_probs = peaks(0, 0, 0, 3, 0, 0, 3, 3, 0, 2, 0, 0)
    options = BeamOptions(beam=8, nbest=3, blank_skip=0.85)
    best = prefix_beam_search(log_probs, torch.tensor([12]), options)[0][0]
    assert (best.tokens, best.frames) == ([3, 3, 2], [3, 6, 9])
    exact = search(log_probs, [12])[0][0]
    assert exact.score - 0.5 < best.score < exact.score


def test_skipping_nothing_changes_nothing() -> None:
    log_probs = random_log_probs(torch.Generator().manual_seed(7), 3, 30, 6)
    options = BeamOptions(beam=8, nbest=8, blank_skip=1.0)
    assert prefix_beam_search(log_probs, torch.tensor([30, 7, 0]), options) == search(log_probs, [30, 7, 0])


def test_blank_penalty_brings_tokens_out() -> None:
    log_probs = torch.tensor([[[0.7, 0.3, 1e-6], [0.7, 1e-6, 0.3], [0.9, 0.05, 0.05]]]).log()
    for penalty, tokens in ((0.0, []), (1.0, [1, 2])):
        assert greedy_search(log_probs, torch.tensor([3]), blank_penalty=penalty)[0].tokens == tokens
    plain, penalised = search(log_probs, [3])[0], search(log_probs, [3], blank_penalty=1.0)[0]
    assert plain[0].tokens != [1, 2] and penalised[0].tokens == [1, 2]


def test_only_allowed_tokens_come_out() -> None:
    generator = torch.Generator().manual_seed(8)
    log_probs = random_log_probs(generator, 4, 40, 12, peaky=3.0)
    lengths = torch.full((4,), 40)
    allowed = torch.zeros(12, dtype=torch.bool)
    allowed[[2, 5]] = True
    for found in search(log_probs, [40] * 4, allowed=allowed):
        assert {token for hypothesis in found for token in hypothesis.tokens} == {2, 5}
    for hypothesis in greedy_search(log_probs, lengths, allowed=allowed):
        assert set(hypothesis.tokens) == {2, 5}
    with pytest.raises(ValueError, match="expected \\(12,\\)"):
        search(log_probs, [40] * 4, allowed=allowed[:5])


def test_an_utterance_without_any_allowed_alignment() -> None:
    log_probs = torch.tensor([[[float("-inf"), 0.0, float("-inf")]]])
    ((found,),) = search(log_probs, [1], allowed=torch.tensor([True, False, True]))
    assert found == Hypothesis([], [], float("-inf"), acoustic=float("-inf"))


def test_half_precision_and_strides() -> None:
    log_probs = random_log_probs(torch.Generator().manual_seed(9), 2, 12, 6)
    wanted = search(log_probs, [12, 12])
    assert search(log_probs.transpose(0, 1).contiguous().transpose(0, 1), [12, 12]) == wanted
    halves = log_probs.half()
    assert search(halves, [12, 12]) == search(halves.float(), [12, 12])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", [0, 1, 2], ids=["alone", "bonus", "lm"])
@pytest.mark.parametrize("restricted", [False, True], ids=["all", "inventory"])
@pytest.mark.parametrize(("blank_skip", "top_tokens"), [(0.0, 0), (0.5, 0), (0.0, 20)])
def test_cuda_equals_cpu(kind: int, restricted: bool, blank_skip: float, top_tokens: int) -> None:
    """Twice each, so that the second batch replays the graph of the first."""
    generator = torch.Generator().manual_seed(10 + kind)
    fusion = fusions(generator, 127)[kind]
    moved = fusion
    if fusion is not None and fusion.lm is not None:
        moved = Fusion(fusion.lm.to("cuda:0"), fusion.weight, fusion.bonus)
    allowed = torch.rand(127, generator=generator) < 0.6 if restricted else None
    options = BeamOptions(16, 4, blank_skip=blank_skip, top_tokens=top_tokens)
    for _ in range(2):
        log_probs = random_log_probs(generator, 5, 200, 127, peaky=4.0)
        lengths = torch.tensor([200, 150, 1, 0, 77])
        here = prefix_beam_search(log_probs, lengths, options, allowed=allowed, fusion=fusion)
        there = prefix_beam_search(log_probs.cuda(), lengths.cuda(), options, allowed=allowed, fusion=moved)
        for wanted, found in zip(here, there, strict=True):
            assert [(h.tokens, h.frames) for h in found] == [(h.tokens, h.frames) for h in wanted]
            assert [h.score for h in found] == pytest.approx([h.score for h in wanted], abs=1e-6)


def test_acoustic_scores_leave_out_what_the_fusion_adds() -> None:
    generator = torch.Generator().manual_seed(12)
    log_probs = random_log_probs(generator, 3, 20, 6, peaky=3.0)
    for fusion in fusions(generator, 6)[1:]:
        for hypotheses in search(log_probs, [20, 7, 0], fusion=fusion):
            for found in hypotheses:
                assert found.acoustic == pytest.approx(found.score - added(tuple(found.tokens), fusion), abs=1e-5)


def test_improbable_frames_do_not_vanish() -> None:
    """Masses far below the smallest number that a float can hold."""
    log_probs = peaks(*([0, 1, 0, 2] * 100)).log_softmax(2) - 500.0
    best = search(log_probs, [400])[0][0]
    assert best.tokens == [1, 2] * 100 and best.score < -200_000.0


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"beam": 0}, "beam 0"),
        ({"beam": 4, "nbest": 5}, "nbest 5"),
        ({"blank_skip": 1.5}, "blank_skip 1.5"),
        ({"top_tokens": -1}, "top_tokens -1"),
    ],
)
def test_wrong_options(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BeamOptions(**values)


def test_a_model_for_other_pieces_is_refused() -> None:
    fusion = Fusion(random_lm(torch.Generator().manual_seed(11), 5))
    with pytest.raises(ValueError, match="read for 5 pieces"):
        search(torch.zeros(1, 3, 4), [3], fusion=fusion)
