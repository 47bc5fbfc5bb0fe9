"""What a call can change beside tensors: lists, dictionaries, attributes, closures, globals.

Everything that can be reached is taken down before a call, one level at a time: the items of a
list, the attributes of an object, each by identity. What is another one afterwards was changed.
"""

from __future__ import annotations

import functools
import gc
import inspect
import io
import types
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

import numpy
import torch
from torch import Tensor

from rewriter.programs import LIBRARY, USER, is_of_users, owner_of
from rewriter.reach import called_with, names_in

MOST_OBJECTS = 100_000
MAX_BYTES = 2**26  # of an array that is kept; of a larger one, only a sum is
_PLAIN = (
    str, bytes, int, float, complex, type(None), range, slice, torch.dtype, torch.device,
    torch.Size, Tensor, CodeType, types.BuiltinFunctionType, types.FrameType, property,
)  # fmt: skip
_SKIPPED = ("__dict__", "__weakref__", "__doc__", "__module__", "__annotations__")


class HostState:
    """The state that a function can reach, as it was when this was made.

    Args:
        function: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.

    Attributes:
        is_too_large: Whether there is more than can be compared.
    """

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        self.is_too_large = False
        self._iterators: dict[str, str] = {}  # path → name
        self._names: set[str] = set()
        self._kept: dict[int, tuple[str, Any, Any]] = {}  # id → path, the object, what it held
        self._codes: set[CodeType] = set()
        self._before: frozenset[int] = frozenset(map(id, gc.get_objects()))
        self._walk([(name, value) for name, value in called_with(function, args, kwargs)])
        self._walk([("", inspect.unwrap(function))])

    def was_there(self, value: Any) -> bool:
        """Whether an object was there before."""
        return id(value) in self._before

    def see(self, frame: FrameType) -> None:
        """Take down what a function that is about to run can reach, too."""
        owner = owner_of(frame.f_code.co_filename)
        if frame.f_code in self._codes or owner not in (USER, LIBRARY):
            return
        self._codes.add(frame.f_code)
        own = [(n, v) for n, v in frame.f_locals.items() if self.was_there(v)]
        self._walk(own)
        self._walk_globals(frame.f_globals, frame.f_code, is_whole=owner == USER)

    def changes(self) -> list[str]:
        """Return what holds something else now, by path."""
        return [
            path
            for path, value, held in self._kept.values()
            if not _is_same(held, _held_by(value, held))
        ]

    def moving(self) -> str:
        """Return the path of an iterator, or of an open file, that code mentions: where it stands
        cannot be put back, and not be compared; nothing if there is none."""
        return next((p for p, name in self._iterators.items() if name in self._names), "")

    def restore(self) -> None:
        """Put back what was changed."""
        for _, value, held in self._kept.values():
            if not _is_same(held, _held_by(value, held)):
                _put_back(value, held)

    def _walk(self, waiting: list[tuple[str, Any]]) -> None:
        queue = deque(waiting)
        while queue:
            path, value = queue.popleft()
            if isinstance(value, _PLAIN) or id(value) in self._kept or _is_inner(value):
                continue
            if len(self._kept) >= MOST_OBJECTS:
                self.is_too_large = True
                return
            self._kept[id(value)] = path, value, _held_by(value)
            if isinstance(value, _MOVING) or _is_iterator(value):
                self._iterators.setdefault(path, path.rpartition(".")[2])
            queue.extend((f"{path}.{n}" if path else n, v) for n, v in _parts(value))
            if isinstance(value, types.FunctionType) and is_of_users(value):
                queue.extend(self._globals(value.__globals__, value.__code__))

    def _walk_globals(self, values: dict[str, Any], code: CodeType, *, is_whole: bool) -> None:
        found = self._globals(values, code)
        callables = (type, types.FunctionType)
        self._walk([(n, v) for n, v in found if is_whole or not isinstance(v, callables)])

    def _globals(self, values: dict[str, Any], code: CodeType) -> list[tuple[str, Any]]:
        """Take down which globals code mentions; return them, and what it mentions of the user's
        modules."""
        names = names_in(code)
        self._names.update(names, code.co_varnames, code.co_freevars)
        mentioned = {n: values[n] for n in names if n in values}
        cells = _Globals(values, tuple(mentioned))
        self._kept[id(cells)] = "a global", cells, cells.held()
        found = list(mentioned.items())
        for module in mentioned.values():
            if isinstance(module, types.ModuleType) and is_of_users(module):
                inner = _Globals(vars(module), tuple(n for n in names if n in vars(module)))
                self._kept[id(inner)] = module.__name__, inner, inner.held()
                found += [(f"{module.__name__}.{n}", v) for n, v in inner.held().items()]
        return found


class _Globals:
    """The globals that some code mentions."""

    def __init__(self, values: dict[str, Any], names: tuple[str, ...]) -> None:
        self.values, self.names = values, names

    def held(self) -> dict[str, Any]:
        return {name: self.values[name] for name in self.names if name in self.values}


def _is_inner(value: Any) -> bool:
    """Whether an object is part of how PyTorch, or this package, works inside."""
    return type(value).__module__.startswith(("torch._", "rewriter", "passes"))


_MOVING = (io.IOBase, memoryview)


def _is_iterator(value: Any) -> bool:
    return hasattr(type(value), "__next__") and hasattr(type(value), "__iter__")


def _attributes(value: Any) -> dict[str, Any]:
    """Return what an object or a class holds by name."""
    if isinstance(value, type):
        return {n: v for n, v in vars(value).items() if n not in _SKIPPED}
    own = dict(getattr(value, "__dict__", {}))
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            name = f"_{kind.__name__.lstrip('_')}{name}" if _is_private(name) else name
            if name not in _SKIPPED and isinstance(
                vars(kind).get(name), types.MemberDescriptorType
            ):
                try:
                    own[name] = getattr(value, name)
                except AttributeError:
                    continue  # not assigned yet
    return own


def _is_private(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


def _held_by(value: Any, before: Any = None) -> Any:
    """Return what an object holds, to be compared and put back; None if nothing can change."""
    if isinstance(value, (list, deque)):
        return [*value], _own_attributes(value)
    if isinstance(value, dict):
        return dict(value), _own_attributes(value)
    if isinstance(value, set):
        return set(value), _own_attributes(value)
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, numpy.ndarray):
        return _of_array(value, before)
    if isinstance(value, types.CellType):
        return _contents(value)
    if isinstance(value, _Globals):
        return value.held()
    if isinstance(value, (tuple, frozenset, types.ModuleType, functools.partial)):
        return None
    return _attributes(value) if hasattr(value, "__dict__") or _has_slots(value) else None


def _own_attributes(value: Any) -> Any:
    return dict(vars(value)) if hasattr(value, "__dict__") else None


def _has_slots(value: Any) -> bool:
    return any("__slots__" in vars(kind) for kind in type(value).__mro__[:-1])


def _of_array(value: numpy.ndarray[Any, Any], before: Any) -> Any:
    is_summed = value.nbytes > MAX_BYTES if before is None else isinstance(before, int)
    if value.dtype.hasobject:
        return [*value.flat]
    return zlib.crc32(value.tobytes()) if is_summed else value.copy()


def _contents(cell: types.CellType) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not assigned yet
        return ()


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what hangs on a value, by name."""
    if isinstance(value, dict):
        yield from ((str(k) if type(k) in (str, int) else "…", v) for k, v in list(value.items()))
        yield from (("key", k) for k in list(value) if not isinstance(k, _PLAIN))
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        yield from ((str(i), v) for i, v in enumerate(list(value)) if not isinstance(v, _PLAIN))
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), (value.__name__, value.__func__))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.FunctionType):
        yield from vars(value).items()
        if is_of_users(value):
            names = value.__code__.co_freevars
            yield from zip(names, value.__closure__ or (), strict=True)
            yield from (("default", v) for v in value.__defaults__ or ())
            yield from (value.__kwdefaults__ or {}).items()
    elif isinstance(value, types.CellType):
        yield from (("contents", v) for v in _contents(value))
    elif isinstance(value, (staticmethod, classmethod)):
        yield "function", value.__func__
    elif isinstance(value, (_Globals, numpy.ndarray, io.IOBase, types.ModuleType)):
        return
    elif isinstance(value, type):
        if is_of_users(value):
            yield from _attributes(value).items()
    elif type(value).__module__.partition(".")[0] != __name__.partition(".")[0]:
        yield from _attributes(value).items()
        yield type(value).__name__, type(value)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two things that an object has held are the same."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_item, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(map(_is_item, one.values(), other.values()))
    if isinstance(one, numpy.ndarray):
        return one.shape == other.shape and one.tobytes() == other.tobytes()
    return bool(one == other)


def _is_item(one: Any, other: Any) -> bool:
    if one is other or (isinstance(one, (list, dict, set)) and _is_same(one, other)):
        return True
    plain = (int, float, str, bool, bytes, type(None))
    return type(one) is type(other) and isinstance(one, plain) and one == other


def _put_back(value: Any, held: Any) -> None:
    if isinstance(value, (list, deque)):
        value.clear()
        value.extend(held[0])
    elif isinstance(value, (dict, set)):
        value.clear()
        value.update(held[0])
    elif isinstance(value, bytearray):
        value[:] = held
    elif isinstance(value, numpy.ndarray):
        if isinstance(held, numpy.ndarray) and held.shape == value.shape:
            value[...] = held
    elif isinstance(value, types.CellType):
        _put_contents_back(value, held)
    elif isinstance(value, _Globals):
        value.values.update(held)
    else:
        _put_attributes_back(value, held)
    if isinstance(value, (list, dict, set, deque)) and held[1] is not None:
        _put_attributes_back(value, held[1])


def _put_contents_back(cell: types.CellType, held: tuple[Any, ...]) -> None:
    if held:
        cell.cell_contents = held[0]
    else:
        del cell.cell_contents


def _put_attributes_back(value: Any, held: dict[str, Any]) -> None:
    now, own = _attributes(value), getattr(value, "__dict__", {})
    is_class = isinstance(value, type)
    for name in now.keys() - held.keys():
        _ = delattr(value, name) if is_class or name not in own else own.pop(name)
    for name, item in held.items():
        if name in now and _is_item(item, now[name]):
            continue
        if is_class or not (name in own or name not in now):
            setattr(value, name, item)
        else:
            own[name] = item
