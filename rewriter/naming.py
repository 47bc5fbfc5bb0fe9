"""Names for the tensors a loss reads."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rewriter.holders import held_by, reached


def named_values(function: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a call by name, then what the function closes over and the globals it
    reads."""
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function in C that does not say
        yield from ((f"argument {i}", value) for i, value in enumerate(args))
        yield from kwargs.items()
        return
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value
    inner = inspect.unwrap(function)
    if inspect.ismethod(inner):
        yield "self", inner.__self__
    if inspect.isfunction(inner) or inspect.ismethod(inner):
        outer = inspect.getclosurevars(inner)
        yield from outer.nonlocals.items()
        yield from outer.globals.items()


def named_tensors(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Return parameters and tensors by name: ``model.0.weight``, ``x``, ``batch.points``,
    ``pair.0``; each tensor once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in named_values(function, args, kwargs):
        for path, tensor in _tensors_in(name, value, depth=4):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[path] = tensor
    return found


def named_leaves(
    function: Callable[..., Any], args: Any, kwargs: Any, leaves: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return tensors by name that `named_tensors` does not know: by the shortest path that leads to
    them from the call, ``helper.net.0.weight``; without one ``leaf.0``."""
    missing = {id(leaf): leaf for leaf in leaves}
    found: dict[str, Tensor] = {}
    for path, value in reached(_roots(function, args, kwargs)) if missing else ():
        for name, tensor in _tensors_in(path, value, depth=0):
            if missing.pop(id(tensor), None) is not None:
                found[name] = tensor
        if not missing:
            break
    return found | {f"leaf.{i}": leaf for i, leaf in enumerate(missing.values())}


def modules_in(function: Callable[..., Any], args: Any, kwargs: Any) -> list[torch.nn.Module]:
    """Return the modules a call can reach."""
    found = reached(_roots(function, args, kwargs))
    return [value for _, value in found if isinstance(value, torch.nn.Module)]


def _roots(function: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    yield from named_values(function, args, kwargs)
    inner = inspect.unwrap(function)
    if isinstance(inner, (types.FunctionType, types.MethodType, functools.partial)):
        yield from held_by(inner)
    else:
        yield "self", inner


def module_paths(
    function: Callable[..., Any], args: Any, kwargs: Any
) -> dict[torch.nn.Module, str]:
    """Return the modules a call reads, and those inside them, by path: ``model.0``,
    ``self.net.1``."""
    paths: dict[torch.nn.Module, str] = {}
    for name, value in named_values(function, args, kwargs):
        for path, module in _modules(name, value, depth=4):
            for inner, part in module.named_modules(prefix=path):
                paths.setdefault(part, inner)
    return paths


def top_modules(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, torch.nn.Module]:
    """Return the modules a call reads by name, ``model`` or ``self.net``; each once, and none for
    being inside another."""
    found: dict[str, torch.nn.Module] = {}
    for name, value in named_values(function, args, kwargs):
        for path, module in _modules(name, value, depth=4):
            if all(module is not other for other in found.values()):
                found.setdefault(path, module)
    return found


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((str(key), item) for key, item in value.items())
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(value, (list, tuple)):
        yield from ((str(index), item) for index, item in enumerate(value))
    elif not isinstance(value, (type, torch.nn.Module)) and not inspect.ismodule(value):
        # A plain object: its attributes (dataclasses, `self` of a decorated method).
        yield from getattr(value, "__dict__", {}).items()


def _tensors_in(path: str, value: Any, depth: int) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, torch.nn.Module):
        for name, parameter in value.named_parameters():
            yield f"{path}.{name}", parameter
    elif depth and not callable(value):
        for name, item in _children(value):
            yield from _tensors_in(f"{path}.{name}", item, depth - 1)


def _modules(path: str, value: Any, depth: int) -> Iterator[tuple[str, torch.nn.Module]]:
    if isinstance(value, torch.nn.Module):
        yield path, value
    elif depth and not callable(value) and not isinstance(value, Tensor):
        for name, item in _children(value):
            yield from _modules(f"{path}.{name}", item, depth - 1)
