"""Result files."""

from __future__ import annotations

import ast
import json
import logging
import math
from pathlib import Path

import pytest

from zipformer_crctc.results import UtteranceResult, file_suffix, read_json_lines, write_atomically, write_results
from zipformer_crctc.search import Hypothesis
from zipformer_crctc.times import Segment
from zipformer_crctc.tokenizer import PhoneTokenizer

RESULTS = [
    UtteranceResult("b", list("kæt"), list("kat"), "eng", "s1", [0.045, 0.065, 0.085], -1.5),
    UtteranceResult("a", ["s", "iː"], [], "deu", "s2"),
    UtteranceResult("c", [], ["p"], "deu", "s2"),
]


def test_result_of_a_hypothesis() -> None:
    tokenizer = PhoneTokenizer.from_table()
    hypothesis = Hypothesis([3, 14, 3, 4, 2], [0, 2, 5, 7, 9], -2.0)
    result = UtteranceResult.of("x", "k aʬ", hypothesis, tokenizer, "eng", "s1")
    assert result == UtteranceResult(
        "x", ["k", "a", "<unk>"], ["k", "a", "<unk>"], "eng", "s1", [0.085, 0.185, 0.225], -2.0
    )
    assert not UtteranceResult.of("x", " ", hypothesis, tokenizer).scorable
    slow = UtteranceResult.of("x", "k", Hypothesis([14, 4], [0, 5], -2.0, factor=2), tokenizer)
    assert slow.times == [0.055, 0.255], "frames of 40 ms, in their middle"


def test_segments_belong_to_the_phones_of_the_hypothesis() -> None:
    segments = [Segment("p", 0.1, 0.2, 0.9)]
    result = RESULTS[2].with_segments(segments, 1.5)
    assert (result.starts, result.ends, result.confidence, result.duration) == ([0.1], [0.2], [0.9], 1.5)
    assert result.segments() == segments
    assert RESULTS[0].segments() == []
    with pytest.raises(ValueError, match="utterance b: segments of other phones"):
        RESULTS[0].with_segments(segments, 1.5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"iteration": 800000, "epoch": 3, "avg": 10}, "iter-800000-avg-10"),
        ({"epoch": 30, "avg": 15, "use_averaged_model": True}, "epoch-30-avg-15-use-averaged-model"),
        (
            {"iteration": 5, "avg": 1, "chunk_size": 16, "left_context_frames": 128, "use_averaged_model": True},
            "iter-5-avg-1-chunk-16-left-context-128-use-averaged-model",
        ),
    ],
)
def test_file_suffix(settings: dict[str, int], expected: str) -> None:
    assert file_suffix(**settings) == expected  # type: ignore[arg-type]


def test_file_suffix_needs_a_checkpoint() -> None:
    with pytest.raises(ValueError, match="one of them must be above 0"):
        file_suffix(avg=1)


def test_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "ctc-greedy-search"
    with caplog.at_level(logging.WARNING):
        paths = write_results(folder, "dev", "iter-5-avg-1", "ctc-greedy-search", RESULTS)
    assert "dev: 1 utterances have an empty reference and are not scored: c" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == [
        "errs-dev-iter-5-avg-1.txt",
        "recogs-dev-iter-5-avg-1.txt",
        "results-dev-iter-5-avg-1.jsonl",
        "wer-summary-dev-iter-5-avg-1.txt",
    ]
    lines = paths["recogs"].read_text(encoding="utf-8").splitlines()
    assert lines[0] == "a:\tref=['s', 'iː']"
    assert lines[1] == "a:\thyp=[]"
    assert [line.split(":\t")[0] for line in lines] == ["a", "a", "b", "b", "c", "c"]
    assert ast.literal_eval(lines[3].split("hyp=")[1]) == ["k", "a", "t"]
    assert paths["wer-summary"].read_text(encoding="utf-8") == "settings\tWER\nctc-greedy-search\t60.00\n"
    assert paths["errs"].read_text(encoding="utf-8").startswith("%WER = 60.00\nErrors: 0 insertions, 2 deletions, 1 ")


def test_times_follow_the_output_rate() -> None:
    tokenizer = PhoneTokenizer.from_table()
    tokens = tokenizer.encode("ka")
    hypothesis = Hypothesis(tokens, list(range(len(tokens))), 0.0, factor=2)
    result = UtteranceResult.of("a", "ka", hypothesis, tokenizer)
    assert result.times == hypothesis.times[-2:] == pytest.approx([0.095, 0.135])


def test_json_lines(tmp_path: Path) -> None:
    path = write_results(tmp_path, "dev", "epoch-1-avg-1", "ctc-greedy-search", RESULTS)["results"]
    assert read_json_lines(path) == sorted(RESULTS, key=lambda result: result.id)
    first = json.loads(path.read_text(encoding="utf-8").splitlines()[1])
    assert first["ref"] == ["k", "æ", "t"]
    assert first["times"] == [0.045, 0.065, 0.085]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"id": "d"}\n')
    with pytest.raises(ValueError, match=r"results-dev-epoch-1-avg-1\.jsonl, line 4: is not a decoding result"):
        read_json_lines(path)


def test_times_follow_the_models_output_rate() -> None:
    tokenizer = PhoneTokenizer.from_table()
    tokens = tokenizer.encode("ab")
    for factor, times in ((1, [0.065, 0.085]), (2, [0.095, 0.135])):
        hypothesis = Hypothesis(tokens, [0, 1, 2], -1.0, factor)
        assert UtteranceResult.of("u", "ab", hypothesis, tokenizer).times == times


def test_several_hypotheses_are_stored_without_boundaries(tmp_path: Path) -> None:
    tokenizer = PhoneTokenizer.from_table()
    found = [Hypothesis(tokenizer.encode(text), list(range(len(text) + 1)), -1.0, 1, -2.0) for text in ("ab", "a")]
    result = UtteranceResult.of("u", "ab", found[0], tokenizer, nbest=found)
    assert [entry["hyp"] for entry in result.nbest] == [["a", "b"], ["a"]]
    assert result.nbest[1] == {"hyp": ["a"], "times": [0.065], "score": -1.0, "acoustic": -2.0}
    paths = write_results(tmp_path, "dev", "x", "beam", [result])
    assert read_json_lines(paths["results"]) == [result]
    assert UtteranceResult.of("u", "ab", found[0], tokenizer, nbest=found[:1]).nbest == []


def test_nothing_to_score(tmp_path: Path) -> None:
    paths = write_results(tmp_path, "dev", "epoch-1-avg-1", "ctc-greedy-search", RESULTS[2:])
    assert math.isnan(float(paths["wer-summary"].read_text(encoding="utf-8").split("\t")[-1]))


def test_atomic_writing(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_atomically(path, "old\n")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
