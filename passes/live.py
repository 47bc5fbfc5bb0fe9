"""What code that runs keeps in memory."""

from __future__ import annotations

import weakref
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from passes.bytes import as_expression
from passes.price import evaluated, known_sizes


class LiveBytes(TorchDispatchMode):
    """Count the bytes of everything that is computed inside and still referred to, fake tensors
    included.

    What autograd saves for a backward pass counts until that frees it. Views count once, with the
    memory that they look at.

    Attributes:
        now: Bytes alive.
        most: The most there were at one moment.

    >>> with LiveBytes() as live:
    ...     total = (torch.ones(8).sin() + 1).sum()
    >>> live.most, live.now
    (64, 4)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._known: dict[sympy.Expr, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for x in tree_leaves((args, kwargs)) for storage in _storages(x)}
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            for storage in _storages(value):
                if id(storage) not in given and id(storage) not in self._alive:
                    self._add(storage)
        return out

    def bytes_of(self, x: Tensor) -> int:
        """Return the bytes of the memory that a tensor lies in; 0 for one without memory."""
        return sum(self._size(storage) for storage in _storages(x))

    def _add(self, storage: Any) -> None:
        key, size = id(storage), self._size(storage)

        def freed(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)

    def _size(self, storage: Any) -> int:
        size: Any = storage.nbytes()
        if not isinstance(size, torch.SymInt):
            return size
        formula = as_expression(size)
        if formula not in self._known:
            self._known[formula] = evaluated(formula, known_sizes(size.node.shape_env))
        return self._known[formula]


def _storages(x: Any) -> list[Any]:
    if not isinstance(x, Tensor) or x.layout is not torch.strided:
        return []
    try:
        return [x.untyped_storage()]
    except NotImplementedError:  # a zero tangent has no memory
        return []
