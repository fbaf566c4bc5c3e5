"""Which utterances may be trained on: published limits, and whether CTC can align their tokens at all.

Sets that are scored are never filtered; ``alignment_problem`` lists what CTC cannot align in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from zipformer_crctc.features import num_feature_frames
from zipformer_crctc.shar import Utterance
from zipformer_crctc.tokenizer import PhoneTokenizer


@dataclass(frozen=True)
class FilterLimits:
    """Limits of a training set; the defaults are the published ones for supervised data (ZIPA, data preparation)."""

    min_duration: float | None = 1.0
    """Seconds; None = no limit. A corpus of single words needs less."""
    max_duration: float | None = 24.0
    """Seconds; None = no limit."""
    min_tokens: int = 5
    """Tokens, the leading word boundary included."""
    max_tokens: int = 512
    """Tokens, the leading word boundary included."""
    frame_share: float = 0.9
    """At most this many tokens per output frame of 20 ms."""

    def __post_init__(self) -> None:
        problems = []
        for name in ("min_duration", "max_duration"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                problems.append(f"{name}: {value}; must be at least 0, or None")
        if self.min_duration is not None and self.max_duration is not None and self.min_duration > self.max_duration:
            problems.append(f"min_duration: {self.min_duration} is above max_duration: {self.max_duration}")
        if not 0 <= self.min_tokens <= self.max_tokens:
            problems.append(f"min_tokens: {self.min_tokens}, max_tokens: {self.max_tokens}; need 0 <= min <= max")
        if not 0 < self.frame_share <= 1:
            problems.append(f"frame_share: {self.frame_share}; must be in (0, 1]")
        if problems:
            raise ValueError("; ".join(problems))


PSEUDO_LABEL_LIMITS = FilterLimits(min_duration=None, max_duration=None, frame_share=0.85)


def num_output_frames(num_samples: int, factor: int = 1) -> int:
    """Output frames of ``factor`` times 20 ms that the model makes of ``num_samples`` samples at 16 kHz."""
    return -(-max(0, (num_feature_frames(num_samples) - 7) // 2) // factor)


def frames_needed(tokens: Sequence[int]) -> int:
    """Output frames that CTC needs at least: one per token and a blank between equal neighbours."""
    return len(tokens) + sum(left == right for left, right in pairwise(tokens))


def alignment_problem(tokens: Sequence[int], num_samples: int, factor: int = 1) -> str | None:
    """Why CTC cannot align ``tokens`` with ``num_samples`` samples, ``factor`` as above; None if it can."""
    if frames_needed(tokens) > num_output_frames(num_samples, factor):
        return "more tokens (with a blank between equal neighbours) than output frames"
    return None


class TrainingFilter:
    """Says why an utterance is left out of training.

    ``encode`` makes the token ids of a text (normalised as in training). ``factor`` is the model's output downsampling
    factor, ``speed`` the fastest speed at which the utterances are trained on.
    """

    def __init__(
        self,
        encode: Callable[[str], Sequence[int]],
        limits: FilterLimits | None = None,
        factor: int = 1,
        speed: float = 1.0,
    ) -> None:
        self.limits = limits or FilterLimits()
        self._encode = encode
        self._factor = factor
        self._speed = speed

    def reason(self, text: str, duration: float, num_samples: int) -> str | None:
        """The first limit that an utterance of ``duration`` seconds breaks; None if it may be trained on."""
        limits = self.limits
        if limits.min_duration is not None and duration < limits.min_duration:
            return f"shorter than {limits.min_duration:g} s"
        if limits.max_duration is not None and duration > limits.max_duration:
            return f"longer than {limits.max_duration:g} s"
        tokens = self._encode(text)
        if len(tokens) < limits.min_tokens:
            return f"fewer than {limits.min_tokens} tokens"
        if not set(tokens) - {PhoneTokenizer.boundary_id, PhoneTokenizer.unk_id}:
            return "no known phone"
        if len(tokens) > limits.max_tokens:
            return f"more than {limits.max_tokens} tokens"
        # The published rule, to the digit: 1.0 // 0.01 is 99, as the double next to 0.01 lies above it.
        frames = (int(duration // 0.01) - 7) // 2 + 1
        if limits.frame_share * frames < len(tokens):
            return f"more than {limits.frame_share:g} tokens per output frame"
        return alignment_problem(tokens, int(num_samples / self._speed), self._factor)

    def __call__(self, utterance: Utterance) -> str | None:
        """``reason`` of an utterance, in the form that the training order asks for."""
        return self.reason(utterance.text, utterance.duration, utterance.num_samples)
