"""What of a body is an operand, and what its inputs are outside of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from passes import derivative
from passes.contraction.rows import Rows, RowsMix
from passes.contraction.terms import Base, Computed, code_of, leaves_of
from passes.graph import arguments, needs, placeholders, reaches, results, value_of
from passes.simplify.emit import call

aten = torch.ops.aten
# Views that may be of all of a tensor, in order.
_WHOLE = {
    aten.alias.default, aten.permute.default, aten.reshape.default, aten.view.default,
    aten.expand.default,
}  # fmt: skip
# Of one tensor, and linear with numbers 0 and 1.
_PLAIN = {
    *_WHOLE, aten.clone.default, aten.t.default, aten.transpose.int, aten.select.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten._unsafe_view.default,
    aten.sum.default, aten.sum.dim_IntList,
}  # fmt: skip


def dependent(
    body: GraphModule, outputs: Iterable[int], points: Iterable[int]
) -> list[tuple[int, int]]:
    """Return which results of a body depend on which of its points.

    Raises:
        RowsMix: None does.
    """
    inside, found = placeholders(body.graph), results(body.graph)
    pairs = itertools.product(outputs, points)
    there = [(out, at) for out, at in pairs if inside[at] in needs([found[out]])]
    if not there:
        raise RowsMix("what is differentiated does not depend on the point")
    return there


def place_of(point: Node, base: Base, moving: set[Node]) -> int:
    """Return the position of a point among the inputs of an operand, whose rows are proven to be
    apart in it.

    Raises:
        RowsMix: It is none of them, they depend on it otherwise, or rows mix.
    """
    places = [k for k, item in enumerate(base.inputs) if same_as(item) is point]
    rest = [n for k, item in enumerate(base.inputs) if k not in places for n in leaves_of(item)]
    if any(n in moving for n in rest):
        raise RowsMix("an inner derivative reads what moves with the point")
    if len(places) != 1:
        raise RowsMix("an inner derivative at another point")
    (place,) = places
    if not base.mixing and place not in base.apart:
        rows = Rows(base.body.graph, placeholders(base.body.graph)[place])
        if rows.kept.get(results(base.body.graph)[0]) != 0:
            raise RowsMix(next(iter(rows.reasons.values()), "rows are in several dimensions"))
    return place


def read_by(module: GraphModule, node: Node) -> list[Node]:
    """Return the inputs of a graph that a node depends on, in the order in which they are read."""
    read = needs([node])
    reads = [n for user in module.graph.nodes if user in read for n in user.all_input_nodes]
    return list(dict.fromkeys(n for n in [*reads, node] if n.op == "placeholder"))


def moving_with(points: Sequence[Node]) -> set[Node]:
    """Return what has a derivative at points."""
    return reaches(points, through=lambda node: node.target is not derivative.stop)


def seen_outside(body: GraphModule, moving: set[Node], outside: dict[Node, Any], item: Any) -> Any:
    """Return what is the same as an explicit tensor of a body, outside of it: what is given for an
    input, or what is computed from that.

    Raises:
        RowsMix: It depends on the body's point, or on a derivative.
    """
    if isinstance(item, Computed):
        read = tuple(seen_outside(body, moving, outside, i) for i in item.inputs)
        return replace(item, inputs=read)
    if item in outside or not isinstance(item, Node):
        return outside.get(item, item)
    if item in moving:
        raise RowsMix("an inner derivative with a factor that moves with the point")
    read = needs([item])
    if any("site" in node.meta for node in read):
        raise RowsMix("a factor that is computed from another derivative")
    inputs = [n for n in placeholders(body.graph) if n in read]
    own = up_to(body, inputs, item)
    return Computed(own, code_of(own), tuple(outside[n] for n in inputs), value_of(item))


def same_as(node: Any) -> Any:
    """Return the node that a view of all of it, in order, is made of."""
    while isinstance(node, Node) and node.target in _WHOLE:
        source: Any = node.args[0]
        if node.target is aten.permute.default and list(arguments(node)[1]) != sorted(
            arguments(node)[1]
        ):
            break
        if node.target not in (aten.alias.default, aten.permute.default) and (
            value_of(source).shape != value_of(node).shape
        ):
            break
        node = source
    return node


def whole_operands(module: GraphModule) -> set[Node]:
    """Return what the results of a body are views, slices and sums of."""
    found = set()
    for node in results(module.graph):
        while isinstance(node, Node) and node.target in _PLAIN and len(node.all_input_nodes) == 1:
            node = node.args[0]
        if isinstance(node, Node) and node.op == "call_function":
            found.add(node)
    return found


def up_to(module: GraphModule, inputs: Sequence[Node], node: Node, first: int = 0) -> GraphModule:
    """Return the graph that computes a node from the given inputs, with one of its dimensions made
    the first."""
    graph = Graph()
    copies = {source: graph.node_copy(source) for source in inputs}
    read = needs([node])
    for source in module.graph.nodes:
        if source in read and source not in copies:
            copies[source] = graph.node_copy(source, copies.__getitem__)
    result = copies[node]
    if first:
        order = [first, *(d for d in range(value_of(node).dim()) if d != first)]
        result = call(graph, aten.permute.default, (result, order), {}, node)
    graph.output((result,))
    return GraphModule(module, graph)
