"""CTC prefix beam search of a whole batch with tensors, on any device.

A hypothesis is a prefix: tokens without blanks and repeats. Its mass is the sum over all alignments that the beam has
followed, kept in two parts, alignments that end in a blank and alignments that end in the last token. In each frame a
hypothesis stays (blank, or its last token once more) or is extended by a token. Where prefix and extension are both in
the beam, the extension's mass is added to the hypothesis that is there. beamblock.py does this for a block of frames,
blockrunner.py for all of them; here stand what the search looks at, and the way back to tokens and their frames.

Legend: N utterances, T' output frames, T'' those that are searched, V pieces, B beam, H hypotheses that come out.
Source: Hannun et al. 2014, "First-pass large vocabulary continuous speech recognition using bi-directional recurrent
DNNs", section 3 (prefix beam search).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zipformer_crctc.beamblock import NEVER, BeamBlock
from zipformer_crctc.blockrunner import block_runner
from zipformer_crctc.ngram import Fusion
from zipformer_crctc.search import Hypothesis, adjusted, valid_frames


@dataclass(frozen=True)
class BeamOptions:
    """How wide to search."""

    beam: int = 16
    """Hypotheses kept per utterance."""
    nbest: int = 1
    """Hypotheses returned per utterance, at most; at most as many as the beam."""
    blank_skip: float = 0.0
    """Runs of frames whose blank has at least this probability count as blanks only, in one step; 0 is off."""
    top_tokens: int = 0
    """Only so many tokens of each frame, the most probable ones, may extend a hypothesis; 0 is all."""

    def __post_init__(self) -> None:
        if self.beam < 1:
            raise ValueError(f"beam {self.beam}: must be 1 or more")
        if not 1 <= self.nbest <= self.beam:
            raise ValueError(f"nbest {self.nbest}: must be 1 or more and not above the beam, {self.beam}")
        if not 0.0 <= self.blank_skip <= 1.0:
            raise ValueError(f"blank_skip {self.blank_skip}: must be a probability; 0 switches it off")
        if self.top_tokens < 0:
            raise ValueError(f"top_tokens {self.top_tokens}: must be 0 (all) or more")


@torch.no_grad()
def prefix_beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    options: BeamOptions | None = None,
    blank_id: int = 0,
    factor: int = 1,
    blank_penalty: float = 0.0,
    allowed: Tensor | None = None,
    fusion: Fusion | None = None,
) -> list[list[Hypothesis]]:
    """The best hypotheses of every utterance, best first; at least one each.

    log_probs: (N, T', V), natural logarithms; lengths: (N,), valid output frames of each. factor: the model's output
    downsampling factor, for the times. blank_penalty, allowed: see `search.adjusted`. fusion: a language model on the
    same device, its weight and an insertion bonus. The score is the log of the mass of all alignments in the beam, plus
    weight times the log-probability of the tokens with their end, plus the bonus for each token. The frame of a token
    is the last one in which the alignments that begin it there outweighed all earlier ones. An utterance without any
    allowed alignment gets an empty hypothesis with a score of minus infinity.

    Raises ValueError where shapes or lengths do not fit, and for NaN.
    """
    options = options or BeamOptions()
    valid = valid_frames(log_probs, lengths)
    if log_probs.size(0) == 0:
        return []
    if fusion is not None:
        fusion.check(log_probs.size(2), log_probs.device)
    frames = _frames(log_probs, valid, blank_id, blank_penalty, options.blank_skip)
    offsets = adjusted(log_probs.new_zeros(log_probs.size(2), dtype=torch.float64), blank_id, blank_penalty, allowed)
    with block_runner(frames.log_probs, options.beam, options.top_tokens, blank_id, fusion) as runner:
        codes = runner.run(frames.log_probs, frames.valid, frames.blank, offsets)
        return _hypotheses(runner.block, codes, options.nbest, fusion, frames.places, factor)


@dataclass(frozen=True)
class _Frames:
    """The frames to search."""

    log_probs: Tensor
    """(N, T'', V), not yet adjusted."""
    valid: Tensor
    """(N, T'') bool; the others are padding."""
    blank: Tensor | None = None
    """(N, T'') float64: the log-probability of the blank where only blanks count, NaN elsewhere."""
    places: Tensor | None = None
    """(N, T''): the output frame of each; None where it is its own."""


def _frames(
    log_probs: Tensor,
    valid: Tensor,
    blank_id: int,
    blank_penalty: float,
    blank_skip: float,
) -> _Frames:
    """All frames, or with `blank_skip` those of a run of blanks as one."""
    if not blank_skip:
        return _Frames(log_probs, valid)
    blank = log_probs[:, :, blank_id].double()
    skipped = (blank >= math.log(blank_skip)) & valid
    kept = valid & ~(skipped & torch.nn.functional.pad(skipped[:, :-1], (1, 0)))  # the first of each run stands for it
    counts = kept.sum(dim=1)
    size = int(counts.max())
    places = torch.sort(kept.logical_not().byte(), dim=1, stable=True).indices[:, :size]  # (N, T'')
    run = (kept.cumsum(dim=1) - 1).clamp(min=0)
    sums = torch.zeros_like(blank).scatter_add_(1, run, torch.where(skipped, blank - blank_penalty, 0.0))
    still_valid = torch.arange(size, device=log_probs.device) < counts.unsqueeze(1)
    merged = torch.where(skipped.gather(1, places) & still_valid, sums[:, :size], float("nan"))
    chosen = log_probs.gather(1, places.unsqueeze(2).expand(-1, -1, log_probs.size(2)))
    return _Frames(chosen, still_valid, merged, places)


def _hypotheses(
    block: BeamBlock, codes: list[Tensor], nbest: int, fusion: Fusion | None, places: Tensor | None, factor: int
) -> list[list[Hypothesis]]:
    """The best hypotheses at the end, with the tokens and frames that the codes, (F, N, B) each, lead back to."""
    score = block.log_mass()
    if fusion is not None and fusion.final is not None:
        score = score + fusion.final[block.final_states()]
    score, slot = score.topk(nbest, dim=1)  # (N, nbest)
    total = block.log_mass().gather(1, slot)
    path = _path(codes, slot, block.shape.vocab)  # (N, nbest, T'')
    begins = path >= 0
    row, _, frame = begins.nonzero().unbind(1)
    if places is not None:
        frame = places[row, frame]
    counts = begins.sum(dim=2).flatten()
    tokens = path[begins]
    if fusion is not None:
        padded = torch.nn.utils.rnn.pad_sequence(tokens.split(counts.tolist()), batch_first=True, padding_value=-1)
        total = total - fusion.added(padded).view_as(total)
    sizes = counts.tolist()
    found_tokens, found_frames = tokens.cpu().split(sizes), frame.cpu().split(sizes)
    scores, acoustics = score.tolist(), total.tolist()
    found: list[list[Hypothesis]] = []
    for n in range(len(scores)):
        listed = []
        for k in range(nbest):
            if scores[n][k] == NEVER:
                continue
            at = n * nbest + k
            listed.append(
                Hypothesis(found_tokens[at].tolist(), found_frames[at].tolist(), scores[n][k], factor, acoustics[n][k])
            )
        found.append(listed or [Hypothesis([], [], NEVER, factor, NEVER)])
    return found


def _path(codes: list[Tensor], slot: Tensor, vocab: int) -> Tensor:
    """The token that begins in each frame on the way to some places of the beam, (N, nbest), or -1: (N, nbest, T'')."""
    parts = [slot.new_empty(*slot.shape, 0)]
    for block in reversed(codes):
        origin = (block // (vocab + 1)).long()
        slots = slot.new_empty(len(block) + 1, *slot.shape)
        slots[-1] = slot
        by_frame = slots.unbind(0)
        for t, before in reversed(list(enumerate(origin.unbind(0)))):
            torch.gather(before, 1, by_frame[t + 1], out=by_frame[t])
        begun = (block % (vocab + 1) - 1).gather(2, slots[1:])
        parts.append(begun.permute(1, 2, 0).long())
        slot = slots[0]
    return torch.cat(parts[::-1], dim=2)
