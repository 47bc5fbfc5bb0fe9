"""Let an operator with several results compute only those that are used."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from passes.graph import arguments

aten = torch.ops.aten


def narrow_masks(graph: Graph) -> int:
    """Split ``convolution_backward`` into one call per result that is used, each with the mask of
    that result alone.

    Autograd asks for input, weight and bias gradients in one call; of the inner gradient usually
    the first is needed and of its tangent the second. The bias' gradient becomes a plain sum.
    """
    changes = 0
    for node in list(
        graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    ):
        used = {arguments(item)[1] for item in node.users if item.target is operator.getitem}
        mask = list(arguments(node)[10])
        if mask[2] and 2 in used:
            changes += _bias_as_sum(graph, node)
            used.discard(2)
        if sum(mask) == 1 and len(used) <= 1:
            continue
        for item in list(node.users):
            only = [index == arguments(item)[1] for index in range(3)]
            with graph.inserting_before(node):
                single = graph.call_function(node.target, (*arguments(node)[:10], only))
            values = node.meta["val"]
            single.meta = {
                **node.meta,
                "val": tuple(v if o else None for v, o in zip(values, only, strict=True)),
            }
            item.args = (single, arguments(item)[1])
            changes += 1
        if not node.users:
            graph.erase_node(node)
    return changes


def _bias_as_sum(graph: Graph, node: Node) -> int:
    grad = arguments(node)[0]
    assert isinstance(grad, Node)
    rank = grad.meta["val"].dim()
    for item in [user for user in node.users if user.args[1] == 2]:
        with graph.inserting_before(item):
            total = graph.call_function(aten.sum.dim_IntList, (grad, [0, *range(2, rank)]))
        total.meta = dict(item.meta)
        item.replace_all_uses_with(total)
        graph.erase_node(item)
    return 1
