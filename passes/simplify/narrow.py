"""Multiply only the part that is not zero, and only for what is read.

The derivative of one output, or in one coordinate, fills one column of a matrix and leaves the
others zero; of what comes back one column is read. With a column s in the columns a…b of zeros,

    mm(0 … s … 0, B) = mm(s, B[a:b]),    mm(A, B)[:, a:b] = mm(A, B[:, a:b])

and what is left with an inner dimension of one is no sum: a column times a row. Of a stack of
matrices, which are multiplied as one with a matrix for each below the other, some may be read:

    (X₁; X₂; …) B, of which only X₁ B is read = X₁ B
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from passes.graph import arguments, is_equal, is_float, value_of
from passes.simplify.aliases import IN_ORDER
from passes.simplify.emit import call, size_of
from passes.simplify.filled import filling

aten = torch.ops.aten

_SCATTERED: dict[Any, Any] = {
    aten.slice_scatter.default: aten.slice.Tensor,
    aten.select_scatter.default: aten.select.int,
}
# A matrix, or one column of it; whether its transpose is meant; the dimension that it fills a part
# of, from where, to where.
Part = tuple[Node, bool, int, int, int]


def narrow_products(graph: Graph) -> int:
    """``mm(0 … s … 0, B) → mm(s, B[a:b])``, ``mm(A, 0 … s … 0) → 0 … mm(A, s) … 0``, ``mm(A, B)[:,
    a:b] → mm(A, B[:, a:b])`` where no more of it is read, and the same for rows."""
    changes = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.mm.default)):
        if not node.users or not is_float(node):
            continue
        with graph.inserting_before(node):
            made = _of_part(graph, node) or _of_column(graph, node)
        read = node
        if made is None and len(node.users) == 1:
            read = next(iter(node.users))
            with graph.inserting_before(node):
                made = _of_what_is_read(graph, node, read)
        if made is None:
            continue
        read.replace_all_uses_with(made)
        graph.erase_node(read)
        changes += 1
    return changes


def narrow_stacks(graph: Graph) -> int:
    """``select(reshape(mm(reshape(X), B)), 0, k) → reshape(mm(reshape(select(X, 0, k)), B))``,
    where not all of X is read."""
    changes = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.mm.default)):
        stack = node
        while len(stack.users) == 1 and (user := next(iter(stack.users))).target in IN_ORDER:
            stack = user
        if stack is node or not _is_read_in_part(stack):
            continue
        x, matrix = arguments(node)
        while x.target in IN_ORDER and not _has_size(x, value_of(stack).shape[0]):
            x = arguments(x)[0]
        if not _has_size(x, value_of(stack).shape[0]):
            continue
        for read in list(stack.users):
            with graph.inserting_before(read):
                made = _one_of_stack(graph, x, matrix, read)
            if made is not None:
                read.replace_all_uses_with(made)
                graph.erase_node(read)
                changes += 1
    return changes


def _is_read_in_part(stack: Node) -> bool:
    """Whether only some places of the first dimension are read, each by its number."""
    if value_of(stack).dim() < 2 or not stack.users:
        return False
    size = value_of(stack).shape[0]
    if not isinstance(size, int):
        return False
    read = set[int]()
    for user in stack.users:
        dim, place = arguments(user)[1:] if user.target is aten.select.int else (None, None)
        if dim != 0 or not isinstance(place, int):
            return False
        read.add(place % size)
    return len(read) < size


def _has_size(node: Node, size: int) -> bool:
    value = value_of(node)
    return value.dim() > 2 and is_equal(value.shape[0], size)


def _one_of_stack(graph: Graph, x: Node, matrix: Node, read: Node) -> Node | None:
    shape = [size if isinstance(size, int) else -1 for size in value_of(read).shape]
    if shape.count(-1) > 1 or 0 in shape:
        return None
    one = call(graph, aten.select.int, (x, 0, arguments(read)[2]), {}, read)
    rows = call(graph, aten.reshape.default, (one, [-1, size_of(graph, matrix, 0)]), {}, read)
    product = call(graph, aten.mm.default, (rows, matrix), {}, read)
    return call(graph, aten.reshape.default, (product, shape), {}, read)


def _of_part(graph: Graph, node: Node) -> Node | None:
    left, right = arguments(node)
    if (part := _part(left)) is not None:
        s, dim, start, end = _laid_out(graph, part, node)
        if dim == 1:
            return call(
                graph, aten.mm.default, (s, _cut(graph, right, 0, (start, end), node)), {}, node
            )
        return _filled_in(graph, node, (s, right), 0, start, end)
    if (part := _part(right)) is not None:
        s, dim, start, end = _laid_out(graph, part, node)
        if dim == 0:
            return call(
                graph, aten.mm.default, (_cut(graph, left, 1, (start, end), node), s), {}, node
            )
        return _filled_in(graph, node, (left, s), 1, start, end)
    return None


def _laid_out(graph: Graph, part: Part, like: Node) -> tuple[Node, int, int, int]:
    s, is_turned, dim, start, end = part
    if value_of(s).dim() == 1:
        s = call(graph, aten.unsqueeze.default, (s, dim), {}, like)
    elif is_turned:
        s = call(graph, aten.permute.default, (s, [1, 0]), {}, like)
    return s, dim, start, end


def _filled_in(
    graph: Graph, node: Node, operands: tuple[Node, Node], dim: int, start: int, end: int
) -> Node | None:
    """Return zeros with the product of two matrices in some of its columns, or rows."""
    value = value_of(node)
    if not all(isinstance(size, int) for size in value.shape):
        return None
    product = call(graph, aten.mm.default, operands, {}, node)
    kind = {"dtype": value.dtype, "device": value.device}
    zeros = graph.call_function(aten.full.default, (list(value.shape), 0), kind)
    zeros.meta = dict(node.meta)
    return call(graph, aten.slice_scatter.default, (zeros, product, dim, start, end), {}, node)


def _of_column(graph: Graph, node: Node) -> Node | None:
    """``mm(a, bᵀ) = a ⊙ bᵀ`` for a column and a row."""
    left, right = arguments(node)
    if not is_equal(value_of(left).shape[1], 1):
        return None
    return call(graph, aten.mul.Tensor, (left, right), {}, node)


def _of_what_is_read(graph: Graph, node: Node, read: Node) -> Node | None:
    if read.target not in (aten.slice.Tensor, aten.select.int):
        return None
    dim, *rest = arguments(read)[1:] or (0,)
    place = _place(read.target, value_of(node).shape[dim], *rest)
    if place is None:
        return None
    operands = list(arguments(node))
    operands[dim] = _cut(graph, operands[dim], dim, place, node)
    product = call(graph, aten.mm.default, operands, {}, node)
    if read.target is aten.slice.Tensor:
        return product
    return call(graph, aten.select.int, (product, dim, 0), {}, read)


def _part(node: Node) -> Part | None:
    """Return the columns, or rows, of a matrix that is zero elsewhere."""
    args = arguments(node)
    if node.target is aten.permute.default and list(args[1]) == [1, 0]:
        part = _part(args[0])
        return part and (part[0], not part[1], 1 - part[2], part[3], part[4])
    if node.target not in _SCATTERED or filling(args[0]) != 0:
        return None
    _, source, *rest = args
    dim, *rest = rest or (0,)
    place = _place(_SCATTERED[node.target], value_of(node).shape[dim], *rest)
    return place and (source, False, dim % 2, place[0], place[1])


def _place(
    target: Any, size: Any, start: Any = None, end: Any = None, step: Any = 1
) -> tuple[int, int] | None:
    """Return from where to where a slice, or a selected place, reaches; None if that is everything
    or not known."""
    if not isinstance(size, int) or not all(isinstance(x, int | None) for x in (start, end)):
        return None
    if target is aten.select.int:
        begin = start % size
        return (begin, begin + 1) if size > 1 else None
    begin, stop, _ = slice(start, end).indices(size)
    return (begin, stop) if 0 < stop - begin < size and step == 1 else None


def _cut(graph: Graph, node: Node, dim: int, place: tuple[int, int], like: Node) -> Node:
    return call(graph, aten.slice.Tensor, (node, dim, *place), {}, like)
