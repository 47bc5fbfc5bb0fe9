"""How many coordinates a point has: a number, for second derivatives along each of them.

Dynamo makes a size symbolic that was another one in an earlier call. A batch may have any size; the
directions of Taylor mode are as many as the point is wide, and a graph holds them one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from passes.contraction.directions import MOST
from passes.graph import arguments, hint, value_of
from passes.nest import sites


def with_known_sizes(example: Tensor, mode: Any) -> Tensor:
    """Return a fake tensor whose sizes are numbers where it is known that they have one value: of a
    symbol that was fixed after the tensor was made.

    Args:
        example: A fake tensor.
        mode: The fake mode that it belongs to.
    """
    sizes = list(map(_known, example.shape))
    if mode is None or all(map(operator.is_, sizes, example.shape)):
        return example
    strides = list(map(_known, example.stride()))
    with mode:
        return torch.empty_strided(sizes, strides, dtype=example.dtype, device=example.device)


def fix_widths(module: GraphModule, open_sizes: Sequence[Any] = ()) -> int:
    """Fix the symbolic widths of points of second and higher derivatives, their last dimension: a
    guard on each, so that another width is another graph. One that is too large for its coordinates
    to be directions stays as it is.

    Args:
        module: A derivative graph.
        open_sizes: Sizes that must stay as they are, and what is computed of them.

    Returns:
        How many were fixed.
    """
    fixed = 0
    kept = {symbol for size in open_sizes for symbol in _symbols(size)}
    for node in sites(module):
        if node.meta["site"].order < 2:
            continue
        _, n_points, _, _, *inputs = arguments(node)
        for point in inputs[:n_points]:
            for size in value_of(point).shape[1:][-1:]:
                is_open = isinstance(_known(size), torch.SymInt) and size.node.has_hint()
                if is_open and kept.isdisjoint(_symbols(size)) and hint(size) <= MOST:
                    int(size)  # which is a guard
                    fixed += 1
    return fixed


def _symbols(size: Any) -> set[Any]:
    return size.node.expr.free_symbols if isinstance(size, torch.SymInt) else set()


def _known(size: Any) -> Any:
    """Return the number that a symbolic size is known to be, or else the size."""
    expression: Any = size.node.expr if isinstance(size, torch.SymInt) else size
    return int(expression) if getattr(expression, "is_number", False) else size
