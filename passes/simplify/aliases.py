"""Drop nodes that return their argument."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def merge_views(graph: Graph) -> int:
    """``permute(permute(x, p), q) → permute(x, p∘q)`` and ``reshape(reshape(x, …), s) → reshape(x,
    s)``, where the result is laid out the same."""
    changes = 0
    for node in list(graph.nodes):
        inner = node.args[0] if node.args else None
        if node.target not in _MERGED or not isinstance(inner, Node) or not node.users:
            continue
        if inner.target is not node.target or node.kwargs or inner.kwargs:
            continue
        source, how = arguments(inner)[0], arguments(node)[1]
        if node.target is aten.permute.default:
            how = _composed(arguments(inner)[1], how)
        target: Any = node.target
        made = target(value_of(source), torch.fx.map_arg(how, value_of))
        if are_equal(made.stride(), value_of(node).stride()):
            node.args = (source, how)
            changes += 1
    return changes


def _composed(first: Sequence[int], second: Sequence[int]) -> list[int]:
    """Return one permutation that does what two do, one after the other."""
    return [first[d] % len(first) for d in second]


_MERGED = {aten.permute.default, aten.reshape.default}


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
