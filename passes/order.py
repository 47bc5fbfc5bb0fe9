"""Put a graph's nodes back in an order that can run."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx
from torch.fx import Graph, Node

from passes.graph import is_random


def sort_nodes(graph: Graph, draws: Sequence[Node] | None = None) -> int:
    """Sort topologically, as near to the present order as can be, random draws in the order they
    have now.

    Draws keep their order because the generator hands out its numbers in sequence. The constraint
    never makes a cycle: a draw depends only on values that the loss as written computes before it.

    Args:
        graph: Changed in place.
        draws: The order of the draws, where it is not that of the graph.

    Returns:
        How many nodes changed place.

    Raises:
        networkx.NetworkXUnfeasible: ``draws`` are in an order that no run can have; the graph is
            unchanged.
    """
    nodes = list(graph.nodes)
    place = {node: index for index, node in enumerate(nodes)}
    dependencies = nx.DiGraph()
    dependencies.add_nodes_from(nodes)
    dependencies.add_edges_from((read, node) for node in nodes for read in node.all_input_nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    nx.add_path(dependencies, inputs)
    nx.add_path(dependencies, draws or [node for node in nodes if is_random(node)])
    # Keys are unique, so the sort is a total order and never compares nodes.
    order = list(nx.lexicographical_topological_sort(dependencies, key=place.__getitem__))
    output = graph.output_node()
    order.remove(output)
    for node in order:
        output.prepend(node)
    return sum(old is not new for old, new in zip(nodes, [*order, output], strict=True))
