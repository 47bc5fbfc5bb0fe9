"""Let an operator with several results compute only those that are used."""

from __future__ import annotations

import operator

import torch
from torch.fx import Graph, Node

from passes.graph import arguments, value_of
from passes.simplify.emit import call
from passes.simplify.filled import RESHAPES

aten = torch.ops.aten


def narrow_masks(graph: Graph) -> int:
    """Split ``convolution_backward`` into one call per result that is used, each with the mask of
    that result alone.

    Autograd asks for input, weight and bias gradients in one call; of the inner gradient usually
    the first is needed and of its tangent the second. The bias' gradient becomes a plain sum, and
    what only gives a shape an empty tensor of it.
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
        changes += _forget_weight(graph, node) if mask == [False, True, False] else 0
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


def _forget_weight(graph: Graph, node: Node) -> int:
    """Its own gradient reads the shape of a weight alone; one that is repeated need not be."""
    source = weight = arguments(node)[2]
    while source.target in RESHAPES or source.target is aten.clone.default:
        source = arguments(source)[0]
    value = value_of(weight)
    if source is weight or source.target is not aten.expand.default:
        return 0
    with graph.inserting_before(node):
        single = arguments(source)[0]
        nothing = call(graph, aten.new_empty.default, (single, []), {}, weight)
        shape = call(graph, aten.expand.default, (nothing, list(value.shape)), {}, weight)
    node.replace_input_with(weight, shape)
    return 1


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
