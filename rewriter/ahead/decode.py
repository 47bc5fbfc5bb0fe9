"""JSON to frozen records and back, by the records' own type hints."""

from __future__ import annotations

import functools
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar, Union

from rewriter.errors import ArtifactError

T = TypeVar("T")
MAX_ITEMS = 1_000_000


def encode(record: Any) -> Any:
    """Return the JSON form of a record: objects, lists, and plain values."""
    if is_dataclass(record):
        return {f.name: encode(getattr(record, f.name)) for f in fields(record)}
    if isinstance(record, Mapping):
        return {key: encode(item) for key, item in record.items()}
    if isinstance(record, (tuple, list)):
        return [encode(item) for item in record]
    return record


def decode(kind: type[T], data: Any, where: str) -> T:
    """Build a record from JSON, every field of the type that its hint says.

    Args:
        kind: A dataclass.
        data: What JSON holds.
        where: What it is, for errors.

    Raises:
        ArtifactError: A field is missing, unknown, or of another type; names it.
    """
    if not isinstance(data, dict):
        raise ArtifactError(f"{where}: expected an object, got {type(data).__name__}")
    hints = _hints(kind)
    for name in data:
        if name not in hints:
            raise ArtifactError(f"{where}: unknown field {name!r}")
    for name in hints:
        if name not in data:
            raise ArtifactError(f"{where}: the field {name!r} is missing")
    return kind(**{n: _value(hint, data[n], f"{where}.{n}") for n, hint in hints.items()})


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _value(hint: Any, data: Any, where: str) -> Any:
    if hint is Any:
        return data
    if is_dataclass(hint):
        return decode(typing.cast("type", hint), data, where)
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return None if data is None else _value(inner[0], data, where)
    if origin is tuple:
        _require(isinstance(data, list), where, "a list", data)
        _require(len(data) <= MAX_ITEMS, where, f"at most {MAX_ITEMS} items", data)
        return tuple(_value(inner[0], x, f"{where}[{i}]") for i, x in enumerate(data))
    if origin is dict:
        _require(isinstance(data, dict), where, "an object", data)
        return {key: _value(inner[1], x, f"{where}[{key!r}]") for key, x in data.items()}
    # bool is an int in Python, and not in JSON.
    _require(type(data) is hint, where, hint.__name__, data)
    return data


def _require(holds: bool, where: str, expected: str, data: Any) -> None:
    if not holds:
        raise ArtifactError(f"{where}: expected {expected}, got {type(data).__name__}")
