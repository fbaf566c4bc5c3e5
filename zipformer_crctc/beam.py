"""CTC prefix beam search of a whole batch with tensors, on any device.

A hypothesis is a prefix: tokens without blanks and repeats. Its mass is the sum over all alignments that the beam has
followed, kept in two parts, alignments that end in a blank and alignments that end in the last token. In each frame a
hypothesis stays (blank, or its last token once more) or is extended by a token. Where prefix and extension are both in
the beam, the extension's mass is added to the hypothesis that is there: hypotheses are told apart by a 64-bit hash of
their tokens, and each remembers the hash of its own prefix, so a comparison of all pairs finds them.

Only a loop over frames remains. All shapes are fixed and nothing is read back to the host within it.

Legend: N utterances, T' output frames, V pieces, B beam, K tokens that may extend in a frame, E extensions,
F frames of a block.
Source: Hannun et al. 2014, "First-pass large vocabulary continuous speech recognition using bi-directional recurrent
DNNs", section 3 (prefix beam search).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from zipformer_crctc.ngram import Fusion
from zipformer_crctc.search import Hypothesis, adjusted, valid_frames

NEVER = float("-inf")
BLOCK = 64
"""Frames whose tokens are sorted at once."""
_FACTOR = 6364136223846793005  # an odd number with well-mixed bits (Knuth's generator)
_EMPTY, _NO_PREFIX, _DEAD = 1, 2, 3  # hashes of the empty prefix, of what comes before it, of unused places
_HALF = math.log(2.0)


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
    frames = _frames(log_probs, valid, blank_id, blank_penalty, allowed, options.blank_skip)
    search = _Search(log_probs, options, blank_id, fusion)
    codes = [search.step(*frame) for block in frames.blocks() for frame in search.prepare(block)]
    return search.hypotheses(codes, frames.places, factor)


@dataclass(frozen=True)
class _Frames:
    """The frames to search, padding included: there the blank is certain, which changes no hypothesis."""

    log_probs: Tensor
    """(N, T'', V), not yet adjusted."""
    valid: Tensor
    """(N, T'') bool."""
    blank: Tensor | None
    """(N, T'') float64: the log-probability of the blank where only blanks count, NaN elsewhere."""
    places: Tensor | None
    """(N, T''): the output frame of each; None where it is its own."""
    blank_id: int
    blank_penalty: float
    allowed: Tensor | None

    def blocks(self) -> Iterator[Tensor]:
        """(F, N, V) float64, adjusted."""
        only_blank = torch.full((self.log_probs.size(2),), NEVER, dtype=torch.float64, device=self.log_probs.device)
        only_blank[self.blank_id] = 0.0
        for start in range(0, self.log_probs.size(1), BLOCK):
            part = slice(start, start + BLOCK)
            block = self.log_probs[:, part].transpose(0, 1).to(torch.float64, copy=True)
            block = adjusted(block, self.blank_id, self.blank_penalty, self.allowed)
            if self.blank is not None:
                blank = self.blank[:, part].T.unsqueeze(2)
                block = torch.where(blank.isnan(), block, only_blank + blank.nan_to_num())
            yield torch.where(self.valid[:, part].T.unsqueeze(2), block, only_blank)


def _frames(
    log_probs: Tensor,
    valid: Tensor,
    blank_id: int,
    blank_penalty: float,
    allowed: Tensor | None,
    blank_skip: float,
) -> _Frames:
    """All frames, or with `blank_skip` those of a run of blanks as one."""
    if not blank_skip:
        return _Frames(log_probs, valid, None, None, blank_id, blank_penalty, allowed)
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
    return _Frames(chosen, still_valid, merged, places, blank_id, blank_penalty, allowed)


@cache
def _extensions(beam: int, num_tokens: int, ranked: bool) -> tuple[list[int], list[int]]:
    """Which hypothesis is extended by which token, as indices into the beam and the tokens of the frame.

    With `ranked`, both stand in falling order, and the score of an extension is a sum of the two. Then extension
    (i, j) is no better than the (i + 1)(j + 1) - 1 others of ranks up to its own, less those that repeat a last token,
    one for each hypothesis at most. So it cannot be among the best B unless (i + 1) j <= B.
    """
    pairs = [(i, j) for i in range(beam) for j in range(num_tokens) if not ranked or (i + 1) * j <= beam]
    return [i for i, _ in pairs], [j for _, j in pairs]


class _Search:
    """The beams of a batch. Every utterance has B places, ordered by score; unused ones have a mass of zero."""

    def __init__(self, log_probs: Tensor, options: BeamOptions, blank_id: int, fusion: Fusion | None) -> None:
        self.num, self.vocab, self.beam = log_probs.size(0), log_probs.size(2), options.beam
        self.options, self.blank_id, self.device = options, blank_id, log_probs.device
        self.table = None if fusion is None else fusion.table
        self.fusion = fusion
        self.bonus = 0.0 if fusion is None else fusion.bonus
        self._lay_out()
        self._start()

    def _lay_out(self) -> None:
        """Tables of the candidates of a frame: B hypotheses that stay, E extensions, a place for what is dropped."""
        ranked = self.table is None
        self.all_tokens = not ranked and not self.options.top_tokens
        limit = self.options.top_tokens or self.vocab
        self.num_tokens = self.vocab if self.all_tokens else max(1, min(limit, self.vocab - 1))
        if ranked:
            self.num_tokens = min(self.num_tokens, self.beam + 1)
        slots, ranks = _extensions(self.beam, self.num_tokens, ranked)
        self.dropped = self.beam + len(slots)
        own = list(range(self.beam))
        tensor = self._integers
        self.slots, self.ranks = tensor(slots), tensor(ranks)
        self.slot_of, self.rank_of = tensor(own + slots), tensor([0] * self.beam + ranks)
        place = torch.full((self.beam, self.num_tokens + 1), self.dropped, device=self.device)
        place[self.slots, self.ranks] = torch.arange(self.beam, self.dropped, device=self.device)
        self.place = place.flatten()  # of an extension among the candidates
        self.own = tensor(own)
        self.own_row = self.own * (self.num_tokens + 1)
        self.own_code = self.own * (self.vocab + 1)
        self.rows = torch.arange(self.num, device=self.device).unsqueeze(1) * self.beam
        generator = torch.Generator().manual_seed(0)
        limits = torch.iinfo(torch.int64)
        self.marks = torch.randint(limits.min, limits.max, (self.vocab,), generator=generator).to(self.device)

    def _integers(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _start(self) -> None:
        """One hypothesis, the empty one."""
        shape = (self.num, self.beam)
        self.blank_mass = torch.full(shape, NEVER, dtype=torch.float64, device=self.device)
        self.blank_mass[:, 0] = 0.0
        self.token_mass = torch.full_like(self.blank_mass, NEVER)
        self.mass = self.blank_mass.clone()
        self.prior = torch.zeros_like(self.mass)  # language model and bonus
        integers = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.hash = integers + _DEAD
        self.hash[:, 0] = _EMPTY
        self.prefix = integers + _NO_PREFIX  # hash of all but the last token
        self.last = integers + self.blank_id
        self.state = integers if self.fusion is None else integers + self.fusion.start

    def prepare(self, block: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
        """What `step` needs of each frame of a block (F, N, V), which is changed.

        Log-probs of the blank (N, 1) and of the tokens (N, V), those of the tokens that may extend and their ids, both
        (N, K), and the rank of every token among them (N, V), K where it may not; None for ranks by id.
        """
        blank = block[:, :, self.blank_id, None].clone()
        block[:, :, self.blank_id] = NEVER  # it neither extends nor ends a hypothesis
        if self.all_tokens:
            ids = torch.arange(self.vocab, device=self.device).expand(self.num, -1)
            for blank_score, frame in zip(blank, block, strict=True):
                yield blank_score, frame, frame, ids, None
            return
        top, ids = block.topk(self.num_tokens, dim=2)  # (F, N, K)
        ranks = torch.full_like(block, self.num_tokens, dtype=torch.int64)
        ranks.scatter_(2, ids, torch.arange(self.num_tokens, device=self.device).expand_as(ids))
        yield from zip(blank, block, top, ids, ranks, strict=True)

    def step(self, blank_score: Tensor, frame: Tensor, top: Tensor, ids: Tensor, ranks: Tensor | None) -> Tensor:
        """Go on by one frame. Returns for each new hypothesis where it comes from, (N, B) int32: the place of its
        predecessor times V + 1, plus 1 + the token that begins in this frame if one does."""
        last_score = frame.gather(1, self.last)
        parent, has_parent = self._parents()
        repeats = self.last.gather(1, parent) == self.last
        incoming = torch.where(repeats, self.blank_mass.gather(1, parent), self.mass.gather(1, parent)) + last_score
        incoming = torch.where(has_parent, incoming, NEVER)
        stay_blank = self.mass + blank_score
        stay_token = torch.logaddexp(self.token_mass + last_score, incoming)
        stay = torch.logaddexp(stay_blank, stay_token)

        candidates = self._candidates(stay, last_score, top, ids, ranks, parent, has_parent)
        score, chosen = candidates[:, : self.dropped].topk(self.beam, dim=1)
        extended = chosen >= self.beam
        source = self.slot_of[chosen]
        token = ids.gather(1, self.rank_of[chosen])

        # Over half of the mass comes in here: the last token rather begins in this frame.
        begins = incoming > stay - _HALF
        stay_code = torch.where(begins, parent * (self.vocab + 1) + self.last + 1, self.own_code)
        packed = torch.stack((self.hash, self.prefix, self.last, stay_code, self.state), dim=2)
        rows = (source + self.rows).flatten()
        hashes, prefixes, lasts, codes, states = (
            packed.view(-1, 5).index_select(0, rows).view(self.num, self.beam, 5).unbind(2)
        )
        masses = torch.stack((stay_blank, stay_token, self.mass, self.blank_mass, self.prior), dim=2)
        blanks, tokens, mass, blank_mass, prior = (
            masses.view(-1, 5).index_select(0, rows).view(self.num, self.beam, 5).unbind(2)
        )
        new = torch.where(token == lasts, blank_mass, mass) + frame.gather(1, token)
        # An extension that was merged away fills a place only where nothing else does.
        dead = score == NEVER
        self.blank_mass = blanks.masked_fill(extended, NEVER)
        self.token_mass = torch.where(extended, new, tokens).masked_fill(dead, NEVER)
        self.mass = torch.logaddexp(self.blank_mass, self.token_mass)
        if self.table is not None:
            cell = states * self.vocab + token
            prior = torch.where(extended, prior + self.table.take(cell), prior)
            assert self.fusion is not None
            self.state = torch.where(extended, self.fusion.following.take(cell).long(), states)
        elif self.bonus:
            prior = torch.where(extended, prior + self.bonus, prior)
        self.prior = prior
        self.last = torch.where(extended, token, lasts)
        # A place without mass may hold the same tokens as one with mass, so it must not be found by them.
        self.hash = torch.where(extended, hashes * _FACTOR + self.marks[token], hashes).masked_fill(dead, _DEAD)
        self.prefix = torch.where(extended, hashes, prefixes).masked_fill(dead, _NO_PREFIX)
        return torch.where(extended, source * (self.vocab + 1) + token + 1, codes).int()

    def _parents(self) -> tuple[Tensor, Tensor]:
        """The place of each hypothesis without its last token, (N, B), and whether the beam has it."""
        same = self.prefix.unsqueeze(2) == self.hash.unsqueeze(1)  # (N, B, B)
        found, parent = same.max(dim=2)
        return parent, found

    def _candidates(
        self,
        stay: Tensor,
        last_score: Tensor,
        top: Tensor,
        ids: Tensor,
        ranks: Tensor | None,
        parent: Tensor,
        has_parent: Tensor,
    ) -> Tensor:
        """Scores (N, B + E + 1) of all hypotheses of the next frame; the last column is without meaning."""
        rank = self.last if ranks is None else ranks.gather(1, self.last)
        again = self.blank_mass + last_score  # of the last token, after a blank
        if self.table is None:
            ranked = self.mass + self.prior if self.bonus else self.mass
            extensions = ranked.index_select(1, self.slots) + top.index_select(1, self.ranks)
            if self.bonus:
                extensions = extensions + self.bonus
                stay, again = stay + self.prior, again + self.prior + self.bonus
        else:
            if ranks is None:
                gained = self.table.index_select(0, self.state.flatten()).view(self.num, self.beam, self.vocab)
            else:
                gained = self.table.take(self.state.unsqueeze(2) * self.vocab + ids.unsqueeze(1))  # (N, B, K)
            extensions = ((self.mass + self.prior).unsqueeze(2) + top.unsqueeze(1) + gained).flatten(1)
            stay = stay + self.prior
            again = again + self.prior + self.table.take(self.state * self.vocab + self.last)
        candidates = torch.cat((stay, extensions, stay[:, :1]), dim=1)
        candidates.scatter_(1, self.place[self.own_row + rank], again)
        merged = torch.where(has_parent, self.place[parent * (self.num_tokens + 1) + rank], self.dropped)
        return candidates.scatter_(1, merged, torch.full_like(stay, NEVER))

    def hypotheses(self, codes: list[Tensor], places: Tensor | None, factor: int) -> list[list[Hypothesis]]:
        """The best hypotheses at the end, with the tokens and frames that the codes of `step` lead back to."""
        score = self.mass + self.prior
        if self.fusion is not None and self.fusion.final is not None:
            score = score + self.fusion.final[self.state]
        score, slot = score.topk(self.options.nbest, dim=1)  # (N, nbest)
        acoustic = self.mass.gather(1, slot)
        path = slot.new_full((len(codes), *slot.shape), -1, dtype=torch.int32)
        for t in range(len(codes) - 1, -1, -1):
            code = codes[t].gather(1, slot)
            path[t] = code % (self.vocab + 1) - 1
            slot = (code // (self.vocab + 1)).long()
        path = path.permute(1, 2, 0)  # (N, nbest, T'')
        begins = path >= 0
        row, _, frame = begins.nonzero().unbind(1)
        if places is not None:
            frame = places[row, frame]
        counts = begins.sum(dim=2).flatten().tolist()
        tokens, frames = path[begins].cpu().split(counts), frame.cpu().split(counts)
        scores, acoustics = score.tolist(), acoustic.tolist()
        found: list[list[Hypothesis]] = []
        for n in range(self.num):
            listed = []
            for k in range(self.options.nbest):
                if scores[n][k] == NEVER:
                    continue
                at = n * self.options.nbest + k
                listed.append(
                    Hypothesis(tokens[at].tolist(), frames[at].tolist(), scores[n][k], factor, acoustics[n][k])
                )
            found.append(listed or [Hypothesis([], [], NEVER, factor, NEVER)])
        return found
