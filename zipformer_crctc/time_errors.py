"""How far the times of phones are off: `python zipformer_crctc/time_errors.py --exp-dir DIR --iter 2000 --fit-on dev`.

Needs sets whose cuts carry true times (a "phone" alignment in the supervision), such as the espeak corpus. Compares the
edges of its events with those of forced alignment of the reference and with those of recognition, and prints a table.
`--help` lists the flags.

An event may be several pieces (a diphthong, an affricate, a phone with a mark); its start is that of the first one and
its end that of the last. Each event has two edges, so an edge between two events counts for both.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

if __package__ in (None, ""):  # run as a script
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from zipformer_crctc.checks import check_no_search
from zipformer_crctc.commandline import DecodeArgs, parse_decode_args, run_program
from zipformer_crctc.flags import raise_if_any
from zipformer_crctc.forced_alignment import ForcedAlignment, force_align
from zipformer_crctc.loader import BatchLoader
from zipformer_crctc.metrics import align
from zipformer_crctc.recogniser import Recogniser, choose_test_sets, eval_loader, load_recogniser
from zipformer_crctc.results import write_atomically
from zipformer_crctc.search import greedy_search, naming
from zipformer_crctc.shar import Skipped, Utterance
from zipformer_crctc.text import normalise
from zipformer_crctc.times import DIGITS, TimeCorrection, label_centres, spans
from zipformer_crctc.tokenizer import PhoneTokenizer

logger = logging.getLogger(__name__)

GAP = 0.001
"""Seconds between two events from which on they count as parted by silence."""
PAUSES = np.arange(0.1, 0.61, 0.01)
"""Values of TimeCorrection.pause that are tried, in seconds."""
METHODS = ("forced alignment", "recognition")


@dataclass(frozen=True)
class TimeErrorsConfig:
    """What is fitted before the errors are measured."""

    fit_on: str = ""
    """A set, named as for --test-sets, on which the time correction is fitted; without it, nothing is."""
    write_correction: Path | None = None
    """File for the fitted correction, for --time-correction of decode.py and align.py."""


@dataclass(frozen=True)
class Event:
    """A stretch of speech whose true times are known."""

    start: float
    """Seconds."""
    end: float
    """Seconds."""
    after_silence: bool
    before_silence: bool


@dataclass(frozen=True)
class Timing:
    """The events of one utterance, and the peaks that some method found for them."""

    id: str
    duration: float
    """Seconds of audio."""
    centres: list[float]
    """The centre of each phone found, in seconds."""
    events: list[tuple[Event, int, int]]
    """Events that were found, each with the places of its first and last phone in `centres`."""
    num_events: int
    """All events, found or not."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point; a bad configuration, missing data or an unfit checkpoint ends it with status 2 and one message."""
    run_program(
        "time_errors.py",
        lambda: parse_decode_args(argv, TimeErrorsConfig, "Measure the errors of the times of phones."),
        run,
    )


def run(args: DecodeArgs) -> None:
    """Fit the correction if asked to, and print the errors on every test set."""
    decode, own = args.decode, args.own
    raise_if_any(check_no_search(decode))
    if own.write_correction and not own.fit_on:
        raise ValueError(f"--write-correction {own.write_correction}: nothing is fitted; give --fit-on as well")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    fitting = choose_test_sets((own.fit_on,), args.data.data_config) if own.fit_on else {}
    sets = choose_test_sets(decode.test_sets, args.data.data_config)
    correction = TimeCorrection.read(decode.time_correction) if decode.time_correction else TimeCorrection()
    recogniser = load_recogniser(args)

    def timings(path: Path) -> dict[str, list[Timing]]:
        return measure(recogniser, eval_loader(args, path, keep_alignment=True), args.data.remove_diacritics)

    if fitting:
        forced = [timing for path in fitting.values() for timing in timings(path)[METHODS[0]]]
        correction = fit_correction(forced)
        print(f"fitted on {', '.join(fitting)}: {correction}")
        if own.write_correction:
            write_atomically(own.write_correction, correction.to_json())
    for name, path in sets.items():
        print(f"\n{name}\n\n{error_table(timings(path), correction)}", flush=True)


@torch.inference_mode()
def measure(recogniser: Recogniser, loader: BatchLoader, without_diacritics: bool = False) -> dict[str, list[Timing]]:
    """The timings of all utterances of a loader, by method; recognition is greedy.

    without_diacritics: delete diacritics from texts and events. Raises ValueError for a set without true times.
    """
    found: dict[str, list[Timing]] = {method: [] for method in METHODS}
    skipped = Skipped(max_examples=None)
    tokenizer, factor = recogniser.tokenizer, recogniser.factor
    for batch in loader:
        if batch.is_empty:
            continue
        log_probs, lengths = recogniser.log_probs(batch)
        tokens = [_tokens(text, tokenizer, without_diacritics) for text in batch.texts]
        forced = force_align(log_probs, lengths, tokens)
        with naming([utterance.id for utterance in batch.utterances]):
            hypotheses = greedy_search(log_probs, lengths, factor=factor)
        recognised = force_align(log_probs, lengths, [hypothesis.tokens for hypothesis in hypotheses])
        for n, utterance in enumerate(batch.utterances):
            pieces = _event_pieces(utterance, tokenizer, without_diacritics)
            without_boundary = [token for token in tokens[n] if token != tokenizer.boundary_id]
            problem = forced[n].problem
            if utterance.alignment is None:
                problem = "no phone alignment in the cut"
            elif [piece for event in pieces for piece in event] != without_boundary:
                problem = "the events do not spell the text"
            elif not all(pieces):
                problem = "an event without a phone of the tokenizer"
            if problem is not None:
                skipped.add(problem.split(":")[0], utterance.id)
                continue
            for method, alignment in zip(METHODS, (forced[n], recognised[n]), strict=True):
                frames = log_probs[n, : lengths[n]]
                found[method].append(timing(utterance, pieces, alignment, frames, tokenizer, factor))
    if skipped.total:
        logger.warning("not measured: %s", skipped.report())
    if not found[METHODS[0]]:
        raise ValueError(f"nothing to measure: {skipped.report() or 'the set is empty'}; use a set with true times")
    return found


def timing(
    utterance: Utterance,
    pieces: Sequence[Sequence[int]],
    alignment: ForcedAlignment,
    log_probs: torch.Tensor,
    tokenizer: PhoneTokenizer,
    factor: int,
) -> Timing:
    """The timing of one utterance; events whose pieces were not all found, one after the other, are left out.

    Args:
        utterance: with its true times.
        pieces: the tokens of each event.
        alignment: of the reference or of what was recognised.
        log_probs: (T', V) without padding.
        tokenizer: of the model.
        factor: the model's output downsampling factor.
    """
    centres = label_centres(log_probs, alignment, factor).seconds
    kept = [k for k, token in enumerate(alignment.tokens) if token != tokenizer.boundary_id]
    reference = [tokenizer.pieces[piece] for event in pieces for piece in event]
    place = matches(reference, [tokenizer.pieces[alignment.tokens[k]] for k in kept])
    events, position = [], 0
    for event, parts in zip(true_events(utterance), pieces, strict=True):
        places = [place[i] for i in range(position, position + len(parts))]
        position += len(parts)
        first, last = places[0], places[-1]
        if first is not None and last is not None and places == list(range(first, last + 1)):
            events.append((event, first, last))
    return Timing(utterance.id, utterance.duration, [centres[k] for k in kept], events, len(pieces))


def true_events(utterance: Utterance) -> list[Event]:
    """The events of an utterance, with the silence around them."""
    times = [(start, start + duration) for _, start, duration in utterance.alignment or ()]
    silent = [True, *(right[0] - left[1] > GAP for left, right in pairwise(times)), True]
    return [Event(start, end, silent[i], silent[i + 1]) for i, (start, end) in enumerate(times)]


def _tokens(text: str, tokenizer: PhoneTokenizer, without_diacritics: bool) -> list[int]:
    return tokenizer.encode(normalise(text, tokenizer.pieces, None, without_diacritics))


def _event_pieces(utterance: Utterance, tokenizer: PhoneTokenizer, without_diacritics: bool) -> list[list[int]]:
    """The tokens of each event."""
    events = (_tokens(phones, tokenizer, without_diacritics) for phones, _, _ in utterance.alignment or ())
    return [[token for token in event if token != tokenizer.boundary_id] for event in events]


def matches(ref: Sequence[str], hyp: Sequence[str]) -> list[int | None]:
    """For each reference phone the place of its equal in the hypothesis, by an alignment with the fewest errors."""
    places: list[int | None] = []
    position = 0
    for expected, got in align(ref, hyp):
        if expected is not None:
            places.append(position if expected == got else None)
        position += got is not None
    return places


def edge_errors(timings: Iterable[Timing], correction: TimeCorrection) -> tuple[list[float], list[float]]:
    """Found minus true seconds of the edges between two events, and of those next to silence."""
    inner: list[float] = []
    silent: list[float] = []
    for t in timings:
        edges = spans(t.centres, t.duration, correction)
        for event, first, last in t.events:
            (silent if event.after_silence else inner).append(edges[first][0] - event.start)
            (silent if event.before_silence else inner).append(edges[last][1] - event.end)
    return inner, silent


def fit_correction(timings: Sequence[Timing]) -> TimeCorrection:
    """The correction with the smallest errors: medians, and the pause with the smallest mean absolute error.

    timings: of forced alignment, with all events. Raises ValueError where there are too few to fit.
    """
    inner, before, after = [], [], []
    for t in timings:
        for event, first, last in t.events:
            if event.after_silence:
                before.append(t.centres[first] - event.start)
            if event.before_silence:
                after.append(event.end - t.centres[last])
        for (left, _, i), (right, j, _) in pairwise(t.events):
            if not left.before_silence and not right.after_silence:
                inner.append(left.end - (t.centres[i] + t.centres[j]) / 2)
    if not (inner and before and after):
        raise ValueError("too few events to fit a time correction; use a larger set")
    shift, reach_before, reach_after = (round(float(np.median(values)), DIGITS) for values in (inner, before, after))
    choices = [
        TimeCorrection(shift, reach_before, reach_after, round(float(pause), DIGITS))
        for pause in PAUSES
        if pause >= reach_before + reach_after
    ]

    if not choices:
        raise ValueError(
            f"a phone reaches {reach_before + reach_after:g} seconds around its centre next to silence, more than any "
            "pause that is tried; check the true times of the set"
        )

    def cost(correction: TimeCorrection) -> float:
        return float(np.mean(np.abs(np.concatenate(edge_errors(timings, correction)))))

    return min(choices, key=cost)


def error_table(timings: dict[str, list[Timing]], correction: TimeCorrection) -> str:
    """Absolute errors in milliseconds by method and kind of edge, as Markdown; bias is the median signed error."""
    header = (
        "method",
        "edges",
        "events",
        "of",
        "number",
        "median ms",
        "mean ms",
        "90 % ms",
        "within 20 ms %",
        "bias ms",
    )
    rows = [header, ("---", "---", *(len(header) - 2) * ["---:"])]
    for method, found in timings.items():
        inner, silent = edge_errors(found, correction)
        counts = str(sum(len(t.events) for t in found)), str(sum(t.num_events for t in found))
        for kind, errors in (("all", [*inner, *silent]), ("between events", inner), ("next to silence", silent)):
            rows.append((method, kind, *counts, *_figures(errors)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figures(errors: Sequence[float]) -> tuple[str, ...]:
    if not errors:
        return ("0", *5 * ["-"])
    signed = 1000 * np.array(errors)
    size = np.abs(signed)
    figures = np.median(size), np.mean(size), np.percentile(size, 90), 100 * np.mean(size <= 20), np.median(signed)
    return (str(len(errors)), *(f"{figure:.1f}" for figure in figures))


if __name__ == "__main__":
    main()
