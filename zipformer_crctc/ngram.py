"""An n-gram language model of phones from an ARPA file, as tables that score a whole beam at once on any device.

A state is a context: the last tokens that still matter. For every state and token the tables hold the log-probability,
back-off included, and the state that follows, so a score is one look-up. With some hundred phones that is small: a
model of 50,000 contexts takes 50 MB.

Legend: S states, V pieces of the tokenizer.
Source: the ARPA format as SRILM describes it (ngram-format(5)); scores are those of KenLM.
"""

from __future__ import annotations

import gzip
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from zipformer_crctc.tokenizer import PhoneTokenizer

logger = logging.getLogger(__name__)

BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MISSING_UNKNOWN = -100.0
"""Decimal logarithm for a phone that a model without <unk> does not know, as in KenLM."""
MAX_CELLS = 400_000_000
"""Largest S * V: tables of 3.2 GB."""
LN_10 = math.log(10.0)

Ngram = tuple[int, ...]


class ArpaError(ValueError):
    """An ARPA file that cannot be used; the text names the file, the line and the remedy."""


@dataclass(frozen=True)
class NgramLM:
    """The tables; natural logarithms."""

    scores: Tensor
    """(S, V) float32: log-probability of each token after each state."""
    following: Tensor
    """(S, V) int32: the state after it."""
    final: Tensor
    """(S,) float32: log-probability of the end of the utterance."""
    start: int
    """The state at the beginning of an utterance."""
    order: int
    """Longest n-gram."""
    source: str = "language model"
    """The file it was read from."""

    def to(self, device: torch.device | str) -> NgramLM:
        """The same model on a device."""
        scores, following, final = (tensor.to(device) for tensor in (self.scores, self.following, self.final))
        return replace(self, scores=scores, following=following, final=final)

    def token_scores(self, tokens: Sequence[int]) -> list[float]:
        """Log-probability of each token of an utterance and of its end, in nats."""
        state, scores = self.start, []
        for token in tokens:
            scores.append(float(self.scores[state, token]))
            state = int(self.following[state, token])
        return [*scores, float(self.final[state])]

    def score(self, tokens: Sequence[int]) -> float:
        """Log-probability of an utterance with its end, in nats."""
        return math.fsum(self.token_scores(tokens))


@dataclass(frozen=True)
class Fusion:
    """What a search adds to the score of a hypothesis: a weighted language model, and a bonus for each token.

    Source of shallow fusion: Gulcehre et al. 2015, "On using monolingual corpora in neural machine translation".
    """

    lm: NgramLM | None = None
    weight: float = 0.5
    bonus: float = 0.0
    """In nats."""
    _tables: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def start(self) -> int:
        """The state of the empty hypothesis."""
        return 0 if self.lm is None else self.lm.start

    def tables(self) -> tuple[Tensor, Tensor]:
        """(S * V,) float64: the factor of each token after each state; (S * V,) int32: the state after it, times V."""
        assert self.lm is not None
        if not self._tables:  # made once, of some hundred megabytes for a large model
            factors = self.lm.scores.double().mul_(self.weight).add_(self.bonus).exp_()
            self._tables.extend((factors.flatten(), (self.lm.following * self.lm.scores.size(1)).int().flatten()))
        return self._tables[0], self._tables[1]

    def added(self, tokens: Tensor) -> Tensor:
        """What the tokens of some hypotheses added to their scores, without the end of the utterance, (H,) float64.

        tokens: (H, L), filled up with -1.
        """
        present = tokens >= 0
        total = present.sum(dim=1) * float(self.bonus)
        if self.lm is not None:
            state = torch.full_like(total, self.lm.start, dtype=torch.int64)
            for column, there in zip(tokens.clamp(min=0).T, present.T, strict=True):
                total += torch.where(there, self.lm.scores[state, column].double() * self.weight, 0.0)
                state = torch.where(there, self.lm.following[state, column].long(), state)
        return total

    @property
    def final(self) -> Tensor | None:
        """(S,): what the end of the utterance adds."""
        return None if self.lm is None else self.lm.final * self.weight

    def check(self, vocab_size: int, device: torch.device) -> None:
        """Raise ValueError where the model does not fit the log-probabilities."""
        if self.lm is None:
            return
        if self.lm.scores.size(1) != vocab_size:
            raise ValueError(
                f"{self.lm.source}: read for {self.lm.scores.size(1)} pieces, but the log-probabilities have "
                f"{vocab_size}; read it with the tokenizer of the acoustic model"
            )
        if self.lm.scores.device != device:
            raise ValueError(f"{self.lm.source}: is on {self.lm.scores.device}, not on {device}; move it with .to()")


def read_arpa(path: str | Path, tokenizer: PhoneTokenizer) -> NgramLM:
    """The model of an ARPA file (gzip where the name ends in .gz), in the ids of a tokenizer.

    Pieces that the file does not list score as its <unk> (1e-100 where it has none), which is logged. Raises ArpaError,
    with file, line and remedy, for a file that cannot be read, is cut or malformed, or has symbols without a piece.
    """
    return _tables(_read(Path(path), tokenizer.pieces), tokenizer)


@dataclass
class _Arpa:
    path: Path
    ids: dict[str, int]
    """Id of every word that may stand in the file: pieces, then the beginning and the end."""
    probs: list[dict[Ngram, float]] = field(default_factory=list)
    """By length: decimal logarithms."""
    backoffs: dict[Ngram, float] = field(default_factory=dict)
    """Where it is not 0."""


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not empty."""
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if text := line.decode("utf-8").strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise ArpaError(f"{path}, line {number}: is not UTF-8 text ({error}); give an ARPA file") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ArpaError(
            f"{path}, after line {number}: the gzip data are cut or damaged ({error}); copy it again"
        ) from error
    except OSError as error:
        raise ArpaError(f"{path}: cannot read the language model ({error.strerror or error})") from error


def _read(path: Path, pieces: Sequence[str]) -> _Arpa:
    """All n-grams of a file, checked."""
    special = (PhoneTokenizer.blank_id, PhoneTokenizer.sos_eos_id)  # these are never in a text
    ids = {piece: number for number, piece in enumerate(pieces) if number not in special}
    ids |= {"<UNK>": PhoneTokenizer.unk_id, BEGIN: len(pieces), END: len(pieces) + 1}
    arpa = _Arpa(path, ids)
    lines = _lines(path)
    counts, (number, text) = _header(path, lines)
    for length, count in enumerate(counts, start=1):
        if text != f"\\{length}-grams:":
            raise ArpaError(f"{path}, line {number}: '{text}' where \\{length}-grams: is expected; make the file again")
        number, text = _section(arpa, length, len(counts), count, lines)
    if text != "\\end\\":
        raise ArpaError(f"{path}, line {number}: '{text}' where \\end\\ is expected; make the file again")
    for word in (BEGIN, END):
        if (ids[word],) not in arpa.probs[0]:
            raise ArpaError(f"{path}: has no {word} among its 1-grams; train it on whole utterances")
    return arpa


def _cut(path: Path, number: int, what: str) -> ArpaError:
    return ArpaError(f"{path}, after line {number}: the file is cut ({what}); copy or make it again")


def _header(path: Path, lines: Iterator[tuple[int, str]]) -> tuple[list[int], tuple[int, str]]:
    """The number of n-grams of each length, and the first line after them."""
    counts: list[int] = []
    number, started = 0, False
    for number, text in lines:
        if not started:
            started = text == "\\data\\"
        elif text.startswith("ngram "):
            length, _, count = text[6:].partition("=")
            if not (length.strip().isdecimal() and count.strip().isdecimal()) or int(length) != len(counts) + 1:
                raise ArpaError(f"{path}, line {number}: {text!r} where 'ngram {len(counts) + 1}=COUNT' is expected")
            counts.append(int(count))
        elif counts:
            return counts, (number, text)
        else:
            break
    if not started:
        raise ArpaError(f"{path}: has no line \\data\\; give a language model in ARPA format (KenLM's binary is not)")
    raise _cut(path, number, "no n-grams follow \\data\\")


def _section(arpa: _Arpa, length: int, order: int, count: int, lines: Iterator[tuple[int, str]]) -> tuple[int, str]:
    """Read the n-grams of one length; return the first line after them."""
    path, probs, unknown = arpa.path, dict[Ngram, float](), dict[str, int]()
    arpa.probs.append(probs)
    number = 0
    for number, text in lines:
        if text.startswith("\\"):
            break
        fields = text.split()
        if len(fields) not in (length + 1, length + 2) or (length == order and len(fields) != length + 1):
            raise ArpaError(f"{path}, line {number}: {text!r} is no {length}-gram; make the file again")
        words = fields[1 : length + 1]
        if missing := [word for word in words if word not in arpa.ids]:
            unknown.update((word, number) for word in missing if word not in unknown)
            continue
        key = tuple(arpa.ids[word] for word in words)
        try:
            prob = float(fields[0])
            backoff = float(fields[length + 1]) if len(fields) > length + 1 else 0.0
        except ValueError as error:
            raise ArpaError(f"{path}, line {number}: {text!r}: {error}; make the file again") from error
        if not (math.isfinite(prob) and math.isfinite(backoff)) or prob > 0:
            raise ArpaError(
                f"{path}, line {number}: {text!r}: log-probabilities are finite and not above 0; make the file again"
            )
        if key in probs:
            raise ArpaError(f"{path}, line {number}: {' '.join(words)!r} stands in the file already; make it again")
        if length > 1 and key[:-1] not in arpa.probs[-2]:
            raise ArpaError(f"{path}, line {number}: {' '.join(words[:-1])!r} is missing from the {length - 1}-grams")
        probs[key] = prob
        if backoff:
            arpa.backoffs[key] = backoff
    else:
        raise _cut(path, number, f"in the {length}-grams")
    _refuse_unknown(path, unknown)
    if len(probs) != count:
        raise ArpaError(
            f"{path}, line {number}: {len(probs)} {length}-grams, but the head of the file says {count}; lines "
            "were lost or added, make the file again"
        )
    return number, text


def _refuse_unknown(path: Path, unknown: dict[str, int]) -> None:
    if unknown:
        first, line = next(iter(unknown.items()))
        raise ArpaError(
            f"{path}, line {line}: {first!r} is no piece of the tokenizer ({len(unknown)} such symbols: "
            f"{' '.join(list(unknown)[:20])}{' ...' if len(unknown) > 20 else ''}); train the language model on texts "
            "as the recogniser writes them (local/train_phone_lm.py), or decode with the tokenizer it was made for"
        )


def _tables(arpa: _Arpa, tokenizer: PhoneTokenizer) -> NgramLM:
    """A row for every context, from short to long: what it backs off to, overwritten by its own n-grams."""
    order, vocab = len(arpa.probs), tokenizer.vocab_size
    contexts = {key[:-1] for probs in arpa.probs[1:] for key in probs} | set(arpa.backoffs) | {()}
    states = {key: number for number, key in enumerate(sorted(contexts, key=lambda key: (len(key), key)))}
    if len(states) * vocab > MAX_CELLS:
        raise ArpaError(
            f"{arpa.path}: {len(states)} contexts times {vocab} pieces are more than {MAX_CELLS} table cells; "
            "train with a lower --order, or prune the model"
        )
    scores = np.empty((len(states), vocab + 2), dtype=np.float64)  # the last two columns: beginning and end
    following = np.zeros((len(states), vocab + 2), dtype=np.int32)
    _fill_unigrams(arpa, tokenizer, scores[0])
    absent = [number for number in range(vocab) if (number,) not in arpa.probs[0]]
    by_length = [[key for key in states if len(key) == length] for length in range(order)]
    for length, keys in enumerate(by_length):
        if length and keys:
            rows = np.array([states[key] for key in keys])
            shorter = np.array([states[_known_suffix(key[1:], states)] for key in keys])
            backoff = np.array([arpa.backoffs.get(key, 0.0) for key in keys])
            scores[rows] = scores[shorter] + backoff[:, None]
            following[rows] = following[shorter]
        for key, prob in arpa.probs[length].items():
            row, word = states[key[:-1]], key[-1]
            scores[row, word] = prob
            following[row, word] = states[_known_suffix(key, states)]
        if keys and (tokenizer.unk_id,) in arpa.probs[0]:
            rows = np.array([states[key] for key in keys])[:, None]
            scores[rows, absent] = scores[rows, tokenizer.unk_id]
            following[rows, absent] = following[rows, tokenizer.unk_id]
    return NgramLM(
        scores=torch.from_numpy((scores[:, :vocab] * LN_10).astype(np.float32)),
        following=torch.from_numpy(following[:, :vocab].copy()),
        final=torch.from_numpy((scores[:, vocab + 1] * LN_10).astype(np.float32)),
        start=states[_known_suffix((arpa.ids[BEGIN],), states)],
        order=order,
        source=str(arpa.path),
    )


def _fill_unigrams(arpa: _Arpa, tokenizer: PhoneTokenizer, row: np.ndarray) -> None:
    """What stands behind all back-off; the model's own unigrams follow."""
    unknown = arpa.probs[0].get((tokenizer.unk_id,))
    row[:] = MISSING_UNKNOWN if unknown is None else unknown
    special = (tokenizer.blank_id, tokenizer.sos_eos_id, tokenizer.unk_id)
    absent = [piece for n, piece in enumerate(tokenizer.pieces) if n not in special and (n,) not in arpa.probs[0]]
    if absent:
        how = "as its <unk>" if unknown is not None else f"1e{MISSING_UNKNOWN:.0f}, for it has no <unk>"
        logger.warning("%s: does not list %d pieces, which score %s: %s", arpa.path, len(absent), how, " ".join(absent))


def _known_suffix(key: Ngram, states: dict[Ngram, int]) -> Ngram:
    """The longest end of a sequence that is a state; the shortest is the empty one."""
    while key not in states:
        key = key[1:]
    return key
