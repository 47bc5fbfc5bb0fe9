"""Drop nodes that return their argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.graph import are_equal, arguments, value_of

aten = torch.ops.aten

ALIASES = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default}
VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.expand.default}


def _same_layout(node: Node) -> bool:
    """Whether a node returns the same shape and type as its argument."""
    old, new = value_of(node.args[0]), value_of(node)
    return (
        isinstance(old, Tensor)
        and isinstance(new, Tensor)
        and old.dtype == new.dtype
        and old.device == new.device
        and are_equal(old.shape, new.shape)
    )


def _is_identity_permutation(node: Node) -> bool:
    dims: Any = node.args[1]
    return list(dims) == list(range(len(dims)))


def merge_views(graph: Graph, apart: Set[Node] = frozenset()) -> int:
    """``permute(permute(x, p), q) → permute(x, p∘q)``, ``reshape(v(x), s) → reshape(x, s)`` and
    ``v(w(x)) → x``, for views v and w that leave the order of elements alone, where the result is
    laid out the same; the nodes in ``apart`` stay, and are not looked through."""
    changes = 0
    for node in list(graph.nodes):
        inner = node.args[0] if node.args else None
        if node.op != "call_function" or not isinstance(inner, Node) or not node.users:
            continue
        if node in apart or inner in apart:
            continue
        if node.target in IN_ORDER and inner.target in IN_ORDER:
            changes += _merge_in_order(graph, node, inner)
        elif node.target is inner.target is aten.permute.default:
            source, first = arguments(inner)
            order = _composed(first, arguments(node)[1])
            if are_equal(value_of(source).permute(order).stride(), value_of(node).stride()):
                node.args = (source, order)
                changes += 1
    return changes


def _merge_in_order(graph: Graph, node: Node, inner: Node) -> int:
    source = arguments(inner)[0]
    before, after = value_of(source), value_of(node)
    if are_equal(before.shape, after.shape) and are_equal(before.stride(), after.stride()):
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        return 1
    if node.target is not aten.reshape.default:
        return 0
    sizes = arguments(node)[1]
    made = before.reshape(torch.fx.map_arg(sizes, value_of))
    if not are_equal(made.stride(), after.stride()):
        return 0
    node.args = (source, sizes)
    return 1


def _composed(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Return one permutation that does what two do, one after the other."""
    return [first[d] % len(first) for d in second]


IN_ORDER = {
    aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip


def _neutral(number: Any) -> Callable[[Node], bool]:
    def holds(node: Node) -> bool:
        return (
            not isinstance(node.args[1], Node)
            and node.args[1] == number
            and not node.kwargs.get("rounding_mode")
            and _same_layout(node)
        )

    return holds


_WHEN: dict[Any, Callable[[Node], bool]] = {
    **dict.fromkeys(ALIASES, lambda node: True),
    **dict.fromkeys(VIEWS, _same_layout),
    aten.permute.default: _is_identity_permutation,
    aten._to_copy.default: lambda node: _same_layout(node) and "memory_format" not in node.kwargs,
    aten.clone.default: lambda node: True,
    aten.mul.Tensor: _neutral(1),
    aten.mul.Scalar: _neutral(1),
    aten.div.Tensor: _neutral(1),
    aten.div.Scalar: _neutral(1),
    aten.add.Tensor: _neutral(0),
    aten.sub.Tensor: _neutral(0),
    aten.pow.Tensor_Scalar: _neutral(1),
    aten.sum.dim_IntList: lambda node: _rank(node.args[0]) == 0 and _same_layout(node),
    aten.mean.default: lambda node: _rank(node.args[0]) == 0 and _same_layout(node),
}


def _rank(node: Any) -> int:
    return value_of(node).dim()


def drop_aliases(graph: Graph) -> int:
    """Drop what changes nothing: ``alias(x) → x``, a view to the same shape, ``x·1``, ``x+0``."""
    changes = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        holds = _WHEN.get(node.target)
        if holds is None or not isinstance(node.args[0], Node) or not holds(node):
            continue
        source = node.args[0]
        if value_of(source).stride() != value_of(node).stride():
            continue  # a view further on may rely on the layout
        if value_of(source).is_conj() != value_of(node).is_conj():
            continue  # conjugation that is not carried out yet cannot be viewed as real
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        changes += 1
    return changes
