"""Weights of the beam search on dev data."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from local import train_phone_lm
from tiny_run import train_flags, write_corpus
from zipformer_crctc import decode, train, tune_search
from zipformer_crctc.results import read_json_lines
from zipformer_crctc.table import score_table
from zipformer_crctc.tokenizer import PhoneTokenizer


def test_the_table_holds_what_decode_gives(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, run, lm = write_corpus(tmp_path / "corpus"), tmp_path / "run", tmp_path / "lm.arpa"
    train.main(train_flags(corpus, run))
    train_phone_lm.train(corpus, lm, PhoneTokenizer.from_table(), order=2)
    flags = [*("--data-config", str(corpus), "--exp-dir", str(run), "--iter", "6", "--avg", "1", "--device", "cpu")]
    flags += ["--num-workers", "0", "--max-duration", "10", "--lm", str(lm)]
    capsys.readouterr()
    tune_search.main([*flags, "--weights", "0.2,1", "--bonuses", "0,4"])
    printed = capsys.readouterr().out
    table = [[float(cell) for cell in re.findall(r"[\d.]+", line)] for line in printed.splitlines()[2:4]]
    found = {(row[0], bonus): row[1 + i] for row in table for i, bonus in enumerate((0.0, 4.0))}
    assert list(found) == [(0.2, 0.0), (0.2, 4.0), (1.0, 0.0), (1.0, 4.0)]
    best = min(found.values())
    assert f"PER {best:.2f} % with" in printed
    for weight, bonus in found:
        search = ["--decoding-method", "ctc-prefix-beam-search", "--test-sets", "dev"]
        decode.main([*flags, *search, "--lm-weight", str(weight), "--insertion-bonus", str(bonus)])
    for path in (run / "ctc-prefix-beam-search").glob("results-*.jsonl"):
        bonus = 4.0 if "bonus-4" in path.name else 0.0
        weight = 0.2 if "lm-lm-0.2" in path.name else 1.0
        assert score_table(read_json_lines(path)).total.counts.per == pytest.approx(found[weight, bonus], abs=0.005)


def test_references_lose_diacritics_as_in_decoding() -> None:
    output = torch.zeros(1, 3, 127), torch.tensor([3])
    recogniser = SimpleNamespace(tokenizer=PhoneTokenizer.from_table(), log_probs=lambda batch: output)
    batch = SimpleNamespace(is_empty=False, texts=["tʰaː"])
    for without, phones in ((False, ["t", "ʰ", "a", "ː"]), (True, ["t", "a"])):
        (scored,) = tune_search.outputs(cast(Any, recogniser), cast(Any, [batch]), without)
        assert scored.references == [phones]


def test_without_a_language_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune_search.main(["--exp-dir", str(tmp_path), "--iter", "6"])
    assert "--lm: give the language model" in capsys.readouterr().err
