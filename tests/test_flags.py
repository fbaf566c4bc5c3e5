"""Dataclasses to flags and back."""

import argparse
from dataclasses import dataclass, fields
from pathlib import Path

import pytest

from zipformer_crctc import flags
from zipformer_crctc.commandline import InertDecoding, InertTraining, OtherHeads
from zipformer_crctc.config import DataConfig, DecodeConfig, ModelConfig, TrainConfig


@dataclass(frozen=True)
class Example:
    """An example."""

    rate: float = 0.5
    """Half of it,
    100 % sure."""
    sizes: tuple[int, ...] = (1, 2)
    """Sizes in frames."""
    folder: Path | None = None
    """Where."""


def test_help_comes_from_the_text_under_the_field() -> None:
    assert flags.field_docs(Example)["rate"] == "Half of it, 100 % sure."
    parser = argparse.ArgumentParser(prog="x")
    flags.add_flags(parser, Example, "example")
    text = " ".join(parser.format_help().split())
    assert "100 % sure. (default: 0.5)" in text and "Sizes in frames. (default: 1,2)" in text
    assert vars(parser.parse_args([])) == {}


@pytest.mark.parametrize(
    "cls", [ModelConfig, DataConfig, TrainConfig, DecodeConfig, OtherHeads, InertTraining, InertDecoding]
)
def test_every_field_has_a_help_text(cls: type) -> None:
    docs = flags.field_docs(cls)
    assert set(docs) == {field.name for field in fields(cls)}
    assert all(text.endswith(".") for text in docs.values())


@pytest.mark.parametrize("word", ["yes", "TRUE", "t", "Y", "1", "no", "False", "F", "n", "0"])
def test_words_for_booleans(word: str) -> None:
    assert flags.coerce(word, bool) is (word.lower() in ("yes", "true", "t", "y", "1"))


@pytest.mark.parametrize(
    ("value", "kind", "result"),
    [
        ("3, 4,-1", tuple[int, ...], (3, 4, -1)),
        ([3, 4], tuple[int, ...], (3, 4)),
        ("a,b", tuple[str, ...], ("a", "b")),
        ("120", float, 120.0),
        (120, float, 120.0),
        ("exp", Path | None, Path("exp")),
        (None, Path | None, None),
    ],
)
def test_coerce(value: object, kind: object, result: object) -> None:
    converted = flags.coerce(value, kind)
    assert converted == result and type(converted) is type(result)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ("maybe", bool),
        (1, bool),
        ("1.5", int),
        (True, int),
        (1.5, int),
        (True, float),
        ("1,,2", tuple[int, ...]),
        (3, tuple[int, ...]),
        (None, int),
    ],
)
def test_coerce_refuses(value: object, kind: object) -> None:
    with pytest.raises(ValueError, match="expected"):
        flags.coerce(value, kind)


def test_from_plain_names_all_that_is_wrong() -> None:
    problems: list[str] = []
    assert flags.from_plain(Example, {"rate": "x", "sizes": [1], "extra": 1}, "example", problems) is None
    assert len(problems) == 2
    assert "extra" in problems[0] and "example.rate 'x'" in problems[1]
    assert flags.from_plain(Example, flags.to_plain(Example()), "example", []) == Example()
    assert flags.from_plain(Example, {}, "example", []) == Example()  # what is missing was added since
