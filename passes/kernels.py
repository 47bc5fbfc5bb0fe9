"""How many kernels the pointwise work of a graph takes."""

from __future__ import annotations

import networkx
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from passes.bytes import memory_owners
from passes.graph import is_random, value_of


def is_product(node: Node) -> bool:
    """Whether a node is a matrix product or a convolution: a kernel of its own."""
    return getattr(node.target, "overloadpacket", None) in flop_registry


def count_kernels(module: GraphModule) -> int:
    """Return the number of groups of pointwise and reducing operators that one kernel each can
    compute.

    Operators are of one group if they are connected and as many products, one after the other, come
    before them: with a product between them they cannot run together. Views cost nothing, and
    constants are written into the kernels that read them. How a compiler fuses is its own affair;
    this says what two graphs ask of it.

    Args:
        module: A functional ATen graph.
    """
    owner = memory_owners(module)
    before: dict[Node, int] = {}
    groups: networkx.Graph[Node] = networkx.Graph()
    for node in module.graph.nodes:
        read = {owner[source] for source in node.all_input_nodes}
        before[node] = max((before[r] + is_product(r) for r in read), default=0)
        if not _is_work(node) or owner[node] is not node:
            continue
        groups.add_node(node)
        near = (r for r in read if r in groups and before[r] == before[node])
        groups.add_edges_from((node, r) for r in near)
    return networkx.number_connected_components(groups)


def _is_work(node: Node) -> bool:
    """Whether a node fills memory, other than with a product or a constant."""
    if node.op != "call_function" or is_product(node):
        return False
    if not any(isinstance(value, Tensor) for value in tree_leaves(value_of(node))):
        return False
    reads = any(isinstance(value_of(r), (Tensor, tuple, list)) for r in node.all_input_nodes)
    return reads or is_random(node)
