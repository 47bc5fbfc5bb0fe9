"""What values fill in memory, as expressions in the symbolic sizes."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from passes.graph import value_of

# Views move no bytes.
_VIEWS = {
    torch.ops.aten.view.default, torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default, torch.ops.aten.expand.default,
    torch.ops.aten.permute.default, torch.ops.aten.t.default, torch.ops.aten.unsqueeze.default,
    torch.ops.aten.squeeze.dim, torch.ops.aten.squeeze.dims, torch.ops.aten.select.int,
    torch.ops.aten.slice.Tensor, torch.ops.aten.transpose.int, torch.ops.aten.detach.default,
    torch.ops.aten.alias.default, torch.ops.aten.diagonal.default,
}  # fmt: skip


def as_expression(size: Any) -> sympy.Expr:
    """Return a size, or a sum of sizes, as an expression."""
    node = getattr(size, "node", None)
    return sympy.sympify(node.expr if node is not None else size)


def size_in_bytes(value: Any) -> sympy.Expr:
    """Return the bytes that a tensor fills."""
    if not isinstance(value, Tensor):
        return sympy.Integer(0)
    elements = sympy.Integer(1)
    for size in value.shape:
        elements *= as_expression(size)
    return elements * value.element_size()


def bytes_made(node: Node) -> sympy.Expr:
    """Return the bytes that the results of a node fill."""
    made = (size_in_bytes(value) for value in tree_leaves(value_of(node)))
    return sum(made, start=sympy.Integer(0))


def is_view(node: Node) -> bool:
    """Whether a node only looks at memory that another has filled."""
    return node.target in _VIEWS or getattr(node.target, "__name__", "") == "getitem"


def node_bytes(node: Node) -> sympy.Expr:
    """Return the bytes that one node reads and writes."""
    if is_view(node):
        return sympy.Integer(0)
    read = (size_in_bytes(value_of(source)) for source in node.all_input_nodes)
    return sum(read, start=bytes_made(node))


def memory_owners(module: GraphModule) -> dict[Node, Node]:
    """Return, for each node, the one that filled the memory that it looks at: itself, but for a
    view."""
    owner: dict[Node, Node] = {}
    for node in module.graph.nodes:
        seen = is_view(node) and bool(node.all_input_nodes)
        owner[node] = owner[node.all_input_nodes[0]] if seen else node
    return owner
