"""Texts to panphon's segments, many at a time, and the articulatory features of these.

Panphon (Mortensen et al. 2016) reads a text from the left and takes the longest segment of its table that fits. Here
that is a walk through a trie from every character at once, and then one through the segments of all texts at once.

Legend: N texts, C characters of all texts, S segments of panphon's table, F = 24 features.
"""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.alignment import Costs, Sequences

_TONE_DIGITS = dict(zip("¹²³⁴⁵", "˩˨˧˦˥", strict=True))  # what panphon reads as tone letters
_ROOT, _DEAD = 0, 1  # states of the trie
_UNKNOWN = -1


@dataclass(frozen=True)
class Segments:
    """The segments of N texts."""

    sequences: Sequences
    """Numbers in the inventory's `names`."""
    dropped: Counter[str]
    """Characters that begin no segment, over all texts."""


class Inventory:
    """Panphon's segments, their features, and the trie of their spellings."""

    def __init__(self) -> None:
        # Imported late: it takes a second or two, and training scores by PER alone.
        from panphon.featuretable import FeatureTable

        table = FeatureTable()
        self.features: list[str] = list(table.names)
        """Names of the F features, as panphon has them."""
        self.names: list[str] = list(table.seg_dict)
        """Spellings of the S segments, decomposed (NFD)."""
        self.numbers = {name: number for number, name in enumerate(self.names)}
        self.vectors = np.array([table.seg_dict[name].numeric() for name in self.names], dtype=np.int8)
        """(S, F), values -1, 0, +1."""
        self._letters, self._next, self._ends = _trie(self.names)

    def split(self, texts: Sequence[str]) -> Segments:
        """The segments of texts: the longest that fit, from the left, without what panphon does not know."""
        plain = [unicodedata.normalize("NFD", text) for text in texts]
        # No segment holds a line break, so none reaches into the next text.
        codes = np.frombuffer("\n".join([*plain, ""]).encode("utf-32-le", "surrogatepass"), dtype="<u4")
        lengths = np.array([len(text) for text in plain], dtype=np.int64)
        numbers, sizes = self._longest(self._letters[codes])  # (C,)
        ends = np.cumsum(lengths + 1) - 1
        begins = _walk(np.maximum(sizes, 1), ends - lengths, ends)
        unknown = begins & (numbers == _UNKNOWN)
        known = np.flatnonzero(begins & ~unknown)
        counts = np.diff(np.searchsorted(known, np.concatenate(([0], ends))))
        dropped = Counter(chr(code) for code in codes[unknown].tolist())
        return Segments(Sequences(numbers[known], counts), dropped)

    def _longest(self, letters: NDArray[np.int32]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """The longest segment that begins at each character (C,), and its number of characters."""
        numbers = np.full(len(letters), _UNKNOWN, dtype=np.int32)
        sizes = np.zeros(len(letters), dtype=np.int64)
        alive = np.arange(len(letters))
        states = np.full(len(letters), _ROOT, dtype=np.int32)
        size = 0
        while len(alive):
            # The last character of all is a line break, which ends every walk before it runs off the end.
            states = self._next[states, letters[alive + size]]
            going = states != _DEAD
            alive, states, size = alive[going], states[going], size + 1
            here = self._ends[states]
            found = here != _UNKNOWN
            numbers[alive[found]], sizes[alive[found]] = here[found], size
        return numbers, sizes

    def costs(self, numbers: NDArray[np.int64]) -> Costs:
        """Panphon's costs for these segments (n,), in units of half a feature: whole numbers, so sums are exact.

        A substitution costs the summed difference of the features; an insertion or deletion 2 for each specified and 1
        for each unspecified feature.
        """
        vectors = self.vectors[numbers]
        substitute = np.zeros((len(numbers), len(numbers)), dtype=np.int32)
        for column in vectors.T:
            substitute += np.abs(column[:, None] - column)
        return Costs(substitute, (1 + np.abs(vectors)).sum(axis=1, dtype=np.int32))

    def compact(self, *many: Sequences) -> tuple[Costs, NDArray[np.int64], list[Sequences]]:
        """Costs of the segments that occur, their numbers, and the sequences with ids that index these."""
        numbers = np.unique(np.concatenate([sequences.ids for sequences in many])).astype(np.int64)
        places = [Sequences(np.searchsorted(numbers, s.ids), s.lengths) for s in many]
        return self.costs(numbers), numbers, places


@cache
def inventory() -> Inventory:
    """Panphon's inventory, read once."""
    return Inventory()


def _trie(names: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """Letter of every code point (0 for none), next state by state and letter, and the segment that ends in a state."""
    alphabet = {letter: number for number, letter in enumerate(sorted(set("".join(names))), start=1)}
    letters = np.zeros(sys.maxunicode + 1, dtype=np.int32)
    for letter, number in alphabet.items():
        letters[ord(letter)] = number
    for digit, tone in _TONE_DIGITS.items():
        letters[ord(digit)] = alphabet[tone]
    steps: dict[tuple[int, int], int] = {}
    ends: dict[int, int] = {}
    for number, name in enumerate(names):
        state = _ROOT
        for letter in name:
            state = steps.setdefault((state, alphabet[letter]), len(steps) + 2)
        ends[state] = number
    following = np.full((len(steps) + 2, len(alphabet) + 1), _DEAD, dtype=np.int32)
    for place, state in steps.items():
        following[place] = state
    segment = np.full(len(following), _UNKNOWN, dtype=np.int32)
    segment[list(ends)] = list(ends.values())
    return letters, following, segment


def _walk(steps: NDArray[np.int64], starts: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(C,), where the walks from `starts` up to `ends` set foot; from character c they go on to c + steps[c]."""
    visited = np.zeros(len(steps), dtype=np.bool_)
    inside = starts < ends
    places, ends = starts[inside], ends[inside]
    while len(places):
        visited[places] = True
        places = places + steps[places]
        inside = places < ends
        places, ends = places[inside], ends[inside]
    return visited
