"""All that a loss can reach: tensors, modules, caches, counters."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def reachable(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield tensors and plain values that objects lead to, each once, with its path.

    Args:
        root: A function, with what it closes over, an argument, or a container of such.
    """
    yield from _walk("", root, set())


def _walk(path: str, item: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if item is None or isinstance(item, (bool, int, float, str, torch.Size, torch.dtype)):
        yield path, item
        return
    if id(item) in seen or isinstance(item, (type, types.ModuleType)):
        return
    seen.add(id(item))
    if isinstance(item, Tensor):
        yield path, item
    for name, part in _parts(item):
        yield from _walk(f"{path}.{name}", part, seen)


def _parts(item: Any) -> Iterator[tuple[str, Any]]:
    """Yield what an object holds, by name; entries of a dict by position, as keys may be objects
    and addresses."""
    if isinstance(item, dict):
        for i, (key, value) in enumerate(list(item.items())):
            yield (key if isinstance(key, str) else f"key {i}"), value
    elif isinstance(item, (list, tuple)):
        yield from ((str(i), part) for i, part in enumerate(item))
    elif isinstance(item, types.MethodType):
        yield "self", item.__self__
    elif isinstance(item, types.FunctionType):
        names = item.__code__.co_freevars
        for name, cell in zip(names, item.__closure__ or (), strict=True):
            yield name, cell.cell_contents
    elif isinstance(item, nn.Module):
        for name, part in vars(item).items():
            if not (name.startswith("_") and "hook" in name):
                yield name, part
    elif not isinstance(item, Tensor):
        yield from list(getattr(item, "__dict__", {}).items())
