"""Compute each value once."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.graph import is_impure

aten = torch.ops.aten

COMMUTATIVE = {aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default}


def merge_common(graph: Graph, apart: Set[Node] = frozenset()) -> int:
    """Merge nodes that call the same operator on the same arguments, in either order where the
    operator commutes; the nodes in ``apart`` stay."""
    seen: dict[Any, Node] = {}
    changes = 0
    for node in list(graph.nodes):
        if is_impure(node) or node in apart or node.op not in ("call_function", "get_attr"):
            continue
        first = seen.setdefault(_key(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            changes += 1
    return changes


def _key(node: Node) -> Any:
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    # A number's type matters: 1, 1.0 and True are equal to Python and not to an operator.
    items: tuple[Any, ...] = tuple(
        item if isinstance(item, Node) else (type(item).__name__, repr(item)) for item in flat
    )
    if node.target in COMMUTATIVE and len(node.args) == 2 and not node.kwargs:
        items = tuple(sorted(items, key=lambda item: (isinstance(item, Node), str(item))))
    return node.op, node.target, items, str(spec)
