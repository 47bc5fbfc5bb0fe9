"""Constants of open sizes: the same all along each dimension of which the size is a symbol.

Such a dimension stands with size 1. Only operators that treat it as a whole are computed: those
that fill a tensor, and those that write to, or move, the other dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._python_dispatch import _disable_current_modes

from passes.graph import arguments, is_equal, value_of
from passes.markers import stop
from passes.simplify.filled import RESHAPES

aten = torch.ops.aten
# Operators that fill a tensor → with what; None for their argument at a position.
_FILLED: dict[Any, tuple[float | None, int]] = {
    aten.zeros.default: (0.0, 0), aten.ones.default: (1.0, 0), aten.full.default: (None, 1),
    aten.new_zeros.default: (0.0, 0), aten.new_ones.default: (1.0, 0),
    aten.new_full.default: (None, 2), aten.zeros_like.default: (0.0, 0),
    aten.ones_like.default: (1.0, 0), aten.full_like.default: (None, 1),
    aten.fill.Scalar: (None, 1),
}  # fmt: skip
# They take dimensions, and elements, one by one.
_MOVED = {
    aten.alias.default, aten.clone.default, aten.detach.default, aten.neg.default,
    aten.permute.default, aten.t.default, aten.transpose.int, aten.unsqueeze.default, stop,
}  # fmt: skip
# Where they have the dimensions that they work along.
_ALONG = {
    aten.diagonal.default: slice(2, 4), aten.diagonal_scatter.default: slice(3, 5),
    aten.select.int: slice(1, 2), aten.squeeze.dim: slice(1, 2), aten.squeeze.dims: slice(1, 2),
}  # fmt: skip


def repeated_result(node: Node, read: Callable[[Any], Tensor | None]) -> Tensor | None:
    """Return what an operator computes of constants, with size 1 along dimensions of symbolic
    sizes; None if it is not the same all along them, as far as known.

    Args:
        node: The operator's call.
        read: Gives the constants that it reads, in the same form.
    """
    target: Any = node.target
    like, args = value_of(node), arguments(node)
    shape = list(map(_stand_in, like.shape))
    if target in _FILLED:
        value, at = _FILLED[target]
        value = args[at] if value is None else value
        is_number = isinstance(value, (int, float))
        return torch.full(shape, value, dtype=like.dtype) if is_number else None
    sources = [arg for arg in args if isinstance(arg, Node)]
    found = [read(source) for source in sources]
    if not found or any(x is None for x in found):
        return None
    before = value_of(sources[0]).shape
    if (target in RESHAPES and _keeps_open(before, like.shape)) or target is aten.expand.default:
        args = (args[0], shape)
    elif target in _ALONG:
        named = args[_ALONG[target]] or (0, 1)
        dims = [d for item in named for d in (item if isinstance(item, (list, tuple)) else [item])]
        if not all(isinstance(before[d], int) for d in dims):
            return None
    elif target not in _MOVED:
        return None
    values = dict(zip(sources, found, strict=True))
    with _disable_current_modes(), torch.no_grad():
        return target(*torch.fx.map_arg(args, values.__getitem__))


def _stand_in(size: Any) -> int:
    return size if isinstance(size, int) else 1


def _keeps_open(before: Sequence[Any], after: Sequence[Any]) -> bool:
    """Whether a reshape leaves the dimensions of symbolic sizes as they are, with as many elements
    before them."""

    def places(shape: Sequence[Any]) -> list[tuple[Any, Any]]:
        sizes = enumerate(shape)
        return [(size, math.prod(shape[:d])) for d, size in sizes if not isinstance(size, int)]

    one, other = places(before), places(after)
    return len(one) == len(other) and all(
        is_equal(a, b) and is_equal(m, n) for (a, m), (b, n) in zip(one, other, strict=True)
    )
