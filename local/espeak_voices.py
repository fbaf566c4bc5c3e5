"""Which espeak-ng voices speak which split, and what their phoneme names mean in IPA."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from local.espeak_library import PhonemeEvent, Prosody
from zipformer_crctc.text import normalise
from zipformer_crctc.tokenizer import PhoneTokenizer

# Natural voices; of a family (edward, edward2) one. Robots, whispers and voices that overdrive (iven) are left out.
VARIANTS: dict[str, tuple[str, ...]] = {
    "train": (
        *("m1", "m2", "m3", "m4", "m5", "m8", "f1", "f2", "f3", "Alicia", "Andrea", "Andy", "Annie", "Denis", "Diogo"),
        *("Gene", "Henrique", "Hugo", "Lee", "Mario", "Michael", "Mike", "adam", "anika"),
        *("belinda", "benjamin", "boris", "caleb", "david", "ed", "edward", "grandma", "grandpa", "gustave", "ian"),
        *("john", "linda", "marcelo", "max", "miguel", "norbert", "pablo", "paul", "pedro", "quincy", "rob"),
        *("robert", "sandro", "shelby", "travis", "victor", "zac", "klatt", "klatt2"),
    ),
    "dev": ("m6", "f4", "michel", "aunty"),
    "test": ("m7", "f5", "Alex", "steph"),
}
RATES, PITCHES, RANGES = (120, 220), (25, 75), (25, 75)

# Names that are not IPA, where the phoneme's own definition has none: espeak-ng then gives its ASCII mnemonic.
_NOT_IPA = {
    "r.": "ɽ",  # Hindi, Urdu, Bengali
    "a.": "ɑ",  # Arabic, beside an emphatic consonant
    "k^": "c",  # Macedonian
    'u"': "ʉ",  # Russian, between soft consonants
    **{letter + "#": letter + "\u0325" for letter in ("r", "l", "tl", "m", "n", "ɲ", "ŋ")},  # Icelandic, voiceless
}
# Danish marks some vowels by a glottal sign that is not heard; a glottal stop is an event of its own.
_MUTE_GLOTTAL = re.compile("^[?ʔ](?=.)")
# What is left are signs of variants that no piece tells apart (Vietnamese e-, Latvian a`, Russian ɪ^).
_VARIANT_SIGNS = str.maketrans(dict.fromkeys('#?^"`~!@*+<>', ""))
# Names of eight bytes, the size of the field, as they are in full; others of that size may have been cut off.
_EIGHT_BYTES = {"ɔːɹ": "ɔːɹ", "ɑːɹ": "ɑːɹ", "ɐ̃ʊ": "ɐ̃ʊ̃", "ɐ̃ʊ̃": "ɐ̃ʊ̃"}


class UnclearName(ValueError):
    """A phoneme name that cannot be turned into phones."""


@dataclass(frozen=True)
class Speaker:
    """How one utterance is spoken."""

    variant: str
    prosody: Prosody


def draw_speaker(split: str, generator: random.Random) -> Speaker:
    """A voice variant of the split, at a random rate, pitch and pitch range."""
    prosody = Prosody(generator.randint(*RATES), generator.randint(*PITCHES), generator.randint(*RANGES))
    return Speaker(generator.choice(VARIANTS[split]), prosody)


def phones_of(event: PhonemeEvent, tokenizer: PhoneTokenizer) -> str:
    """The phones of an event, none for a pause or for the mark of a foreign word, "(en)".

    A foreign word is spoken by the same voice and its events name its own phones, so it needs nothing more.
    Raises UnclearName for a name that may be cut off, and for an unknown symbol.
    """
    if event.ipa.startswith("("):
        return ""
    bare = event.ipa.strip().lstrip("ˈˌ")
    if event.full:
        if bare not in _EIGHT_BYTES:
            raise UnclearName(f"name cut off: {event.ipa}")
        bare = _EIGHT_BYTES[bare]
    bare = _MUTE_GLOTTAL.sub("", _NOT_IPA.get(bare, bare)).translate(_VARIANT_SIGNS)
    phones = normalise(bare).replace(" ", "")
    if tokenizer.unk_id in tokenizer.encode(phones):
        raise UnclearName(f"unknown symbol in {event.ipa}")
    return phones
