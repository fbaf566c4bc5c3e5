"""Modified Kneser-Ney by hand, and the script that trains a phone language model."""

from __future__ import annotations

import logging
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from local.kneser_ney import FALLBACK_DISCOUNTS, KneserNey, discounts, estimate, write_arpa
from local.train_phone_lm import perplexity, train
from shar_folder import write_folder
from test_ngram import TOKENIZER, random_texts
from tiny_run import write_corpus
from zipformer_crctc.ngram import read_arpa

WORDS = ["zero", "one", "two", "three"]


def prob(model: KneserNey, *words: int) -> float:
    """Of the last word after the others, which must be an n-gram of the model."""
    part = model.orders[len(words) - 1]
    key = 0
    for word in words:
        key = key * model.base + word
    place = int(np.searchsorted(part.keys, key))
    assert part.keys[place] == key
    return float(part.probs[place])


def test_bigrams_by_hand() -> None:
    """Texts "1 2" and "1 1", where 3 is never seen; discounts 0.5, 1, 1.5."""
    model = estimate([[1, 2], [1, 1]], WORDS, [1, 2, 3], order=2)
    # Different words before 1: <s>, 1; before 2: 1; before </s>: 2, 1. Of 5, 1.0 + 0.5 + 1.0 are taken off and shared
    # by the four words.
    share = 2.5 / 5 / 4
    one, two, three, end = (prob(model, word) for word in (1, 2, 3, model.end))
    assert (one, two, three, end) == pytest.approx((0.2 + share, 0.1 + share, share, 0.2 + share))
    # After <s>: 1 twice. After 1: 2, 1, </s>, once each.
    assert prob(model, model.begin, 1) == pytest.approx((2 - 1) / 2 + 1 / 2 * one)
    assert prob(model, 1, 2) == pytest.approx(0.5 / 3 + 1.5 / 3 * two)
    assert prob(model, 2, model.end) == pytest.approx(0.5 + 0.5 * end)
    assert [len(part.keys) for part in model.orders] == [4, 5]


def test_texts_shorter_than_the_order(tmp_path: Path) -> None:
    model = estimate([[5], [6, 5]], TOKENIZER.pieces, [5, 6, 7], order=6)
    assert [len(part.keys) for part in model.orders] == [4, 4, 3, 1]
    write_arpa(model, tmp_path / "lm.arpa")
    assert read_arpa(tmp_path / "lm.arpa", TOKENIZER).order == 4


def test_counts_against_loops() -> None:
    texts = random_texts(40, list(range(1, 7)), seed=3)
    model = estimate(texts, [str(n) for n in range(7)], range(1, 7), order=3)
    rows = [[model.begin, *text, model.end] for text in texts]
    grams = {n: Counter(tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)) for n in (1, 2, 3)}
    before: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for gram in [*grams[2], *grams[3]]:
        before[gram[1:]].add(gram[0])
    for n, part in enumerate(model.orders, start=1):
        wanted = {
            gram: count if n == 3 or gram[0] == model.begin else len(before[gram]) for gram, count in grams[n].items()
        }
        wanted.pop((model.begin,), None)
        found = {
            tuple(int(key) // model.base**power % model.base for power in range(n - 1, -1, -1)): int(count)
            for key, count in zip(part.keys, part.counts, strict=True)
        }
        assert {gram: count for gram, count in found.items() if count} == wanted


def test_discounts_of_chen_and_goodman() -> None:
    counts = np.repeat([1, 2, 3, 4, 9], [40, 20, 12, 8, 5])
    share = 40 / (40 + 2 * 20)
    wanted = (1 - 2 * share * 20 / 40, 2 - 3 * share * 12 / 20, 3 - 4 * share * 8 / 12)
    assert discounts(counts, 2) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "repeats", [(5, 3, 2, 0), (0, 1, 1, 1), (1, 1, 9, 1)], ids=["no count of 4", "no count of 1", "below 0"]
)
def test_discounts_fall_back(repeats: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert discounts(np.repeat([1, 2, 3, 4], repeats), 2) == FALLBACK_DISCOUNTS
    assert "2-grams" in caplog.text and "0.5, 1.0, 1.5" in caplog.text


@pytest.mark.parametrize("order", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 200], ids=["one text", "many texts"])
def test_probabilities_sum_to_one_after_every_context(tmp_path: Path, order: int, count: int) -> None:
    words = list(range(3, 20))
    model = estimate(random_texts(count, words[:12]), TOKENIZER.pieces, words, order)
    write_arpa(model, tmp_path / "lm.arpa.gz")
    tables = read_arpa(tmp_path / "lm.arpa.gz", TOKENIZER)
    sums = tables.scores[:, words].double().exp().sum(dim=1) + tables.final.double().exp()
    assert sums.tolist() == pytest.approx([1.0] * len(sums), abs=1e-5)
    assert len(sums) >= order


def test_the_file_says_what_was_estimated(tmp_path: Path) -> None:
    words = list(range(4, 20))
    model = estimate(random_texts(100, words), TOKENIZER.pieces, words, order=3)
    write_arpa(model, tmp_path / "lm.arpa")
    tables = read_arpa(tmp_path / "lm.arpa", TOKENIZER)
    for text in random_texts(20, words):
        row = [model.begin, *text, model.end]
        wanted = [math.log(prob(model, *row[max(0, i - 2) : i + 1])) for i in range(1, len(row))]
        assert tables.token_scores(text) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("texts", "order", "words"),
    [([], 3, "no texts"), ([[]], 3, "no texts"), ([[1]], 0, "order 0"), ([[1]], 30, "order 30"), ([[0]], 2, "[0]")],
)
def test_what_cannot_be_estimated(texts: list[list[int]], order: int, words: str) -> None:
    with pytest.raises(ValueError) as raised:
        estimate(texts, WORDS, [1, 2, 3], order)
    assert words in str(raised.value)


def test_the_script(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    corpus = write_corpus(tmp_path)
    with caplog.at_level(logging.INFO):
        model = train(corpus, tmp_path / "lm.arpa", TOKENIZER, order=3)
    printed = capsys.readouterr().out
    assert "train: perplexity" in printed and "tones-dev: perplexity" in printed
    assert "24 texts" in caplog.text
    held_out = TOKENIZER.encode("aba")
    result = perplexity(model, [held_out])
    assert result.tokens == len(held_out) + 1 and result.per_token == pytest.approx(
        math.exp(-model.score(held_out) / result.tokens)
    )
    # The texts are all "aba", so there is little left to guess.
    assert result.per_token < 1.5
    train(corpus, tmp_path / "xx.arpa", TOKENIZER, order=3, language="xx")
    assert (tmp_path / "xx.arpa").read_bytes() == (tmp_path / "lm.arpa").read_bytes()
    with pytest.raises(ValueError, match="language 'yy': no text has it; the languages are: xx 24"):
        train(corpus, tmp_path / "yy.arpa", TOKENIZER, language="yy")


def test_no_training_sets(tmp_path: Path) -> None:
    write_folder(tmp_path / "dev", [1.0])
    (tmp_path / "data.yaml").write_text("dev: {tones: dev}\n")
    with pytest.raises(ValueError, match="no folder under train"):
        train(tmp_path / "data.yaml", tmp_path / "lm.arpa", TOKENIZER)
