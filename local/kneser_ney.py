"""Interpolated modified Kneser-Ney smoothing of n-gram counts, with numpy, and its ARPA file.

An n-gram is one integer: its words as digits, the first word the most significant. So n-grams in numerical order share
their contexts (all but the last word) in runs, the context is a quotient, and the shorter n-gram behind (all but the
first word) a remainder.

Words are numbered from 0; the beginning of an utterance comes after the last of them, the end after that.
Source: Chen and Goodman 1998, "An empirical study of smoothing techniques for language modeling", section 3.
"""

from __future__ import annotations

import gzip
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from zipformer_crctc.ngram import BEGIN, END

logger = logging.getLogger(__name__)

Keys = NDArray[np.int64]
Floats = NDArray[np.float64]

FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
"""Where the counts of counts give none, as with few or very many utterances; KenLM's --discount_fallback."""
NO_PROB = -99.0
"""Decimal logarithm of the probability of the beginning, which is never predicted."""


@dataclass
class Order:
    """The n-grams of one length, in numerical order."""

    keys: Keys
    counts: NDArray[np.int64]
    """Adjusted: occurrences for the longest n-grams and those that begin an utterance, else different words before."""
    probs: Floats = field(default_factory=lambda: np.zeros(0))
    """Interpolated probability of the last word after the others."""
    discounts: tuple[float, ...] = FALLBACK_DISCOUNTS
    """Of counts of 1, 2, and 3 or more."""
    contexts: Keys = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    """The contexts of the n-grams, in order."""
    gammas: Floats = field(default_factory=lambda: np.zeros(0))
    """The share that each context leaves to the shorter n-grams."""


@dataclass
class KneserNey:
    """An estimated model."""

    words: Sequence[str]
    predicted: Sequence[int]
    """The words that can follow, the end not counted; those that never do share what the others leave."""
    orders: list[Order]

    @property
    def begin(self) -> int:
        return len(self.words)

    @property
    def end(self) -> int:
        return len(self.words) + 1

    @property
    def base(self) -> int:
        """Of the digits."""
        return len(self.words) + 2


def estimate(texts: Sequence[Sequence[int]], words: Sequence[str], predicted: Sequence[int], order: int) -> KneserNey:
    """The model of some texts.

    Args:
        texts: word numbers of each utterance, without beginning and end.
        words: how each number is written.
        predicted: the numbers that can stand in a text.
        order: longest n-gram, 1 or more.

    Raises:
        ValueError: no texts, a number that is not among `predicted`, or n-grams too long for 63 bits.
    """
    model = KneserNey(words, sorted(predicted), [])
    if not any(len(text) for text in texts):
        raise ValueError("there are no texts to estimate a language model from; check the data config and --language")
    if order < 1 or model.base**order >= 2**63:
        raise ValueError(f"order {order}: must be at least 1, and {model.base} ** order below 2 ** 63")
    stream, reach = _stream(texts, model)
    if unknown := set(np.unique(stream).tolist()) - {*predicted, model.begin, model.end}:
        raise ValueError(f"word numbers {sorted(unknown)} stand in the texts, but are not predicted")
    if order > (longest := int(reach.max())):
        logger.info("order %d: the longest text has %d words with its ends, so the model ends there", order, longest)
        order = longest
    model.orders = _adjusted_counts(stream, reach, model, order)
    lower: Floats | None = None
    for length, part in enumerate(model.orders, start=1):
        _smooth(part, length, model, lower)
        lower = part.probs
    return model


def _stream(texts: Sequence[Sequence[int]], model: KneserNey) -> tuple[Keys, Keys]:
    """All texts in one row, each with its beginning and end, and how many words of its utterance end at each place."""
    parts = [np.array([model.begin, *text, model.end], dtype=np.int64) for text in texts]
    return np.concatenate(parts), np.concatenate([np.arange(1, len(part) + 1) for part in parts])


def _adjusted_counts(stream: Keys, reach: Keys, model: KneserNey, order: int) -> list[Order]:
    """The n-grams of every length up to `order`; the beginning by itself is none."""
    occurring = [_occurring(stream, reach, length, model.base) for length in range(1, order + 1)]
    orders = []
    for length, (keys, counts) in enumerate(occurring, start=1):
        if length < order:
            unit = model.base ** (length - 1)
            begins = keys // unit == model.begin
            # Each n-gram that is one word longer stands for a different word before this one.
            others, before = np.unique(occurring[length][0] % model.base**length, return_counts=True)
            merged = np.concatenate((keys[begins], others))
            place = np.argsort(merged)
            keys, counts = merged[place], np.concatenate((counts[begins], before)).astype(np.int64)[place]
        if length == 1:
            kept = keys != model.begin
            keys, counts = _with_unseen(keys[kept], counts[kept], model)
        orders.append(Order(keys, counts))
    return orders


def _occurring(stream: Keys, reach: Keys, length: int, base: int) -> tuple[Keys, NDArray[np.int64]]:
    keys: Keys = np.zeros(max(len(stream) - length + 1, 0), dtype=np.int64)
    for position in range(length):
        keys = keys * base + stream[position : position + len(keys)]
    inside = reach[length - 1 :] >= length
    unique: Keys
    unique, counts = np.unique(keys[inside], return_counts=True)
    return unique, counts.astype(np.int64)


def _with_unseen(keys: Keys, counts: NDArray[np.int64], model: KneserNey) -> tuple[Keys, NDArray[np.int64]]:
    """The 1-grams of all words that can follow, and the end."""
    every = np.array([*model.predicted, model.end], dtype=np.int64)
    all_counts = np.zeros(len(every), dtype=np.int64)
    all_counts[np.searchsorted(every, keys)] = counts
    return every, all_counts


def _smooth(part: Order, length: int, model: KneserNey, lower: Floats | None) -> None:
    """Fill in discounts, probabilities and what each context leaves; `lower` are the probabilities one word shorter."""
    part.discounts = discounts(part.counts, length)
    discount = np.array((0.0, *part.discounts))[np.minimum(part.counts, 3)]
    part.contexts, first, context = np.unique(part.keys // model.base, return_index=True, return_inverse=True)
    totals = np.add.reduceat(part.counts, first)
    part.gammas = np.add.reduceat(discount, first) / totals
    if lower is None:
        behind = np.full(len(part.keys), 1.0 / len(part.keys))
    else:
        shorter = model.orders[length - 2].keys
        behind = lower[np.searchsorted(shorter, part.keys % model.base ** (length - 1))]
    part.probs = (part.counts - discount) / totals[context] + part.gammas[context] * behind


def discounts(counts: NDArray[np.int64], length: int) -> tuple[float, ...]:
    """What is taken off counts of 1, 2, and 3 or more (Chen and Goodman 1998, equation 26), by the counts of counts.

    Those of the fallback where a count does not occur or the result is no discount; that is logged.
    """
    n1, n2, n3, n4 = (int((counts == number).sum()) for number in (1, 2, 3, 4))
    if min(n1, n2, n3, n4):
        share = n1 / (n1 + 2 * n2)
        found = (1 - 2 * share * n2 / n1, 2 - 3 * share * n3 / n2, 3 - 4 * share * n4 / n3)
        if all(0 < value <= number for number, value in enumerate(found, start=1)):
            return found
    logger.info(
        "%d-grams: %d, %d, %d and %d that count 1, 2, 3 and 4 give no discounts; taking %s",
        *(length, n1, n2, n3, n4),
        ", ".join(map(str, FALLBACK_DISCOUNTS)),
    )
    return FALLBACK_DISCOUNTS


def write_arpa(model: KneserNey, path: Path) -> None:
    """Write an ARPA file, gzip where the name ends in .gz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    with part.open("wb") as raw:
        # Without a time stamp, so that the same texts give the same file.
        packed = gzip.GzipFile(fileobj=raw, mode="wb", filename="", mtime=0) if path.suffix == ".gz" else raw
        text = io.TextIOWrapper(packed, encoding="utf-8", newline="\n")
        _write(model, text)
        text.flush()
        text.detach()
        if packed is not raw:
            packed.close()
    part.replace(path)


def _write(model: KneserNey, file: io.TextIOWrapper) -> None:
    words = [*model.words, BEGIN, END]
    sizes = [len(part.keys) + (length == 1) for length, part in enumerate(model.orders, start=1)]
    file.write("\\data\\\n" + "".join(f"ngram {n}={size}\n" for n, size in enumerate(sizes, start=1)))
    for length, part in enumerate(model.orders, start=1):
        file.write(f"\n\\{length}-grams:\n")
        keys, logs = part.keys, np.log10(part.probs)
        if length == 1:
            place = int(np.searchsorted(keys, model.begin))
            keys, logs = np.insert(keys, place, model.begin), np.insert(logs, place, NO_PROB)
        digits = [(keys // model.base**power % model.base).tolist() for power in range(length - 1, -1, -1)]
        backoffs = _backoffs(model, length, keys)
        for log, backoff, *ids in zip(logs.tolist(), backoffs, *digits, strict=True):
            file.write(f"{log:.7g}\t{' '.join([words[i] for i in ids])}{backoff}\n")
    file.write("\n\\end\\\n")


def _backoffs(model: KneserNey, length: int, keys: Keys) -> list[str]:
    """The last field of each line; empty where no longer n-gram begins with this one."""
    if length == len(model.orders):
        return [""] * len(keys)
    longer = model.orders[length]
    logs = np.zeros(len(keys))
    logs[np.searchsorted(keys, longer.contexts)] = np.log10(longer.gammas)
    return [f"\t{log:.7g}" if log else "" for log in logs.tolist()]
