"""PER and PFER."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from zipformer_crctc.metrics import (
    ErrorCounts,
    FeatureDistance,
    PferSummary,
    align,
    align_all,
    count_errors,
    edit_distance,
    group_by,
    join_phones,
    score,
)

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "golden" / "90_pfer.json"


def slow_distance(ref: str, hyp: str) -> int:
    """Levenshtein by the textbook recurrence."""
    row = list(range(len(hyp) + 1))
    for i, r in enumerate(ref):
        row, above = [i + 1], row
        for j, h in enumerate(hyp):
            row.append(min(above[j + 1] + 1, row[j] + 1, above[j] + (r != h)))
    return row[-1]


def test_edit_distance_and_alignment_on_random_strings() -> None:
    rng = random.Random(1)
    for _ in range(200):
        ref, hyp = ("".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(2))
        alignment = align(ref, hyp)
        assert "".join(r for r, _ in alignment if r) == ref
        assert "".join(h for _, h in alignment if h) == hyp
        assert edit_distance(ref, hyp) == count_errors(alignment).errors == slow_distance(ref, hyp)
        assert alignment == align(ref, hyp)


def test_alignment_of_ties() -> None:
    assert align("ab", "b") == [("a", None), ("b", "b")]
    assert align("aa", "a") == [("a", None), ("a", "a")]
    assert align("", "ab") == [(None, "a"), (None, "b")]
    assert align("", "") == []


def test_pooled_counts() -> None:
    pairs = [("▁kæt", "kat"), ("s▁iː", "siːp▁"), ("pa", "")]
    counts = score((list(ref), list(hyp)) for ref, hyp in pairs)
    assert counts == ErrorCounts(correct=5, substitutions=1, deletions=2, insertions=1)
    assert (counts.reference_phones, counts.errors, counts.per) == (8, 4, 50.0)
    assert math.isnan(ErrorCounts(insertions=2).per)


def test_group_by() -> None:
    assert group_by(["b1", "a1", "b0"], key=lambda row: row[0]) == {"a": ["a1"], "b": ["b1", "b0"]}


@pytest.mark.parametrize(
    ("hyp", "ref", "expected"),
    [
        ("kæt", "kat", 0.041667),
        ("", "pat", 2.770833),
        ("t͡ʃa", "tʃa", 1.020833),
        ("ðɪsɪz", "dɪs", 1.9375),
        ("", "", 0.0),
    ],
)
def test_feature_distance(hyp: str, ref: str, expected: float) -> None:
    features = FeatureDistance()
    assert features.distance(hyp, ref) == pytest.approx(expected, abs=1e-6)
    assert features.distance(ref, hyp) == pytest.approx(expected, abs=1e-6)


def test_reads_g_as_script_g_and_keeps_cedilla() -> None:
    features = FeatureDistance()
    assert features.distance("ga", "ɡa") == 0.0
    assert features.segments("ɪç") == ["ɪ", "c\u0327"]
    assert not features.dropped


def test_names_what_panphon_drops() -> None:
    features = FeatureDistance()
    assert features.distance("▁aʜ b", "aⱱʜb") == 0.0
    assert features.dropped == {"ʜ": 2, "ⱱ": 1}
    assert features.segments("aʜ") == ["a"]
    features.percent_parts([("ʜ", "ʜ")])
    assert features.dropped == {"ʜ": 2, "ⱱ": 1}
    features.percent([("aʜ", "a!")])
    assert features.dropped == {"ʜ": 3, "ⱱ": 1}


def test_percent_definition() -> None:
    features = FeatureDistance()
    pairs = [("k æ t!", "kat"), ("", "pat")]
    assert features.percent(pairs) == pytest.approx(100 * (1 / 24 + 2.7708333333333335) / 6, abs=1e-9)
    assert math.isnan(features.percent([("a", "")]))


def test_equals_panphon() -> None:
    panphon = pytest.importorskip("panphon.distance").Distance()
    rng = random.Random(2)
    phones = ["p", "tʰ", "kʼ", "ŋ", "ʃ", "aː", "ɛ̃", "u", "t͡s", "ɡ", "ʜ", "˥", "²"]
    pairs = [["".join(rng.choices(phones, k=rng.randrange(12))) for _ in range(2)] for _ in range(40)]
    features = FeatureDistance()
    for hyp, ref in pairs:
        assert features.distance(hyp, ref) == pytest.approx(panphon.feature_edit_distance(hyp, ref), abs=1e-9)
    plain = [[text.replace("²", "") for text in pair] for pair in pairs]
    hyps, refs = zip(*plain, strict=True)
    assert features.percent((hyp, ref) for hyp, ref in plain) == pytest.approx(
        100 * panphon.feature_error_rate(list(hyps), list(refs)), abs=1e-9
    )


def test_equals_the_reference_pairs() -> None:
    if not REFERENCE.is_file():
        pytest.skip(f"no reference material at {REFERENCE}")
    content = json.loads(REFERENCE.read_text(encoding="utf-8"))
    features = FeatureDistance()
    distances = [features.distance(pair["hyp"], pair["ref"]) for pair in content["pairs"]]
    assert distances == pytest.approx([pair["pfer"] for pair in content["pairs"]], abs=1e-9)
    summary = PferSummary.of(distances).as_published()
    assert summary["PFER mean"] == content["summary"]["pfer_mean"]
    assert summary["PFER IQR"] == content["summary"]["pfer_iqr"]


def test_many_pairs_equal_one_by_one() -> None:
    rng = random.Random(3)
    phones = ["p", "tʰ", "kʼ", "ŋ", "ʃ", "aː", "ɛ̃", "u", "t͡s", "g", "ʜ", "¹", "\n", "!"]
    texts = ["".join(rng.choices(phones, k=rng.choice([0, 1, 5, 40]))) for _ in range(400)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    together, alone = FeatureDistance(), FeatureDistance()
    assert together.distances(pairs).tolist() == [alone.distance(*pair) for pair in pairs]
    assert together.dropped == alone.dropped
    assert together.dropped["ʜ"] == sum(text.count("ʜ") for text in texts)
    distances, lengths = together.percent_parts(pairs)
    assert together.percent(pairs) == pytest.approx(100 * distances.sum() / lengths.sum(), abs=1e-9)
    assert together.distances([]).shape == (0,)


def test_alignment_by_features_pairs_what_is_alike() -> None:
    assert align("ta", "di") == [("t", "d"), ("a", "i")]
    (ambiguous,) = align_all([("tas", "d")])
    assert ("s", "d") in ambiguous
    (alike,) = align_all([("tas", "d")], by_features=True)
    assert alike == [("t", "d"), ("a", None), ("s", None)]
    (unknown,) = align_all([(["k", "ʰ", "<unk>"], ["g"])], by_features=True)
    assert unknown == [("k", "g"), ("ʰ", None), ("<unk>", None)]


def test_alignment_by_features_has_the_fewest_errors() -> None:
    rng = random.Random(4)
    texts = ["".join(rng.choices("tdaisg", k=rng.randrange(9))) for _ in range(400)]
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for (ref, hyp), alignment in zip(pairs, align_all(pairs, by_features=True), strict=True):
        assert "".join(r for r, _ in alignment if r) == ref
        assert "".join(h for _, h in alignment if h) == hyp
        assert count_errors(alignment).errors == slow_distance(ref, hyp)


def test_summary() -> None:
    summary = PferSummary.of([0.0, 1.0, 2.0, 5.0])
    assert (summary.mean, summary.median, summary.iqr) == (2.0, 1.5, 2.0)
    assert summary.as_published() == {"PFER mean": 2.0, "PFER median": 1.5, "PFER IQR": 2.0, "PFER std": 1.871}
    assert math.isnan(PferSummary.of([]).mean)


def test_join_phones_leaves_out_special_pieces() -> None:
    features = FeatureDistance()
    assert join_phones(["▁", "k", "<unk>", "ʰ", "▁"], features.dropped) == "kʰ"
    assert features.dropped == {"<unk>": 1}
