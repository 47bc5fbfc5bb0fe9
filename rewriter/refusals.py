"""Which calls run as written because calls like them could not be captured.

A refusal holds for calls with the same arguments under the same modes of PyTorch: autocast or
`detect_anomaly` around one call says nothing of the next one. A second refusal for the same reason,
at the same line, is no matter of sizes, of one network or of how many tensors there are: from then
on it holds for all calls with arguments of the same kinds.

The keys that calls are known by are asked for at each call of a refused loss, so they cost what a
few attributes cost.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from rewriter.errors import CaptureError, TooLittleWork
from rewriter.naming import top_modules
from rewriter.stateful import modes

Watched = Sequence["weakref.ref[nn.Module]"]
"""Modules that are no arguments, but that a call reads: a call is another one in eval mode."""


_MOST_WATCHED = 16


class Call:
    """The arguments of a call and the modes of PyTorch around it."""

    def __init__(self, args: Any, kwargs: Any, watched: Watched = ()) -> None:
        self.exact = exact_key(args, kwargs, watched)
        self.alike = rough_key(args, kwargs, watched)

    @property
    def in_every_mode(self) -> Any:
        """What it is known by whatever PyTorch computes by."""
        return self.exact[1:]


def exact_key(args: Any, kwargs: Any, watched: Watched = ()) -> tuple[Any, ...]:
    """Return what a call is known by."""
    key: list[Any] = [modes()]
    for item in leaves_in(args, kwargs) if kwargs else args:
        if isinstance(item, Tensor):
            key += (item.shape, item.dtype, item.requires_grad)
        elif isinstance(item, nn.Module):
            key += (id(item), item.training)
        elif item is True or item is False:  # a flag is what it says
            key.append(item)
        elif isinstance(item, _CONTAINERS):
            return exact_key(leaves_in(args, kwargs), {}, watched)
        else:
            key.append(type(item))
    for module in watched:
        key.append(getattr(module(), "training", None))
    return tuple(key)


def rough_key(args: Any, kwargs: Any, watched: Watched = ()) -> tuple[Any, ...]:
    """Return what a call has in common with those of other sizes, networks and lengths of lists."""
    kinds = set[Any]()
    for item in leaves_in(args, kwargs) if kwargs else args:
        if isinstance(item, Tensor):
            kinds.add((item.dtype, item.requires_grad))
        elif isinstance(item, nn.Module):
            kinds.add((type(item), item.training))
        elif item is True or item is False:
            kinds.add(item)
        elif isinstance(item, _CONTAINERS):
            return rough_key(leaves_in(args, kwargs), {}, watched)
        else:
            kinds.add(type(item))
    key: list[Any] = [modes(), frozenset(kinds)]
    for module in watched:
        key.append(getattr(module(), "training", None))
    return tuple(key)


class Refusals:
    """Why calls run as written.

    Attributes:
        all: Why, each kind of call once.
        watched: What calls read beside their arguments.
    """

    def __init__(self) -> None:
        self.all: list[CaptureError] = []
        self.watched: Watched = ()
        self._by_call: dict[Any, CaptureError] = {}

    def watch(self, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Tell calls apart by the mode of the networks that they read and do not get, too."""
        given = {id(item) for item in leaves_in(args, kwargs)}
        with contextlib.suppress(TypeError):  # arguments that are not its own: it will say so
            found = top_modules(function, args, kwargs).values()
            others = [module for module in found if id(module) not in given]
            self.watched = tuple(map(weakref.ref, others[:_MOST_WATCHED]))

    def add(self, call: Call, refusal: CaptureError) -> None:
        """Let calls like this one run as written."""
        if isinstance(refusal, TooLittleWork):
            self._by_call[call.in_every_mode] = refusal
        elif self.has_same(refusal):
            self._by_call[call.alike] = refusal
        else:
            self._by_call[call.exact] = refusal
        if refusal not in self.all:
            self.all.append(refusal)

    def has_same(self, refusal: CaptureError) -> bool:
        """Whether a call was refused before for the same reason at the same line."""
        return any(_is_same(refusal, known) for known in self.all)

    def of(self, args: Any, kwargs: Any) -> CaptureError | None:
        """Return why such a call runs as written, if it is known to."""
        call = Call(args, kwargs, self.watched)
        keys = (call.in_every_mode, call.exact, call.alike)
        return next((self._by_call[key] for key in keys if key in self._by_call), None)

    def is_of_its_kind(self, call: Call) -> bool:
        """Whether all calls with arguments of the same kinds run as written."""
        return call.alike in self._by_call


def leaves_in(args: Any, kwargs: Any) -> list[Any]:
    """Return the arguments of a call, of lists, tuples and dicts what is in them."""
    found: list[Any] = []
    _add_leaves(found, args)
    _add_leaves(found, kwargs.values())
    return found


_CONTAINERS = (list, tuple, dict)


def _add_leaves(found: list[Any], items: Iterable[Any]) -> None:
    for item in items:
        if not isinstance(item, _CONTAINERS):
            found.append(item)
        else:
            _add_leaves(found, item.values() if isinstance(item, dict) else item)


def _is_same(one: CaptureError, other: CaptureError) -> bool:
    """Whether two refusals have the same reason, whatever sizes it names."""

    def said(refusal: CaptureError) -> tuple[str, str]:
        return "".join(c for c in refusal.reason if not c.isdigit()), refusal.where

    return said(one) == said(other)
