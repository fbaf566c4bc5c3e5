"""A block of frames of the prefix beam search: tensor operations on buffers that stay where they are.

Input, state and output of a block are tensors made once, updated in place; within a block nothing is allocated for a
frame's sake only, nothing is read back to the host and all shapes are fixed. So a block is a plain function on a CPU,
where short frames cost what their calls cost (24 a frame), and can be captured as one graph on a GPU (blockrunner.py).

A hypothesis is a prefix. Its mass has two parts, the alignments that end in a blank and those that end in the last
token, as float64 numbers relative to the best hypothesis of the frame, language model and bonus multiplied in; the
logarithms of what was divided out are summed apart. A hypothesis that falls 700 nats behind the best has no mass left.

Which hypothesis is another one's prefix is told by 64-bit keys: each offers one under which its extensions find it,
made of all its tokens, and a second one for the extension that repeats its last token, which only alignments that end
in a blank reach. An extension keeps the key it wants. All pairs are compared, and a matrix product with the matches
brings both the mass of the prefix and its place.

Legend: N utterances, F frames of a block, V pieces, B beam, K tokens that may extend in a frame, E extensions tried,
C candidates of a frame: B that stay, B that repeat their last token, E extended by another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from zipformer_crctc.ngram import Fusion

NEVER = float("-inf")
_FACTOR = 6364136223846793005  # an odd number with well-mixed bits (Knuth's generator)
_REPEAT = 3935559000370003845  # added to a key for the extension that repeats the last token
_EMPTY, _DEAD = 1, 2  # keys that the empty prefix and the unused places want; nobody offers them
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class BlockShape:
    """What the buffers of a block depend on, besides the device and the language model."""

    num: int
    """N."""
    frames: int
    """F."""
    vocab: int
    """V."""
    beam: int
    """B."""
    top_tokens: int
    """Tokens of each frame that may extend a hypothesis, the most probable ones; 0 is all."""
    blank_id: int
    dtype: torch.dtype
    """Of the log-probabilities."""


@cache
def _extensions(beam: int, num_tokens: int, ranked: bool) -> tuple[list[int], list[int]]:
    """Which hypothesis is extended by which token, as indices into the beam and the tokens of the frame.

    With `ranked`, both stand in falling order, and the mass of an extension is a product of the two. Then extension
    (i, j) is no better than the (i + 1)(j + 1) - 1 others of ranks up to its own, less those that repeat a last token,
    one for each hypothesis at most. So it cannot be among the best B unless (i + 1) j <= B.
    """
    pairs = [(i, j) for i in range(beam) for j in range(num_tokens) if not ranked or (i + 1) * j <= beam]
    return [i for i, _ in pairs], [j for _, j in pairs]


@dataclass(frozen=True)
class _Frame:
    """The views of one frame of a block, made once: to slice anew in every frame would double its time."""

    by_token: Tensor
    """(N, 2 or 3, V): rank, probability, and with a bonus the probability times the bonus."""
    last_index: Tensor
    """(N, 2 or 3, B): the last tokens, to look those up."""
    own: Tensor
    """Where they go."""
    rank: Tensor
    """(N, 1, B): rank of the last token among those that may extend, K where it is none."""
    stays: Tensor
    """(N, B): probability of the last token once more."""
    arrives: Tensor
    """(N, B): the same with what language model and bonus gave for it."""
    parts: Tensor
    """(N, 1 or 2, B): factors of the two parts of the mass: the last token once more, or again after a blank."""
    blank: Tensor
    """(N, 1): probability."""
    top: Tensor
    """Probabilities of what may extend: (N, E), with a language model (N, 1, K)."""
    ids: Tensor
    """(N, 1, K): those tokens."""
    last: Tensor
    """(N, B): last tokens, and the keys that hypotheses want, also as (N, 1, B), and offer, also as (N, 2B, 1)."""
    wanted: Tensor
    wanted_row: Tensor
    offered: Tensor
    offered_again: Tensor
    offered_column: Tensor
    keys_source: Tensor
    """(2, N, 4B + K): all of these, where the next frame's `keys_next`, (2, N, B), come from: wanted, last."""
    keys_next: Tensor
    wanted_next: Tensor
    found: Tensor
    """(N, 3, B): rows of `place` of each hypothesis and its prefix (`bases`), and the mass of the prefix."""
    parent_mass: Tensor
    bases: Tensor
    mass: Tensor
    """(N, B): of the best candidates, not yet divided by that of the best, `norm`; and which they are."""
    chosen: Tensor
    chosen_flat: Tensor
    parts_next: Tensor
    """(2 or 3, N, B): their parts, with a language model its factor before them."""
    norm: Tensor
    scaled: Tensor
    """(3, N, B): parts and mass, still to be divided."""


class BeamBlock:
    """The beams of a batch. Every utterance has B places, ordered by mass; unused ones have none.

    Fill `log_probs`, `valid` and `blank` for a block, call `run`, and take `codes`; `start` begins a new batch.
    """

    def __init__(self, shape: BlockShape, fusion: Fusion | None, device: torch.device) -> None:
        self.shape, self.fusion, self.device = shape, fusion, device
        self.has_lm = fusion is not None and fusion.lm is not None
        self.bonus = 1.0 if fusion is None or self.has_lm else math.exp(fusion.bonus)
        size = (shape.num, shape.frames)
        self.log_probs = torch.zeros(*size, shape.vocab, dtype=shape.dtype, device=device)
        """(N, F, V): input, not yet adjusted."""
        self.valid = torch.zeros(size, dtype=torch.bool, device=device)
        """(N, F): input; elsewhere the blank is certain, which changes no hypothesis."""
        self.blank = self._floats(*size)
        """(N, F): input; the log-probability of the blank where only blanks count, NaN elsewhere."""
        self.offsets = self._floats(shape.vocab)
        """(V,): input; added to the log-probabilities, see `search.adjusted`."""
        self.codes = torch.zeros(shape.frames, shape.num, shape.beam, dtype=torch.int32, device=device)
        """(F, N, B): output; for each new hypothesis the place of its predecessor times V + 1, plus 1 + the token that
        begins in this frame if one does."""
        self._lay_out()
        self._make_buffers()
        self._make_views()
        self.start()

    def _floats(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def _integers(self, *size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int64, device=self.device)

    def _table(self, values: list[list[int]] | list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)

    def _lay_out(self) -> None:
        """Tables of the candidates of a frame."""
        shape, beam = self.shape, self.shape.beam
        self.all_tokens = self.has_lm and not shape.top_tokens
        limit = shape.top_tokens or shape.vocab
        tokens = shape.vocab if self.all_tokens else max(1, min(limit, shape.vocab - 1))
        self.num_tokens = tokens if self.has_lm else min(tokens, beam + 1)
        slots, ranks = _extensions(beam, self.num_tokens, not self.has_lm)
        self.slots, self.ranks = self._table(slots), self._table(ranks)
        own, count = list(range(beam)), len(slots)
        self.num_candidates = 2 * beam + count
        self.source_of = self._table(own + own + slots)
        # Columns of `masses`: blank part of those that stay, their other part, both together, again, extensions,
        # what is dropped, zero; then what the language model gives for these. Of `keys`: wanted, offered for a
        # repeat, offered, last tokens, ids of the frame. Of `cells`: states, and the table cells of all extensions.
        again, extended = range(3 * beam, 4 * beam), range(4 * beam, 4 * beam + count)
        zero = 4 * beam + count + 1
        gains = zero + 1
        self.mass_columns = zero + 1 + (2 * beam + count if self.has_lm else 0)
        columns = [
            [*range(beam, 2 * beam), *again, *extended],
            own + [zero] * (beam + count),
            [*own, *range(beam, 2 * beam), *(2 * beam + slot for slot in slots)],
            [3 * beam + slot for slot in own + own] + [4 * beam + rank for rank in ranks],
        ]
        if self.has_lm:
            columns = [list(range(gains, gains + 2 * beam + count)), *columns, list(range(2 * beam + count))]
        self.columns = self._table(columns)  # (4 or 6, C)
        # The candidate that a key stands for, by its own number and by the rank of the token; 0 is no key.
        dropped = self.num_candidates
        place = torch.full((2 * beam + 1, self.num_tokens + 1), dropped, device=self.device)
        place[1 : beam + 1] = torch.arange(beam, 2 * beam, device=self.device).unsqueeze(1)
        place[self.slots + beam + 1, self.ranks] = torch.arange(2 * beam, dropped, device=self.device)
        self.place = place.flatten()
        limits = torch.iinfo(torch.int64)
        marks = torch.randint(limits.min, limits.max, (shape.vocab,), generator=torch.Generator().manual_seed(0))
        self.marks = marks.to(self.device)

    def _make_buffers(self) -> None:
        num, frames, beam, tokens = self.shape.num, self.shape.frames, self.shape.beam, self.num_tokens
        rows = 2 + (self.bonus != 1.0)
        self.by_token = self._floats(frames, num, rows, self.shape.vocab)
        self.own = self._floats(frames, num, 4 if self.has_lm else rows, beam)
        self.blank_probs = self._floats(frames, num, 1)
        top_columns = tokens if self.has_lm else len(self.slots)
        self.top = self._floats(frames, num, top_columns)
        self.keys = self._integers(frames + 1, num, 4 * beam + tokens)
        self.same = self._floats(num, 2 * beam, beam)
        self.found = self._floats(frames, num, 3, beam)
        key_rows = torch.arange(1, 2 * beam + 1, dtype=torch.float64, device=self.device) * (tokens + 1)
        # Rows of `state`: nothing, rows of `place` for the keys, masses. Their product with the matches adds to what
        # the first row of `found` starts with: those of the hypotheses themselves.
        self.state = self._floats(num, 3, 3 * beam)
        self.state[:, 1, beam:] = key_rows
        self.own_rows = self._floats(num, 3, beam)
        self.own_rows[:, 0] = key_rows[beam:]
        self.masses = self._floats(num, self.mass_columns)
        self.chosen = self._integers(frames, num, beam)
        self.next = self._floats(frames, 3 + self.has_lm, num, beam)
        self.norms = self._floats(frames, num, 1)
        self.scale = self._floats(num)
        """(N,): logarithm of what was divided out."""
        self.mark, self.lookup = self._integers(num, beam), self._integers(len(self.columns), num * beam)
        self.dead = torch.zeros(num, beam, dtype=torch.bool, device=self.device)
        self.zeroed_rank, self.zeroed_cell = self._floats(num, 2, beam), self._integers(num, 2, beam)
        self.zeroed = self._integers(num, 2, beam)
        if self.has_lm:
            assert self.fusion is not None
            self.cells = self._integers(num, 2 * beam + beam * tokens)
            self.cell, self.moved = self._integers(num, beam), self.dead.clone()
            self.following = torch.zeros(num, beam, dtype=torch.int32, device=self.device)
            self.factors, self.next_rows = self.fusion.tables()

    def _make_views(self) -> None:
        num, beam, tokens = self.shape.num, self.shape.beam, self.num_tokens
        first = 2 * beam
        blocks = self.masses[:, : 4 * beam].view(num, 4, beam)
        self.stay_blank, self.stay_token, self.stay = blocks[:, 0], blocks[:, 1], blocks[:, 2]
        self.repeated = blocks[:, 1::2]  # the last token once more, and again
        last = first + self.num_candidates
        self.candidates, self.with_dropped = self.masses[:, first:last], self.masses[:, first : last + 1]
        self.extended = self.masses[:, 4 * beam : last]
        sources = self.masses.unsqueeze(0).expand(2 + self.has_lm, -1, -1)
        self.mass_source = sources
        self.mass = self.state[:, 2, 2 * beam :]
        self.blank_part, self.token_part = self.state[:, 2, beam : 2 * beam], self.state[:, 2, :beam]
        self.both_parts = self.state[:, 2, : 2 * beam].view(num, 2, beam)
        self.senders = self.state[:, :, beam:]
        self.scaled = self.state[:, 2].view(num, 3, beam).transpose(0, 1)
        lookup = self.lookup.view(-1, num, beam)
        floats = 2 + self.has_lm
        self.mass_index, self.key_index = lookup[:floats], lookup[floats : floats + 2]
        self.zeroed_flat = self.zeroed.view(num, 2 * beam)
        if self.has_lm:
            gains = self.masses[:, last + 2 :]
            self.gain, self.again_gain = gains[:, :beam], gains[:, beam : 2 * beam]
            self.both_gains = gains[:, : 2 * beam].view(num, 2, beam)
            self.gained = gains[:, 2 * beam :].view(num, beam, tokens)
            self.extended_by = self.extended.view(num, beam, tokens)
            self.mass_column = self.mass.unsqueeze(2)
            self.states, self.again_cells = self.cells[:, :beam], self.cells[:, beam : 2 * beam]
            self.states_column = self.states.unsqueeze(2)
            self.extended_cells = self.cells[:, 2 * beam :].view(num, beam, tokens)
            self.cell_index = lookup[floats + 2]
        self.views = [self._frame(f) for f in range(self.shape.frames)]

    def _frame(self, f: int) -> _Frame:
        num, beam = self.shape.num, self.shape.beam
        keys, keys_next = (self.keys[i, :, : 4 * beam].view(num, 4, beam) for i in (f, f + 1))
        last, own = keys[:, 3], self.own[f]
        looked_up = own[:, 0::2] if self.has_lm else own
        if self.has_lm:  # rows: rank, arrives, stays, again
            stays, arrives, parts = own[:, 2], own[:, 1], own[:, 2:]
        else:  # rows: rank, stays, with a bonus arrives
            stays, arrives, parts = own[:, 1], own[:, -1], own[:, 1:]
        ids = self.keys[f, :, 4 * beam :]
        return _Frame(
            by_token=self.by_token[f],
            last_index=last.unsqueeze(1).expand(-1, self.by_token.size(2), -1),
            own=looked_up,
            rank=own[:, :1],
            stays=stays,
            arrives=arrives,
            parts=parts,
            blank=self.blank_probs[f],
            top=self.top[f].unsqueeze(1) if self.has_lm else self.top[f],
            ids=ids.unsqueeze(1),
            last=last,
            wanted=keys[:, 0],
            wanted_row=keys[:, 0].unsqueeze(1),
            offered=keys[:, 2],
            offered_again=keys[:, 1],
            offered_column=self.keys[f, :, beam : 3 * beam].unsqueeze(2),
            keys_source=self.keys[f].unsqueeze(0).expand(2, -1, -1),
            keys_next=keys_next[:, 0::3].transpose(0, 1),
            wanted_next=keys_next[:, 0],
            found=self.found[f],
            parent_mass=self.found[f, :, 2],
            bases=self.found[f, :, :2],
            mass=self.next[f, -1],
            chosen=self.chosen[f],
            chosen_flat=self.chosen[f].view(-1),
            parts_next=self.next[f, :-1],
            norm=self.norms[f],
            scaled=self.next[f, -3:],
        )

    def start(self) -> None:
        """One hypothesis, the empty one."""
        beam = self.shape.beam
        self.state[:, 2] = 0.0
        self.mass[:, 0] = self.blank_part[:, 0] = 1.0
        self.scale.zero_()
        self.keys[0, :, :beam] = _DEAD
        self.keys[0, :, 0] = _EMPTY
        self.views[0].last.fill_(self.shape.blank_id)
        if self.has_lm:
            assert self.fusion is not None
            self.states.fill_(self.fusion.start * self.shape.vocab)
            self.gain.fill_(1.0)

    def run(self, frames: int) -> None:
        """Go on by the first frames of the block; the others are taken for padding."""
        self._prepare(frames)
        for view in self.views[:frames]:
            self._step(view)
        self._encode(frames)
        beam = self.shape.beam
        for columns in (slice(0, beam), slice(3 * beam, 4 * beam)):
            self.keys[0, :, columns] = self.keys[frames, :, columns]

    def _prepare(self, frames: int) -> None:
        """Turn the input into what the steps look up: probabilities relative to the best one of their frame."""
        shape, beam = self.shape, self.shape.beam
        certain = torch.full_like(self.offsets, NEVER)
        certain[shape.blank_id] = 0.0
        scores = self.log_probs[:, :frames].double() + self.offsets
        blank = self.blank[:, :frames].unsqueeze(2)
        scores = torch.where(blank.isnan(), scores, certain + blank.nan_to_num())
        scores = torch.where(self.valid[:, :frames].unsqueeze(2), scores, certain)
        best = scores.amax(dim=2, keepdim=True)
        best = torch.where(best == NEVER, 0.0, best)
        self.scale += best.sum(dim=(1, 2))
        probs = (scores - best).exp_().transpose(0, 1).contiguous()  # (F, N, V)
        self.blank_probs[:frames] = probs[:, :, shape.blank_id, None]
        probs[:, :, shape.blank_id] = 0.0  # it neither extends nor ends a hypothesis
        rank, *tables = self.by_token[:frames].unbind(2)
        tables[0].copy_(probs)
        if self.bonus != 1.0:
            torch.mul(probs, self.bonus, out=tables[1])
        if self.all_tokens:
            ids = torch.arange(shape.vocab, device=self.device).expand_as(probs)
            top = probs
            rank.copy_(ids)
        else:
            top, ids = probs.topk(self.num_tokens, dim=2)  # (F, N, K)
            rank.fill_(self.num_tokens)
            ranks = torch.arange(self.num_tokens, dtype=torch.float64, device=self.device)
            rank.scatter_(2, ids, ranks.expand_as(ids))
        self.keys[:frames, :, 4 * beam :] = ids
        if self.has_lm:
            self.top[:frames] = top
        else:
            torch.mul(top.index_select(2, self.ranks), self.bonus, out=self.top[:frames])

    def _step(self, frame: _Frame) -> None:
        """One frame. Each line is a call, of which the smallest batches feel every one."""
        torch.gather(frame.by_token, 2, frame.last_index, out=frame.own)
        torch.take(self.marks, frame.last, out=self.mark)
        torch.add(self.mark, frame.wanted, alpha=_FACTOR, out=frame.offered)
        torch.add(frame.offered, _REPEAT, out=frame.offered_again)
        torch.eq(frame.offered_column, frame.wanted_row, out=self.same)
        torch.baddbmm(self.own_rows, self.senders, self.same, out=frame.found)
        if self.has_lm:
            self._extend_with_lm(frame)
        else:
            torch.index_select(self.mass, 1, self.slots, out=self.extended)
            self.extended.mul_(frame.top)
        torch.mul(self.both_parts, frame.parts, out=self.repeated)
        self.stay_token.addcmul_(frame.parent_mass, frame.arrives)
        torch.mul(self.mass, frame.blank, out=self.stay_blank)
        torch.add(self.stay_blank, self.stay_token, out=self.stay)
        # Gone from the extensions: the last token again, which has its own place, and what was added to a hypothesis.
        torch.add(frame.bases, frame.rank, out=self.zeroed_rank)
        self.zeroed_cell.copy_(self.zeroed_rank)
        torch.take(self.place, self.zeroed_cell, out=self.zeroed)
        self.with_dropped.scatter_(1, self.zeroed_flat, 0.0)

        torch.topk(self.candidates, self.shape.beam, dim=1, out=(frame.mass, frame.chosen))
        torch.index_select(self.columns, 1, frame.chosen_flat, out=self.lookup)
        torch.gather(self.mass_source, 2, self.mass_index, out=frame.parts_next)
        torch.gather(frame.keys_source, 2, self.key_index, out=frame.keys_next)
        if self.has_lm:
            self._follow_lm(frame)
        # A place without mass may hold the same tokens as one with mass, so it must neither find nor be found.
        torch.eq(frame.mass, 0.0, out=self.dead)
        frame.wanted_next.masked_fill_(self.dead, _DEAD)
        torch.clamp_min(frame.mass[:, :1], _TINY, out=frame.norm)
        torch.div(frame.scaled, frame.norm, out=self.scaled)

    def _extend_with_lm(self, frame: _Frame) -> None:
        """Extensions, and what each token gains, also the last one again."""
        torch.add(self.states, frame.last, out=self.again_cells)
        torch.take(self.factors, self.again_cells, out=self.again_gain)
        torch.add(self.states_column, frame.ids, out=self.extended_cells)
        torch.take(self.factors, self.extended_cells, out=self.gained)
        torch.mul(self.mass_column, frame.top, out=self.extended_by)
        self.extended_by.mul_(self.gained)
        torch.mul(frame.stays, self.gain, out=frame.arrives)
        torch.mul(frame.stays, self.again_gain, out=frame.parts[:, 1])

    def _follow_lm(self, frame: _Frame) -> None:
        """States after the chosen candidates."""
        torch.gather(self.cells, 1, self.cell_index, out=self.cell)
        torch.take(self.next_rows, self.cell, out=self.following)
        torch.ge(frame.chosen, self.shape.beam, out=self.moved)
        self.states.copy_(torch.where(self.moved, self.following, self.cell))
        self.gain.copy_(frame.parts_next[0])

    def _encode(self, frames: int) -> None:
        """The codes of the frames, and the logarithm of what they divided out."""
        beam, vocab = self.shape.beam, self.shape.vocab
        self.scale += self.norms[:frames].log().sum(dim=(0, 2))
        chosen = self.chosen[:frames]
        source = self.source_of[chosen]
        token = self.keys[1 : frames + 1, :, 3 * beam : 4 * beam]
        key = (self.found[:frames, :, 1] / (self.num_tokens + 1)).long() - 1  # (F, N, B)
        arrives = self.own[:frames, :, 1 if self.has_lm else -1]
        incoming = self.found[:frames, :, 2] * arrives
        # Over half of the mass comes in here: the last token rather begins in this frame.
        stays = chosen < beam
        moves = stays & (incoming.gather(2, source) > 0.5 * self.next[:frames, -1])
        origin = torch.where(moves, (key % beam).gather(2, source), source)
        self.codes[:frames] = origin * (vocab + 1) + torch.where(moves | ~stays, token + 1, 0)

    def log_mass(self) -> Tensor:
        """(N, B): the score of each hypothesis so far, in nats."""
        return self.mass.log() + self.scale.unsqueeze(1)

    def final_states(self) -> Tensor:
        """(N, B): the language model's state of each hypothesis."""
        return self.states // self.shape.vocab
