"""Contract a product by another that is there anyway.

    Σᵢⱼ (L R)ᵢⱼ Vᵢⱼ = Σᵢₖ Lᵢₖ (V Rᵀ)ᵢₖ = Σₖⱼ Rₖⱼ (Lᵀ V)ₖⱼ

A gradient of weights is such a product, cotangents times features. Where it is needed only along a
direction V, as in a Hessian-vector product ``∇⟨∇L, V⟩``, forward mode along V has multiplied the
features by V already, and the gradient need not be formed. A convolution is bilinear too: its two
pullbacks, contracted, are the cotangent contracted with a convolution.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.graph import are_equal, arguments, value_of
from passes.simplify.emit import call

aten = torch.ops.aten

_PRODUCTS = (aten.mm.default, aten.bmm.default)
_TURNED = {2: [1, 0], 3: [0, 2, 1]}  # rank → the permutation that transposes matrices
Matrix = tuple[Node, bool]  # a node and whether it stands for its transpose


def contract_first(graph: Graph) -> int:
    """``sum((L @ R) ⊙ V) → sum(L ⊙ (V @ Rᵀ))`` where ``V @ Rᵀ``, or its transpose, is computed
    anyway; so also for ``Lᵀ @ V``, for sums over rows or columns alone and for convolutions."""
    known = _products(graph)
    changes = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.sum.dim_IntList)):
        product = arguments(node)[0]
        if product.target is not aten.mul.Tensor or len(product.users) > 1 or not node.users:
            continue
        for formed, other in (product.args, product.args[::-1]):
            pair = _other_form(graph, node, formed, other, known)
            if pair is not None:
                with graph.inserting_before(node):
                    scaled = call(graph, aten.mul.Tensor, pair, {}, node)
                    node.args = (scaled, *node.args[1:])
                # What was formed is gone: two sums that could each take the other's product would
                # change places for ever.
                gone, _ = _matrix(formed)
                known = {key: made for key, made in known.items() if made is not gone}
                changes += 1
                break
    return changes


def _products(graph: Graph) -> dict[Any, Node]:
    """Return the products and convolutions of a graph by what they multiply."""
    found: dict[Any, Node] = {}
    for target in _PRODUCTS:
        for node in graph.find_nodes(op="call_function", target=target):
            if not node.users:
                continue
            left, right = map(_matrix, arguments(node))
            found[left, right] = node
            found[_transposed(right), _transposed(left)] = node
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        if arguments(node)[2] is None and node.users:
            found[_convolution(node.args)] = node
    return found


def _other_form(
    graph: Graph, total: Node, formed: Any, along: Any, known: dict[Any, Node]
) -> tuple[Node, Node] | None:
    """Return two tensors that, multiplied and summed up, are ``sum(formed ⊙ along)``."""
    if not isinstance(formed, Node) or not isinstance(along, Node) or len(formed.users) > 1:
        return None
    if not are_equal(value_of(formed).shape, value_of(along).shape):
        return None
    if value_of(formed).dtype != value_of(along).dtype:
        return None
    if formed.target is operator.getitem:
        return _of_convolution(graph, total, formed, along, known)
    product, is_turned = _matrix(formed)
    if product.target not in _PRODUCTS or len(product.users) > 1:
        return None
    if is_turned and not _sums_all(total, value_of(formed).dim()):
        return None
    v, turned = _matrix(along)
    return _of_product(graph, total, product, (v, turned != is_turned), known)


def _of_product(
    graph: Graph, total: Node, formed: Node, v: Matrix, known: dict[Any, Node]
) -> tuple[Node, Node] | None:
    left, right = map(_matrix, arguments(formed))
    rank = value_of(formed).dim()
    for kept, key, dim in (
        (left, (v, _transposed(right)), rank - 1),
        (right, (_transposed(left), v), rank - 2),
    ):
        if known.get(key, formed) is formed or not _sums_over(total, rank, dim):
            continue
        is_flipped = _matrix(arguments(known[key])[0]) != key[0]
        operands = [_transposed(key[1]), _transposed(key[0])] if is_flipped else list(key)
        with graph.inserting_before(total):
            made = [_as_node(graph, operand, total) for operand in operands]
            product = call(graph, formed.target, made, {}, total)
            if _sums_all(total, rank):  # the order does not matter: transpose nothing
                kept = _transposed(kept) if is_flipped else kept
                return _as_node(graph, kept, total), product
            if is_flipped:
                product = call(graph, aten.permute.default, (product, _TURNED[rank]), {}, total)
            return _as_node(graph, kept, total), product
    return None


def _of_convolution(
    graph: Graph, total: Node, formed: Node, along: Node, known: dict[Any, Node]
) -> tuple[Node, Node] | None:
    """``Σ pullback(g, x, w) ⊙ v = Σ g ⊙ convolution(v, w)``, or of ``(x, v)`` where the pullback is
    that to the weight."""
    backward, index = arguments(formed)
    if backward.target is not aten.convolution_backward.default or not _sums_all(
        total, value_of(formed).dim()
    ):
        return None
    grad, x, w, _, *options, mask = arguments(backward)
    if list(mask) != [i == index for i in range(3)]:
        return None
    args = (along, w, None, *options) if index == 0 else (x, along, None, *options)
    if _convolution(args) not in known:
        return None
    with graph.inserting_before(total):
        return grad, call(graph, aten.convolution.default, args, {}, total)


def _convolution(args: Any) -> Any:
    x, w, _, *options = args
    return x, w, str(options)


def _sums_over(total: Node, rank: int, dim: int) -> bool:
    """Whether a sum runs over a dimension and leaves the same shape for another size of it."""
    return _sums_all(total, rank) or ({d % rank for d in arguments(total)[1]} == {dim})


def _sums_all(total: Node, rank: int) -> bool:
    dims = arguments(total)[1]
    return not dims or len({d % rank for d in dims}) == rank


def _matrix(node: Node) -> Matrix:
    """Look through transpositions."""
    is_turned = False
    while node.target is aten.t.default or _is_turning(node):
        node, is_turned = arguments(node)[0], not is_turned
    return node, is_turned


def _is_turning(node: Node) -> bool:
    if node.target is not aten.permute.default:
        return False
    dims = list(arguments(node)[1])
    return [d % len(dims) for d in dims] == _TURNED.get(len(dims))


def _transposed(matrix: Matrix) -> Matrix:
    return matrix[0], not matrix[1]


def _as_node(graph: Graph, matrix: Matrix, like: Node) -> Node:
    node, is_turned = matrix
    if not is_turned:
        return node
    turned = _TURNED[value_of(node).dim()]
    return call(graph, aten.permute.default, (node, turned), {}, like)
