"""Find zeros that were written down, and drop what they make superfluous."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.graph import are_equal, arguments, value_of

aten = torch.ops.aten

_MADE = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default}
_FILLED = {aten.full.default, aten.full_like.default, aten.new_full.default}

# Zero if the first argument is.
_KEEPS = {
    aten.alias.default, aten.neg.default, aten.view.default, aten._unsafe_view.default,
    aten.expand.default, aten.permute.default, aten.t.default, aten.transpose.int,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default,
    aten.select.int, aten.slice.Tensor, aten.sum.default, aten.sum.dim_IntList, aten.mean.default,
    aten.mean.dim, aten.clone.default, aten._to_copy.default, aten.constant_pad_nd.default,
    aten.mul.Scalar, aten.div.Scalar, aten.sqrt.default, aten.abs.default, aten.tanh.default,
    aten.sin.default, aten.relu.default, aten.select_backward.default, aten.slice_backward.default,
    aten.index.Tensor, aten.gather.default, aten.cumsum.default, aten.flip.default,
    aten.repeat.default, aten.diagonal.default, aten.div.Tensor, aten.reshape.default,
    aten.convolution_backward.default, aten.embedding_dense_backward.default, aten.detach.default,
}  # fmt: skip
# Zero if either of the first two is.
_PRODUCTS = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default}
# Zero if all arguments at these positions are.
_JOINS: dict[Any, tuple[int, ...]] = {
    aten.cat.default: (0,),
    aten.stack.default: (0,),
    aten.slice_scatter.default: (0, 1),
    aten.select_scatter.default: (0, 1),
    aten.diagonal_scatter.default: (0, 1),
    aten.scatter_add.default: (0, 3),
}


def is_made_of_zeros(node: Node) -> bool:
    """Whether a node makes a tensor of zeros."""
    if node.target in _MADE:
        return True
    if node.target is aten.scalar_tensor.default:
        return not isinstance(node.args[0], Node) and bool(node.args[0] == 0)
    if node.target not in _FILLED:
        return False
    filling = arguments(node)[1]
    return not isinstance(filling, Node) and bool(filling == 0)


def zero_nodes(graph: Graph) -> set[Node]:
    """Return every node whose value is proven to be zero everywhere."""
    zeros: set[Node] = set()

    def is_zero(item: Any) -> bool:
        if isinstance(item, Node):
            return item in zeros
        return isinstance(item, (int, float)) and item == 0

    def as_list(item: Any) -> list[Any]:
        return list(item) if isinstance(item, (list, tuple)) else [item]

    def derived(node: Node) -> bool:
        target, args = node.target, arguments(node)
        if target in _KEEPS:
            if target is aten.constant_pad_nd.default and len(args) > 2 and args[2] != 0:
                return False
            return is_zero(args[0])
        if target in _PRODUCTS:
            return is_zero(args[0]) or is_zero(args[1])
        if target in (aten.add.Tensor, aten.sub.Tensor):
            return is_zero(args[0]) and is_zero(args[1])
        if target is aten.where.self:
            return is_zero(args[1]) and is_zero(args[2])
        if target is aten.convolution.default:
            return (is_zero(args[0]) or is_zero(args[1])) and (args[2] is None or is_zero(args[2]))
        if target in _JOINS:
            return all(
                is_zero(part) for position in _JOINS[target] for part in as_list(args[position])
            )
        if getattr(target, "__name__", "") == "getitem":
            return is_zero(args[0])
        return False

    for node in graph.nodes:
        if node.op == "call_function" and (is_made_of_zeros(node) or derived(node)):
            zeros.add(node)
    return zeros


def drop_zeros(graph: Graph) -> int:
    """Drop sums with zero, and make every zero that is still read a constant: ``0 + x → x``,
    ``mm(0, W) → 0``.

    ``0·x`` is taken to be 0 also where ``x`` is infinite, as symbolic zeros are.
    """
    zeros = zero_nodes(graph)
    changes = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not node.users:
            continue
        if node in zeros:
            changes += _make_constant(graph, node)
        elif node.target in (aten.add.Tensor, aten.sub.Tensor):
            changes += _drop_term(graph, node, zeros)
        elif node.target in (aten.addmm.default, aten.baddbmm.default):
            changes += _drop_product(graph, node, zeros)
    return changes


def _make_constant(graph: Graph, node: Node) -> int:
    value = value_of(node)
    if not isinstance(value, Tensor) or node.target is aten.full.default:
        return 0
    if not all(isinstance(size, int) for size in value.shape):
        return 0
    with graph.inserting_before(node):
        zeros = graph.call_function(
            aten.full.default,
            (list(value.shape), 0),
            {"dtype": value.dtype, "device": value.device},
        )
    zeros.meta = {**node.meta}
    node.replace_all_uses_with(zeros)
    graph.erase_node(node)
    return 1


def _drop_term(graph: Graph, node: Node, zeros: set[Node]) -> int:
    left, right = node.args[:2]
    factor = node.kwargs.get("alpha", 1)
    if right in zeros and _fits(left, node):
        kept: Any = left
    elif left in zeros and isinstance(right, Node) and _fits(right, node):
        if node.target is aten.sub.Tensor or factor != 1:
            if factor != 1:
                return 0
            with graph.inserting_before(node):
                kept = graph.call_function(aten.neg.default, (right,))
            kept.meta = dict(node.meta)
        else:
            kept = right
    else:
        return 0
    node.replace_all_uses_with(kept)
    graph.erase_node(node)
    return 1


def _drop_product(graph: Graph, node: Node, zeros: set[Node]) -> int:
    """``addmm(c, 0, B) → c``, ``addmm(0, A, B) → mm(A, B)``."""
    shift, a, b = node.args
    if node.kwargs.get("beta", 1) != 1 or node.kwargs.get("alpha", 1) != 1:
        return 0
    if (a in zeros or b in zeros) and isinstance(shift, Node):
        kept: Node = shift
        if not _fits(shift, node):
            with graph.inserting_before(node):
                kept = graph.call_function(aten.expand.default, (shift, list(value_of(node).shape)))
            kept.meta = dict(node.meta)
    elif shift in zeros:
        product: Callable[..., Any] = (
            aten.mm.default if node.target is aten.addmm.default else aten.bmm.default
        )
        with graph.inserting_before(node):
            kept = graph.call_function(product, (a, b))
        kept.meta = dict(node.meta)
    else:
        return 0
    node.replace_all_uses_with(kept)
    graph.erase_node(node)
    return 1


def _fits(kept: Any, node: Node) -> bool:
    old, new = value_of(kept), value_of(node)
    return (
        isinstance(old, Tensor)
        and old.dtype == new.dtype
        and old.stride() == new.stride()  # a view further on may rely on the layout
        and are_equal(old.shape, new.shape)
    )
