"""Normalisation, diacritic removal, the published clean-up, and the count of unknown symbols."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from zipformer_crctc.text import UnknownSymbols, clean_training_text, name_symbols, normalise, remove_diacritics
from zipformer_crctc.tokenizer import PhoneTokenizer, read_table

REFERENCE = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="module")
def tokenizer() -> PhoneTokenizer:
    return PhoneTokenizer.from_table()


@pytest.mark.parametrize("symbol", read_table())
def test_pieces_stay_as_they_are(symbol: str) -> None:
    assert normalise(symbol) == symbol
    assert normalise(unicodedata.normalize("NFD", symbol)) == symbol


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bɔ̃ʒuʁ ẽ ã", "bɔ\u0303ʒuʁ e\u0303 a\u0303"),
        ("ç c\u0327 c\u0327\u0303 c\u0334\u0327", "ç ç ç\u0303 ç\u0334"),
        ("ɡato", "gato"),
        ("t͡ʃ k͜p", "tʃ kp"),
        ("ʈʂʰuŋ˥˥ kuo˧˥ tʰɔ̀ xúpî ma55 ma⁵¹", "ʈʂʰuŋ kuo tʰɔ xupi ma ma"),
        ("həˈloʊ ˌˈwɝld 'ta", "həloʊ wɜ˞ld ta"),
        ("a.b|c‖d‿e [k]-/t/", "abcde kt"),
        ("ʧʤʦʣ", "tʃdʒtsdz"),
        ("ɚ ɫ tˢ ⁿd ŋ̊ ŋ̍ g̊", "ə˞ l\u0334 ts nd ŋ\u0325 ŋ\u0329 g\u0325"),
        ("a: aːˑ k’", "aː aː kʼ"),
        ("ɐ̯ s̻ ü r̝ ɯᵝ", "ɐ s u r ɯ"),
        ("a\u00a0b\tc\u3000\nd", "a b c d"),
        ("  a \u200b b ", "a b"),
        ("kə\x1dkʰi", "kəkʰi"),
        ("<blk>a<sos/eos>", "blkasoseos"),
        ("", ""),
        ("˥ .", ""),
    ],
)
def test_normalise(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected


def test_normalise_leaves_the_unknown() -> None:
    assert normalise("aQ!b") == "aQ!b"


def test_normalise_orders_marks_alike() -> None:
    assert normalise("n\u0303\u0325") == normalise("n\u0325\u0303") == normalise("n\u0303\u030a") == "n\u0325\u0303"


def test_pieces_of_another_table_are_kept() -> None:
    pieces = ("▁", "a", "ã", "ɡ", "˥", "ˈ", "á", "\u0303")
    assert normalise("ˈɡã˥á", pieces) == "ˈɡã˥á"
    assert normalise("a\u0301ʧ\u0303", pieces) == "áʧ\u0303", "ʧ stays, because t and ʃ are no pieces"


def test_normalise_counts_what_it_drops() -> None:
    dropped: Counter[str] = Counter()
    assert normalise("s̻ä s̻\x1d˥", dropped=dropped) == "sa s"
    assert dropped == {"\u033b": 2, "\u0308": 1, "\x1d": 1}


def test_remove_diacritics_is_the_published_set(tokenizer: PhoneTokenizer) -> None:
    removed = [piece for piece in tokenizer.pieces if remove_diacritics(piece) == ""]
    assert removed == list(tokenizer.pieces[107:122])
    assert remove_diacritics("tʰa\tɔ\u0303ã") == "taɔã"


def test_clean_training_text() -> None:
    assert clean_training_text("ɡa ɛ\u0308b") == "gaɛb"
    assert clean_training_text("j\u0329\u0329\u0329\u0329") == "j\u0329"
    assert clean_training_text("üo\u0308n\u0308") == "üon\u0308", "precomposed letters and other bases stay"


def test_unknown_symbols_are_counted_and_named(tokenizer: PhoneTokenizer) -> None:
    unknown = UnknownSymbols()
    for text in ("aʬʬb", "a", normalise("s̻k͈", dropped=unknown.dropped), "<blk>"):
        unknown.add(text, tokenizer)
    assert unknown.unknown == {"ʬ": 2, "\u0348": 1}
    assert (unknown.num_texts, unknown.num_affected) == (4, 2)
    assert unknown.report() == (
        "2 of 4 texts hold symbols without a piece, which become <unk>: "
        "2 x 'ʬ' (U+02AC LATIN LETTER BILABIAL PERCUSSIVE), "
        "1 x '◌\u0348' (U+0348 COMBINING DOUBLE VERTICAL LINE BELOW)\n"
        "marks that the pieces cannot express were dropped: 1 x '◌\u033b' (U+033B COMBINING SQUARE BELOW)"
    )
    assert UnknownSymbols().report() == ""
    assert name_symbols(Counter({"\x1d": 1})) == "1 x '\\x1d' (U+001D without a name)"


def test_normalise_is_idempotent_on_the_reference_texts() -> None:
    path = REFERENCE / "golden" / "70_tokenizer.json"
    if not path.is_file():
        pytest.skip(f"no reference material at {path}")
    for case in json.loads(path.read_text(encoding="utf-8"))["cases"]:
        once = normalise(case["text"])
        assert normalise(once) == once


def test_east_tusom_has_no_unknown_symbols(tokenizer: PhoneTokenizer) -> None:
    folder = REFERENCE / "data" / "tusom2021" / "data"
    if not folder.is_dir():
        pytest.skip(f"no reference material at {folder}")
    yaml = pytest.importorskip("yaml")
    unknown = UnknownSymbols()
    for entry in yaml.safe_load((folder / "dev.yml").read_text(encoding="utf-8")).values():
        unknown.add(normalise(str(entry["no_tones"]), dropped=unknown.dropped), tokenizer)
    assert unknown.num_texts == 230
    assert not unknown.unknown
