"""Which tensors of a graph are constants, and what they do to indices."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._python_dispatch import _disable_current_modes

from passes.contraction.repeated import repeated_result
from passes.contraction.terms import Index
from passes.graph import is_impure, value_of

aten = torch.ops.aten
# Of their argument they read its shape only.
_OF_SHAPE = {
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default,
}  # fmt: skip
# Elements of the largest constant that is looked at.
LARGEST = 2**25


class Constants:
    """The nodes of a graph that depend on no input."""

    def __init__(self, graph: Graph, known: dict[Node, Tensor] | None = None) -> None:
        self.graph = graph
        self._known: dict[Node, Any] = dict(known or {})

    def inside(self, outside: dict[Node, Any]) -> dict[Node, Tensor]:
        """Return those inputs of a body that are constants.

        Args:
            outside: The body's inputs → what is given for them.
        """
        found = {inner: self.repeated(outer) for inner, outer in outside.items()}
        return {inner: value for inner, value in found.items() if value is not None}

    def value(self, node: Any) -> Tensor | None:
        """Return the value of a constant; None for what is none, or too large, or has symbolic
        sizes."""
        found = self.repeated(node)
        return None if found is None or _is_open(value_of(node)) else found

    def repeated(self, node: Any) -> Tensor | None:
        """Return the value of a constant, with size 1 along dimensions of symbolic sizes: it is the
        same all along them; None for what is no constant, or too large."""
        if not isinstance(node, Node):
            return None
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: Node) -> Tensor | None:
        like = value_of(node)
        if not isinstance(like, Tensor) or not _is_small(like):
            return None
        if is_impure(node) or node.op != "call_function":
            return None
        if any(map(_is_open, map(value_of, [node, *node.all_input_nodes]))):
            return repeated_result(node, self.repeated)
        read: dict[Node, Any] = {}
        for source in node.all_input_nodes:
            known = _shape_of(source) if node.target in _OF_SHAPE else self.value(source)
            if known is None:
                return None
            read[source] = known
        with _disable_current_modes(), torch.no_grad():
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), read.__getitem__)
            operator: Any = node.target
            return operator(*args, **kwargs)

    def apart(
        self, value: Tensor, indices: tuple[Index | None, ...]
    ) -> tuple[float, tuple[Index, Index] | None] | None:
        """Return ``(c, None)`` if a constant is the number c everywhere, ``(c, (a, b))`` if it is
        ``c·δ(a, b)``, None if it is anything else."""
        left = list(indices)
        for dim in range(value.dim() - 1, -1, -1):
            first = value.narrow(dim, 0, 1) if value.shape[dim] else value
            if left[dim] is None or bool((value == first).all()):
                value = value.select(dim, 0)
                del left[dim]
        if value.dim() == 0:
            return float(value), None
        if value.dim() == 2 and value.shape[0] == value.shape[1]:
            scale = value[0, 0]
            if bool((value == scale * torch.eye(len(value)).to(value)).all()):
                a, b = left
                assert a is not None
                assert b is not None
                return float(scale), (a, b)
        return None


def is_identity(value: Tensor, batch_dims: int) -> bool:
    """Whether a tensor's first dimensions number the unit vectors of the space that the others
    span."""
    n = math.prod(value.shape[:batch_dims])
    if n != math.prod(value.shape[batch_dims:]):
        return False
    return bool((value.reshape(n, n) == torch.eye(n, dtype=value.dtype, device=value.device)).all())


def _shape_of(node: Node) -> Tensor | None:
    """Return a tensor of a node's shape."""
    like = value_of(node)
    if not isinstance(like, Tensor) or not _is_small(like):
        return None
    return torch.empty(like.shape, dtype=like.dtype)


def _is_small(like: Tensor) -> bool:
    return math.prod(size for size in like.shape if isinstance(size, int)) <= LARGEST


def _is_open(like: Any) -> bool:
    """Whether a tensor has a symbolic size, or is one."""
    sizes = like.shape if isinstance(like, Tensor) else [like]
    return any(isinstance(size, torch.SymInt) for size in sizes)
