"""Which calls run as written because calls like them could not be captured.

A refusal holds for calls with the same arguments under the same modes of PyTorch: autocast or
`detect_anomaly` around one call says nothing of the next one. A second refusal for the same reason,
at the same line, is no matter of sizes, of one network or of how many tensors there are: from then
on it holds for all calls with arguments of the same kinds.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rewriter.errors import CaptureError, TooLittleWork
from rewriter.stateful import modes


class Call:
    """The arguments of a call."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        if kwargs or any(type(item) is not Tensor for item in args):
            args = pytree.tree_leaves((args, kwargs))
        self._leaves = args
        self.exact = tuple([_kind(leaf) for leaf in args])

    @functools.cached_property
    def modes(self) -> Any:
        """What PyTorch computes by."""
        return modes()

    @functools.cached_property
    def alike(self) -> Any:
        """What it has in common with calls of other sizes, networks and lengths of lists."""
        return self.modes, frozenset(_rough_kind(leaf) for leaf in self._leaves)


class Refusals:
    """Why calls run as written.

    Attributes:
        all: Why, each kind of call once.
    """

    def __init__(self) -> None:
        self.all: list[CaptureError] = []
        self._by_call: dict[Any, CaptureError] = {}

    def add(self, call: Call, refusal: CaptureError) -> None:
        """Let calls like this one run as written."""
        if isinstance(refusal, TooLittleWork):
            self._by_call[call.exact] = refusal  # in every mode
        elif self.has_same(refusal):
            self._by_call[call.alike] = refusal
        else:
            self._by_call[call.modes, call.exact] = refusal
        if refusal not in self.all:
            self.all.append(refusal)

    def has_same(self, refusal: CaptureError) -> bool:
        """Whether a call was refused before for the same reason at the same line."""
        return any(_is_same(refusal, known) for known in self.all)

    def of(self, args: Any, kwargs: Any) -> CaptureError | None:
        """Return why such a call runs as written, if it is known to."""
        call = Call(args, kwargs)
        found = self._by_call.get(call.exact) or self._by_call.get((call.modes, call.exact))
        return found or self._by_call.get(call.alike)


def _is_same(one: CaptureError, other: CaptureError) -> bool:
    """Whether two refusals have the same reason, whatever sizes it names."""

    def said(refusal: CaptureError) -> tuple[str, str]:
        return "".join(c for c in refusal.reason if not c.isdigit()), refusal.where

    return said(one) == said(other)


def _kind(item: Any) -> Any:
    if isinstance(item, Tensor):
        return tuple(item.shape), item.dtype, item.requires_grad
    if isinstance(item, nn.Module):
        return id(item), item.training
    return type(item)


def _rough_kind(item: Any) -> Any:
    if isinstance(item, Tensor):
        return item.dtype, item.requires_grad
    if isinstance(item, nn.Module):
        return type(item), item.training
    return type(item)
