"""What every search shares, and the greedy one: the best path, with the time of every phone.

Legend: N utterances, T' output frames (20 ms times the model's output downsampling factor), V pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

FRAME_SHIFT = 0.02
"""Seconds from one output frame to the next."""
FIRST_FRAME = 0.045
"""Seconds from the start of the audio to the centre of what output frame 0 stands for."""


@dataclass(frozen=True)
class Hypothesis:
    """What the search found in one utterance."""

    tokens: list[int]
    """Ids with repeats merged and blanks removed."""
    frames: list[int]
    """The output frame in which each token begins."""
    score: float
    """What the search ranks by, in nats: greedy, the log-probability of the best path; beam, that of all alignments
    together, plus language model and insertion bonus."""
    factor: int = 1
    """The model's output downsampling factor."""
    acoustic: float | None = None
    """The share of the acoustic model in the score, in nats; None where it is all of it."""
    last_frames: list[int] | None = None
    """The last output frame of each token; None where the search follows many alignments at once."""

    @property
    def times(self) -> list[float]:
        """The time of each token in seconds from the start of the audio."""
        return [frame_time(t, self.factor) for t in self.frames]


def frame_time(frame: int, factor: int = 1) -> float:
    """The time in seconds that an output frame stands for: 20 t + 45 ms; with a factor, the middle of its frames."""
    return round(FIRST_FRAME + FRAME_SHIFT * (factor * frame + (factor - 1) / 2), 6)


class NotANumber(ValueError):
    """Log-probabilities with NaN; says where, so that a program can name the utterance."""

    def __init__(self, row: int, frame: int) -> None:
        super().__init__(
            f"log_probs: NaN in row {row}, frame {frame}; check the features of that utterance and the weights of the "
            "checkpoint"
        )
        self.row, self.frame = row, frame


def valid_frames(log_probs: Tensor, lengths: Tensor) -> Tensor:
    """Check the input of a search; return which frames count, (N, T') bool.

    Raises ValueError where shapes or lengths do not fit, and NotANumber, which is one, for NaN in a frame that counts.
    """
    if log_probs.dim() != 3:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}, expected (N, T', V)")
    num_utterances, num_frames, _ = log_probs.shape
    if lengths.shape != (num_utterances,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({num_utterances},)")
    if num_utterances and (int(lengths.min()) < 0 or int(lengths.max()) > num_frames):
        raise ValueError(f"lengths {lengths.tolist()} do not lie within 0 and T' = {num_frames}")
    valid = torch.arange(num_frames, device=log_probs.device) < lengths.to(log_probs.device).unsqueeze(1)
    # A sum is NaN where one of its terms is, at a fraction of the cost of looking at each.
    wrong = log_probs.sum(dim=2).isnan() & valid
    if bool(wrong.any()):
        for row, frame in wrong.nonzero().tolist():  # infinities of both signs give NaN too
            if bool(log_probs[row, frame].isnan().any()):
                raise NotANumber(row, frame)
    return valid


@contextmanager
def naming(ids: Sequence[str]) -> Iterator[None]:
    """Turn a NotANumber of a batch into a ValueError that names the utterance; ids: of its rows."""
    try:
        yield
    except NotANumber as error:
        raise ValueError(f"utterance {ids[error.row]}: {error}") from error


def adjusted(log_probs: Tensor, blank_id: int = 0, blank_penalty: float = 0.0, allowed: Tensor | None = None) -> Tensor:
    """Log-probabilities (..., V) less a penalty (nats) of the blank, and minus infinity for what cannot come out.

    allowed: (V,) bool, see inventory.py; the blank is always allowed. The input is not changed. Raises ValueError for a
    mask of another size.
    """
    if allowed is not None:
        if allowed.shape != log_probs.shape[-1:]:
            raise ValueError(f"allowed has shape {tuple(allowed.shape)}, expected ({log_probs.shape[-1]},)")
        allowed = allowed.to(log_probs.device).clone()
        allowed[blank_id] = True
        log_probs = log_probs.masked_fill(~allowed, float("-inf"))
    if blank_penalty:
        offset = log_probs.new_zeros(log_probs.shape[-1])
        offset[blank_id] = blank_penalty
        log_probs = log_probs - offset
    return log_probs


@torch.no_grad()
def greedy_search(
    log_probs: Tensor,
    lengths: Tensor,
    blank_id: int = 0,
    factor: int = 1,
    blank_penalty: float = 0.0,
    allowed: Tensor | None = None,
) -> list[Hypothesis]:
    """The best CTC path of every utterance, repeats merged and blanks removed.

    log_probs: (N, T', V), natural logarithms; lengths: (N,), valid output frames of each. A repeat counts as a token of
    its own where a blank stands between. factor: the model's output downsampling factor, for the times. blank_penalty,
    allowed: see `adjusted`. Raises ValueError where shapes or lengths do not fit, and for NaN.
    Source: Graves et al. 2006, "Connectionist temporal classification", section 3.2 (best path decoding).
    """
    valid = valid_frames(log_probs, lengths)
    if log_probs.size(0) == 0:
        return []
    best, ids = adjusted(log_probs, blank_id, blank_penalty, allowed).max(dim=2)  # (N, T')
    scores = torch.where(valid, best, 0.0).sum(dim=1, dtype=torch.float64).tolist()
    previous = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=blank_id)
    is_token = valid & (ids != blank_id)
    begins = is_token & (ids != previous)
    continues = torch.nn.functional.pad((is_token & ~begins)[:, 1:], (0, 1))
    ends = [0, *begins.sum(dim=1).cumsum(dim=0).tolist()]
    found = (ids[begins], begins.nonzero()[:, 1], (is_token & ~continues).nonzero()[:, 1])
    tokens, first, last = torch.stack(found).tolist()
    return [
        Hypothesis(tokens[start:end], first[start:end], score, factor, last_frames=last[start:end])
        for (start, end), score in zip(pairwise(ends), scores, strict=True)
    ]
