"""From phone strings to ids and back: a sentencepiece unigram model over a table of phones.

The table (`phones.txt` beside this file, or one of your own) holds one symbol of one code point per line, as itself or
as `U+XXXX`; what follows the first space is a comment, and so are lines that begin with `#`. Four pieces come before
the table's and never change: `<blk>` 0 (the CTC blank), `<sos/eos>` 1, `<unk>` 2 and the word boundary `▁` 3. The
symbols follow in code-point order, whatever their order in the table. The vocabulary is as large as the table plus
four, so another table makes another model.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece

DEFAULT_TABLE = Path(__file__).with_name("phones.txt")
BOUNDARY = "▁"
FIXED_PIECES = ("<blk>", "<sos/eos>", "<unk>", BOUNDARY)

_CODE_POINT = re.compile(r"U\+([0-9A-Fa-f]{4,6})")
# Sentencepiece keeps these for itself: the boundary, its mark for unknown text, and the end of a C string.
_RESERVED = {BOUNDARY: "the word boundary", "\u2585": "sentencepiece's own mark", "\0": "the null character"}


def read_table(path: str | Path | None = None) -> tuple[str, ...]:
    """The symbols of a phone table in code-point order; `None` is the table of this package.

    Raises ValueError that names the file, the line and the remedy for a missing or empty table, a symbol that stands
    twice or has more than one code point, white space, and symbols that sentencepiece keeps for itself.
    """
    path = DEFAULT_TABLE if path is None else Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot read the phone table as UTF-8 text ({error})") from error
    line_of: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        fields = line.split(maxsplit=1)
        if not fields or fields[0].startswith("#"):
            continue
        where = f"{path}, line {number}"
        symbol = _parse_symbol(fields[0], where)
        if len(fields) == 2 and not fields[1].startswith("#"):
            raise ValueError(f"{where}: {fields[1]!r} follows the symbol; give one symbol per line, comments after '#'")
        if symbol in line_of:
            raise ValueError(f"{where}: {_name(symbol)} stands in line {line_of[symbol]} already; remove one of them")
        line_of[symbol] = number
    if len(line_of) < 2:
        raise ValueError(f"{path}: holds {len(line_of)} symbols; a phone table needs two at least, one per line")
    return tuple(sorted(line_of))


def _parse_symbol(field: str, where: str) -> str:
    match = _CODE_POINT.fullmatch(field)
    symbol = field
    if match:
        number = int(match[1], 16)
        if number > 0x10FFFF or 0xD800 <= number <= 0xDFFF:
            raise ValueError(f"{where}: {field} is no character of Unicode")
        symbol = chr(number)
    if len(symbol) != 1:
        points = " ".join(f"U+{ord(c):04X}" for c in symbol)
        raise ValueError(
            f"{where}: {symbol!r} has {len(symbol)} code points ({points}), but a piece is a single one; "
            "give each on its own line"
        )
    if symbol in _RESERVED or symbol.isspace():
        reason = _RESERVED.get(symbol, "white space, which stands for the word boundary")
        raise ValueError(f"{where}: {_name(symbol)} cannot be a phone, it is {reason}; remove the line")
    return symbol


def _name(symbol: str) -> str:
    return f"{symbol!r} (U+{ord(symbol):04X})"


class PhoneTokenizer:
    """Phone strings to ids and back, by sentencepiece; `encode` normalises nothing (see `text.normalise`).

    Spaces become `▁` (3), one stands before any non-empty text; a run of symbols without a piece becomes one `<unk>`.
    Instances can be pickled, so data-loader workers may carry them.
    """

    blank_id = 0
    sos_eos_id = 1
    unk_id = 2
    boundary_id = 3

    proto: bytes
    """The serialised sentencepiece model: what a checkpoint carries, and what a `.model` file holds."""
    pieces: tuple[str, ...]
    """The piece of every id."""

    def __init__(self, proto: bytes, source: str = "tokenizer model") -> None:
        """Load a serialised model; `source` names its origin in errors. Raises ValueError where it does not fit."""
        remedy = "give a sentencepiece .model file such as unigram_127.model"
        if not proto:
            raise ValueError(f"{source}: is empty; {remedy}")
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except RuntimeError as error:
            raise ValueError(f"{source}: is not a sentencepiece model; {remedy}") from error
        self.proto = proto
        self.pieces = tuple(self._processor.id_to_piece(i) for i in range(self._processor.get_piece_size()))
        if self.pieces[:4] != FIXED_PIECES or self._processor.unk_id() != self.unk_id:
            raise ValueError(
                f"{source}: its first pieces are {list(self.pieces[:4])}, but ids 0 to 3 must be {list(FIXED_PIECES)}; "
                "train it with user-defined symbols <blk> and <sos/eos>, unk id 2, and no bos, eos or pad"
            )

    @classmethod
    def from_table(cls, table: str | Path | None = None) -> PhoneTokenizer:
        """Build the model from a phone table (`None`: the package's own, which gives the published 127 ids)."""
        symbols = read_table(table)
        proto = _train(symbols, str(table or DEFAULT_TABLE))
        return cls(proto, str(table or DEFAULT_TABLE))

    @classmethod
    def from_model(cls, path: str | Path) -> PhoneTokenizer:
        """Load a sentencepiece `.model` file, such as the published `unigram_127.model`."""
        try:
            proto = Path(path).read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot read the tokenizer model ({error.strerror or error})") from error
        return cls(proto, str(path))

    @classmethod
    def from_tokens(cls, path: str | Path) -> PhoneTokenizer:
        """Build the model from a `tokens.txt` of lines `piece id`. Raises ValueError for pieces it cannot have."""
        try:
            lines = [line.split() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
            pieces = [piece for piece, number in sorted(lines, key=lambda line: int(line[1]))]
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"{path}: cannot read it as lines of a piece and its id ({error})") from error
        symbols = tuple(pieces[len(FIXED_PIECES) :])
        if tuple(pieces[: len(FIXED_PIECES)]) != FIXED_PIECES or symbols != tuple(sorted(symbols)) or len(symbols) < 2:
            raise ValueError(
                f"{path}: the pieces must be {' '.join(FIXED_PIECES)} and then symbols in code-point order; give the "
                "sentencepiece model of this vocabulary as tokenizer.model"
            )
        return cls(_train(symbols, str(path)), str(path))

    @classmethod
    def from_bytes(cls, proto: bytes) -> PhoneTokenizer:
        """Load the serialised model that a checkpoint carries."""
        return cls(proto, "tokenizer model in the checkpoint")

    def __reduce__(self) -> tuple[Any, ...]:
        return (PhoneTokenizer, (self.proto,))

    @property
    def vocab_size(self) -> int:
        """Number of pieces, blank included: the width of the output layer."""
        return len(self.pieces)

    def encode(self, text: str) -> list[int]:
        """Ids of a phone string; empty for empty text, else the first is `boundary_id`."""
        return list(self._processor.encode(text, out_type=int))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of several phone strings."""
        return [self.encode(text) for text in texts]

    def surfaces(self, text: str) -> list[str]:
        """The stretch of text behind each id of `encode(text)`; for `<unk>` the unknown symbols themselves."""
        return list(self._processor.encode(text, out_type=str))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids: `▁` becomes a space (the first one is dropped), `<unk>` becomes ` ⁇ `."""
        self._check_ids(ids)
        return str(self._processor.decode(list(ids)))

    def phones(self, ids: Iterable[int]) -> list[str]:
        """The pieces of ids without `▁`: what is scored, on both sides."""
        ids = list(ids)
        self._check_ids(ids)
        return [self.pieces[i] for i in ids if i != self.boundary_id]

    def _check_ids(self, ids: Sequence[int]) -> None:
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise ValueError(
                f"id {wrong} is outside the vocabulary of {self.vocab_size} pieces; "
                "the ids come from a model with another tokenizer"
            )


@cache
def _train(symbols: tuple[str, ...], source: str) -> bytes:
    """Serialised unigram model whose pieces are the fixed four and `symbols`, with the published settings."""
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(symbols),
            model_writer=model,
            model_type="unigram",
            vocab_size=len(FIXED_PIECES) + len(symbols),
            character_coverage=1.0,
            user_defined_symbols=["<blk>", "<sos/eos>"],
            unk_id=2,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"{source}: sentencepiece cannot make a model of these symbols ({error})") from error
    proto = model.getvalue()
    pieces = PhoneTokenizer(proto, source).pieces
    # The order is a habit of the trainer, not a promise; ids that moved would spoil every checkpoint.
    if pieces != FIXED_PIECES + symbols:
        wrong = [f"{got!r} for {want!r}" for got, want in zip(pieces[4:], symbols, strict=False) if got != want]
        raise ValueError(f"{source}: sentencepiece made other pieces than the table's: {', '.join(wrong[:5])}")
    return proto
