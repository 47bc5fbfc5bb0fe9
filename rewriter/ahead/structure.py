"""Structures of Python values as JSON: what a loss takes, and what it returns.

A structure is ``{"list": [...]}``, ``{"tuple": [...]}``, ``{"dict": [[key, item], ...]}``,
``{"namedtuple": name, "fields": [...], "items": [...]}``, ``{"object": name, "attributes": {...}}``
(a dataclass), ``{"value": plain}``, ``{"opaque": type}``, or a leaf: ``{"tensor": i}``,
``{"module": root}``, ``{"output": i}``, ``{"leaf": i}``, ``{"input": i}``.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rewriter.errors import ArtifactError

MAX_DEPTH = 50
Leaf = Callable[[str, Any], "dict[str, Any] | None"]


def describe(path: str, value: Any, leaf: Leaf, *, objects: bool = True) -> dict[str, Any]:
    """Return the structure of a value.

    Args:
        path: What it is called; items are ``path.0``, ``path.key``.
        value: The value.
        leaf: Returns what a value is described as, None if it is no leaf.
        objects: Whether to look into dataclasses; otherwise they are opaque.
    """

    def item(name: Any, value: Any) -> dict[str, Any]:
        return describe(f"{path}.{name}", value, leaf, objects=objects)

    found = leaf(path, value)
    if found is not None:
        return found
    if is_plain(value):
        return {"value": _as_json(value)}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = list(value._fields)  # pyright: ignore[reportAttributeAccessIssue]
        items = [item(name, x) for name, x in zip(fields, value, strict=True)]
        return {"namedtuple": type(value).__name__, "fields": fields, "items": items}
    if type(value) in (list, tuple):
        return {type(value).__name__: [item(i, x) for i, x in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, (str, int)) for key in value):
        return {"dict": [[key, item(key, x)] for key, x in value.items()]}
    if objects and dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        attributes = {name: item(name, getattr(value, name)) for name in names}
        return {"object": type(value).__name__, "attributes": attributes}
    return {"opaque": type(value).__name__}


def replaced(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """Return a value with ``leaf`` applied to everything in it that is no container."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replaced(x, leaf) for x in value))
    if type(value) in (list, tuple):
        return type(value)(replaced(x, leaf) for x in value)
    if isinstance(value, dict):
        own = copy.copy(value)
        for key, item in value.items():
            own[key] = replaced(item, leaf)
        return own
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(own, field.name, replaced(getattr(value, field.name), leaf))
        return own
    return leaf(value)


def rebuild(tree: Any, leaf: Callable[[str, int], Any]) -> Any:
    """Return a value of a structure.

    Args:
        tree: The structure.
        leaf: Returns the value of a leaf from its kind and number.

    Raises:
        ArtifactError: It is no structure of a result.
    """
    return _rebuilt(tree, leaf, 0)


def _rebuilt(tree: Any, leaf: Callable[[str, int], Any], depth: int) -> Any:
    if depth > MAX_DEPTH or not isinstance(tree, dict):
        raise ArtifactError("the result has a structure that no loss returns")
    if tree.keys() == {"value"}:
        return _from_json(tree["value"])
    if tree.keys() == {"dict"}:
        return {key: _rebuilt(x, leaf, depth + 1) for key, x in _pairs(tree["dict"])}
    if tree.keys() == {"namedtuple", "fields", "items"}:
        items = [_rebuilt(x, leaf, depth + 1) for x in _listed(tree["items"])]
        kind = namedtuple(tree["namedtuple"], tree["fields"])  # pyright: ignore
        return kind(*items)
    if len(tree) == 1:
        ((kind, inner),) = tree.items()
        if kind in ("list", "tuple"):
            items = [_rebuilt(x, leaf, depth + 1) for x in _listed(inner)]
            return items if kind == "list" else tuple(items)
        if kind in ("output", "leaf", "input") and type(inner) is int:
            return leaf(kind, inner)
    raise ArtifactError("the result has a structure that no loss returns")


def match(tree: Any, value: Any, path: str, leaf: Callable[[str, Any, str], None]) -> None:
    """Check that a value is what a structure says.

    Args:
        tree: The structure.
        value: The value.
        path: What it is called, for errors.
        leaf: Called with a leaf's kind and number, the value there, and its path.

    Raises:
        TypeError: It has another structure; says what was expected and what came.
        ValueError: A plain value differs from the one that was burned in.
    """
    for kind in ("tensor", "module"):
        if kind in tree:
            return leaf(f"{kind} {tree[kind]}", value, path)
    if "value" in tree:
        return _match_plain(_from_json(tree["value"]), value, path)
    if "opaque" in tree:
        return None
    for name, item, part in _parts(tree, value, path):
        match(part, item, name, leaf)
    return None


def _match_plain(expected: Any, value: Any, path: str) -> None:
    same = type(value) is type(expected) and (value == expected or value != value != expected)
    if not same:
        raise ValueError(
            f"{path}: compiled for {expected!r}, got {value!r}; compile for that value too, or "
            "make it a tensor argument of the loss"
        )


def _parts(tree: Any, value: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if "dict" in tree:
        pairs = _pairs(tree["dict"])
        keys = [key for key, _ in pairs]
        if not isinstance(value, Mapping) or set(value) != set(keys):
            raise TypeError(f"{path}: expected a dict with keys {keys}, got {_shown(value)}")
        for key, part in pairs:
            yield f"{path}.{key}", value[key], part
    elif "object" in tree:
        for name, part in tree["attributes"].items():
            if not hasattr(value, name):
                raise TypeError(
                    f"{path}: expected an object with attributes {list(tree['attributes'])}, such "
                    f"as a {tree['object']}, got {_shown(value)}"
                )
            yield f"{path}.{name}", getattr(value, name), part
    else:
        kind = next(iter(tree))
        parts = _listed(tree.get("items", tree[kind]))
        expected = tuple if kind == "namedtuple" else {"list": list, "tuple": tuple}[kind]
        if not isinstance(value, expected) or len(value) != len(parts):
            raise TypeError(
                f"{path}: expected a {expected.__name__} of {len(parts)}, got {_shown(value)}"
            )
        names = tree.get("fields", range(len(parts)))
        for name, item, part in zip(names, value, parts, strict=True):
            yield f"{path}.{name}", item, part


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with keys {list(value)}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


def leaves_in(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a structure is made of: ``("tensor", 0)``, ``("value", 3)``."""
    if "dict" in tree:
        for _, item in _pairs(tree["dict"]):
            yield from leaves_in(item)
    elif "object" in tree:
        for item in tree["attributes"].values():
            yield from leaves_in(item)
    elif "items" in tree or "list" in tree or "tuple" in tree:
        for item in _listed(next(tree[k] for k in ("items", "list", "tuple") if k in tree)):
            yield from leaves_in(item)
    else:
        yield next(iter(tree.items()))


def is_plain(value: Any) -> bool:
    """Whether a value has a form in JSON of its own."""
    return value is None or type(value) in (bool, int, float, str)


def _as_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() != {"float"} or value["float"] not in ("inf", "-inf", "nan"):
            raise ArtifactError("a value that is no number")
        return float(value["float"])
    if not is_plain(value):
        raise ArtifactError("a value that is not plain")
    return value


def _listed(items: Any) -> list[Any]:
    if not isinstance(items, list):
        raise ArtifactError("a structure whose items are no list")
    return items


def _pairs(items: Any) -> list[Any]:
    for pair in _listed(items):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], (str, int)):
            raise ArtifactError("a dict whose items are no pairs")
    return items
