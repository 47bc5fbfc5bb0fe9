"""Take groups of a convolution that have the same weight as rows of its batch.

`vmap` makes samples with a weight each the groups of one convolution. Where the weight is the same
for all of them it was repeated for that, a tensor (batch, parameters), and its gradient is one for
each of them, to be summed up. Of a table of rows to be looked up it makes one long table.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.graph import are_equal, arguments, value_of
from passes.simplify.emit import call
from passes.simplify.factors.tables import of_samples
from passes.simplify.filled import RESHAPES

aten = torch.ops.aten

_BACKWARD = aten.convolution_backward.default


def fold_groups(graph: Graph) -> int:
    """``convolution(x[b, N·c], repeat(W, N), groups=N·g) → convolution(x[b·N, c], W, groups=g)``,
    its pullback in x, and ``Σₙ`` of its pullback in the weights; ``embedding(repeat(W, N), i +
    offsets of samples) → embedding(W, i)``."""
    changes = 0
    for node in list(graph.nodes):
        rule = _RULES.get(node.target)
        made = rule(graph, node) if rule and node.users else None
        if made is not None:
            node.replace_all_uses_with(made)
            graph.erase_node(node)
            changes += 1
    return changes


def _of_one_weight(graph: Graph, node: Node) -> Node | None:
    x, weight, bias, *settings, groups = arguments(node)
    found = _repeated(weight, groups)
    if found is None or bias is not None:
        return None
    number, single = found
    with graph.inserting_before(node):
        args = (_rows(graph, x, number, node), single, None, *settings, groups // number)
        made = call(graph, node.target, args, {}, node)
        return call(graph, aten.reshape.default, (made, list(value_of(node).shape)), {}, node)


def _of_gradient(graph: Graph, node: Node) -> Node | None:
    """The pullback in x alone."""
    backward, position = arguments(node)
    if backward.target is not _BACKWARD:
        return None
    grad, x, weight, bias, *settings, groups, mask = arguments(backward)
    found = _repeated(weight, groups)
    if found is None or position != 0 or list(mask) != [True, False, False]:
        return None
    number, single = found
    with graph.inserting_before(node):
        rows = [_rows(graph, item, number, node) for item in (grad, x)]
        args = (*rows, single, bias, *settings, groups // number, mask)
        made = _result(graph, call(graph, _BACKWARD, args, {}, backward), 0, node)
        return call(graph, aten.reshape.default, (made, list(value_of(node).shape)), {}, node)


def _of_summed(graph: Graph, node: Node) -> Node | None:
    """The pullback in the weights alone, one for each of N, summed over these."""
    if len(node.args) < 2 or node.kwargs:
        return None
    view, dims, *keep = arguments(node)
    item = _formed(view, alone=True)
    if item.target is not operator.getitem or arguments(item)[0].target is not _BACKWARD:
        return None
    grad, x, weight, bias, *settings, groups, mask = arguments(arguments(item)[0])
    shape, parts = value_of(item).shape, value_of(view).shape
    if list(mask) != [False, True, False] or list(dims or []) != [0]:
        return None
    if len(item.users) > 1:  # they are needed one by one too
        return None
    if len(parts) != len(shape) + 1 or not are_equal(parts[2:], shape[1:]):
        return None
    number = parts[0]
    if not _are_numbers(number, groups, *shape) or number < 2 or groups % number:
        return None
    with graph.inserting_before(node):
        rows = [_rows(graph, item, number, node) for item in (grad, x)]
        found = _repeated(weight, groups)
        if found is not None and found[0] == number:
            like = found[1]
        else:  # its shape is read
            like = call(graph, aten.slice.Tensor, (weight, 0, 0, shape[0] // number), {}, node)
        args = (*rows, like, bias, *settings, groups // number, mask)
        backward = call(graph, _BACKWARD, args, {}, arguments(item)[0])
        made = _result(graph, backward, 1, node)
        return call(graph, aten.unsqueeze.default, (made, 0), {}, node) if any(keep) else made


def _of_one_table(graph: Graph, node: Node) -> Node | None:
    table, positions, *rest = arguments(node)
    length = value_of(table).shape[0]
    if rest or node.kwargs or not _are_numbers(length):
        return None
    own, sample, single = of_samples(positions, length)
    found = _repeated(table, length) if sample is not None else None
    if found is None or found[0] * single != length:
        return None
    with graph.inserting_before(node):
        return call(graph, node.target, (found[1], own), {}, node)


def _result(graph: Graph, backward: Node, position: int, like: Node) -> Node:
    return call(graph, operator.getitem, (backward, position), {}, like)


def _rows(graph: Graph, x: Node, number: int, like: Node) -> Node:
    """Turn some parts of the channels into rows."""
    rows, channels, *sizes = value_of(x).shape
    shape = [rows * number, channels // number, *sizes]
    return call(graph, aten.reshape.default, (x, shape), {}, like)


def _repeated(weight: Node, groups: Any) -> tuple[int, Node] | None:
    """Return how often a weight is repeated along its first dimension, and the weight."""
    repeated, shape = _formed(weight), value_of(weight).shape
    if repeated is weight or repeated.target is not aten.expand.default:
        return None
    source = arguments(repeated)[0]
    single, parts = value_of(source).shape, value_of(repeated).shape
    if len(parts) != len(shape) + 1 or not are_equal(parts[2:], shape[1:]):
        return None
    if len(single) != len(parts) or not are_equal(single, (1, *parts[1:])):
        return None
    if not _are_numbers(parts[0], groups, *shape) or parts[0] < 2 or groups % parts[0]:
        return None
    with weight.graph.inserting_before(weight):
        return parts[0], call(weight.graph, aten.squeeze.dims, (source, [0]), {}, weight)


def _formed(node: Node, *, alone: bool = False) -> Node:
    """Return what a tensor is a copy, or a view in another shape, of; with ``alone`` no further
    than it is read by nothing else."""
    while node.target in RESHAPES or node.target is aten.clone.default:
        if alone and len(node.users) > 1:
            break
        node = arguments(node)[0]
    return node


def _are_numbers(*sizes: Any) -> bool:
    return all(isinstance(size, int) for size in sizes)


_RULES = {
    aten.convolution.default: _of_one_weight,
    aten.embedding.default: _of_one_table,
    aten.sum.dim_IntList: _of_summed,
    operator.getitem: _of_gradient,
}
