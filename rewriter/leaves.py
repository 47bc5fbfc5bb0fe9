"""Find the leaves whose ``.grad`` a backward pass would fill."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from sys import getrefcount
from typing import Any

import torch
from torch import Tensor


def leaves_of(end: Tensor, known: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaves that a value depends on, but for those that were made on the way and that
    nobody holds.

    Args:
        end: The value.
        known: Tensors with a history at which the search ends.
    """
    if end.is_leaf:
        return [end] if end.requires_grad else []
    ends = {(x.grad_fn, x.output_nr) for x in known if x.grad_fn is not None}
    waiting, seen, leaves = [end.grad_fn], {end.grad_fn}, []
    while waiting:
        node: Any = waiting.pop()
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        for entry in node.next_functions:
            if entry[0] is not None and entry[0] not in seen and entry not in ends:
                seen.add(entry[0])
                waiting.append(entry[0])
    held = [_references(leaves, i) > _FREE for i in range(len(leaves))]
    return [leaf for leaf, is_held in zip(leaves, held, strict=True) if is_held]


def _references(leaves: Sequence[Tensor], position: int) -> int:
    return getrefcount(leaves[position])


def _references_of_free() -> int:
    """Count the references to a leaf that only a graph, and who counts, hold."""
    node: Any = (torch.zeros((), requires_grad=True) * 1).grad_fn
    return _references([node.next_functions[0][0].variable], 0)


_FREE = _references_of_free()
