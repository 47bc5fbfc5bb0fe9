"""Find what a call can reach: through helpers that read globals, partials, callable objects, bound
methods, slots.

`rewriter.naming` looks at arguments and at what the loss itself names; here is everything behind
that, so that no parameter goes without a name.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.reach import names_in

MOST_OBJECTS = 20_000
_PLAIN = (str, bytes, bytearray, int, float, complex, torch.dtype, torch.device, type(None))
_REGISTERED = {"_parameters", "_buffers", "_modules"}
_TORCH, _STANDARD = os.path.dirname(torch.__file__), sysconfig.get_path("stdlib")


def reached(roots: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Tensor | nn.Module]]:
    """Yield the tensors and modules that can be reached from values, with their paths, near ones
    first; what a module has registered is left to the module.

    Args:
        roots: Values by name.
    """
    waiting, seen = deque(roots), set()
    kept = []  # alive, so that no other object gets its identity
    while waiting and len(seen) < MOST_OBJECTS:
        path, value = waiting.popleft()
        if isinstance(value, _PLAIN) or id(value) in seen:
            continue
        seen.add(id(value))
        kept.append(value)
        if isinstance(value, (Tensor, nn.Module)):
            yield path, value
        if not isinstance(value, Tensor):
            waiting.extend((f"{path}.{name}", item) for name, item in held_by(value))


def held_by(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a value holds, by name."""
    if isinstance(value, nn.Module):
        yield from _unregistered(value)
    elif isinstance(value, dict):
        yield from ((str(key), item) for key, item in list(value.items()))
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        yield from ((str(i), item) for i, item in enumerate(islice(value, MOST_OBJECTS)))
    elif isinstance(value, functools.partial):
        yield from _held_by_partial(value)
    elif isinstance(value, types.MethodType):
        yield "self", value.__self__
        yield value.__name__, value.__func__
    elif isinstance(value, types.FunctionType):
        yield from _read_by(value)
    elif isinstance(value, (staticmethod, classmethod)):
        yield "function", value.__func__
    elif isinstance(value, type):
        if _is_users_class(value):
            yield from ((k, v) for k, v in vars(value).items() if not k.startswith("__"))
            yield "call", vars(value).get("__call__")
    elif "as_written" in getattr(value, "__dict__", {}):
        yield "as_written", value.as_written  # a decorated function; the rest is ours
    elif not isinstance(value, (types.ModuleType, types.BuiltinFunctionType)):
        yield from _attributes(value)


def _unregistered(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield what a module and those inside it hold without having registered it."""
    for path, inner in module.named_modules():
        if not type(inner).__module__.startswith("torch.nn."):
            start = f"{path}." if path else ""
            yield from ((start + k, v) for k, v in vars(inner).items() if k not in _REGISTERED)
            yield f"{start}class", type(inner)


def _held_by_partial(value: functools.partial[Any]) -> Iterator[tuple[str, Any]]:
    names = _parameters(value.func)
    yield from ((names.get(i, str(i)), item) for i, item in enumerate(value.args))
    yield from value.keywords.items()
    yield getattr(value.func, "__name__", "func"), value.func


def _parameters(function: Callable[..., Any]) -> dict[int, str]:
    try:
        return dict(enumerate(inspect.signature(function).parameters))
    except (TypeError, ValueError):  # a builtin
        return {}


def _attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of a plain object, slots too, and what its class has for all."""
    yield from list(getattr(value, "__dict__", {}).items())
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            name = f"_{kind.__name__.lstrip('_')}{name}" if _is_mangled(name) else name
            if hasattr(value, name):
                yield name, getattr(value, name)
    yield "class", type(value)


def _is_mangled(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def _read_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function closes over, its defaults, and the globals that it or functions written
    inside of it name; of Python modules, what of them is named."""
    yield from vars(function).items()  # what it wraps, too
    code = function.__code__
    if not _is_users(code.co_filename):
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield from _contents(name, cell)
    defaults = function.__defaults__ or ()
    own = code.co_varnames[: code.co_argcount]
    # Python itself does not mind more defaults than there are arguments; they belong to the last.
    yield from zip(reversed(own), reversed(defaults), strict=False)
    yield from (function.__kwdefaults__ or {}).items()
    names = names_in(code)
    for name in names:
        value = function.__globals__.get(name)
        if not isinstance(value, types.ModuleType):
            yield name, value
        elif _is_users(getattr(value, "__file__", None)):
            yield from ((f"{name}.{n}", vars(value)[n]) for n in names if n in vars(value))


def _contents(name: str, cell: types.CellType) -> Iterator[tuple[str, Any]]:
    try:
        yield name, cell.cell_contents
    except ValueError:  # not assigned yet
        return


def _is_users(path: str | None) -> bool:
    """Whether a file is neither PyTorch's nor Python's own: what is in it may name a network."""
    if path is None or path.startswith(_TORCH):
        return False
    return "site-packages" in path or not path.startswith(_STANDARD)


def _is_users_class(cls: type) -> bool:
    package = cls.__module__.partition(".")[0]
    return package != "torch" and package not in sys.stdlib_module_names
