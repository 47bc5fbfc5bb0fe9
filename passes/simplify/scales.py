"""Compute what differs by a factor for each row only once.

A *row scale* of a tensor (batch, …) is a tensor (batch, 1, …, 1). An operator that works on each
row by itself, and is linear, commutes with it:

    op(s ⊙ X) = s ⊙ op(X)

A network with one output per row is pulled back from a cotangent (batch, 1), which is a row scale
of ones; where the network is piecewise linear, everything on the way is the scale times what the
gradient of the network's sum has on the way. So a data loss beside a gradient penalty needs no
backward chain of its own, and its weight gradients ride on the penalty's own products:

    mm((s ⊙ A)ᵀ, X) + mm(Aᵀ, Y) = mm(Aᵀ, s ⊙ X + Y)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.graph import are_equal, arguments, is_equal, is_float, value_of
from passes.simplify.emit import call, size_of
from passes.simplify.filled import RESHAPES, filling
from passes.simplify.zeros import is_made_of_zeros

aten = torch.ops.aten

# Linear in the first argument, a row at a time, for all other arguments that there are.
_LINEAR = {
    aten.mm.default,
    aten.alias.default,
    aten.detach.default,
    aten.clone.default,
}
_CONVOLUTIONS = {aten.convolution.default, aten.convolution_backward.default}
# What is worth a pointwise product in its place.
_DEAR = {aten.mm.default, *_CONVOLUTIONS}


@dataclass(frozen=True)
class _Scaled:
    """A node's value as factors for each row, times what a key stands for.

    Attributes:
        key: Equal for two nodes only if this is the same value.
        scales: The factors, tensors with one element a row, in the order of their names.
        number: A factor that is the same for all rows.
    """

    key: Any
    scales: tuple[Node, ...] = ()
    number: float = 1


def share_scaled(graph: Graph) -> int:
    """Replace a product or convolution of what is a row scale of something by the row scale of the
    product of that, where it is there already: ``mm(s ⊙ X, W) → s ⊙ mm(X, W)``."""
    found: dict[Node, _Scaled] = {}
    plain: dict[Any, Node] = {}
    changes = 0
    for node in list(graph.nodes):
        if not is_float(node) and node.target is not aten.convolution_backward.default:
            continue
        scaled = found[node] = _scaled(node, found)
        base = plain.get(scaled.key)
        if base is None and not scaled.scales:
            plain[scaled.key] = node
        if base is None or node in scaled.scales or not is_float(node):
            continue
        ratio = _number(scaled.number / found[base].number)
        if ratio is None or _source(node).target not in _DEAR or not _is_same_layout(base, node):
            continue
        with graph.inserting_before(node):
            product = _times(graph, base, scaled.scales, ratio, node)
        node.replace_all_uses_with(product)
        found[product] = scaled
        graph.erase_node(node)
        changes += 1
    return changes


def _times(graph: Graph, x: Node, scales: Sequence[Node], number: float | None, like: Node) -> Node:
    """Multiply a tensor by factors for each row and by one for all."""
    for scale in scales:
        x = call(graph, aten.mul.Tensor, (x, _shaped(graph, scale, x)), {}, like)
    return x if number == 1 else call(graph, aten.mul.Tensor, (x, number), {}, like)


def merge_products(graph: Graph) -> int:
    """Add before a sum over rows of products, where two of the operands are equal up to a row
    scale: ``mm((s ⊙ A)ᵀ, X) + mm(Aᵀ, Y) → mm(Aᵀ, s ⊙ X + Y)``, and so for a common right operand
    and for the weight's gradient of a convolution."""
    found: dict[Node, _Scaled] = {}
    for node in graph.nodes:
        if is_float(node) or node.target is aten.convolution_backward.default:
            found[node] = _scaled(node, found)
    changes = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if node.kwargs or len(node.args) != 2 or not node.users:
            continue
        first, second = node.args
        if not _is_own_product(first) or not _is_own_product(second) or first is second:
            continue
        if not _is_same_layout(first, second) or not _is_same_layout(first, node):
            continue
        with graph.inserting_before(node):
            merged = _merged(graph, first, second, found)
        if merged is not None:
            merged.meta = {**node.meta, "val": value_of(node)}
            node.replace_all_uses_with(merged)
            graph.erase_node(node)
            changes += 1
    return changes


def _is_own_product(node: Any) -> bool:
    """Whether this is a product that only one node reads."""
    if not isinstance(node, Node) or len(node.users) > 1 or len(_source(node).users) > 1:
        return False
    return node.target is aten.mm.default or _is_weight_gradient(node)


def _is_weight_gradient(node: Node) -> bool:
    call = _source(node)
    if call.target is not aten.convolution_backward.default:
        return False
    return list(arguments(call)[10]) == [False, True, False]


def _merged(graph: Graph, first: Node, second: Node, found: dict[Node, _Scaled]) -> Node | None:
    mine, theirs = _operands(first), _operands(second)
    if mine is None or theirs is None or first.target is not second.target:
        return None
    if arguments(_source(first))[3:] != arguments(_source(second))[3:]:
        return None
    for i in (0, 1):
        if mine[i] not in found or theirs[i] not in found:
            continue
        one, other = found[mine[i]], found[theirs[i]]
        if one.key != other.key or (one.scales and other.scales):
            continue
        if other.scales:
            one, other, second, mine, theirs = other, one, first, theirs, mine
        ratio = _number(one.number / other.number)
        if ratio is None or (not one.scales and ratio == 1):
            continue
        x, y = mine[1 - i], theirs[1 - i]
        x = _times(graph, x, one.scales, ratio, x)
        total = call(graph, aten.add.Tensor, (x, y), {}, x)
        return _with_operand(graph, second, 1 - i, total)
    return None


def _operands(node: Node) -> tuple[Node, Node] | None:
    """Return two tensors (batch, …) of which a node is a sum over the batch of products."""
    left, right = arguments(_source(node))[:2]
    if node.target is operator.getitem:
        return left, right
    if left.target is aten.permute.default and list(arguments(left)[1]) == [1, 0]:
        return arguments(left)[0], right
    return (arguments(left)[0], right) if left.target is aten.t.default else None


def _with_operand(graph: Graph, node: Node, position: int, operand: Node) -> Node:
    """Repeat a sum over the batch of products with another operand."""
    source = _source(node)
    if source is node and position == 0:
        operand = call(graph, aten.permute.default, (operand, [1, 0]), {}, operand)
    args = list(source.args)
    args[position] = operand
    target: Any = source.target
    made = graph.call_function(target, tuple(args))
    made.meta = dict(source.meta)
    return made if source is node else graph.call_function(operator.getitem, (made, 1))


def _scaled(node: Node, found: dict[Node, _Scaled]) -> _Scaled:
    """Return what a node is a row scale of; of itself if nothing is known."""
    value, opaque = value_of(node), _Scaled(("node", node))
    if _is_row_scale(value):
        ones = ("ones", tuple(map(str, value.shape)), value.dtype, value.device)
        return _Scaled(ones) if _is_ones(node) else _Scaled(ones, (node,))
    if node.op != "call_function":
        return opaque
    target, args = node.target, arguments(node)
    if target is aten.expand.default:
        return _of_ones(node) or opaque
    if target is aten.mul.Tensor:
        return _of_product(node, found) or _of_ones(node) or opaque
    if target is aten.where.self:
        return _of_branches(node, found) or opaque
    first = args[0] if args else None
    inner = found.get(first) if isinstance(first, Node) else None
    if inner is None or not isinstance(first, Node):
        return opaque
    if target is operator.getitem and first.target is aten.convolution_backward.default:
        return _Scaled((target, inner.key, args[1]), inner.scales, inner.number)
    if target in RESHAPES:
        before = value_of(first)
        if not value.dim() or not before.dim() or not is_equal(before.shape[0], value.shape[0]):
            return opaque
        key = _call(target, inner.key, args[1:], node.kwargs)
        return _Scaled(key, inner.scales, inner.number)
    if target in _NUMBERS and not node.kwargs and (factor := _NUMBERS[target](*args[1:])):
        return _Scaled(inner.key, inner.scales, inner.number * factor)
    if target in _LINEAR or (target in _CONVOLUTIONS and _has_linear_rows(node)):
        key = _call(target, inner.key, args[1:], node.kwargs)
        return _Scaled(key, inner.scales, inner.number)
    return opaque


def _of_ones(node: Node) -> _Scaled | None:
    """``expand(w) = mm(1, w)`` and ``s ⊙ w = mm(s, w)``, as which they would be found."""
    value = value_of(node)
    if value.dim() != 2:
        return None
    s, w, *_ = (None, *arguments(node)) if node.target is aten.expand.default else arguments(node)
    if s is not None and not _is_row_scale(value_of(s)):
        s, w = w, s
    if not isinstance(w, Node) or value_of(w).dim() != 2 or not is_one(value_of(w).shape[0]):
        return None
    ones = ("ones", (str(value.shape[0]), "1"), value.dtype, value.device)
    key = _call(aten.mm.default, ones, (w,), {})
    if s is None or _is_ones(s):
        return _Scaled(key)
    return _Scaled(key, (s,)) if _is_row_scale(value_of(s)) else None


def _of_product(node: Node, found: dict[Node, _Scaled]) -> _Scaled | None:
    """``mul(X, s)``, ``mul(X, M)``, ``mul(X, number)``, in either order."""
    one, other = node.args
    if not isinstance(one, Node):
        one, other = other, one
    if not isinstance(one, Node) or one not in found:
        return None
    rank = value_of(node).dim()
    if not isinstance(other, Node):
        factor = _number(other)
        if factor is None or not _same_shape(one, node):
            return None
        return _Scaled(found[one].key, found[one].scales, found[one].number * factor)
    if other not in found or not rank:
        return None
    for x, s in ((one, other), (other, one)):
        if _is_row_scale(value_of(s), rank) and _same_shape(x, node):
            return _Scaled(found[x].key, _together(found[x].scales, (s,)), found[x].number)
    for x, m in ((one, other), (other, one)):
        if found[x].scales and not found[m].scales and _same_shape(x, node):
            key = _call(node.target, found[x].key, (m,), {})
            return _Scaled(key, found[x].scales, found[x].number)
    if not found[one].scales and not found[other].scales:
        for x, m in ((one, other), (other, one)):
            # The order in which a scaled product of the same two would be found.
            if _same_shape(x, node) and found[x].key[0] != "node":
                return _Scaled(_call(node.target, found[x].key, (m,), {}), (), found[x].number)
    return None


def _of_branches(node: Node, found: dict[Node, _Scaled]) -> _Scaled | None:
    """``where(mask, s ⊙ X, s ⊙ Y)``, ``where(mask, s ⊙ X, 0)``."""
    mask, *branches = arguments(node)
    if any(branch not in found for branch in branches):
        return None
    full = [branch for branch in branches if not is_made_of_zeros(branch)]
    scales = {found[branch].scales for branch in full}
    if len(scales) != 1 or not all(_same_shape(branch, node) for branch in full):
        return None
    number = found[full[0]].number  # the slope of a leaky branch belongs to the key
    keys = (
        (found[branch].key, found[branch].number / number) if branch in full else "zero"
        for branch in branches
    )
    return _Scaled((node.target, mask, *keys), scales.pop(), number)


def _number(item: Any) -> float | None:
    """Return a factor that may be taken out; None for a tensor, for zero and what is not finite."""
    is_number = isinstance(item, int | float) and not isinstance(item, bool)
    return item if is_number and item != 0 and math.isfinite(item) else None


def _inverse(item: Any) -> float | None:
    number = _number(item)
    return number and _number(1 / number)


# Operators that multiply by a number.
_NUMBERS: dict[Any, Callable[..., float | None]] = {
    aten.neg.default: lambda: -1,
    aten.mul.Scalar: _number,
    aten.div.Scalar: _inverse,
    aten.div.Tensor: _inverse,
}


def _has_linear_rows(node: Node) -> bool:
    """Whether a convolution has no bias, or the pullback of one is its input's only."""
    args = arguments(node)
    if node.target is aten.convolution.default:
        return args[2] is None
    return list(args[10]) == [True, False, False]


def _call(target: Any, key: Any, rest: Sequence[Any], kwargs: Any) -> Any:
    plain = tuple(tuple(a) if isinstance(a, (list, tuple)) else a for a in rest)
    items = tuple(x if isinstance(x, Node) else (type(x).__name__, repr(x)) for x in plain)
    return target, key, items, tuple(sorted((k, repr(v)) for k, v in kwargs.items()))


def _together(one: tuple[Node, ...], other: tuple[Node, ...]) -> tuple[Node, ...]:
    return tuple(sorted((*one, *other), key=lambda node: node.name))


def is_one(size: Any) -> bool:
    """Whether a size is proven to be 1."""
    return is_equal(size, 1)


def _is_row_scale(value: Any, rank: int | None = None) -> bool:
    """Whether a tensor has one element a row."""
    if not isinstance(value, Tensor) or value.dim() < 2 or value.dtype.is_complex:
        return False
    return rank in (None, value.dim()) and all(map(is_one, value.shape[1:]))


def _is_ones(node: Node) -> bool:
    return filling(node) == 1


def _same_shape(one: Node, other: Node) -> bool:
    a, b = value_of(one), value_of(other)
    return are_equal(a.shape, b.shape)


def _is_same_layout(one: Node, other: Node) -> bool:
    a, b = value_of(one), value_of(other)
    return _same_shape(one, other) and a.dtype == b.dtype and a.stride() == b.stride()


def _source(node: Node) -> Node:
    return arguments(node)[0] if node.target is operator.getitem else node


def _shaped(graph: Graph, scale: Node, like: Node) -> Node:
    """Give a row scale the rank of what it scales."""
    value, rank = value_of(scale), value_of(like).dim()
    if value.dim() == rank:
        return scale
    sizes = [size_of(graph, scale, 0), *[1] * (rank - 1)]
    return call(graph, aten.reshape.default, (scale, sizes), {}, scale)
