"""Proof that each row of what a body computes depends on the same row of its point alone.

The rows are the first dimension of the point, and any one of what is computed: in ``branch(f) @
trunk(x).T``, shape (functions, points), they are the second.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.custom_rules import CUSTOM
from passes.derivative import taylor
from passes.graph import is_equal, is_one, reaches, value_of, where
from passes.markers import stop
from passes.simplify.filled import RESHAPES
from passes.tangent_tables import ELEMENTWISE, FROM_BACKWARD

aten = torch.ops.aten


class RowsMix(Exception):
    """A derivative that is no operand of a contraction; the message is the reason a report
    shows."""


# Each element of the result depends on the elements at the same place (broadcast from the right).
POINTWISE = {
    *ELEMENTWISE, *FROM_BACKWARD, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
    aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.neg.default, aten.pow.Tensor_Scalar, aten.where.self, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.acosh.default,
    aten.atanh.default, aten.log_sigmoid_forward.default, aten._to_copy.default,
}  # fmt: skip

# Along the dimensions of the second argument only; the first keep them all, the others have them
# no more unless they are told to keep them.
_ALONG_SAME = {aten._softmax.default, aten._log_softmax.default, aten.cumsum.default}
_ALONG = {
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten.logsumexp.default,
}  # fmt: skip
_SPLITS = {aten.split.Tensor: 2, aten.split_with_sizes.default: 2, aten.unbind.int: 1}


class Rows:
    """What of a body keeps the rows of its point apart, and holds no derivative.

    Args:
        graph: The body.
        point: One of its inputs.

    Attributes:
        kept: The nodes that depend on the point, position n of one dimension on row n alone → that
            dimension.
        reasons: Other nodes that depend on the point, and read only nodes of ``kept`` → why they
            are not of them.
    """

    def __init__(self, graph: Graph, point: Node) -> None:
        moving = reaches([point], through=lambda node: node.target is not stop)
        sizes = value_of(point).shape[:1]
        self.kept: dict[Node, int] = {point: 0} if sizes else {}
        self.reasons = {} if sizes else {point: "the point has no rows"}
        for node in graph.nodes:
            if node not in moving or node.op != "call_function":
                continue
            reads = [n for n in node.all_input_nodes if n in moving]
            if not all(n in self.kept for n in reads):
                continue
            dim = None if "site" in node.meta else _row_dim(node, {n: self.kept[n] for n in reads})
            parts = dim is not None and node.target is taylor  # each has a dimension of its own
            if dim is not None and (parts or _has_rows(value_of(node), dim, sizes[0])):
                self.kept[node] = dim
            elif node.target is taylor:
                self.reasons[node] = "rows mix in an inner derivative"
            else:
                self.reasons[node] = f"rows mix at {_name(node)}, {where(node)}"


def _has_rows(value: Any, dim: int, size: Any) -> bool:
    """Whether a dimension of a tensor, or of each of several, is as long as there are rows."""
    values = value if isinstance(value, (tuple, list)) else [value]
    return all(
        isinstance(x, Tensor) and dim < x.dim() and is_equal(x.shape[dim], size) for x in values
    )


def _row_dim(node: Node, moving: Mapping[Node, int]) -> int | None:
    """Return the dimension of a result whose position n depends on row n alone; None if there is
    none.

    Args:
        node: What computes it.
        moving: What it reads that moves → the dimension of its rows.
    """
    args: Any = node.args
    target = node.target
    if target is taylor:
        _, *inputs = args
        apart = {inputs[at] for at in node.meta["rows"].inputs}
        return 0 if all(n in apart and dim == 0 for n, dim in moving.items()) else None
    if target is operator.getitem:
        source: Any = args[0]
        return source.meta["rows"].results[args[1]] if source.target is taylor else moving[source]
    if target in CUSTOM:
        reads = [arg for i, arg in enumerate(args) if i not in CUSTOM[target].rows]
        if any(n in moving for n in _nodes_in((reads, node.kwargs))):
            return None
        return 0 if not any(moving.values()) else None
    if target in POINTWISE:
        return _broadcast(node, moving)
    if target in _PRODUCTS:
        return _of_product(node, moving)
    if target is aten.convolution.default:
        return 0 if dict(moving) == {args[0]: 0} else None
    if target is aten.cat.default or target is aten.stack.default:
        return _of_joined(node, moving)
    if len(moving) != 1 or not args or args[0] not in moving:
        return None
    return _of_one(node, args[0], moving[args[0]])


def _broadcast(node: Node, moving: Mapping[Node, int]) -> int | None:
    """Dimensions are aligned at the last one."""
    values = value_of(node)
    rank = (values[0] if isinstance(values, tuple) else values).dim()
    dims = {dim + rank - value_of(n).dim() for n, dim in moving.items()}
    return dims.pop() if len(dims) == 1 else None


def _of_product(node: Node, moving: Mapping[Node, int]) -> int | None:
    """A dimension of a product is one of the left operand, of the right one, or of both."""
    args: Any = node.args
    left, right = args[-2:] if node.target not in _SUMMED else args[1:3]
    dims = set()
    rank = value_of(node).dim()
    for operand, places in ((left, _LEFT), (right, _RIGHT)):
        if operand in moving:
            there = places[value_of(operand).dim(), rank]
            dims.add(there[moving[operand]])
    if node.target in _SUMMED and args[0] in moving:
        dims.add(moving[args[0]] + rank - value_of(args[0]).dim())
    # Two operands whose rows are in one dimension of the result: the batch's, or they mix.
    both = left in moving and right in moving
    if both and not (value_of(left).dim() == value_of(right).dim() == 3 and dims == {0}):
        return None
    return dims.pop() if len(dims) == 1 else None


def _of_joined(node: Node, moving: Mapping[Node, int]) -> int | None:
    args: Any = node.args
    own, rank = args[1] if len(args) > 1 else 0, value_of(node).dim()
    own %= rank
    if len(set(moving.values())) != 1:
        return None
    (dim,) = set(moving.values())
    if node.target is aten.stack.default:
        return dim + (own <= dim)
    return None if own == dim else dim


def _of_one(node: Node, source: Node, row: int) -> int | None:
    """Views, sums and the like of one tensor."""
    args: Any = node.args
    target: Any = node.target
    rank = value_of(source).dim()
    if target in RESHAPES:
        return _reshaped(value_of(source).shape, value_of(node).shape, row)
    if target is aten.permute.default:
        return [d % rank for d in args[1]].index(row)
    if target is aten.t.default or target is aten.transpose.int:
        a, b = (0, rank - 1) if target is aten.t.default else (d % rank for d in args[1:])
        return {a: b, b: a}.get(row, row)
    if target is aten.expand.default:
        return row + value_of(node).dim() - rank
    if target is aten.unsqueeze.default:
        return row + (args[1] % (rank + 1) <= row)
    if target is aten.slice.Tensor:
        dim = args[1] % rank if len(args) > 1 else 0
        return None if dim == row and not _same_size(source, node, row) else row
    if target is aten.index_select.default:
        return None if args[1] % rank == row else row
    if target in _SPLITS:
        at = _SPLITS[target]
        dim = args[at] % rank if len(args) > at else 0
        return None if dim == row else row - (target is aten.unbind.int and dim < row)
    if target in _ALONG_SAME:
        return None if args[1] % rank == row else row
    if target in (aten.select.int, aten.squeeze.dim, aten.squeeze.dims) or target in _ALONG:
        named = args[1] if len(args) > 1 else None
        dims = {d % rank for d in (named if isinstance(named, (list, tuple)) else [named or 0])}
        if named is None or not dims or row in dims:
            return None
        # A dimension that is squeezed stays unless it has size 1, one that is summed if kept.
        gone = rank - value_of(node).dim()
        before = sum(dim < row for dim in _gone(source, dims, target, gone))
        return row - before
    return None


def _gone(source: Node, dims: set[int], target: Any, count: int) -> list[int]:
    """Return which of the dimensions named the result has no more."""
    if count == 0:
        return []
    if target in (aten.squeeze.dim, aten.squeeze.dims):
        return [dim for dim in dims if is_one(value_of(source).shape[dim])]
    return list(dims)


def _reshaped(before: Sequence[Any], after: Sequence[Any], row: int) -> int | None:
    """Return where a dimension is after a reshape: as long as it was, and with as much before it.
    What stays the same is in a tensor of any layout at the same place."""
    lead = math.prod(before[:row])
    for dim, size in enumerate(after):
        if is_equal(size, before[row]) and is_equal(math.prod(after[:dim]), lead):
            return dim
    return None


# Where each dimension of an operand is in the product, by the ranks of both.
_LEFT: dict[tuple[int, int], tuple[int | None, ...]] = {
    (2, 2): (0, None), (2, 1): (0, None), (3, 3): (0, 1, None),
}  # fmt: skip
_RIGHT: dict[tuple[int, int], tuple[int | None, ...]] = {
    (2, 2): (None, 1), (1, 1): (None,), (3, 3): (0, None, 2),
}  # fmt: skip
_SUMMED = {aten.addmm.default, aten.baddbmm.default}
_PRODUCTS = {aten.mm.default, aten.mv.default, aten.bmm.default, *_SUMMED}


def _nodes_in(arguments: Any) -> list[Node]:
    return [item for item in pytree.tree_leaves(arguments) if isinstance(item, Node)]


def _same_size(before: Node, after: Node, dim: int) -> bool:
    return is_equal(value_of(before).shape[dim], value_of(after).shape[dim])


def _name(node: Node) -> str:
    target = node.target
    return target.name() if isinstance(target, torch._ops.OpOverload) else str(target)
