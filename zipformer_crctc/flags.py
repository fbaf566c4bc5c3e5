"""A command line made from frozen dataclasses: one flag per field, its help the docstring under the field.

Field types: bool, int, float, str, Path, ``tuple[int, ...]`` and ``tuple[str, ...]`` (comma lists), each also with
``| None``. Only the flags that were given are returned, so that explicit flags can win over presets and checkpoints.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

TRUE_WORDS = frozenset({"yes", "true", "t", "y", "1"})
FALSE_WORDS = frozenset({"no", "false", "f", "n", "0"})
# The published programs spell these two with an underscore.
UNDERSCORED = frozenset({"wandb_project", "wandb_run"})
EXPECTED = {bool: "True or False", int: "a whole number", float: "a number", str: "a text", Path: "a path"}


class ConfigError(ValueError):
    """Everything that is wrong with a configuration, in one message; ``problems`` holds a sentence for each."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        count = f"{len(self.problems)} problem" + ("s" if len(self.problems) > 1 else "")
        super().__init__("\n  ".join([f"{count} in the configuration:", *self.problems]))


def raise_if_any(problems: Iterable[str]) -> None:
    """Raise one ConfigError with all problems, or return when there is none."""
    if problems := tuple(problems):
        raise ConfigError(problems)


def flag_name(field: str) -> str:
    """The flag of a field: ``base_lr`` is ``--base-lr``."""
    return "--" + (field if field in UNDERSCORED else field.replace("_", "-"))


def format_value(value: Any) -> str:
    """A value as one would give it on the command line."""
    if isinstance(value, tuple | list):
        return ",".join(str(item) for item in value)
    return str(value)


@functools.cache
def field_docs(cls: type) -> dict[str, str]:
    """Docstrings under the fields of a dataclass and its bases, by field name, white space collapsed."""
    docs = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            docs.update(_own_field_docs(base))
    return docs


def _own_field_docs(cls: type) -> dict[str, str]:
    (node,) = ast.parse(inspect.cleandoc(inspect.getsource(cls))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_doc = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            docs[field.target.id] = " ".join(str(text.value.value).split()) if is_doc else ""  # type: ignore[attr-defined]
    return docs


def field_kinds(cls: type) -> dict[str, Any]:
    """Resolved types of the fields of a dataclass."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def coerce(value: Any, kind: Any) -> Any:
    """``value`` (text from a command line or plain data from JSON or a checkpoint) as ``kind``.

    Raises ValueError that says what was expected.
    """
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        (kind,) = (option for option in typing.get_args(kind) if option is not type(None))
        return None if value is None else coerce(value, kind)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        items = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(items, list | tuple) or "" in items:
            raise ValueError(f"expected a comma list, each item {EXPECTED[item]}")
        return tuple(coerce(part, item) for part in items)
    if kind is bool and isinstance(value, str) and value.lower() in TRUE_WORDS | FALSE_WORDS:
        return value.lower() in TRUE_WORDS
    text_fits = isinstance(value, str) and kind is not bool
    number_fits = kind is float and isinstance(value, int) and not isinstance(value, bool)
    if text_fits or number_fits:
        try:
            return kind(value)
        except ValueError:
            pass
    elif isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"expected {EXPECTED[kind]}")


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str, only: Collection[str] | None = None) -> None:
    """Add one flag per field of ``cls``, or of ``only``; a flag that is not given leaves no attribute behind."""
    group = parser.add_argument_group(title)
    for field in dataclasses.fields(cls):
        if only is not None and field.name not in only:
            continue
        default = "" if field.default is None else f" (default: {format_value(field.default)})"
        text = field_docs(cls)[field.name] + default
        group.add_argument(
            flag_name(field.name),
            dest=field.name,
            default=argparse.SUPPRESS,
            metavar=field.name.upper(),
            help=text.replace("%", "%%"),
        )


def read_flags(given: Mapping[str, str], cls: type, problems: list[str]) -> dict[str, Any]:
    """The fields of ``cls`` among the flags given, converted; what cannot be converted is added to ``problems``."""
    values = {}
    for name, kind in field_kinds(cls).items():
        if name in given:
            try:
                values[name] = coerce(given[name], kind)
            except ValueError as error:
                problems.append(f"{flag_name(name)} {given[name]}: {error}.")
    return values


def to_plain(config: Any) -> dict[str, Any]:
    """A dataclass, nested ones included, as plain data that JSON and safe checkpoint loading take."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    plain_config: dict[str, Any] = plain(config)
    return plain_config


def from_plain(cls: type, data: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """The inverse of ``to_plain`` for a flat dataclass; None, with ``problems`` extended, where it cannot be."""
    kinds = field_kinds(cls)
    before = len(problems)
    if unknown := sorted(set(data) - set(kinds)):
        problems.append(f"{where}: unknown fields {', '.join(unknown)}; another version of this project wrote it.")
    values = {}
    for name, kind in kinds.items():
        if name in data:
            try:
                values[name] = coerce(data[name], kind)
            except ValueError as error:
                problems.append(f"{where}.{name} {data[name]!r}: {error}.")
    return cls(**values) if len(problems) == before else None
