"""Checks of the greedy search (32), the tokenizer (70, tokenizer/) and the feature distance (90)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from golden_checks.compare import Checker, Comparison, Fixture, exact
from zipformer_crctc.metrics import FeatureDistance, PferSummary, edit_distance
from zipformer_crctc.search import greedy_search
from zipformer_crctc.text import clean_training_text, remove_diacritics
from zipformer_crctc.tokenizer import PhoneTokenizer


def check_greedy(path: Path) -> list[Comparison]:
    """`in.CALL.log_probs`, `in.CALL.lens` to `out.CALL.tokens` (padded with -1) and `out.CALL.num_tokens`."""
    fixture = Fixture.read(path)
    calls = sorted({key.split(".")[1] for key in fixture.tensors if key.startswith("in.")})
    results = []
    for call in calls:
        inputs, wanted = fixture.group(f"in.{call}."), fixture.group(f"out.{call}.")
        found = greedy_search(inputs["log_probs"], inputs["lens"])
        tokens = torch.full_like(wanted["tokens"], -1)
        for row, hypothesis in zip(tokens, found, strict=True):
            row[: len(hypothesis.tokens)] = torch.tensor(hypothesis.tokens, dtype=row.dtype)[: len(row)]
        results.append(exact(f"{call}.tokens", tokens, wanted["tokens"]))
        counts = torch.tensor([len(hypothesis.tokens) for hypothesis in found])
        results.append(exact(f"{call}.num_tokens", counts, wanted["num_tokens"]))
    return results


def check_tokenizer_cases(path: Path) -> list[Comparison]:
    """`cases`: a text with its ids, pieces and forms, one comparison each; an unknown field is an error."""
    tokenizer = PhoneTokenizer.from_table()
    results = []
    for number, case in enumerate(json.loads(path.read_text(encoding="utf-8"))["cases"]):
        got = _tokenizer_case(tokenizer, case["text"])
        label = case.get("label", "")
        for key, want in case.items():
            if key != "label":
                results.append(exact(f"{number} {label}: {key}", got.get(key, "no such field here"), want))
    return results


def _tokenizer_case(tokenizer: PhoneTokenizer, text: str) -> dict[str, Any]:
    ids = tokenizer.encode(text)
    pieces = [tokenizer.pieces[i] for i in ids]
    bare, clean = remove_diacritics(text), clean_training_text(text)
    return {
        "text": text,
        "ids": ids,
        "pieces": tokenizer.surfaces(text),
        "vocab_pieces": pieces,
        "decoded": tokenizer.decode(ids),
        "eval_phones": pieces[1:],
        "no_diacritics": bare,
        "no_diacritics_ids": tokenizer.encode(bare),
        "train_text": clean,
        "train_ids": tokenizer.encode(clean),
    }


def check_pfer(path: Path) -> list[Comparison]:
    """`pairs` of texts with distances, one comparison for each value, and the `summary` over all."""
    content = json.loads(path.read_text(encoding="utf-8"))
    features, tokenizer = FeatureDistance(), PhoneTokenizer.from_table()
    got = [_pfer_pair(features, tokenizer, pair["hyp"], pair["ref"]) for pair in content["pairs"]]
    results = []
    for number, (values, pair) in enumerate(zip(got, content["pairs"], strict=True)):
        name = f"{number} {pair['hyp']!r} {pair['ref']!r}"
        results += [_value(f"{name}: {key}", values.get(key), want) for key, want in pair.items()]
    summary = _pfer_summary(got)
    return results + [_value(f"summary: {key}", summary.get(key), want) for key, want in content["summary"].items()]


def _pfer_pair(features: FeatureDistance, tokenizer: PhoneTokenizer, hyp: str, ref: str) -> dict[str, Any]:
    tokens = [[tokenizer.pieces[i] for i in tokenizer.encode(text)][1:] for text in (hyp, ref)]
    segments = [features.segments(text.replace("g", "ɡ")) for text in (hyp, ref)]
    return {
        "hyp": hyp,
        "ref": ref,
        "pfer": features.distance(hyp, ref),
        "hyp_tokens": tokens[0],
        "ref_tokens": tokens[1],
        "token_levenshtein": edit_distance(tokens[1], tokens[0]),
        "hyp_segments": segments[0],
        "ref_segments": segments[1],
        "segment_levenshtein": edit_distance(segments[1], segments[0]),
    }


def _pfer_summary(pairs: list[dict[str, Any]]) -> dict[str, float]:
    published = PferSummary.of([pair["pfer"] for pair in pairs]).as_published()
    errors = sum(pair["token_levenshtein"] for pair in pairs)
    summary = {name.lower().replace(" ", "_"): value for name, value in published.items()}
    return {**summary, "token_error_rate": errors / sum(len(pair["ref_tokens"]) for pair in pairs)}


def _value(name: str, got: Any, want: Any, limit: float = 1e-9) -> Comparison:
    """Floating-point numbers within an absolute limit, everything else exact."""
    if not isinstance(want, float) or not isinstance(got, float | int):
        return exact(name, got, want)
    difference = abs(got - want)
    relative = difference / abs(want) if want else difference
    return Comparison(name, difference, relative, difference <= limit, "" if difference <= limit else f"got {got!r}")


def check_tokenizer_folder(path: Path) -> list[Comparison]:
    """The published `.model`, `.vocab` and `tokens.txt` against the tokenizer built from the table here."""
    built = PhoneTokenizer.from_table()
    scores = sentencepiece.SentencePieceProcessor(model_proto=built.proto)
    results = []
    for file in sorted(path.iterdir()):
        if file.suffix == ".model":
            results.append(exact(f"{file.name}: pieces", PhoneTokenizer.from_model(file).pieces, built.pieces))
            continue
        if file.suffix == ".vocab":
            got = [f"{piece}\t{scores.get_score(i):g}" for i, piece in enumerate(built.pieces)]
        elif file.name == "tokens.txt":
            got = [f"{piece} {i}" for i, piece in enumerate(built.pieces)]
        else:
            results.append(exact(f"{file.name}: kind of file", "unknown", "known"))
            continue
        results.append(exact(f"{file.name}: lines", got, file.read_text(encoding="utf-8").splitlines()))
    return results


CHECKERS: dict[str, Checker] = {
    "32": check_greedy,
    "70": check_tokenizer_cases,
    "90": check_pfer,
    "tokenizer": check_tokenizer_folder,
}
