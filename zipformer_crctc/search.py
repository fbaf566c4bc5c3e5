"""Greedy CTC search: the best path, with the time of every phone.

Legend: N utterances, T' output frames (20 ms), V pieces.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    """Log-probability of the best path in nats: the sum over all frames of the utterance."""
    factor: int = 1
    """The model's output downsampling factor."""

    @property
    def times(self) -> list[float]:
        """The time of each token in seconds from the start of the audio."""
        return [frame_time(t, self.factor) for t in self.frames]


def frame_time(frame: int, factor: int = 1) -> float:
    """The time in seconds that an output frame stands for: 20 t + 45 ms; with a factor, the middle of its frames."""
    return round(FIRST_FRAME + FRAME_SHIFT * (factor * frame + (factor - 1) / 2), 6)


@torch.no_grad()
def greedy_search(log_probs: Tensor, lengths: Tensor, blank_id: int = 0, factor: int = 1) -> list[Hypothesis]:
    """The best CTC path of every utterance, repeats merged and blanks removed.

    log_probs: (N, T', V), natural logarithms; lengths: (N,), valid output frames of each. A repeat counts as a token of
    its own where a blank stands between. factor: the model's output downsampling factor, for the times. Raises
    ValueError where the shapes or lengths do not fit.
    Source: Graves et al. 2006, "Connectionist temporal classification", section 3.2 (best path decoding).
    """
    if log_probs.dim() != 3:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}, expected (N, T', V)")
    num_utterances, num_frames, _ = log_probs.shape
    if lengths.shape != (num_utterances,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({num_utterances},)")
    if num_utterances == 0:
        return []
    if int(lengths.min()) < 0 or int(lengths.max()) > num_frames:
        raise ValueError(f"lengths {lengths.tolist()} do not lie within 0 and T' = {num_frames}")

    best, ids = log_probs.max(dim=2)  # (N, T')
    valid = torch.arange(num_frames, device=log_probs.device) < lengths.to(log_probs.device).unsqueeze(1)
    scores = torch.where(valid, best, 0.0).sum(dim=1, dtype=torch.float64).tolist()
    previous = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=blank_id)
    begins = valid & (ids != blank_id) & (ids != previous)
    counts = begins.sum(dim=1).tolist()
    tokens = ids[begins].split(counts)
    frames = begins.nonzero()[:, 1].split(counts)
    return [
        Hypothesis(t.tolist(), f.tolist(), score, factor)
        for t, f, score in zip((t.cpu() for t in tokens), (f.cpu() for f in frames), scores, strict=True)
    ]
