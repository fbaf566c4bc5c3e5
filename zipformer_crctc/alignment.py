"""Edit distances and alignments of many pairs of sequences at once, for any costs.

The costs of deleting all of the reference and inserting all of the hypothesis are taken off first, so that a pair of
symbols earns `substitution - deletion - insertion`, and an entry of the table is the smallest of its three neighbours,
the diagonal one with that gain (negative or 0) added. Padding symbols gain nothing, so a padded table ends in the value
of the unpadded one.

Legend: N pairs, B pairs of a block, R reference symbols, H hypothesis symbols, S different symbols.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

_CELLS = 1 << 20  # of the tables of a block: its work arrays stay small, and each array operation covers many pairs
_PAIR, _DELETION, _INSERTION = 1, 2, 3


@dataclass(frozen=True)
class Sequences:
    """N sequences of symbol ids, one after the other."""

    ids: NDArray[np.integer[Any]]
    """(sum of lengths,), each from 0 to S - 1."""
    lengths: NDArray[np.int64]
    """(N,)"""

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> Sequences:
        """The sequences of a list of lists."""
        lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
        ids = np.array([symbol for sequence in sequences for symbol in sequence], dtype=np.int32)
        return cls(ids, lengths)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(N,), where each sequence ends in `ids`."""
        return np.cumsum(self.lengths)

    def sums(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """(N,), the sum of `values` (S,) over the symbols of each sequence."""
        running = np.concatenate(([0], np.cumsum(values[self.ids], dtype=np.int64)))
        return running[self.ends] - running[self.ends - self.lengths]

    def padded(self, rows: NDArray[np.int64], padding: int) -> NDArray[np.int64]:
        """(B, longest), the sequences `rows`, filled up with `padding`."""
        lengths, ends = self.lengths[rows], self.ends[rows]
        columns = np.arange(int(lengths.max(initial=0)))
        inside = columns < lengths[:, None]
        matrix = np.full(inside.shape, padding, dtype=np.int64)
        matrix[inside] = self.ids[((ends - lengths)[:, None] + columns)[inside]]
        return matrix


@dataclass(frozen=True)
class Costs:
    """Whole-number costs of S symbols; insertion and deletion of a symbol cost the same."""

    substitute: NDArray[np.integer[Any]]
    """(S, S); 0 on the diagonal. Its type is that of the tables."""
    indel: NDArray[np.integer[Any]]
    """(S,)"""

    @classmethod
    def unit(cls, num_symbols: int) -> Costs:
        """Levenshtein's: every error costs 1."""
        ones = np.ones((num_symbols, num_symbols), dtype=np.int32)
        return cls(ones - np.eye(num_symbols, dtype=np.int32), np.ones(num_symbols, dtype=np.int32))

    def gains(self) -> NDArray[np.integer[Any]]:
        """(S+1, S+1): what a pair earns over a deletion and an insertion; the last symbol is padding."""
        gains = np.zeros([n + 1 for n in self.substitute.shape], dtype=self.substitute.dtype)
        gains[:-1, :-1] = self.substitute - self.indel[:, None] - self.indel
        return gains


def distances(refs: Sequences, hyps: Sequences, costs: Costs) -> NDArray[np.int64]:
    """(N,), the smallest cost of turning each reference into its hypothesis."""
    gains = costs.gains()
    padding = len(gains) - 1
    indel = costs.indel.astype(np.int64)
    result = refs.sums(indel) + hyps.sums(indel)
    for rows in _blocks(refs.lengths, hyps.lengths):
        ref, hyp = refs.padded(rows, padding), hyps.padded(rows, padding)  # (B, R), (B, H)
        row = np.zeros((len(rows), hyp.shape[1] + 1), dtype=gains.dtype)
        for symbols in ref.T:
            row = _next_row(row, _lookup(gains, symbols, hyp))
        result[rows] += row[:, -1]
    return result


def alignments(refs: Sequences, hyps: Sequences, costs: Costs) -> list[NDArray[np.int64]]:
    """One cheapest alignment of each pair: (P, 2), positions in reference and hypothesis, -1 for no symbol.

    Of several, the one that, read from the end, takes a pair before a deletion and a deletion before an insertion.
    """
    gains = costs.gains()
    padding = len(gains) - 1
    result: list[NDArray[np.int64]] = [np.empty((0, 2), dtype=np.int64)] * len(refs.lengths)
    for rows in _blocks(refs.lengths, hyps.lengths):
        ref, hyp = refs.padded(rows, padding), hyps.padded(rows, padding)
        gain = (
            np.stack([_lookup(gains, symbols, hyp) for symbols in ref.T])
            if ref.size
            else np.empty((0, 0, 0), gains.dtype)
        )
        table = np.zeros((ref.shape[1] + 1, len(rows), hyp.shape[1] + 1), dtype=gains.dtype)  # (R+1, B, H+1)
        for i in range(ref.shape[1]):
            table[i + 1] = _next_row(table[i], gain[i])
        moves = _trace(table, gain, refs.lengths[rows], hyps.lengths[rows])
        for row, steps in zip(rows.tolist(), moves, strict=True):
            result[row] = _positions(steps[steps > 0])
    return result


def _blocks(ref_lengths: NDArray[np.int64], hyp_lengths: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """The pairs in blocks of like lengths, each of about `_CELLS` table entries with its padding."""
    order = np.lexsort((hyp_lengths, ref_lengths))[::-1]
    start = 0
    while start < len(order):
        # The longest reference of a block is its first, so this is what the whole block is padded to.
        height = int(ref_lengths[order[start]]) + 1
        rest = order[start : start + _CELLS // height + 1]
        cells = height * (np.maximum.accumulate(hyp_lengths[rest]) + 1)
        size = max(1, int(np.searchsorted(cells * np.arange(1, len(cells) + 1), _CELLS, side="right")))
        yield rest[:size]
        start += size


def _lookup(
    gains: NDArray[np.integer[Any]], symbols: NDArray[np.int64], hyp: NDArray[np.int64]
) -> NDArray[np.integer[Any]]:
    """(B, H), the gains of one reference symbol (B,) with each hypothesis symbol."""
    return gains.ravel().take(symbols[:, None] * len(gains) + hyp)


def _next_row(above: NDArray[np.integer[Any]], gain: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Row (B, H+1) of the tables from the row above and the gains (B, H) of the pairs that end in it."""
    row = above.copy()
    np.minimum(row[:, 1:], above[:, :-1] + gain, out=row[:, 1:])
    return np.minimum.accumulate(row, axis=1)


def _trace(
    table: NDArray[np.integer[Any]],
    gain: NDArray[np.integer[Any]],
    ref_lengths: NDArray[np.int64],
    hyp_lengths: NDArray[np.int64],
) -> NDArray[np.int8]:
    """(B, steps), the moves of each pair from first to last, 0 where a pair has fewer."""
    i, j, pairs = ref_lengths.copy(), hyp_lengths.copy(), np.arange(len(ref_lengths))
    moves = []
    while (i + j).any():
        value = table[i, pairs, j]
        paired = (i > 0) & (j > 0)
        where = np.flatnonzero(paired)
        before = table[i[where] - 1, where, j[where] - 1] + gain[i[where] - 1, where, j[where] - 1]
        paired[where] = value[where] == before
        deleted = ~paired & (i > 0) & (value == table[i - 1, pairs, j])
        inserted = ~paired & ~deleted & (j > 0)
        moves.append((_PAIR * paired + _DELETION * deleted + _INSERTION * inserted).astype(np.int8))
        i -= paired | deleted
        j -= paired | inserted
    return np.stack(moves[::-1], axis=1) if moves else np.zeros((len(pairs), 0), dtype=np.int8)


def _positions(moves: NDArray[np.int8]) -> NDArray[np.int64]:
    in_ref, in_hyp = moves != _INSERTION, moves != _DELETION
    ref, hyp = (np.where(inside, np.cumsum(inside) - 1, -1) for inside in (in_ref, in_hyp))
    return np.stack([ref, hyp], axis=1)
