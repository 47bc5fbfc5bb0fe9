"""Turn each mark of the flat graph into one derivative node with a body of its own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch.fx import Graph, GraphModule, Node

from passes import derivative
from passes.graph import (
    arguments,
    attribute_of,
    between,
    drop_dead,
    finish,
    is_float,
    is_random,
    needs,
    placeholders,
    reaches,
    results,
    value_of,
    where,
)
from passes.markers import GRADIENT, LEAF, POINT, STOP, TANGENT
from passes.order import sort_nodes
from passes.origin import note, note_new, note_site
from passes.simplify import simplify
from passes.simplify.emit import size_of
from passes.tracing import example_inputs, fake_mode_of, trace


class NotNested(Exception):
    """A derivative that cannot be given a body; the message says why and where."""


@dataclass(frozen=True)
class Site:
    """One nested derivative of the user's loss.

    Attributes:
        name: ``gradient``, ``gradient_1``, … in the order they are computed.
        operator: What is computed: ``gradient``, or ``jacobian`` when several seeds are pulled back
            at once.
        order: 1 for a derivative of plain code, one more for each derivative its body contains.
        where: ``file:line`` and the line's code, as far as known.
    """

    name: str
    operator: str
    order: int
    where: str


def active_nodes(module: GraphModule, requiring_grad: set[Node]) -> set[Node]:
    """Return the nodes that carry a gradient from the given inputs.

    Float tensors that depend on one of them, not behind a stop. A value that leaves a derivative
    node carries one if it does inside the body.
    """
    active = set(requiring_grad)
    for node in module.graph.nodes:
        if node.op != "call_function" or not active.intersection(node.all_input_nodes):
            continue
        if node.target in (STOP, LEAF, derivative.stop):
            continue
        if _is_item_of_derivative(node):
            source, index = arguments(node)
            if _is_active_result(module, source, index, active):
                active.add(node)
        elif is_float(node) or isinstance(value_of(node), (tuple, list)):
            active.add(node)
    return active


def _is_item_of_derivative(node: Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, Node) and source.target in (derivative.gradient, derivative.tangent)


def _is_active_result(module: GraphModule, node: Node, index: int, active: set[Node]) -> bool:
    _, n_points, n_outputs, _, *inputs = arguments(node)
    n_derivatives = n_points if node.target is derivative.gradient else n_outputs
    if index < n_derivatives:
        return True
    body = body_of(module, node)
    read = zip(placeholders(body.graph), inputs, strict=False)
    inside = active_nodes(body, {inner for inner, outer in read if outer in active})
    return results(body.graph)[index - n_derivatives] in inside


def nest(module: GraphModule) -> int:
    """Replace ``gradient(outputs, inputs, seeds) → gradient(body, *points, *captured, *seeds)``.

    The body is every node on a path from a point to an output; what else it reads is captured.
    Values of the body that are used elsewhere leave as further results of the same node, so that
    value and gradient are one site and one pullback serves both. The nodes stay outside, and the
    body is a copy of them, where they have a second master: seeds computed from the body, or
    another derivative that starts or passes inside it without containing this one. Copies of the
    primal meet again in the joint graph, as common subexpressions.

    Args:
        module: The flat graph; changed in place into the derivative graph.

    Returns:
        How many derivative nodes were made.

    Raises:
        NotNested: A derivative cannot be given a body; the graph is left half nested.
    """
    graph = module.graph
    _split_dependent_points(graph)
    marks = [node for node in graph.nodes if node.target in (GRADIENT, TANGENT)]
    draws = [node for node in graph.nodes if is_random(node)]
    for made, mark in enumerate(marks):
        name = f"gradient_{made}" if made else "gradient"
        _nest_one(module, mark, name, marks[made + 1 :], draws)
    dissolve_marks(module)
    sort_nodes(graph)
    drop_dead(graph)
    note_new(module, "nest", "nest.")
    finish(module)
    return len(marks)


def _split_dependent_points(graph: Graph) -> None:
    """Give every point its own mark where one point of a mark is computed from another, or given
    twice: each gradient is a total derivative."""
    for mark in list(graph.find_nodes(op="call_function", target=GRADIENT)):
        outputs, points, seeds, seed_dims = arguments(mark)
        if len(points) == 1:
            continue
        after = [between([p], points) for p in points]
        dependent = any(p in after[i] for p in points for i, q in enumerate(points) if p is not q)
        if not dependent and len(set(points)) == len(points):
            continue
        with graph.inserting_before(mark):
            for index, point in enumerate(points):
                single = graph.call_function(GRADIENT, (outputs, [point], seeds, seed_dims))
                single.meta = {**mark.meta, "val": [value_of(mark)[index]]}
                grad = graph.call_function(operator.getitem, (single, 0))
                grad.meta = {**mark.meta, "val": value_of(mark)[index]}
                _replace_item(mark, index, grad)
        graph.erase_node(mark)


def _replace_item(node: Node, index: int, by: Node) -> None:
    for item in [user for user in node.users if user.target is operator.getitem]:
        if arguments(item)[1] == index:
            item.replace_all_uses_with(by)
            item.graph.erase_node(item)


def _body_nodes(points: list[Node], outputs: list[Node]) -> set[Node]:
    inside = between(points, outputs) - set(points)
    # The items of a node with several results go where the node goes.
    for node in list(inside):
        if isinstance(value_of(node), (tuple, list)):
            inside.update(user for user in node.users if user.target is operator.getitem)
    return inside


def _nest_one(
    module: GraphModule, mark: Node, name: str, others: Sequence[Node], draws: list[Node]
) -> None:
    """Put a node with a body in the place of a mark.

    Args:
        module: The graph; in an order that can run, before and after.
        mark: The first mark that is left.
        name: The site's name.
        others: The marks behind it.
        draws: The graph's random draws in order; kept up to date.
    """
    graph = module.graph
    outputs, points, along, batch_dims = arguments(mark)
    backward = mark.target is GRADIENT
    inside = _body_nodes(points, outputs)
    _take_in_draws(draws, inside)
    within = [index for index, node in enumerate(draws) if node in inside]
    for other in others:
        if inside.intersection(arguments(other)[1]) and mark in needs(arguments(other)[0]):
            raise NotNested("a derivative at a hidden value of another derivative that it contains")
    live = [i for i, u in enumerate(outputs) if u in inside or u in points]
    answers = range(len(points)) if backward else live
    _replace_with_zeros(graph, mark, [] if live else list(answers))
    if not backward:
        _replace_with_zeros(graph, mark, [i for i in range(len(outputs)) if i not in live])
    if not live:
        graph.erase_node(mark)
        return
    if backward:
        along = [along[i] for i in live]
    outputs = [outputs[i] for i in live]
    copied = bool(between(list(inside), along)) or _has_other_master(mark, inside, others)
    if within and (copied or within[-1] - within[0] >= len(within)):
        raise NotNested(
            f"a random draw ({draws[within[0]].target}) depends on the point of a derivative, and "
            "the derivative cannot be computed in one piece"
        )
    escaping = [] if copied else _escaping(inside, outputs, mark)
    body, captured = _body(module, points, outputs, escaping, inside)
    order = 1 + max((n.meta["site"].order for n in inside if "site" in n.meta), default=0)
    if not backward and derivative.holds_user_function(body):
        raise NotNested("forward mode through a user-defined autograd.Function")
    whole = body
    if not backward and order > 1:
        body = without_derivatives(body)
    note_site(body, name, mark)
    body_name = f"body_{name}"
    module.register_module(body_name, body)
    derivatives = [value_of(mark)[i] for i in answers]
    with graph.inserting_before(mark):
        node = graph.call_function(
            derivative.gradient if backward else derivative.tangent,
            (
                graph.get_attr(body_name),
                len(points),
                len(outputs),
                batch_dims,
                *points,
                *captured,
                *along,
            ),
        )
        node.meta = {
            **mark.meta,
            "val": (*derivatives, *(value_of(n) for n in [*outputs, *escaping])),
            "site": Site(name, _operator(backward, batch_dims), order, where(mark)),
            "draws": bool(within),
            "whole": whole,
        }
        note(node, site=name, stage="nest", role="cotangent" if backward else "tangent")
        for position, index in enumerate(answers):
            _replace_item(mark, index, _item(graph, node, position))
        values = [] if copied else [*enumerate([*outputs, *escaping], start=len(derivatives))]
        is_sorted = not draws
        for index, old in values:
            outside = [u for u in old.users if u not in inside and u is not mark and u is not node]
            if outside and old not in points:
                new = _item(graph, node, index)
                old.replace_all_uses_with(new, delete_user_cb=lambda user: user in outside)  # noqa: B023
                is_sorted = is_sorted and not any(user < new for user in outside)
    graph.erase_node(mark)
    if not copied:
        for old in sorted(inside, reverse=True):
            graph.erase_node(old)
    if within:
        draws[within[0] : within[-1] + 1] = [node]
    if is_sorted:
        return
    try:
        sort_nodes(graph, draws)
    except networkx.NetworkXUnfeasible as error:
        raise NotNested(
            "a random draw depends on the point of a derivative and comes before another draw that "
            "the derivative reads"
        ) from error


def _take_in_draws(draws: list[Node], inside: set[Node]) -> None:
    """Add to a body that draws, the draws that must come between its own or between them and it,
    with what leads from them into the body."""
    while True:
        within = [index for index, node in enumerate(draws) if node in inside]
        if not within:
            return
        read = needs(inside)
        later = {
            node
            for index, node in enumerate(draws)
            if node not in inside and within[0] < index and (index < within[-1] or node in read)
        }
        if not later:
            return
        inside.update(later, reaches(later) & read)


def _operator(backward: bool, batch_dims: int) -> str:
    if backward:
        return "jacobian" if batch_dims else "gradient"
    return "jacobian (forward)" if batch_dims else "jvp"


def without_derivatives(body: GraphModule) -> GraphModule:
    """Trace a body that holds derivatives into plain operators, to be pushed forward."""
    inputs = example_inputs(body)
    plain = trace(lambda *values: tuple(body(*values)), inputs, fake_mode_of(inputs))
    simplify(plain)
    dissolve_marks(plain)
    return finish(plain)


def _item(graph: Graph, node: Node, index: int) -> Node:
    item = graph.call_function(operator.getitem, (node, index))
    item.meta = {
        key: value
        for key, value in node.meta.items()
        if key not in ("val", "site", "draws", "whole")
    } | {"val": value_of(node)[index]}
    note(item, source="")
    return item


def _has_other_master(mark: Node, inside: set[Node], others: Sequence[Node]) -> bool:
    """Whether another derivative still to be nested begins or passes inside, without containing
    this one."""
    if not inside:
        return False
    first, last = min(inside), max(inside)
    for other in others:
        outputs, points = arguments(other)[:2]
        if any(point in inside for point in points):
            return True
        if max(outputs) < first or last < min(points):
            continue
        theirs = _body_nodes(points, outputs)
        if mark not in theirs and theirs & inside:
            return True
    return False


def _escaping(inside: set[Node], outputs: list[Node], mark: Node) -> list[Node]:
    return [
        node
        for node in sorted(inside)
        if node not in outputs
        and not isinstance(value_of(node), (tuple, list))
        and any(user not in inside and user is not mark for user in node.users)
    ]


def _body(
    module: GraphModule,
    points: list[Node],
    outputs: list[Node],
    escaping: list[Node],
    inside: set[Node],
) -> tuple[GraphModule, list[Node]]:
    """Copy ``inside`` into a graph of its own; return it with the outer nodes it captures."""
    body = Graph()
    new: dict[Node, Node] = {}

    def take(node: Node) -> Node:
        copy = body.placeholder(node.name)
        copy.meta = dict(node.meta)
        return copy

    for point in points:
        new[point] = take(point)
    ordered = sorted(inside)
    captured: list[Node] = []
    for node in ordered:
        for read in node.all_input_nodes:
            if read not in inside and read not in new and read.op != "get_attr":
                new[read] = take(read)
                captured.append(read)
    attributes: dict[str, Any] = {}
    for node in ordered:
        for read in node.all_input_nodes:
            if read.op == "get_attr" and read not in new:
                attributes[str(read.target)] = attribute_of(module, str(read.target))
                new[read] = body.get_attr(str(read.target))
                new[read].meta = dict(read.meta)
        new[node] = body.node_copy(node, new.__getitem__)
    body.output(tuple(new[n] for n in [*outputs, *escaping]))
    root = torch.nn.Module()
    for target, value in attributes.items():
        setattr(root, target, value)
    result = GraphModule(root, body)
    dissolve_marks(result)
    return finish(result), captured


def _replace_with_zeros(graph: Graph, mark: Node, indices: list[int]) -> None:
    """A derivative of something that does not depend on the point is zero."""
    outputs, points, along, batch_dims = arguments(mark)
    for index in indices:
        value = value_of(mark)[index]
        like = points[index] if mark.target is GRADIENT else outputs[index]
        with graph.inserting_before(mark):
            shape = [size_of(graph, along[0], dim) for dim in range(batch_dims)]
            shape += [size_of(graph, like, dim) for dim in range(value_of(like).dim())]
            zeros = graph.call_function(
                torch.ops.aten.full.default,
                (shape, 0),
                {"dtype": value.dtype, "device": value.device},
            )
        zeros.meta["val"] = value
        _replace_item(mark, index, zeros)


def dissolve_marks(module: GraphModule) -> None:
    """Replace the marks that have become plain: ``point(x) → x``, ``leaf(x) → stop(x)``."""
    for node in list(module.graph.nodes):
        if node.target is POINT:
            node.replace_all_uses_with(arguments(node)[0])
            module.graph.erase_node(node)
        elif node.target in (LEAF, STOP):
            node.target = derivative.stop


def drop_stops(module: GraphModule) -> int:
    """Take away what keeps derivatives back where no derivative is taken; return how often.

    Only for a loss without a gradient of its own: there `torch.autograd.grad` without
    ``create_graph`` is what it is with it, and sums of such derivatives can be contracted.
    """
    differentiated = needs(sites(module))
    idle = [node for node in module.graph.find_nodes(op="call_function", target=derivative.stop)
            if node not in differentiated]  # fmt: skip
    for node in idle:
        node.replace_all_uses_with(node.all_input_nodes[0])
        module.graph.erase_node(node)
    return len(idle)


def sites(module: GraphModule) -> list[Node]:
    """Return the derivative nodes of a graph, not those inside bodies."""
    return [node for node in module.graph.nodes if "site" in node.meta]


def all_sites(module: GraphModule, nodes: list[Node]) -> list[Site]:
    """Return the records of derivative nodes and of all derivatives inside their bodies, inner ones
    first, each once."""
    found: dict[str, Site] = {}
    for node in nodes:
        if node.target in (derivative.gradient, derivative.tangent):
            body = body_of(module, node)
            found |= {site.name: site for site in all_sites(body, sites(body))}
        site = node.meta["site"]
        found[site.name] = site
    return list(found.values())


def points_of(node: Node) -> list[Any]:
    """Return what a derivative node differentiates at."""
    _, n_points, _, _, *inputs = arguments(node)
    return inputs[:n_points]


def body_of(module: GraphModule, node: Node) -> GraphModule:
    """Return the body graph of a derivative node."""
    attribute = arguments(node)[0]
    assert isinstance(attribute, Node), f"{node} has no body"
    return attribute_of(module, str(attribute.target))
