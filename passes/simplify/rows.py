"""Multiply a matrix of equal rows once.

Seeds and directions are constants that are the same for each point: ones for the gradient of a sum,
a unit vector for the derivative in one coordinate. In the first product that they meet,

    mm(1 rᵀ, B) = 1 (rᵀ B),    mm(L, 1 rᵀ) = (L 1) rᵀ

one row is enough, or a sum in place of a product. For a unit vector that row is a row of B.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.graph import are_equal, arguments, hint, is_equal, is_float, value_of
from passes.simplify.emit import call, size_of
from passes.simplify.filled import filling

aten = torch.ops.aten

Row = tuple[Any, ...] | None  # its numbers; empty if only known to be the same in each row

# These fill a result of their own, so an expanded operand is as good as one in full.
_POINTWISE = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor, aten.where.self}


def multiply_rows_once(graph: Graph) -> int:
    """``mm(A, B) → expand(mm(a, B))`` where each row of A is a, and ``mm(L, A) → sum(L, 1) ⊙ a``;
    for a transpose of A on the left ``mm(Aᵀ, R) → aᵀ ⊙ sum(R, 0)``."""
    changes = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.mm.default)):
        left, right = arguments(node)
        if not node.users or not is_float(node):
            continue
        with graph.inserting_before(node):
            made = _expanded(graph, node, left, right) or _outer(graph, node, left, right)
        if made is not None:
            made.meta = {**node.meta, "val": value_of(made)}
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            changes += 1
    return changes


def _expanded(graph: Graph, node: Node, left: Node, right: Node) -> Node | None:
    """``mm(1 aᵀ, B) = 1 (aᵀ B)``"""
    row = row_of(left)
    is_single = is_equal(value_of(left).shape[0], 1)
    if row is None or (is_single and not row) or not (is_single or _keeps_layouts(node)):
        return None
    ones = [number for number in row if number != 0]
    if len(row) == 1:
        once = _times(graph, right, row[0], node)
    elif row and len(ones) == 1:
        place = row.index(ones[0])
        once = call(graph, aten.slice.Tensor, (right, 0, place, place + 1), {}, node)
        once = _times(graph, once, ones[0], node)
    elif row and len(set(row)) == 1:
        once = call(graph, aten.sum.dim_IntList, (right, [0], True), {}, node)
        once = _times(graph, once, row[0], node)
    elif is_single:
        return None
    else:
        once = call(graph, aten.mm.default, (_first_row(graph, left, node), right), {}, node)
    if is_single:
        return once
    sizes = [size_of(graph, left, 0), size_of(graph, right, 1)]
    return call(graph, aten.expand.default, (once, sizes), {}, node)


def _outer(graph: Graph, node: Node, left: Node, right: Node) -> Node | None:
    """``mm(L, 1 aᵀ) = (L 1) aᵀ`` and ``mm(a 1ᵀ, R) = a (1ᵀ R)``"""
    inner = value_of(right).shape[0]
    if hint(inner) < 2:
        return None
    is_turned = left.target is aten.permute.default and list(arguments(left)[1]) == [1, 0]
    if (row := row_of(right)) is not None:
        dim, summed, equal = 1, left, right
    elif is_turned and (row := row_of(arguments(left)[0])) is not None:
        dim, summed, equal = 0, right, arguments(left)[0]
    else:
        return None
    total = call(graph, aten.sum.dim_IntList, (summed, [dim], True), {}, node)
    if len(row) == 1:
        return _times(graph, total, row[0], node)
    vector = _first_row(graph, equal, node)
    if dim == 0:
        vector = call(graph, aten.permute.default, (vector, [1, 0]), {}, node)
    return call(graph, aten.mul.Tensor, (total, vector), {}, node)


def row_of(node: Any) -> Row:
    """Return the row that all rows of a matrix are, if they are proven to be the same."""
    value = value_of(node)
    if not isinstance(node, Node) or not isinstance(value, Tensor) or value.dim() != 2:
        return None
    columns = value.shape[1]
    number, target, args = filling(node), node.target, node.args
    if number is not None:
        return (number,) * columns if isinstance(columns, int) else ()
    if target is aten.expand.default:
        before = value_of(args[0])
        return () if before.dim() < 2 or is_equal(before.shape[0], 1) else None
    if target is aten.slice_scatter.default and not node.kwargs:
        return _scattered(arguments(node), columns)
    if target is aten.select_scatter.default:
        return _selected(arguments(node), columns)
    if target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(args[1], (int, float)):
        row, factor = row_of(args[0]), args[1]
        return None if row is None else tuple(number * factor for number in row)
    return None


def _scattered(args: Any, columns: Any) -> Row:
    """Return the row of ``slice_scatter(base, source, dim, start, end, step)``."""
    base, source, dim, start, end, step, *_ = (*args, *(0, None, None, 1)[len(args) - 2 :])
    row, inside = row_of(base), row_of(source)
    if dim not in (1, -1) or not row or not inside or not isinstance(columns, int):
        return None
    if not all(isinstance(x, (int, type(None))) for x in (start, end)) or step != 1:
        return None
    mixed = list(row)
    places = range(*slice(start, end).indices(columns))
    if len(places) != len(inside):
        return None
    mixed[places.start : places.stop] = inside
    return tuple(mixed)


def _selected(args: Any, columns: Any) -> Row:
    """Return the row of ``select_scatter(base, source, dim, index)``."""
    base, source, dim, index = args
    row, number = row_of(base), filling(source)
    if dim not in (1, -1) or not row or number is None or not isinstance(columns, int):
        return None
    return tuple(number if i == index % columns else x for i, x in enumerate(row))


def _first_row(graph: Graph, node: Node, like: Node) -> Node:
    return call(graph, aten.slice.Tensor, (node, 0, 0, 1), {}, like)


def _times(graph: Graph, node: Node, number: Any, like: Node) -> Node:
    return node if number == 1 else call(graph, aten.mul.Tensor, (node, number), {}, like)


def _keeps_layouts(node: Node) -> bool:
    """Whether what reads a node is laid out the same if the node is an expanded row."""
    value = value_of(node)
    expanded = value.new_empty(()).expand(value.shape)
    for user in node.users:
        if user.target not in _POINTWISE or user.kwargs:
            return False
        operator: Any = user.target
        values = [expanded if x is node else value_of(x) for x in user.args]
        if not are_equal(operator(*values).stride(), value_of(user).stride()):
            return False
    return True
