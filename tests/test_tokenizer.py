"""The tokenizer: published ids, tables of one's own, and errors that help."""

from __future__ import annotations

import pickle
import time
from pathlib import Path

import pytest
import sentencepiece

from zipformer_crctc.tokenizer import DEFAULT_TABLE, FIXED_PIECES, PhoneTokenizer, read_table

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "golden" / "tokenizer"


@pytest.fixture(scope="module")
def tokenizer() -> PhoneTokenizer:
    return PhoneTokenizer.from_table()


def write_table(folder: Path, text: str) -> Path:
    path = folder / "phones.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_published_vocabulary(tokenizer: PhoneTokenizer) -> None:
    assert tokenizer.vocab_size == 127
    assert tokenizer.pieces[:5] == (*FIXED_PIECES, "a")
    assert list(tokenizer.pieces[4:]) == sorted(tokenizer.pieces[4:])
    samples = {"g": 10, "z": 29, "ç": 31, "ǃ": 40, "ɐ": 41, "ɦ": 60, "ɧ": 61, "ʢ": 106, "ʰ": 107, "˞": 112}
    samples |= {"\u0303": 115, "\u033a": 121, "β": 122, "ⱱ": 126}
    assert {piece: tokenizer.pieces.index(piece) for piece in samples} == samples


def test_equals_the_published_model(tokenizer: PhoneTokenizer) -> None:
    if not REFERENCE.is_dir():
        pytest.skip(f"no reference material at {REFERENCE}")
    published = PhoneTokenizer.from_model(REFERENCE / "unigram_127.model")
    assert published.pieces == tokenizer.pieces
    text = "tʰʲʷʼː˞ QQ<blk> ɡgç"
    assert published.encode(text) == tokenizer.encode(text)


def test_encode_decode(tokenizer: PhoneTokenizer) -> None:
    assert tokenizer.encode("abc") == [3, 4, 5, 6]
    assert tokenizer.encode("  a   b ") == [3, 4, 3, 5]
    assert tokenizer.encode("") == tokenizer.encode(" ") == []
    assert tokenizer.encode("aQQb") == [3, 4, 2, 5]
    assert tokenizer.surfaces("aQQb") == ["▁", "a", "QQ", "b"]
    assert tokenizer.encode("<blk>a<sos/eos>") == [3, 0, 4, 1]
    assert tokenizer.decode([3, 4, 3, 5]) == "a b"
    assert tokenizer.decode([3, 4, 2, 5]) == "a ⁇ b"
    assert tokenizer.phones([3, 4, 3, 2, 5]) == ["a", "<unk>", "b"]
    assert tokenizer.encode_batch(["a", ""]) == [[3, 4], []]


def test_ids_outside_the_vocabulary(tokenizer: PhoneTokenizer) -> None:
    for ids in ([3, 127], [-1]):
        with pytest.raises(ValueError, match="outside the vocabulary of 127 pieces"):
            tokenizer.decode(ids)
        with pytest.raises(ValueError, match="outside the vocabulary"):
            tokenizer.phones(ids)


def test_deterministic_quick_and_quiet(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    start = time.perf_counter()
    first = PhoneTokenizer.from_table()
    assert time.perf_counter() - start < 1.0
    lines = DEFAULT_TABLE.read_text(encoding="utf-8").splitlines()
    reordered = write_table(tmp_path, "\n".join(reversed(lines)))
    assert PhoneTokenizer.from_table(reordered).proto == first.proto
    assert capfd.readouterr() == ("", "")


def test_bytes_pickle_and_file_round_trip(tokenizer: PhoneTokenizer, tmp_path: Path) -> None:
    path = tmp_path / "phones.model"
    path.write_bytes(tokenizer.proto)
    for copy in (
        PhoneTokenizer.from_bytes(tokenizer.proto),
        PhoneTokenizer.from_model(path),
        pickle.loads(pickle.dumps(tokenizer)),
    ):
        assert copy.pieces == tokenizer.pieces
        assert copy.encode("kʰæt") == tokenizer.encode("kʰæt")


def test_table_of_ones_own(tmp_path: Path) -> None:
    path = write_table(tmp_path, "# tones\n˥\na  # low vowel\n\nU+0301 # acute\nã\nU+0023\n")
    assert set(read_table(path)) == {"#", "a", "ã", "˥", "\u0301"}
    tokenizer = PhoneTokenizer.from_table(path)
    assert tokenizer.vocab_size == 9
    assert tokenizer.pieces[:4] == FIXED_PIECES
    assert list(tokenizer.pieces[4:]) == sorted(["#", "a", "ã", "˥", "\u0301"])
    assert [tokenizer.pieces[i] for i in tokenizer.encode("ã˥")] == ["▁", "ã", "˥"]


@pytest.mark.parametrize("count", [2, 3, 17, 300])
def test_tables_of_any_size(count: int, tmp_path: Path) -> None:
    symbols = [chr(0x4E00 + i) for i in range(count)]
    tokenizer = PhoneTokenizer.from_table(write_table(tmp_path, "\n".join(symbols)))
    assert tokenizer.pieces == (*FIXED_PIECES, *symbols)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds 0 symbols"),
        ("# nothing\n\n", "holds 0 symbols"),
        ("a\n", "holds 1 symbols"),
        ("a\nb\na\n", r"line 3: 'a' \(U\+0061\) stands in line 1 already"),
        ("ç\nU+00E7\n", "line 2.*stands in line 1"),
        ("a\ntʃ\n", r"line 2: 'tʃ' has 2 code points \(U\+0074 U\+0283\)"),
        ("a b\n", "line 1: 'b' follows the symbol"),
        ("a\n▁\n", "line 2: '▁'.*the word boundary"),
        ("a\nU+0020\n", "line 2.*white space"),
        ("a\nU+2585\n", "line 2.*own mark"),
        ("a\nU+0000\n", "line 2.*null"),
        ("a\nU+D800\n", "line 2: U\\+D800 is no character"),
    ],
)
def test_table_errors(text: str, message: str, tmp_path: Path) -> None:
    path = write_table(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        PhoneTokenizer.from_table(path)
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.txt: cannot read the phone table"):
        PhoneTokenizer.from_table(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"none\.model: cannot read the tokenizer model"):
        PhoneTokenizer.from_model(tmp_path / "none.model")
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"this is text, not a model")
    with pytest.raises(ValueError, match=r"broken\.model: is not a sentencepiece model"):
        PhoneTokenizer.from_model(broken)
    with pytest.raises(ValueError, match="is empty"):
        PhoneTokenizer.from_bytes(b"")


def test_model_with_other_first_pieces(tmp_path: Path) -> None:
    prefix = tmp_path / "other"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("abc"), model_prefix=str(prefix), vocab_size=7, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"other\.model: its first pieces are \['<unk>', '<s>'.*ids 0 to 3 must be"):
        PhoneTokenizer.from_model(f"{prefix}.model")
