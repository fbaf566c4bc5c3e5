"""N-gram models from ARPA files: by hand, against KenLM, and files that cannot be used."""

from __future__ import annotations

import gzip
import importlib.util
import logging
import math
import random
from pathlib import Path

import pytest
import torch

from local.kneser_ney import estimate, write_arpa
from zipformer_crctc.ngram import LN_10, NgramLM, read_arpa
from zipformer_crctc.tokenizer import PhoneTokenizer

TOKENIZER = PhoneTokenizer.from_table()
A, B, C = (TOKENIZER.pieces.index(phone) for phone in "abc")
ARPA = """
\\data\\
ngram 1=5
ngram 2=4
ngram 3=2

\\1-grams:
-2.0\t<unk>
-99\t<s>\t-0.5
-0.75\t</s>
-0.5\ta\t-0.25
-0.625\tb\t-0.125

\\2-grams:
-0.25\t<s> a\t-0.375
-0.3125\ta b\t-0.0625
-0.4375\tb a
-0.5625\tb </s>

\\3-grams:
-0.1875\t<s> a b
-0.15625\ta b </s>

\\end\\
"""


def write(folder: Path, text: str = ARPA, name: str = "lm.arpa") -> Path:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
def test_scores_by_hand(tmp_path: Path, name: str) -> None:
    """Every score is a sum of numbers of the file; the comments say how far it backs off."""
    model = read_arpa(write(tmp_path, name=name), TOKENIZER)
    assert model.order == 3
    cases: list[tuple[list[int], list[float]]] = [
        ([], [-0.5 - 0.75]),  # <s> backs off
        ([A, B], [-0.25, -0.1875, -0.15625]),  # all found
        ([A, A], [-0.25, -0.375 - 0.25 - 0.5, -0.25 - 0.75]),  # <s> a, then a, back off
        ([B, A, B], [-0.5 - 0.625, -0.4375, -0.3125, -0.15625]),  # b a has no back-off weight: 0
        ([A, B, A], [-0.25, -0.1875, -0.0625 - 0.4375, -0.25 - 0.75]),  # a b backs off to b a
        ([C, B], [-0.5 - 2.0, -0.625, -0.5625]),  # c is not in the file: <unk>, which is no context
    ]
    for tokens, logs in cases:
        assert model.token_scores(tokens) == pytest.approx([log * LN_10 for log in logs], abs=1e-6)


def test_pieces_that_a_model_lacks_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        read_arpa(write(tmp_path), TOKENIZER)
    assert "does not list 122 pieces, which score as its <unk>: ▁" in caplog.text
    text = ARPA.replace("-2.0\t<unk>\n", "").replace("ngram 1=5", "ngram 1=4")
    model = read_arpa(write(tmp_path, text), TOKENIZER)
    assert model.token_scores([C])[0] == pytest.approx((-0.5 - 100) * LN_10)


def random_texts(count: int, words: list[int], seed: int = 0) -> list[list[int]]:
    """Texts in which some words follow others much more often."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        text = [rng.choice(words)]
        while rng.random() < 0.85:
            near = words.index(text[-1])
            text.append(words[(near + rng.choice((1, 1, 1, 2, 5, rng.randrange(len(words))))) % len(words)])
        texts.append(text)
    return texts


def estimated(path: Path, order: int, predicted: list[int], words: list[int]) -> NgramLM:
    write_arpa(estimate(random_texts(150, words), TOKENIZER.pieces, predicted, order), path)
    return read_arpa(path, TOKENIZER)


@pytest.mark.skipif(importlib.util.find_spec("kenlm") is None, reason="the package kenlm is not installed")
@pytest.mark.parametrize("order", [2, 3, 5])
@pytest.mark.parametrize("with_unknown", [True, False])
def test_scores_equal_kenlm(tmp_path: Path, order: int, with_unknown: bool) -> None:
    """It reads no models of 1-grams only."""
    import kenlm

    words = list(range(4, 30))
    predicted = [TOKENIZER.unk_id, *words] if with_unknown else words
    path = tmp_path / "lm.arpa"
    model = estimated(path, order, predicted, words)
    peer = kenlm.Model(str(path))
    for tokens in [*random_texts(60, list(range(3, 34)), seed=1), []]:
        wanted = [prob for prob, _, _ in peer.full_scores(" ".join(TOKENIZER.pieces[token] for token in tokens))]
        assert [score / LN_10 for score in model.token_scores(tokens)] == pytest.approx(wanted, abs=1e-4)


def test_probabilities_sum_to_one(tmp_path: Path) -> None:
    words = list(range(4, 30))
    model = estimated(tmp_path / "lm.arpa", 4, words, words)
    sums = model.scores[:, words].double().exp().sum(dim=1) + model.final.double().exp()
    assert len(sums) > 300
    assert sums.tolist() == pytest.approx([1.0] * len(sums), abs=1e-5)


def test_every_state_is_reached_by_its_tokens(tmp_path: Path) -> None:
    """A table look-up after any history is that after its longest known end."""
    words = list(range(4, 12))
    model = estimated(tmp_path / "lm.arpa", 3, words, words)
    state = model.start
    seen = set()
    for token in random_texts(1, words, seed=2)[0] * 3:
        state = int(model.following[state, token])
        seen.add(state)
        assert 0 <= state < len(model.scores)
    assert len(seen) > 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("\\data\\", "data", "no line \\data\\"),
        ("ngram 1=5", "ngram one=5", "line 3: 'ngram one=5'"),
        ("ngram 2=4", "ngram 3=4", "line 4: 'ngram 3=4'"),
        ("ngram 1=5", "ngram 1=6", "5 1-grams, but the head of the file says 6"),
        ("\\2-grams:", "\\4-grams:", "line 14: '\\4-grams:' where \\2-grams:"),
        ("\\end\\", "\\the end\\", "where \\end\\ is expected"),
        ("\\end\\", "", "after line 22: the file is cut (in the 3-grams)"),
        ("-0.5\ta\t-0.25", "-0.5\ta\t-0.25\t-1", "line 11"),
        ("-0.5\ta\t-0.25", "0.5\ta\t-0.25", "line 11"),
        ("-0.5\ta\t-0.25", "nan\ta\t-0.25", "line 11"),
        ("-0.5\ta\t-0.25", "half\ta\t-0.25", "line 11"),
        ("-0.5\ta\t-0.25", "-0.5\tPH\t-0.25", "line 11: 'PH' is no piece of the tokenizer (1 such symbols: PH)"),
        ("-0.5\ta\t-0.25", "-0.5\t<blk>\t-0.25", "'<blk>' is no piece"),
        ("-0.5\ta\t-0.25", "-0.5\tb\t-0.25", "'b' stands in the file already"),
        ("-0.4375\tb a", "-0.4375\tɛ a", "line 17: 'ɛ' is missing from the 1-grams"),
        ("-0.75\t</s>", "-0.75\tc", "has no </s>"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, old: str, new: str, words: str) -> None:
    path = write(tmp_path, ARPA.replace(old, new))
    with pytest.raises(ValueError) as raised:
        read_arpa(path, TOKENIZER)
    assert str(path) in str(raised.value) and words in str(raised.value)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    text = ARPA.rstrip()
    for size in range(0, len(text), 7):
        with pytest.raises(ValueError, match=r"lm\.arpa"):
            read_arpa(write(tmp_path, text[:size]), TOKENIZER)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot read the language model"):
        read_arpa(tmp_path / "nowhere.arpa", TOKENIZER)
    packed = write(tmp_path, name="lm.arpa.gz").read_bytes()
    (tmp_path / "cut.arpa.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="cut or damaged"):
        read_arpa(tmp_path / "cut.arpa.gz", TOKENIZER)
    (tmp_path / "plain.arpa.gz").write_text(ARPA)
    with pytest.raises(ValueError, match="cut or damaged"):
        read_arpa(tmp_path / "plain.arpa.gz", TOKENIZER)
    (tmp_path / "binary.arpa").write_bytes(b"\\data\\\nngram 1=1\n\xff\xfe")
    with pytest.raises(ValueError, match="line 3: is not UTF-8"):
        read_arpa(tmp_path / "binary.arpa", TOKENIZER)


def test_moving_keeps_the_tables(tmp_path: Path) -> None:
    model = read_arpa(write(tmp_path), TOKENIZER)
    assert torch.equal(model.to("cpu").scores, model.scores)
    assert math.isfinite(float(model.scores.sum()))
