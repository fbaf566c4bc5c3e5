"""Phone inventories: the file, the mask, and the phones of a language."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from local.phone_inventory import write_inventory
from shar_folder import RATE, cut, flac, tone, write_shard
from zipformer_crctc.inventory import inventory_phones, read_inventory
from zipformer_crctc.tokenizer import PhoneTokenizer

TOKENIZER = PhoneTokenizer.from_table()


def phones_of(path: Path, text: str) -> set[str]:
    path.write_text(text, encoding="utf-8")
    return set(inventory_phones(read_inventory(path, TOKENIZER), TOKENIZER))


def test_lines_spaces_and_comments(tmp_path: Path) -> None:
    path = tmp_path / "inventory"
    assert phones_of(path, "# vowels\na e\ti\n\n  # more\no\nu") == {*"aeiou"}
    assert phones_of(path, "\ufeffa\r\nb\r\n") == {"a", "b"}


def test_phones_are_normalised_and_allow_each_of_their_symbols(tmp_path: Path) -> None:
    assert phones_of(tmp_path / "inventory", "tʰ t͡ʃ ɡ ã aː") == {"t", "ʰ", "ʃ", "g", "a", "\u0303", "ː"}


def test_blank_and_boundary_are_always_allowed_and_unknown_never(tmp_path: Path) -> None:
    (tmp_path / "inventory").write_text("a", encoding="utf-8")
    allowed = read_inventory(tmp_path / "inventory", TOKENIZER)
    assert allowed.shape == (127,)
    assert [i for i in range(127) if allowed[i]] == [0, 3, TOKENIZER.pieces.index("a")]


def test_unknown_phones_are_all_listed(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as raised:
        phones_of(tmp_path / "inventory", "a PH\nb ˥ %\n")
    assert "PH (line 1), ˥ (line 2), % (line 2)" in str(raised.value)
    assert str(tmp_path / "inventory") in str(raised.value)


def test_marks_that_are_dropped_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert phones_of(tmp_path / "inventory", "ä") == {"a"}
    assert "U+0308" in caplog.text


@pytest.mark.parametrize("text", ["", "# nothing\n\n"])
def test_no_phones(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match="lists no phones"):
        phones_of(tmp_path / "inventory", text)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the phone inventory"):
        read_inventory(tmp_path / "nowhere", TOKENIZER)


def write_corpus(folder: Path) -> Path:
    texts = {"u1": ("xx", "aba tʰa"), "u2": ("xx", "ãb☂"), "u3": ("yy", "sus")}
    samples = flac(tone(1.0))
    cuts = [cut(name, RATE, text, language=language) for name, (language, text) in texts.items()]
    write_shard(folder / "train", 0, cuts, [(f"{name}.flac", samples) for name in texts])
    (folder / "data.yaml").write_text("train: [train]\n")
    return folder / "data.yaml"


def test_the_phones_of_a_language(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, output = write_corpus(tmp_path), tmp_path / "xx.txt"
    with caplog.at_level(logging.INFO):
        phones = write_inventory(config, "xx", output, TOKENIZER)
    assert set(phones) == {"a", "b", "t", "ʰ", "\u0303"} and phones[0] == "a"
    assert "U+2602" in caplog.text
    assert inventory_phones(read_inventory(output, TOKENIZER), TOKENIZER) == sorted(phones)


def test_rare_phones_are_left_out_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        phones = write_inventory(write_corpus(tmp_path), "xx", tmp_path / "xx.txt", TOKENIZER, min_count=2)
    assert phones == ["a", "b"]
    assert "3 symbols are rarer than 2 and left out" in caplog.text and "ʰ 1" in caplog.text


def test_an_unknown_language_lists_those_that_are_there(tmp_path: Path) -> None:
    config = write_corpus(tmp_path)
    with pytest.raises(ValueError, match="'zz': no text has it; the languages are: xx 2, yy 1"):
        write_inventory(config, "zz", tmp_path / "zz.txt", TOKENIZER)
    with pytest.raises(ValueError, match="lower --min-count"):
        write_inventory(config, "xx", tmp_path / "xx.txt", TOKENIZER, min_count=9)
