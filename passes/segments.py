"""Cut a graph behind some of its values: each segment takes what those before it have computed.

Autograd sees one node for a compiled graph, and no path from one of its results to another. Where a
result is computed from another one, ``u₂ = g(u₁, x)`` with ``u₁ = f(x)``, two segments keep the
path: ``∂u₂/∂u₁`` can be asked for from outside, as of the graph run op by op.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from passes.graph import finish, results, value_of


@dataclass(frozen=True)
class Segment:
    """A piece of a graph.

    Attributes:
        module: ``(*takes) → (*gives)``.
        takes: The nodes of the whole graph whose values it takes.
        gives: Those whose values it returns.
    """

    module: GraphModule
    takes: tuple[Node, ...]
    gives: tuple[Node, ...]


def read_results(module: GraphModule, candidates: Collection[Node]) -> list[Node]:
    """Return those of some results that another result is computed from, in the graph's order.

    Args:
        module: Any graph.
        candidates: Results of it.
    """
    ends = {node for node in results(module.graph) if isinstance(node, Node)}
    reads: set[Node] = set()  # all that lead to a result, that result itself left out
    for node in reversed(module.graph.nodes):
        if node.op == "call_function" and (node in ends or node in reads):
            reads.update(node.all_input_nodes)
    return [n for n in module.graph.nodes if n in reads and n in candidates]


def segments(module: GraphModule, cuts: Collection[Node]) -> list[Segment]:
    """Cut a graph behind each of ``cuts``."""
    place = _places(module.graph, cuts)
    ends = {node for node in results(module.graph) if isinstance(node, Node)}
    found = []
    for number in range(len(cuts) + 1):
        own = [node for node, where in place.items() if where == number]
        gives = [
            node
            for node in own
            if isinstance(value_of(node), Tensor)
            and (node in ends or any(place.get(user, number) > number for user in node.users))
        ]
        if gives:
            found.append(_segment(module, place, own, gives))
    return found


def _places(graph: Graph, cuts: Collection[Node]) -> dict[Node, int]:
    """Return the number of the segment that each operator belongs to; a number, such as a size,
    belongs to none: it is computed wherever it is read."""
    place: dict[Node, int] = {}
    passed = 0
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(value_of(node), (Tensor, tuple, list)):
            several = (n for n in node.all_input_nodes if isinstance(value_of(n), (tuple, list)))
            # A part of what an operator returns goes with the operator.
            place[node] = min((place[n] for n in several if n in place), default=passed)
        passed += node in cuts
    return place


def _segment(
    module: GraphModule, place: dict[Node, int], own: Sequence[Node], gives: Sequence[Node]
) -> Segment:
    number = place[own[0]]
    inside, takes = set(own), dict[Node, None]()
    ahead = list(own)
    while ahead:
        for node in ahead.pop().all_input_nodes:
            if node in inside or node in takes:
                continue
            if node.op == "placeholder" or place.get(node, number) < number:
                takes[node] = None
            else:  # a number, or a constant
                inside.add(node)
                ahead.append(node)
    graph, copies = Graph(), dict[Node, Node]()
    for node in takes:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in inside:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in gives))
    return Segment(finish(GraphModule(module, graph)), tuple(takes), tuple(gives))
