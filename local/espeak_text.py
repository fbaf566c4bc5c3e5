"""Random text in many languages for the espeak corpus: words drawn by frequency, split by word.

The lists are those of the package `wordfreq` (its data are CC-BY-SA 4.0); only their words and frequencies are read,
so none of its optional tokenizers is needed.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import random
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LANGUAGES_TABLE = Path(__file__).parents[1] / "data" / "espeak_languages.tsv"
SPLITS = ("train", "dev", "test")
HELD_OUT_PERCENT = 10
"""share of the words of a language that only dev uses; test the same"""
WORDS_PER_LANGUAGE = 20_000
"""the most frequent ones; beyond them the lists hold mostly names and typing errors"""
FREQUENCY_POWER = 0.7
"""words are drawn by frequency to this power: by plain frequency, ten words would fill a quarter of all speech"""
COMMA_PROBABILITY = 0.12
ENDINGS = (".", ".", ".", "?", "!")

# Inside a word: apostrophes, the Catalan middle dot, and the joiners that Persian and the scripts of India spell with.
WORD_SIGNS = frozenset("'’·\u200c\u200d")


@dataclass(frozen=True)
class Language:
    """A row of data/espeak_languages.tsv."""

    code: str
    """ISO 639 code, as wordfreq has it"""
    name: str
    script: str
    """first word of the Unicode names of its letters"""
    voices: tuple[str, ...]
    """espeak-ng's names of its voices: its accents, one of which is drawn for each utterance"""
    is_default: bool
    """used where no language is named"""


@cache
def read_languages(table: Path = LANGUAGES_TABLE) -> dict[str, Language]:
    """The languages of the table by code, in its order."""
    with table.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {
            row["code"]: Language(
                row["code"], row["name"], row["script"], tuple(row["voices"].split(",")), row["default"] == "yes"
            )
            for row in rows
        }


def choose_languages(codes: Iterable[str], table: Path = LANGUAGES_TABLE) -> tuple[Language, ...]:
    """The named languages, or the default ones of the table where none is named.

    Raises ValueError for a code that the table lacks or that is named twice, naming those that are there.
    """
    languages = read_languages(table)
    codes = tuple(codes) or tuple(code for code, language in languages.items() if language.is_default)
    unknown = [code for code in codes if code not in languages]
    if unknown:
        there = ", ".join(f"{language.code} ({language.name})" for language in languages.values())
        raise ValueError(f"--languages: unknown {', '.join(map(repr, unknown))}; there are: {there}")
    if len(set(codes)) < len(codes):
        raise ValueError(f"--languages: a language is named twice in {','.join(codes)}")
    return tuple(languages[code] for code in codes)


def split_of(word: str) -> str:
    """The split a word belongs to, by a stable hash of its letters.

    The language is not hashed: related languages share words, and "internet" held out in one is held out in all.
    """
    percent = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") % 100
    if percent < HELD_OUT_PERCENT:
        return "test"
    return "dev" if percent < 2 * HELD_OUT_PERCENT else "train"


def is_word(word: str, script: str) -> bool:
    """Whether a list's entry is a word of at least two letters in the script: no numerals, addresses or symbols."""
    letters = 0
    for character in word:
        if character in WORD_SIGNS:
            continue
        kind = unicodedata.category(character)[0]
        if kind not in "LM" or unicodedata.name(character, "").split(" ")[0] not in (script, "COMBINING", "MODIFIER"):
            return False
        letters += kind == "L"
    return letters >= 2 and word[0] not in WORD_SIGNS


class WordSource:
    """Draws the words of one language and split by frequency."""

    def __init__(self, language: Language, split: str) -> None:
        """Raises ValueError for a split of another name."""
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}: there are {', '.join(SPLITS)}")
        import wordfreq

        frequencies = wordfreq.get_frequency_dict(language.code)  # the most frequent first
        entries = itertools.islice(frequencies, WORDS_PER_LANGUAGE)
        self.words = [word for word in entries if is_word(word, language.script) and split_of(word) == split]
        weights = [frequencies[word] ** FREQUENCY_POWER for word in self.words]
        self._cumulative = list(itertools.accumulate(weights))

    def draw(self, count: int, generator: random.Random) -> list[str]:
        return generator.choices(self.words, cum_weights=self._cumulative, k=count)


def sentence(words: Iterable[str], generator: random.Random) -> str:
    """Words as one sentence, with a comma (a short pause) here and there and an ending that shapes the melody."""
    parts: list[str] = []
    for word in words:
        if parts and generator.random() < COMMA_PROBABILITY:
            parts[-1] += ","
        parts.append(word)
    return " ".join(parts) + generator.choice(ENDINGS)
