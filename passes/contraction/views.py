"""Explicit tensors that are the same but for the order of their dimensions, or for those of size
1."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from passes.contraction.terms import Factor, Index
from passes.graph import are_equal, arguments, is_one, value_of

aten = torch.ops.aten
_SAME = {aten.alias.default, aten.clone.default}
_RESHAPES = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
}  # fmt: skip


def source_of(factor: Factor) -> Factor:
    """Return the tensor that a factor is a view of, with the indices where it has them: two views
    of one vector are one direction."""
    while True:
        found = _one_step(factor)
        if found is None:
            return factor
        factor = found


def _one_step(factor: Factor) -> Factor | None:
    node = factor.node
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if node.target in _SAME:
        return Factor(source, factor.indices)
    rank = value_of(source).dim() if isinstance(value_of(source), torch.Tensor) else 0
    if node.target is aten.permute.default:
        indices: list[Index | None] = [None] * rank
        for at, dim in enumerate(arguments(node)[1]):
            indices[dim % rank] = factor.indices[at]
        return Factor(source, tuple(indices))
    if node.target is aten.t.default and rank == 2:
        return Factor(source, factor.indices[::-1])
    if node.target is aten.expand.default and _is_same_shape(source, node):
        return Factor(source, factor.indices)
    if node.target in _RESHAPES:
        return _reshaped(factor, source)
    return None


def _is_same_shape(one: Node, other: Node) -> bool:
    return are_equal(value_of(one).shape, value_of(other).shape)


def _reshaped(factor: Factor, source: Node) -> Factor | None:
    """A reshape that adds or takes away dimensions of size 1 only."""
    sizes: list[Any] = list(value_of(factor.node).shape)
    left = [(i, s) for i, s in zip(factor.indices, sizes, strict=True) if not is_one(s)]
    before = [s for s in value_of(source).shape if not is_one(s)]
    if any(i is not None for i, s in zip(factor.indices, sizes, strict=True) if is_one(s)):
        return None
    if not are_equal([s for _, s in left], before):
        return None
    given = iter(left)
    return Factor(
        source, tuple(None if is_one(s) else next(given)[0] for s in value_of(source).shape)
    )
