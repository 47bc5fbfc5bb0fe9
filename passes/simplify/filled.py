"""Multiply by a number where a tensor holds only that number.

Reverse mode starts from ones: ``∂ sum(x)/∂x`` is a one for each element, ``∂ mean(x)/∂x`` a one
divided by their number. Multiplied with a tensor they hide that it is the tensor itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.graph import arguments, is_float, same_layout, value_of
from passes.simplify.zeros import is_made_of_zeros

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
_SAME_NUMBERS = {
    aten.expand.default, aten.permute.default, aten.t.default, aten.unsqueeze.default,
    aten.alias.default, aten.detach.default, aten.clone.default, aten.slice.Tensor,
    aten.select.int, *RESHAPES,
}  # fmt: skip
_TIMES = {aten.mul.Tensor, aten.mul.Scalar}
_OVER = {aten.div.Tensor, aten.div.Scalar}


def fold_filled(graph: Graph) -> int:
    """``x ⊙ (c, c, …) → c·x``, and ``x`` itself for ones; the same for a quotient."""
    changes = 0
    # In order, so that each answer is made of known ones: chains of sums are as long as the graph.
    known: dict[Node, Any] = {}
    for node in graph.nodes:
        known[node] = filling(node, known)
    for node in list(graph.nodes):
        if node.target not in (aten.mul.Tensor, aten.div.Tensor) or node.kwargs or not node.users:
            continue
        x, filled = node.args
        if node.target is aten.mul.Tensor and filling(x, known) is not None:
            x, filled = filled, x
        number = filling(filled, known)
        if not isinstance(x, Node) or not is_float(x) or not is_float(filled):
            continue
        if not isinstance(number, (int, float)) or number == 0 or filling(x, known) is not None:
            continue
        if not same_layout(value_of(x), value_of(node)):
            continue
        if number == 1:
            node.replace_all_uses_with(x)
            graph.erase_node(node)
        else:
            node.args = (x, number)
        changes += 1
    return changes


def filling(node: Any, known: Mapping[Node, Any] = MappingProxyType({})) -> Any:
    """Return the number that a tensor is filled with; None if it is not known to be.

    Args:
        node: What makes it, or a number.
        known: The answer for some nodes.
    """
    if not isinstance(node, Node):
        return node
    if node in known:
        return known[node]
    if node.op != "call_function":
        return None
    if is_made_of_zeros(node):
        return 0
    if node.target is aten.ones.default or node.target is aten.ones_like.default:
        return 1
    args = arguments(node)
    if node.target is aten.full.default or node.target is aten.full_like.default:
        return None if isinstance(args[1], Node) else args[1]
    if node.target in _SAME_NUMBERS:
        return filling(args[0], known)
    if node.target is aten.cat.default:
        numbers = {filling(part, known) for part in args[0]}
        return numbers.pop() if len(numbers) == 1 else None
    if node.kwargs or (node.target not in _TIMES | _OVER and node.target is not aten.add.Tensor):
        return None
    one, other = filling(args[0], known), filling(args[1], known)
    if one is None or other is None or (node.target in _OVER and other == 0):
        return None
    if node.target is aten.add.Tensor:
        return one + other
    return one * other if node.target in _TIMES else one / other
