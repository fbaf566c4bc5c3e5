"""Forced alignment: the best CTC path through given labels (Viterbi), for a whole batch at once.

Legend: N utterances, T' output frames, V pieces, L labels (of the longest text), S = 2 L + 1 states: a blank before
each label and one after the last.
Source: Graves et al. 2006, "Connectionist temporal classification", section 4.1, with the maximum in place of the sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from zipformer_crctc.filters import frames_needed

IMPOSSIBLE = float("-inf")


@dataclass(frozen=True)
class ForcedAlignment:
    """The best path of one utterance through its labels, or why there is none."""

    tokens: list[int]
    """The labels, as given."""
    first: list[int]
    """The first output frame of each label on the path; empty where there is no path."""
    last: list[int]
    """The last output frame of each label: it holds the frames from `first` to `last`, both included."""
    score: float
    """Log-probability of the path in nats; minus infinity where there is none."""
    problem: str | None = None
    """Why the labels cannot be aligned; None where they are."""


@torch.no_grad()
def force_align(
    log_probs: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]], blank_id: int = 0
) -> list[ForcedAlignment]:
    """The frames of every label on the best CTC path through it, for each utterance.

    Where two paths are equally good, the one that, read from the end, stays in a state longest is taken. Labels that do
    not fit are named in `problem`: more labels (with a blank between equal neighbours) than frames, NaN in the frames,
    or a label of probability zero in all of them.

    Args:
        log_probs: (N, T', V), natural logarithms, on any device.
        lengths: (N,), valid output frames of each utterance.
        targets: the labels of each utterance, without blanks; may be empty.
        blank_id: the blank.

    Raises:
        ValueError: shapes or lengths that do not fit, or labels that are blank or outside the vocabulary.
    """
    _check(log_probs, lengths, targets, blank_id)
    if not targets:
        return []
    lengths = lengths.to(log_probs.device)
    valid = torch.arange(log_probs.shape[1], device=log_probs.device) < lengths[:, None]  # (N, T')
    damaged = (log_probs.isnan().any(dim=2) & valid).any(dim=1).tolist()
    states = _states(targets, blank_id, log_probs.device)  # (N, S)
    counts = torch.tensor([len(labels) for labels in targets], device=log_probs.device)
    path, scores = _best_path(log_probs, valid, states, counts, blank_id)
    first, last = _label_frames(path, valid, max(len(labels) for labels in targets))
    rows = zip(
        targets, lengths.tolist(), damaged, scores.tolist(), first.cpu().tolist(), last.cpu().tolist(), strict=True
    )
    found = []
    for labels, frames, is_damaged, score, begins, ends in rows:
        tokens = list(labels)
        problem = _problem(tokens, frames, is_damaged, score)
        if problem is not None:
            found.append(ForcedAlignment(tokens, [], [], IMPOSSIBLE, problem))
        else:
            found.append(ForcedAlignment(tokens, begins[: len(tokens)], ends[: len(tokens)], score))
    return found


def _check(log_probs: Tensor, lengths: Tensor, targets: Sequence[Sequence[int]], blank_id: int) -> None:
    if log_probs.dim() != 3:
        raise ValueError(f"log_probs has shape {tuple(log_probs.shape)}, expected (N, T', V)")
    num_utterances, num_frames, num_pieces = log_probs.shape
    if lengths.shape != (num_utterances,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({num_utterances},)")
    if len(targets) != num_utterances:
        raise ValueError(f"targets holds the labels of {len(targets)} utterances, log_probs has {num_utterances}")
    if num_utterances and (int(lengths.min()) < 0 or int(lengths.max()) > num_frames):
        raise ValueError(f"lengths {lengths.tolist()} do not lie within 0 and T' = {num_frames}")
    for n, labels in enumerate(targets):
        if wrong := [label for label in labels if label == blank_id or not 0 <= label < num_pieces]:
            raise ValueError(
                f"targets[{n}] holds the label {wrong[0]}, which is the blank or outside the {num_pieces} pieces; "
                "encode the text with the tokenizer of this model"
            )


def _problem(tokens: list[int], frames: int, is_damaged: bool, score: float) -> str | None:
    if (needed := frames_needed(tokens)) > frames:
        return (
            f"text longer than the audio allows: {len(tokens)} tokens need {needed} output frames "
            f"(one each and a blank between equal neighbours), the audio has {frames}"
        )
    if is_damaged:
        return "NaN in the log-probabilities"
    if score == IMPOSSIBLE:
        return "no path through the text has a probability above zero"
    return None


def _states(targets: Sequence[Sequence[int]], blank_id: int, device: torch.device) -> Tensor:
    """(N, S): blank, label, blank, label, ..., blank; blanks behind the end."""
    states = torch.full((len(targets), 2 * max(len(labels) for labels in targets) + 1), blank_id)
    for n, labels in enumerate(targets):
        states[n, 1 : 2 * len(labels) : 2] = torch.tensor(labels, dtype=torch.int64)
    return states.to(device)


def _best_path(
    log_probs: Tensor, valid: Tensor, states: Tensor, counts: Tensor, blank_id: int
) -> tuple[Tensor, Tensor]:
    """The state in each frame (N, T') and the score (N,) of the best path; frames that are not valid hold the last."""
    num_utterances, num_frames, _ = log_probs.shape
    size = states.shape[1]
    # From a label to the next one without a blank between them, unless they are equal.
    may_skip = torch.zeros_like(states, dtype=torch.bool)
    may_skip[:, 2:] = (states[:, 2:] != blank_id) & (states[:, 2:] != states[:, :-2])
    scores = torch.full((num_utterances, size), IMPOSSIBLE, dtype=torch.float64, device=log_probs.device)
    scores[:, 0] = 0.0
    moves = torch.zeros((num_frames, num_utterances, size), dtype=torch.uint8, device=log_probs.device)
    for t in range(num_frames):
        if t == 0:
            # The path begins in the first blank or the first label.
            best = torch.full_like(scores, IMPOSSIBLE)
            best[:, :2] = 0.0
        else:
            step = torch.nn.functional.pad(scores[:, :-1], (1, 0), value=IMPOSSIBLE)
            skip = torch.nn.functional.pad(scores[:, :-2], (2, 0), value=IMPOSSIBLE)[:, :size]
            skip = skip.masked_fill(~may_skip, IMPOSSIBLE)
            best = torch.maximum(torch.maximum(scores, step), skip)
            # Comparisons, not an argmax: which of equal values that gives depends on the device.
            move = (best > scores).to(torch.uint8) + ((best > scores) & (best > step)).to(torch.uint8)
            moves[t] = move.masked_fill(~valid[:, t, None], 0)
        emitted = log_probs[:, t].gather(1, states)
        scores = torch.where(valid[:, t, None], best + emitted, scores)
    # The path ends in the last label or the blank behind it; without labels there is only the blank.
    ends = torch.stack([2 * counts, (2 * counts - 1).clamp(min=0)], dim=1)  # (N, 2)
    final = scores.gather(1, ends)
    in_label = final[:, 1] > final[:, 0]
    state = torch.where(in_label, ends[:, 1], ends[:, 0])
    path = torch.empty((num_utterances, num_frames), dtype=torch.int64, device=log_probs.device)
    for t in range(num_frames - 1, -1, -1):
        path[:, t] = state
        state = state - moves[t].gather(1, state[:, None])[:, 0].long()
    return path, final.max(dim=1).values


def _label_frames(path: Tensor, valid: Tensor, num_labels: int) -> tuple[Tensor, Tensor]:
    """First and last frame (N, L) of each label of a path of states (N, T')."""
    num_utterances, num_frames = path.shape
    # Blanks and frames that are not valid go to a column of their own, which is cut off.
    label = torch.where(valid & (path % 2 == 1), path // 2, num_labels)
    frame = torch.arange(num_frames, device=path.device).expand(num_utterances, -1)
    empty = torch.zeros((num_utterances, num_labels + 1), dtype=torch.int64, device=path.device)
    first = empty.scatter_reduce(1, label, frame, "amin", include_self=False)
    last = empty.scatter_reduce(1, label, frame, "amax", include_self=False)
    return first[:, :num_labels], last[:, :num_labels]
