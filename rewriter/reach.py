"""What a call of a loss can read: its arguments, what it closes over, globals, and all that hangs
on them."""

from __future__ import annotations

import enum
import functools
import inspect
import sys
import sysconfig
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

MAX_ARRAY = 2**20  # elements of an array that is compared by value
_DEPTH = 6  # of objects in objects, modules not counted

_PLAIN = (
    int, float, complex, bool, str, bytes, type(None), range, slice, torch.dtype, torch.device,
    torch.Size,
)  # fmt: skip
_LIBRARIES = tuple({sysconfig.get_path(n) for n in ("stdlib", "purelib", "platlib")})


_OWN = __name__.partition(".")[0]
EVERY_NAME = "*"  # among names: code asks for attributes by names that it computes


class Kind(tuple[Any, ...]):
    """What a recording holds for, of a tensor or of an object with parts.

    Attributes:
        id: Which tensor or object it is the kind of.
        free: Dimensions of the tensor whose sizes do not count.
    """

    id: int = 0
    free: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Global:
    """A global variable.

    Attributes:
        path: What to call it.
        values: The globals of its module.
        name: Its name there.
    """

    path: str
    values: dict[str, Any]
    name: str

    @property
    def value(self) -> Any:
        """What it is now."""
        return self.values[self.name]


def arguments(function: Callable[..., Any], args: Any, kwargs: Any) -> dict[str, Any]:
    """Return what a call is given, by name, without ``self`` and modules: its data."""
    found: dict[str, Any] = {}
    for name, value in called_with(function, args, kwargs):
        if name != "self":
            _walk(name, value, None, found, set(), _DEPTH, modules=False)
    return found


def reached(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    names: set[str],
    others: Sequence[Global] = (),
) -> dict[str, Any]:
    """Return what a call can read, by path: tensors, plain values, and the kinds of what holds
    them.

    Args:
        function: The loss.
        args: Its arguments.
        kwargs: Its keyword arguments.
        names: Attributes and globals that the code mentions; others are left out.
        others: Globals of libraries that it reads, too.
    """
    values = [*called_with(function, args, kwargs), *roots_of(function)]
    values += [(other.path, other.value) for other in others if other.name in other.values]
    return reached_from(values, names)


def reached_from(values: Iterable[tuple[str, Any]], names: set[str]) -> dict[str, Any]:
    """Return what can be read from values, by path."""
    found: dict[str, Any] = {}
    for name, value in values:
        _walk(name, value, names, found, set(), _DEPTH)
    return found


def roots_of(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """Return what a function can read beside its arguments."""
    inner = inspect.unwrap(function)
    if isinstance(inner, types.FunctionType):
        return list(_outer(inner))
    return [("self", inner)]


def called_with(function: Callable[..., Any], args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    """Yield the arguments of a call by name, defaults too."""
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    for name, value in bound.arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            yield from value.items()
        else:
            yield name, value


def _walk(
    path: str,
    value: Any,
    names: set[str] | None,
    found: dict[str, Any],
    above: set[int],
    depth: int,
    *,
    modules: bool = True,
) -> None:
    if path in found or (isinstance(value, nn.Module) and not modules):
        return
    if isinstance(value, (Tensor, *_PLAIN)):
        found[path] = value
        return
    parts = parts_of(value, names)
    if isinstance(value, types.FunctionType):
        found[path] = value.__code__
    elif parts is None:
        found[path] = value
    else:
        found[path] = Kind((type(value),))
        found[path].id = id(value)
    if parts is None or id(value) in above or not depth:
        return
    above = above | {id(value)}
    less = depth if isinstance(value, nn.Module) else depth - 1
    for name, item in parts:
        _walk(f"{path}.{name}", item, names, found, above, less, modules=modules)


def parts_of(value: Any, names: set[str] | None) -> list[tuple[str, Any]] | None:
    """Return what hangs on a value, by name; None if nothing that is known of it does."""
    if isinstance(value, dict):
        return [(k if isinstance(k, str) else f"[{k!r}]", item) for k, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(value, (list, tuple, deque)):
        return [(str(index), item) for index, item in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return [(repr(item), item) for item in value]
    if isinstance(value, types.MethodType):
        return [("__self__", value.__self__), ("__func__", value.__func__)]
    if isinstance(value, types.FunctionType):
        return list(_outer(value)) if _is_own(value) else None
    if isinstance(value, types.ModuleType):
        return mentioned_of(vars(value), names) if _is_own(value) else None
    if isinstance(value, type):
        return mentioned_of(vars(value), names) if _is_own(value) else None
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, (numpy.ndarray, numpy.generic, torch.Generator, enum.Enum)):
        return None
    if type(value).__module__.partition(".")[0] == _OWN and hasattr(value, "as_written"):
        return [("as_written", value.as_written)]  # decorated: what was built for it is no input
    of_class = [part for kind in type(value).__mro__ for part in parts_of_class(kind, names)]
    if isinstance(value, nn.Module):
        held = [value._parameters, value._buffers, value._modules]
        own = {n: v for n, v in vars(value).items() if n not in _HELD}
        of_module = [("training", value.training), *(p for h in held for p in h.items())]
        return [*of_module, *mentioned_of(own, names), *of_class]
    own = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if isinstance(name, str) and hasattr(value, name):
                own[name] = getattr(value, name)
    found = [*mentioned_of(own, names), *of_class]
    return found if own or of_class else None


def parts_of_class(kind: type, names: set[str] | None) -> list[tuple[str, Any]]:
    """Return what a class of the user's gives to its objects, of what code mentions."""
    return mentioned_of(_functions(kind), names) if _is_own(kind) else []


_HELD = {"_parameters", "_buffers", "_modules", "training"}


def mentioned_of(values: Any, names: set[str] | None) -> list[tuple[str, Any]]:
    """Return those of some named values that code mentions."""
    every = names is None or EVERY_NAME in names
    return [(n, v) for n, v in values.items() if every or n in names]


def _functions(kind: type) -> dict[str, Any]:
    """Return what a class gives to its instances, methods as plain functions."""
    found = {}
    for name, value in vars(kind).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, property):
            value = value.fget
        if not name.startswith("__") or isinstance(value, types.FunctionType):
            found[name] = value
    return found


def _is_own(value: Any) -> bool:
    """Whether a function, class or module is part of the user's program, not of a library."""
    if isinstance(value, types.FunctionType):
        path = value.__code__.co_filename
    else:
        name = value.__module__ if isinstance(value, type) else value.__name__
        module = value if isinstance(value, types.ModuleType) else _loaded(name)
        path = getattr(module, "__file__", None) or ("" if name == "__main__" else _LIBRARIES[0])
    return not path.startswith(_LIBRARIES)


def _loaded(name: str) -> Any:
    return sys.modules.get(name)


def _outer(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield what a function closes over, the globals that it mentions, and its defaults."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # not assigned yet
    mentioned = names_in(function.__code__)
    yield from ((n, function.__globals__[n]) for n in mentioned if n in function.__globals__)
    for position, value in enumerate(function.__defaults__ or ()):
        yield f"default {position}", value
    yield from (function.__kwdefaults__ or {}).items()


def names_in(code: types.CodeType) -> list[str]:
    """Return the names of attributes and globals that code, or a function written inside of it,
    mentions; each once."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return list(dict.fromkeys([*code.co_names, *(n for c in inner for n in names_in(c))]))


def kind_of(value: Any, free: tuple[int, ...] = ()) -> Any:
    """Return what a recording holds for: of a tensor all but its values, and but its sizes in the
    dimensions ``free`` if there are some."""
    if isinstance(value, numpy.ndarray) and value.size <= MAX_ARRAY and value.dtype != object:
        return value.copy()
    if not isinstance(value, Tensor):
        return value
    shape: tuple[Any, ...] = tuple(value.shape)
    strides: Any = value.stride() if value.layout is torch.strided else None
    if free and value.layout is torch.strided:
        shape = tuple(None if dim in free else size for dim, size in enumerate(shape))
        strides = value.is_contiguous()
    kind = (shape, value.dtype, value.device, strides, value.requires_grad, value.layout)
    found = Kind((type(value), *kind))
    found.free = free
    return found


def is_same(now: Any, then: Any) -> bool:
    """Whether what stands at a path is of the kind that stood there."""
    if isinstance(now, Tensor):
        return is_same(kind_of(now, then.free if isinstance(then, Kind) else ()), then)
    if type(now) is not type(then):
        return False
    if isinstance(now, numpy.ndarray):
        alike = now.shape == then.shape and now.dtype == then.dtype
        return alike and now.tobytes() == then.tobytes()
    if isinstance(now, float):
        return now == then or (now != now and then != then)
    return now is then or (isinstance(now, (*_PLAIN, Kind, types.CodeType)) and now == then)


def aliases(found: dict[str, Any]) -> dict[str, str]:
    """Return, for each path of a tensor or an object, the first path of the same one."""
    first: dict[int, str] = {}
    return {
        path: first.setdefault(id(x) if isinstance(x, Tensor) else x.id, path)
        for path, x in found.items()
        if isinstance(x, (Tensor, Kind))
    }


def asks_for_any_name(code: types.CodeType) -> bool:
    """Whether code of the user's program can read attributes that it does not mention by name."""
    asks = {"getattr", "vars", "__dict__", "__getattribute__", "locals", "globals", "eval", "exec"}
    return not code.co_filename.startswith(_LIBRARIES) and not asks.isdisjoint(code.co_names)
