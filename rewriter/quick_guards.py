"""Find out without a walk that a call reads what an earlier one has read.

`rewriter.reach` walks everything that a call can read, with paths. Nearly always nothing of it but
the data among the arguments is another object than at the call before, and that is asked of each
object that holds something in one comparison by identity. Where one has changed, the walk decides.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy
from torch import Tensor, nn

from rewriter.reach import (
    Global,
    Kind,
    aliases,
    called_with,
    is_same,
    kind_of,
    mentioned_of,
    parts_of,
    parts_of_class,
    reached_from,
    roots_of,
)

_KIND = operator.attrgetter("shape", "dtype", "device", "requires_grad", "layout")
_DATA = (Tensor, numpy.ndarray, dict, list, tuple, set, frozenset, str, bytes, int, float, complex)
_REGISTERED = ("_parameters", "_buffers", "_modules")


class QuickGuards:
    """What a call has read, to be compared with what the next one would read.

    Args:
        function: The loss.
        args: Its arguments, of a call that a specialisation holds for.
        kwargs: Its keyword arguments.
        names: Attributes and globals that its code mentions.
        others: Globals of libraries that it reads.

    Attributes:
        fixed: What does not come with the call, by path.
        is_possible: Whether the two can be told apart.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        names: set[str],
        others: Sequence[Global],
    ) -> None:
        self.function, self.names = function, names
        self._holders: list[tuple[Callable[[], Sequence[Any]], Sequence[Any]]] = []
        self._arrays: list[tuple[Any, Any]] = []
        self._empty: list[Any] = []  # of hooks, nearly always
        given = called_with(function, args, kwargs)
        self._kept = {name: value for name, value in given if _stays(value)}
        self._hold(functools.partial(_outside, function, others))
        roots = [*self._kept.items(), *roots_of(function), *((o.path, o.value) for o in others)]
        self._take_down([value for _, value in roots])
        self.fixed = reached_from(roots, names)
        tensors = {id(x): x for x in self.fixed.values() if isinstance(x, Tensor)}
        self._tensors = list(tensors.values())
        self._kinds = list(map(_KIND, self._tensors))
        self._strides = list(map(Tensor.stride, self._tensors))
        self._ids = {_identity(x) for x in self.fixed.values()} - {0}
        fresh = self._walked(args, kwargs)
        self.is_possible = fresh is not None
        self._paths = fresh.keys() if fresh is not None else set()
        self._aliases = aliases(fresh or {})

    def fresh(self, args: Any, kwargs: Any) -> dict[str, Any] | None:
        """Return what comes with a call, by path; None if a walk has to decide."""
        if not self._is_still():
            return None
        found = self._walked(args, kwargs)
        if found is None or found.keys() != self._paths or aliases(found) != self._aliases:
            return None
        return found

    def _walked(self, args: Any, kwargs: Any) -> dict[str, Any] | None:
        kept, data, number = self._kept, [], 0
        for name, value in called_with(self.function, args, kwargs):
            if name not in kept:
                data.append((name, value))
            elif kept[name] is not value:
                return None
            else:
                number += 1
        found = reached_from(data, self.names) if number == len(kept) else None
        if found is None or not self._ids.isdisjoint(map(_identity, found.values())):
            return None
        return found

    def _is_still(self) -> bool:
        if any(self._empty):
            return False
        try:
            for read, held in self._holders:
                now = read()
                if len(now) != len(held) or not all(map(operator.is_, now, held)):
                    return False
            return (
                list(map(_KIND, self._tensors)) == self._kinds
                and list(map(Tensor.stride, self._tensors)) == self._strides
                and all(is_same(x, kind) for x, kind in self._arrays)
            )
        except (KeyError, AttributeError):  # one that was there is gone
            return False

    def _hold(self, read: Callable[[], Sequence[Any]]) -> None:
        self._holders.append((read, read()))

    def _take_down(self, values: list[Any]) -> None:
        """Note who holds what, of all that a walk would come to."""
        waiting, seen = deque(values), set[int]()
        while waiting:
            value = waiting.popleft()
            if id(value) in seen or isinstance(value, Tensor):
                continue
            seen.add(id(value))
            if isinstance(value, numpy.ndarray):
                self._arrays.append((value, kind_of(value)))
            if isinstance(value, types.FunctionType):
                self._hold(functools.partial(_code, value))
            parts = parts_of(value, self.names)
            if parts is None:
                continue
            waiting.extend(item for _, item in parts)
            self._hold_parts(value)
            for kind in type(value).__mro__ if _is_object(value) else ():
                if id(kind) not in seen:
                    seen.add(id(kind))
                    self._hold(functools.partial(_of_class, kind, self.names))

    def _hold_parts(self, value: Any) -> None:
        if isinstance(value, (dict, list, deque)):
            if value:
                self._hold(functools.partial(_items, value))
            else:
                self._empty.append(value)
        elif _is_object(value) and not _has_slots(value):
            own, skipped = vars(value), _REGISTERED if isinstance(value, nn.Module) else ()
            names = [n for n, _ in mentioned_of(own, self.names) if n not in skipped]
            if isinstance(value, nn.Module):
                names += [n for n in ("training", *_REGISTERED) if n in own]
                for name in _REGISTERED:
                    self._hold_parts(own[name])
            self._hold(functools.partial(_attributes, own, tuple(dict.fromkeys(names)), len(own)))
        elif not isinstance(value, tuple):
            self._hold(functools.partial(_parts, value, self.names))


def _stays(value: Any) -> bool:
    """Whether an argument is one that later calls will have too: a network, not data."""
    is_data = value is None or isinstance(value, _DATA) or dataclasses.is_dataclass(value)
    return not is_data


def _is_object(value: Any) -> bool:
    """Whether what a value holds are its attributes."""
    others = (tuple, dict, list, deque, set, frozenset, type, types.FunctionType, types.MethodType)
    named = (*others, types.ModuleType, functools.partial, types.BuiltinFunctionType)
    return not isinstance(value, named) and hasattr(value, "__dict__")


def _has_slots(value: Any) -> bool:
    return any(vars(kind).get("__slots__") for kind in type(value).__mro__)


def _identity(value: Any) -> int:
    if isinstance(value, Tensor):
        return id(value)
    return value.id if isinstance(value, Kind) else 0


def _outside(function: Callable[..., Any], others: Sequence[Global]) -> Sequence[Any]:
    return [*(value for _, value in roots_of(function)), *(other.value for other in others)]


def _code(function: types.FunctionType) -> Sequence[Any]:
    return function.__code__, function.__defaults__, function.__kwdefaults__


def _items(value: Any) -> Sequence[Any]:
    return [*value, *value.values()] if isinstance(value, dict) else [*value]


def _attributes(own: dict[str, Any], names: tuple[str, ...], number: int) -> Sequence[Any]:
    return [len(own) == number, *[own[name] for name in names]]


def _of_class(kind: type, names: set[str]) -> Sequence[Any]:
    return [value for _, value in parts_of_class(kind, names)]


def _parts(value: Any, names: set[str]) -> Sequence[Any]:
    return [item for _, item in parts_of(value, names) or ()]
