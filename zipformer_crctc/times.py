"""From peaks to stretches of time: where each phone begins and ends, and how sure the model is of it.

A CTC model says that a phone was there, in a frame or two, with blanks around it; its peak says little about edges.
What holds is that the peak lies near the middle of the phone. So the centre of each label is taken from its posteriors,
with more precision than a frame, neighbouring phones meet in the middle between their centres, and the phones next to
silence reach a fixed time beyond theirs. The times of `TimeCorrection` are fitted on speech whose true times are known.

Legend: N utterances, T' output frames, V pieces, L labels.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from zipformer_crctc.forced_alignment import ForcedAlignment, force_align
from zipformer_crctc.search import Hypothesis, frame_time
from zipformer_crctc.tokenizer import PhoneTokenizer

REACH = 2
"""Frames on either side of a label's own that its centre is taken from."""
MIN_POSTERIOR = 1e-6
"""Below this sum of posteriors the centre is the middle of the label's frames."""
DIGITS = 4
"""Times are rounded to 0.1 ms."""


@dataclass(frozen=True)
class TimeCorrection:
    """How to get from peaks to edges, in seconds; fitted by `time_errors.py --fit-on`.

    The defaults are those fitted on the dev set of the espeak corpus, rounded to milliseconds; but for the pause, which
    was 0.15 there, in fast speech without long vowels: slower speakers would get silence within a word.
    """

    inner: float = 0.0
    """Added to the middle between the centres of neighbouring phones."""
    before: float = 0.032
    """From the start of a phone that follows silence to its centre."""
    after: float = 0.035
    """From the centre of a phone to its end where silence follows."""
    pause: float = 0.25
    """Phones whose centres are further apart than this have silence between them."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.inner):
            raise ValueError(f"inner: {self.inner}; must be a number of seconds")
        if not (self.before > 0 and self.after > 0):
            raise ValueError(f"before: {self.before}, after: {self.after}; both must be above 0 seconds")
        if not self.pause >= self.before + self.after:
            raise ValueError(
                f"pause: {self.pause}; must be at least before + after, {self.before + self.after:g} seconds, "
                "or phones around a pause would overlap"
            )

    @classmethod
    def read(cls, path: str | Path) -> TimeCorrection:
        """The correction in a JSON file. Raises ValueError with the file for one that cannot be read."""
        names = [field.name for field in fields(cls)]
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{name: float(values[name]) for name in names})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: is no time correction ({type(error).__name__}: {error}); "
                f"expected a JSON object with {', '.join(names)} in seconds, as time_errors.py --fit-on writes it"
            ) from error

    def to_json(self) -> str:
        """The content of such a file."""
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)}, indent=2) + "\n"


@dataclass(frozen=True)
class Segment:
    """A phone in time."""

    phone: str
    start: float
    """Seconds from the start of the audio."""
    end: float
    """Seconds."""
    confidence: float
    """Mean posterior of the label over its frames, 0 to 1."""


@dataclass(frozen=True)
class LabelCentres:
    """Where the labels of one utterance have their peaks."""

    seconds: list[float]
    """The centre of each label from the start of the audio."""
    confidence: list[float]
    """Mean posterior of each label over its frames."""


def hypothesis_segments(
    log_probs: Tensor,
    lengths: Tensor,
    hypotheses: Sequence[Hypothesis],
    durations: Sequence[float],
    tokenizer: PhoneTokenizer,
    factor: int = 1,
    correction: TimeCorrection | None = None,
) -> list[list[Segment]]:
    """The phones of search results in time, by the best path through the tokens found, whatever the search was.

    A search that followed a single path has it already; for others it is found by forced alignment.

    Args:
        log_probs: (N, T', V), natural logarithms.
        lengths: (N,), valid output frames.
        hypotheses: of each utterance.
        durations: of each utterance's audio in seconds.
        tokenizer: of the model; `▁` gets no segment.
        factor: the model's output downsampling factor.
        correction: see there; None is the default one.

    Raises:
        ValueError: tokens that the utterance has no path for.
    """
    alignments = hypothesis_paths(log_probs, lengths, hypotheses)
    return [
        phone_segments(frames[:length], alignment, duration, tokenizer, factor, correction)
        for frames, length, alignment, duration in zip(log_probs, lengths.tolist(), alignments, durations, strict=True)
    ]


def hypothesis_paths(log_probs: Tensor, lengths: Tensor, hypotheses: Sequence[Hypothesis]) -> list[ForcedAlignment]:
    """The best path through the tokens of each hypothesis; arguments and errors as of `hypothesis_segments`."""
    paths = [_single_path(hypothesis) for hypothesis in hypotheses]
    alignments = [path for path in paths if path is not None]
    if len(alignments) < len(hypotheses):
        alignments = force_align(log_probs, lengths, [hypothesis.tokens for hypothesis in hypotheses])
    for n, alignment in enumerate(alignments):
        if alignment.problem is not None:
            raise ValueError(
                f"hypothesis {n} of the batch: {alignment.problem}; these log-probabilities did not give it"
            )
    return alignments


def _single_path(hypothesis: Hypothesis) -> ForcedAlignment | None:
    if hypothesis.last_frames is None:
        return None
    return ForcedAlignment(hypothesis.tokens, hypothesis.frames, hypothesis.last_frames, hypothesis.score)


def phone_segments(
    log_probs: Tensor,
    alignment: ForcedAlignment,
    duration: float,
    tokenizer: PhoneTokenizer,
    factor: int = 1,
    correction: TimeCorrection | None = None,
) -> list[Segment]:
    """The phones of one alignment in time; log_probs: (T', V) without padding, the rest as in `hypothesis_segments`."""
    return segments_of(alignment.tokens, label_centres(log_probs, alignment, factor), duration, tokenizer, correction)


def segments_of(
    tokens: Sequence[int],
    centres: LabelCentres,
    duration: float,
    tokenizer: PhoneTokenizer,
    correction: TimeCorrection | None = None,
) -> list[Segment]:
    """The phones among some tokens in time, from where the tokens have their peaks."""
    kept = [k for k, token in enumerate(tokens) if token != tokenizer.boundary_id]
    edges = spans([centres.seconds[k] for k in kept], duration, correction or TimeCorrection())
    return [
        Segment(tokenizer.pieces[tokens[k]], start, end, round(centres.confidence[k], DIGITS))
        for k, (start, end) in zip(kept, edges, strict=True)
    ]


def label_centres(log_probs: Tensor, alignment: ForcedAlignment, factor: int = 1) -> LabelCentres:
    """The centre of each label of one utterance: the mean time of its posteriors around its frames on the path.

    The frames are those of the label and up to REACH on either side, but none beyond the middle of the blanks between
    two labels; so the centres of two labels are a frame apart at least, and in order.
    log_probs: (T', V) without padding.
    """
    if not alignment.first:
        return LabelCentres([], [])
    device = log_probs.device
    tokens = torch.tensor(alignment.tokens, device=device)
    posteriors = log_probs[: alignment.last[-1] + 1 + REACH].index_select(1, tokens).double().exp().cpu()  # (T', L)
    frames = torch.arange(len(posteriors), dtype=torch.float64)[:, None]
    first, last = torch.tensor(alignment.first), torch.tensor(alignment.last)
    middle = (last[:-1] + first[1:]) // 2
    low = torch.maximum(first - REACH, torch.cat([torch.zeros(1, dtype=torch.int64), middle + 1]))
    high = torch.minimum(last + REACH, torch.cat([middle, torch.tensor([len(posteriors) - 1])]))
    weight, moment = _range_sums(posteriors, low, high), _range_sums(posteriors * frames, low, high)
    centre = torch.where(weight > MIN_POSTERIOR, moment / weight.clamp(min=MIN_POSTERIOR), (first + last) / 2)
    mean = _range_sums(posteriors, first, last) / (last - first + 1)
    shift, start = frame_time(1, factor) - frame_time(0, factor), frame_time(0, factor)
    return LabelCentres((start + shift * centre).tolist(), mean.clamp(0.0, 1.0).tolist())


def _range_sums(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(L,): the sum of column l of values (T', L) over the frames low[l] to high[l], both included."""
    sums = torch.nn.functional.pad(values.cumsum(dim=0), (0, 0, 1, 0))
    columns = torch.arange(values.shape[1])
    return sums[high + 1, columns] - sums[low, columns]


def spans(centres: Sequence[float], duration: float, correction: TimeCorrection) -> list[tuple[float, float]]:
    """Start and end of each phone in seconds, rounded; each holds its own centre, and none overlap.

    centres: seconds, in rising order, within the audio; duration: of the audio in seconds.
    """
    if not centres:
        return []
    starts, ends = [max(0.0, centres[0] - correction.before)], []
    for left, right in pairwise(centres):
        if right - left > correction.pause:
            ends.append(left + correction.after)
            starts.append(right - correction.before)
        else:
            edge = min(max((left + right) / 2 + correction.inner, left), right)
            ends.append(edge)
            starts.append(edge)
    ends.append(max(centres[-1], min(duration, centres[-1] + correction.after)))
    return [(round(start, DIGITS), round(end, DIGITS)) for start, end in zip(starts, ends, strict=True)]
