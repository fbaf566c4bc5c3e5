"""Text before it is encoded: normalisation, diacritic removal, training clean-up, and the count of what is unknown.

`normalise` runs before `encode` in training and in scoring. A symbol that is a piece of the tokenizer is never touched,
and a symbol is only replaced by symbols that are pieces, so a table of your own keeps what it holds (tones, say). The
steps, in order:

1. canonical decomposition (NFD), so that `ã` becomes `a` and a tilde; letters that are pieces as they stand (`ç`) are
   put together again;
2. symbols with a standard equivalent are replaced: look-alikes (`ɡ` to `g`), ligatures (`ʧ` to `tʃ`), letters that IPA
   writes with a mark (`ɚ` to `ə˞`), marks drawn above instead of below, superscripts read as the tie bar's second half
   (`tˢ`, like `t͡s`, becomes `ts`);
3. what is not part of the phones is dropped: tie bars, tones, stress, half length, breaks, pauses and brackets;
4. narrow marks that the pieces cannot express, and control characters, are dropped; these are counted (`dropped`);
5. white space of any kind becomes single spaces.

Everything else that has no piece stays, becomes `<unk>`, and is counted and named by `UnknownSymbols`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache

from zipformer_crctc.tokenizer import PhoneTokenizer, read_table

# The published removal set; the tab is in it by accident, and stays for equal results.
_DIACRITICS = "ʰʲʷʼː˞ˠˤ\u0303\u031a\u0325\u0329\u032a\u0334\u033a\t"
_NO_DIACRITICS = dict.fromkeys(map(ord, _DIACRITICS))

_DIAERESIS = "\u0308"
_CLEAN_UP = (
    (" ", ""),
    ("ɡ", "g"),
    *((base + _DIAERESIS, base) for base in "ɛjukɔʏɑɥioɪyagəwøe"),
    ("j" + 4 * "\u0329", "j\u0329"),
)

_EQUIVALENT_RULES = (
    # look-alikes from other blocks, and letters withdrawn from the IPA
    "ɡ>g ε>ɛ γ>ɣ φ>ɸ ϕ>ɸ ϐ>β ϑ>θ α>ɑ ǝ>ə ә>ə ɩ>ɪ ɷ>ʊ ʚ>ɞ ʗ>ǃ ʇ>ǀ ʖ>ǁ ɂ>ʔ Ɂ>ʔ :>ː ꞉>ː ’>ʼ ˁ>ˤ ˜>\u0303 "
    # ligatures
    "ʦ>ts ʣ>dz ʧ>tʃ ʤ>dʒ ʨ>tɕ ʥ>dʑ ꭧ>tʂ ꭦ>dʐ ʩ>fŋ ʪ>ls ʫ>lz "
    # letters that IPA writes as a letter and a mark; ᵻ and ᵿ are ɪ and ʊ with the diaeresis of step 4
    "ɚ>ə˞ ɝ>ɜ˞ ɫ>l\u0334 ᵻ>ɪ ᵿ>ʊ ɿ>z\u0329 ʅ>ʐ\u0329 ȶ>tʲ ȡ>dʲ ȵ>nʲ ȴ>lʲ ʱ>ʰ "
    # marks that IPA lets stand above a letter with a descender: voiceless, syllabic, dental
    "\u030a>\u0325 \u030d>\u0329 \u0346>\u032a "
    # superscripts: prenasalised, released into, off-glides
    "ᵐ>m ᶬ>ɱ ⁿ>n ᶮ>ɲ ᶯ>ɳ ᵑ>ŋ ᶰ>ɴ ˡ>l ˢ>s ᶻ>z ᶴ>ʃ ᶾ>ʒ ᶳ>ʂ ᶿ>θ ˣ>x ᵡ>χ ᶠ>f ᵊ>ə ᵃ>a ᵉ>e ⁱ>i ᵒ>o ᵘ>u"
)
_EQUIVALENTS = dict(rule.split(">") for rule in _EQUIVALENT_RULES.split())
_PROSODY = (
    "\u0361\u035c"  # tie bars
    "˥˦˧˨˩꜒꜓꜔꜕꜖ꜛꜜ↑↓↗↘"  # tone letters, steps, rises and falls
    "¹²³⁴⁵⁶⁷⁸⁹⁰0123456789"  # tone numbers; IPA has no other digits
    "ˊˋˉˇ\u0300\u0301\u0302\u0304\u030b\u030c\u030f\u1dc4\u1dc5\u1dc6\u1dc7\u1dc8\u1dc9"  # tone marks
    "ˈˌ'ˑ"  # stress (also as typed) and half length
    ".,;|‖‿⁀-‐‑–—_=/[]<>"  # breaks, pauses, links, morphemes, delimiters; so no text can spell `<blk>`
    "◌"  # the carrier of a lone mark
)
_NARROW = (
    "\u0306\u0308\u033d"  # extra short, centralised, mid-centralised
    "\u0318\u0319\u031c\u0339"  # tongue root, rounding
    "\u031d\u031e\u031f\u0320˔˕˖˗"  # raised, lowered, advanced, retracted
    "\u032f\u0311"  # not syllabic
    "\u033bᵝ"  # laminal, compressed
)


class _Normaliser:
    """The rules of `normalise`, compiled for one set of pieces."""

    def __init__(self, pieces: Iterable[str]) -> None:
        known = frozenset(pieces)
        rules: dict[str, str] = {s: r for s, r in _EQUIVALENTS.items() if known.issuperset(r)}
        rules.update(dict.fromkeys(_PROSODY + _NARROW, ""))
        self.rules = str.maketrans({s: r for s, r in rules.items() if s not in known})
        self.narrow = re.compile("|".join(map(re.escape, sorted(frozenset(_NARROW) - known))) or "(?!)")
        # Marks of a lower combining class may stand between a letter and its own mark.
        self.whole = [
            (parts[1:], re.compile(f"{re.escape(parts[0])}([\u0300-\u036f]*?){re.escape(parts[1:])}"), rf"{piece}\1")
            for piece in sorted(known)
            if len(parts := unicodedata.normalize("NFD", piece)) > 1
        ]

    def decompose(self, text: str) -> str:
        text = unicodedata.normalize("NFD", text)
        for marks, pattern, piece in self.whole:
            if marks in text:
                text = pattern.sub(piece, text)
        return text

    def __call__(self, text: str, dropped: Counter[str] | None) -> str:
        text = self.decompose(text)
        controls = [] if text.isprintable() else [c for c in text if _is_control(c)]
        if dropped is not None:
            dropped.update(self.narrow.findall(text))
            dropped.update(controls)
        if controls:
            text = text.translate(dict.fromkeys(map(ord, controls)))
        # A mark that moved below its letter has another place in the canonical order.
        return " ".join(self.decompose(text.translate(self.rules)).split())


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf") and character not in "\t\n\v\f\r"


@cache
def _normaliser(pieces: tuple[str, ...] | None) -> _Normaliser:
    return _Normaliser(read_table() if pieces is None else pieces)


def normalise(
    text: str,
    pieces: tuple[str, ...] | None = None,
    dropped: Counter[str] | None = None,
    without_diacritics: bool = False,
) -> str:
    """Phone text as the tokenizer knows it; the rules are at the head of this file. Idempotent.

    pieces: of the tokenizer that encodes the result (`PhoneTokenizer.pieces`); `None` means the package's own table.
    dropped: a counter that collects the narrow marks and control characters that were dropped.
    without_diacritics: `remove_diacritics` from the result.
    """
    text = _normaliser(pieces)(text, dropped)
    return remove_diacritics(text) if without_diacritics else text


def remove_diacritics(text: str) -> str:
    """The text without the marks and modifier letters of the published model (ids 107 to 121), and without tabs.

    A plain deletion of code points: nothing is normalised, so a precomposed `ã` keeps its tilde.
    """
    return text.translate(_NO_DIACRITICS)


def clean_training_text(text: str) -> str:
    """The published clean-up of training text: spaces out, `ɡ` to `g`, the diaeresis off some letters.

    Plain replacements in a fixed order, on decomposed forms only; published training data went through it.
    """
    for old, new in _CLEAN_UP:
        text = text.replace(old, new)
    return text


class UnknownSymbols:
    """Counts the symbols that have no piece, so that the log can name each.

    `unknown` become `<unk>`; `dropped` is the counter to hand to `normalise`.
    """

    def __init__(self) -> None:
        self.unknown: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.num_texts = 0
        """Texts seen."""
        self.num_affected = 0
        """Texts with an unknown symbol."""

    def add(self, text: str, tokenizer: PhoneTokenizer, ids: Sequence[int] | None = None) -> None:
        """Count the symbols of a normalised text that `tokenizer` encodes to `<unk>`; `ids` as it encodes it."""
        self.num_texts += 1
        ids = tokenizer.encode(text) if ids is None else ids
        if tokenizer.unk_id not in ids:
            return
        self.num_affected += 1
        for token, surface in zip(ids, tokenizer.surfaces(text), strict=True):
            if token == tokenizer.unk_id:
                self.unknown.update(surface)

    def report(self) -> str:
        """A sentence for each kind, the most frequent symbols first; empty where nothing was unknown or dropped."""
        sentences = []
        if self.unknown:
            sentences.append(
                f"{self.num_affected} of {self.num_texts} texts hold symbols without a piece, which become <unk>: "
                f"{name_symbols(self.unknown)}"
            )
        if self.dropped:
            sentences.append(f"marks that the pieces cannot express were dropped: {name_symbols(self.dropped)}")
        return "\n".join(sentences)


def name_symbols(counts: Counter[str]) -> str:
    """`12 x 'ʱ' (U+02B1 MODIFIER LETTER SMALL H WITH HOOK), ...`, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} x {_show(symbol)}" for symbol, count in ordered)


def visible(symbol: str) -> str:
    """A symbol to look at: a combining mark alone gets a carrier."""
    return f"◌{symbol}" if symbol and unicodedata.combining(symbol[0]) else symbol


def _show(symbol: str) -> str:
    if len(symbol) != 1:
        return repr(symbol)
    return f"{visible(symbol)!r} (U+{ord(symbol):04X} {unicodedata.name(symbol, 'without a name')})"
