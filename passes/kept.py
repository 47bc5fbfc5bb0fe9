"""What a graph keeps in memory."""

from __future__ import annotations

import sympy
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.graph import value_of
from passes.price import evaluated, is_view, size_in_bytes


def bytes_kept(module: GraphModule, hints: dict[sympy.Symbol, int]) -> int:
    """Return the most bytes that computed values fill at one moment.

    The graph runs in its own order and every value is freed after its last use. Inputs do not
    count; a view keeps the memory that it looks at.

    Args:
        module: A functional ATen graph.
        hints: What its symbolic sizes are.
    """
    owner: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    size: dict[Node, int] = {}
    nodes = list(module.graph.nodes)
    for index, node in enumerate(nodes):
        seen = is_view(node) and bool(node.all_input_nodes)
        owner[node] = owner[node.all_input_nodes[0]] if seen else node
        if node.op == "call_function" and not seen:
            made = [size_in_bytes(value) for value in tree_leaves(value_of(node))]
            size[node] = evaluated(sum(made, start=sympy.Integer(0)), hints)
        for read in (node, *node.all_input_nodes):
            last[owner[read]] = index
    dying: dict[int, int] = {}
    for node, index in last.items():
        dying[index] = dying.get(index, 0) + size.get(node, 0)
    kept = most = 0
    for index, node in enumerate(nodes):
        kept += size.get(node, 0)
        most = max(most, kept)
        kept -= dying.get(index, 0)
    return most
