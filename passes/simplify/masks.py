"""Let an operator with several results compute only those that are used."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten


def narrow_masks(graph: Graph) -> int:
    """Split ``convolution_backward`` into one call per result that is used, each with the mask of that result alone.

    Autograd asks for input, weight and bias gradients in one call; of the inner gradient usually the first is needed and of its
    tangent the second. The bias' gradient becomes a plain sum.
    """
    changes = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.convolution_backward.default)):
        used = {item.args[1] for item in node.users if item.target is operator.getitem}
        mask = list(node.args[10])
        if mask[2] and 2 in used:
            changes += _bias_as_sum(graph, node)
            used.discard(2)
        if sum(mask) == 1 and len(used) <= 1:
            continue
        for item in list(node.users):
            only = [index == item.args[1] for index in range(3)]
            with graph.inserting_before(node):
                single = graph.call_function(node.target, (*node.args[:10], only))
            values = node.meta["val"]
            single.meta = {**node.meta, "val": tuple(v if o else None for v, o in zip(values, only, strict=True))}
            item.args = (single, item.args[1])
            changes += 1
        if not node.users:
            graph.erase_node(node)
    return changes


def _bias_as_sum(graph: Graph, node: Node) -> int:
    grad = node.args[0]
    assert isinstance(grad, Node)
    rank = grad.meta["val"].dim()
    for item in [user for user in node.users if user.args[1] == 2]:
        with graph.inserting_before(item):
            total = graph.call_function(aten.sum.dim_IntList, (grad, [0, *range(2, rank)]))
        total.meta = dict(item.meta)
        item.replace_all_uses_with(total)
        graph.erase_node(item)
    return 1
