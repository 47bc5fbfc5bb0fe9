"""Take a batch of matrix products as one where it is one.

Of points (length, batch, width) that are not laid out in this order, `linear` makes a batch of
products with one weight, and the weight's gradient a batch of outer products to be summed up: a
tensor (length, width, width).
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from passes.graph import are_equal, arguments, elements, hint, is_equal, value_of
from passes.simplify.emit import call, size_of

aten = torch.ops.aten


def fold_batches(graph: Graph) -> int:
    """``bmm(X, expand(W)) → mm(X, W)`` and ``sum(bmm(Xᵀ, Y), 0) → mm(Xᵀ, Y)``, rows of the batch
    put one below the other, where that moves no more bytes."""
    changes = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.bmm.default)):
        if not node.users:
            continue
        with graph.inserting_before(node):
            folded = _of_one_weight(graph, node)
        replaced = node
        if folded is None:
            replaced = next(iter(node.users))
            with graph.inserting_before(replaced):
                folded = _of_summed(graph, node, replaced)
        if folded is None:
            continue
        replaced.replace_all_uses_with(folded)
        graph.erase_node(replaced)
        changes += 1
    return changes


def _of_one_weight(graph: Graph, node: Node) -> Node | None:
    x, weights = arguments(node)
    is_turned = _is_turned(weights)
    if is_turned:
        weights = arguments(weights)[0]
    if weights.target is not aten.expand.default:
        return None
    weight = arguments(weights)[0]
    batch = value_of(x).shape[0]
    if value_of(weight).dim() == 3 and not is_equal(value_of(weight).shape[0], 1):
        return None
    if _copied(x) > hint(batch) * elements(value_of(weight)):
        return None
    if value_of(weight).dim() == 3:
        weight = call(graph, aten.squeeze.dims, (weight, [0]), {}, node)
    if is_turned:
        weight = call(graph, aten.permute.default, (weight, [1, 0]), {}, node)
    flat = call(graph, aten.reshape.default, (x, [-1, size_of(graph, x, 2)]), {}, node)
    product = call(graph, aten.mm.default, (flat, weight), {}, node)
    sizes = [size_of(graph, x, 0), size_of(graph, x, 1), size_of(graph, weight, 1)]
    return call(graph, aten.reshape.default, (product, sizes), {}, node)


def _of_summed(graph: Graph, node: Node, total: Node) -> Node | None:
    if total.target is not aten.sum.dim_IntList or len(node.users) > 1 or total.kwargs:
        return None
    dims = list(arguments(total)[1] or [])
    left, right = arguments(node)
    if dims not in ([0], [-3]) or not _is_turned(left):
        return None
    left = arguments(left)[0]
    if _copied(left) + _copied(right) > elements(value_of(node)):
        return None
    flat = [
        call(graph, aten.reshape.default, (x, [-1, size_of(graph, x, 2)]), {}, total)
        for x in (left, right)
    ]
    turned = call(graph, aten.permute.default, (flat[0], [1, 0]), {}, total)
    product = call(graph, aten.mm.default, (turned, flat[1]), {}, total)
    if not are_equal(value_of(product).shape, value_of(total).shape):
        sizes = [1, size_of(graph, product, 0), size_of(graph, product, 1)]
        return call(graph, aten.reshape.default, (product, sizes), {}, total)
    return product


def _is_turned(node: Node) -> bool:
    return node.target is aten.permute.default and list(arguments(node)[1]) in (
        [0, 2, 1],
        [0, -1, -2],
    )


def _copied(node: Node) -> int:
    """Return how many elements are copied to put the matrices of a batch one below the other."""
    value = value_of(node)
    _, rows, columns = value.shape
    laid_out = are_equal(value.stride(), (rows * columns, columns, 1))
    return 0 if laid_out else elements(value)
