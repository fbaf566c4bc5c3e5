"""Errors of times, on made-up events."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from zipformer_crctc.forced_alignment import force_align
from zipformer_crctc.shar import Utterance
from zipformer_crctc.time_errors import (
    Event,
    Timing,
    edge_errors,
    error_table,
    fit_correction,
    matches,
    measure,
    timing,
    true_events,
)
from zipformer_crctc.times import TimeCorrection
from zipformer_crctc.tokenizer import PhoneTokenizer


def utterance(*alignment: tuple[str, float, float]) -> Utterance:
    text = "".join(phones for phones, _, _ in alignment)
    return Utterance("u", 1.0, 16_000, text, "xx", "s", "tar", 0, 0, alignment)


def test_silence_around_events() -> None:
    events = true_events(utterance(("a", 0.1, 0.1), ("t", 0.2, 0.1), ("s", 0.4, 0.1)))
    assert [(e.after_silence, e.before_silence) for e in events] == [(True, False), (False, True), (True, True)]
    assert events[1].end == pytest.approx(0.3)


def test_matches() -> None:
    assert matches(list("abc"), list("abc")) == [0, 1, 2]
    assert matches(list("abc"), list("xabdc")) == [1, 2, 4]
    assert matches(list("abc"), list("ac")) == [0, None, 1]
    assert matches([], list("a")) == []


def test_an_event_of_several_pieces_is_one_event() -> None:
    tokenizer = PhoneTokenizer.from_table()
    spoken = utterance(("tʃ", 0.1, 0.1), ("a", 0.2, 0.1), ("ɪə", 0.3, 0.2))
    pieces = [tokenizer.encode(phones)[1:] for phones, _, _ in spoken.alignment or ()]
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(1, 30, 127, generator=generator).log_softmax(dim=2)
    lengths = torch.tensor([30])
    (forced,) = force_align(log_probs, lengths, [tokenizer.encode(spoken.text)])
    found = timing(spoken, pieces, forced, log_probs[0], tokenizer, 1)
    assert [(first, last) for _, first, last in found.events] == [(0, 1), (2, 2), (3, 4)]
    assert len(found.centres) == 5 and found.num_events == 3
    # Of what was recognised, an event counts if all its pieces are there, one after the other.
    (other,) = force_align(log_probs, lengths, [tokenizer.encode("tsʃaɪə")])
    found = timing(spoken, pieces, other, log_probs[0], tokenizer, 1)
    assert [(first, last) for _, first, last in found.events] == [(3, 3), (4, 5)]
    assert found.num_events == 3


def made_up(correction: TimeCorrection, count: int = 40) -> list[Timing]:
    """Utterances for which a correction is right to the digit: two stretches of three phones with silence between."""
    found = []
    for n in range(count):
        step = 0.08 + 0.001 * n
        centres = [0.3, 0.3 + step, 0.3 + 2 * step]
        centres += [centre + 0.8 for centre in centres]
        events = []
        for k, centre in enumerate(centres):
            opens, closes = k % 3 == 0, k % 3 == 2
            start = centre - (correction.before if opens else step / 2 - correction.inner)
            end = centre + (correction.after if closes else step / 2 + correction.inner)
            events.append((Event(start, end, opens, closes), k, k))
        found.append(Timing(str(n), 3.0, centres, events, len(events)))
    return found


def test_the_fit_finds_what_was_put_in() -> None:
    truth = TimeCorrection(inner=0.004, before=0.03, after=0.05, pause=0.3)
    fitted = fit_correction(made_up(truth))
    assert (fitted.inner, fitted.before, fitted.after) == (0.004, 0.03, 0.05)
    inner, silent = edge_errors(made_up(truth), fitted)
    assert (len(inner), len(silent)) == (40 * 8, 40 * 4)
    assert max(map(abs, [*inner, *silent])) < 1e-4
    with pytest.raises(ValueError, match="too few events"):
        fit_correction([])
    with pytest.raises(ValueError, match="check the true times"):
        fit_correction(made_up(TimeCorrection(before=0.03, after=0.7, pause=0.8)))


def test_an_event_without_phones_is_counted() -> None:
    """Such as a tone, which normalisation drops; the text without it is spelled by the others."""
    tokenizer = PhoneTokenizer.from_table()
    log_probs = torch.randn(2, 30, 127, generator=torch.Generator().manual_seed(0)).log_softmax(dim=2)
    spoken = [utterance(("a", 0.1, 0.1), ("˥", 0.2, 0.1), ("t", 0.3, 0.1)), utterance(("a", 0.1, 0.1))]
    batch = SimpleNamespace(is_empty=False, texts=["at", "a"], utterances=spoken)
    recogniser = SimpleNamespace(
        tokenizer=tokenizer, factor=1, log_probs=lambda batch: (log_probs, torch.tensor([30, 30]))
    )
    found = measure(cast(Any, recogniser), cast(Any, [batch]))
    assert [t.num_events for t in found["forced alignment"]] == [1]
    batch.texts, batch.utterances = ["tʰa"] * 2, [utterance(("tʰ", 0.1, 0.1), ("a", 0.2, 0.1))] * 2
    for without, phones in ((False, 3), (True, 2)):
        found = measure(cast(Any, recogniser), cast(Any, [batch]), without)
        assert [len(t.centres) for t in found["forced alignment"]] == [phones, phones]
    batch.texts, batch.utterances = ["at", "a"], spoken
    log_probs[1, 3, 7] = float("nan")
    with pytest.raises(ValueError, match="utterance u: log_probs: NaN in row 1, frame 3"):
        measure(cast(Any, recogniser), cast(Any, [batch]))
    log_probs[1, 3, 7] = -1.0
    batch.utterances = spoken[:1] * 2
    with pytest.raises(ValueError, match="an event without a phone"):
        measure(cast(Any, recogniser), cast(Any, [batch]))


def test_the_table() -> None:
    truth = TimeCorrection(inner=0.0, before=0.03, after=0.05, pause=0.3)
    late = TimeCorrection(inner=0.01, before=0.03, after=0.05, pause=0.3)
    table = error_table({"forced alignment": made_up(truth, 5), "recognition": []}, late).splitlines()
    assert table[2] == "| forced alignment | all | 30 | 30 | 60 | 10.0 | 6.7 | 10.0 | 100.0 | 10.0 |"
    assert table[3] == "| forced alignment | between events | 30 | 30 | 40 | 10.0 | 10.0 | 10.0 | 100.0 | 10.0 |"
    assert table[4].startswith("| forced alignment | next to silence | 30 | 30 | 20 | 0.0 |")
    assert table[5] == "| recognition | all | 0 | 0 | 0 | - | - | - | - | - |"
