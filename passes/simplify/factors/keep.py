"""Keep products of tensors as factors until they are contracted.

    Σᵢⱼ (δᵢ aⱼ)² = ‖δ‖² ‖a‖²,    Σᵢⱼ (δᵢ aⱼ) (εᵢ bⱼ) = ⟨δ, ε⟩ ⟨a, b⟩,    (A B) C = A (B C)

The gradients of single samples in a layer's weights are outer products; their norms, their Gram
matrix and their weighted sum need them as little as the gradients of these do. A tensor is kept as
factors where these have fewer elements than it has, or where it is a matrix product that only
another one reads; whatever is computed from it by sums and products is then put in the order that
takes the least work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import networkx
import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.graph import arguments, elements, has_hints, value_of
from passes.simplify.factors.convolutions import is_pulled_back, pulls_back
from passes.simplify.factors.lowering import Lowering, flops, work
from passes.simplify.factors.moves import Moves
from passes.simplify.factors.operators import VIEWS, expression_of, finishing, is_multilinear
from passes.simplify.factors.order import MOST_FACTORS
from passes.simplify.factors.tables import LOOK_UPS
from passes.simplify.factors.terms import Expression, NotAProduct, leaf

aten = torch.ops.aten

_POINTWISE = {aten.mul.Tensor, aten.pow.Tensor_Scalar}
_MATRICES = {aten.mm.default, aten.bmm.default}
_SUMS_OF_PRODUCTS = {*_MATRICES, aten.index_put.default}
_LAYERS = {aten.convolution.default, *LOOK_UPS}
# Operators that have several results.
_SEVERAL = {aten.split_with_sizes.default, aten.convolution_backward.default}
# Half the range of float16 is too little for products that were not written.
_TYPES = (torch.float32, torch.float64, torch.bfloat16)
_MOST_TERMS = 16
WORTH_A_PRODUCT = 1.5
_MOST_KEPT = MOST_FACTORS // 2  # a product of two of them is still a product


@dataclass
class _Found:
    """What a graph holds.

    Attributes:
        kept: Tensors that need not be formed.
        roots: What is computed from them and has to be there.
    """

    kept: dict[Node, Expression] = field(default_factory=dict)
    roots: dict[Node, Expression] = field(default_factory=dict)


def keep_factors(graph: Graph) -> int:
    """``sum((A B) ⊙ (C D)) → …`` contracted in the order of least work, for any sums, products and
    views, where that is less work than before.

    Work is additions, multiplications and elements written. A pointwise product and a sum are more
    of it than the matrix product that takes their place, which alone counts in FLOPs: if these
    grow, work has to be two thirds of it at most.
    """
    moves = Moves(graph)
    replaced: dict[Node, Node] = {}
    for part in _parts(_find(graph, moves)):
        replaced |= _cheaper(graph, part, moves)
    for root, made in replaced.items():
        root.replace_all_uses_with(made)
    for root in sorted(replaced, reverse=True):
        graph.erase_node(root)
    moves.drop_unused()
    return len(replaced)


def _find(graph: Graph, moves: Moves) -> _Found:
    """Keep as much as can be; what something else than sums and products reads is formed."""
    nodes = [
        node
        for node in graph.nodes
        if is_multilinear(node) and _has_type(node) and all(map(has_hints, _sources(node)))
    ]
    formed: set[Node] = set()
    while True:
        found, before = _Found(), len(formed)
        for node in nodes:
            _read(node, moves, found, formed)
        formed |= {
            node
            for node in found.kept
            if any(u not in found.kept and u not in found.roots for u in _users(node))
        }
        if len(formed) == before:
            return found


def _read(node: Node, moves: Moves, found: _Found, formed: set[Node]) -> None:
    has_kept = any(source in found.kept for source in _sources(node))
    if not has_kept and not _grows(node) and not _is_in_a_chain(node):
        return
    try:
        expression = expression_of(moves, node, lambda x: _operand(x, node, moves, found))
    except NotAProduct:
        return
    is_kept = _saves_memory(node, expression, found.kept) or _is_in_a_chain(node)
    is_kept = is_kept or (node.target in VIEWS and has_kept)
    is_kept = is_kept and node not in formed and not finishing(node)
    if len(expression.terms) > _MOST_TERMS or _longest(expression) > (
        _MOST_KEPT if is_kept else MOST_FACTORS
    ):
        sources = [source for source in _sources(node) if source in found.kept]
        formed |= set(sorted(sources, key=lambda x: _longest(found.kept[x]))[-1:])
    elif is_kept:
        found.kept[node] = expression
    elif has_kept:
        found.roots[node] = expression


def _longest(expression: Expression) -> int:
    """Return the largest number of factors of a term."""
    return max((len(term.factors) for term in expression.terms), default=0)


def _saves_memory(node: Node, expression: Expression, kept: Mapping[Node, Expression]) -> bool:
    """Whether the factors have fewer elements than the tensor has; less than half of them if one is
    added to those of an operand, for otherwise a network is kept as the factors of it all."""
    leaves = expression.leaves()
    operands = [kept[source].leaves() for source in _sources(node) if source in kept]
    least = 2 if operands and leaves - set().union(*operands) else 1
    return least * sum(elements(value_of(x)) for x in leaves) < elements(value_of(node))


def _operand(node: Any, user: Node, moves: Moves, found: _Found) -> Expression:
    """Return what is kept of an operand, or the tensor itself, which a view only looks at."""
    if not isinstance(node, Node) or not _has_type(node) or _kind(node) != _kind(user):
        raise NotAProduct("an operand of another type")
    if node in found.kept:
        return found.kept[node]
    if node.target not in VIEWS:
        return leaf(node)
    try:
        return expression_of(moves, node, lambda x: _operand(x, node, moves, found))
    except NotAProduct:
        return leaf(node)


def _kind(node: Node) -> tuple[torch.dtype, torch.device]:
    return value_of(node).dtype, value_of(node).device


def _has_type(node: Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.dtype in _TYPES and has_hints(node)


def _grows(node: Node) -> bool:
    """Whether an operator makes more than it reads; that a layer does is no reason for it."""
    if node.target in _LAYERS:
        return False
    sources = {source for source in _sources(node) if isinstance(value_of(source), Tensor)}
    return elements(value_of(node)) > sum(elements(value_of(source)) for source in sources)


def _is_in_a_chain(node: Node) -> bool:
    """Whether a matrix product is read by one other alone."""
    if node.target not in _MATRICES:
        return False
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target in _MATRICES:
            return True
        if node.target not in VIEWS:
            return False
    return False


def _users(node: Node) -> Iterator[Node]:
    """Yield what reads a node; of what has several results these."""
    for user in node.users:
        if user.target in _SEVERAL:
            yield from user.users
        else:
            yield user


def _sources(node: Node) -> Iterator[Node]:
    """Yield what a node is computed from; what gives only a shape, or zeros, is not meant."""
    if node.target is aten.index_put.default:
        yield arguments(node)[2]
        return
    for source in node.all_input_nodes:
        if source.target is aten.convolution_backward.default:
            yield from pulls_back(node)
        elif source.target in _SEVERAL:
            yield from source.all_input_nodes
        else:
            yield source


def _parts(found: _Found) -> Iterator[_Found]:
    """Yield what hangs together by tensors that are kept, if there is a product among them that is
    worth it: another order of products alone only hides a matrix product from the other rules."""
    links: networkx.Graph[Node] = networkx.Graph()
    for node in [*found.kept, *found.roots]:
        links.add_edges_from((node, s) for s in _sources(node) if s in found.kept)
    for part in networkx.connected_components(links):
        kept, roots = _among(found.kept, part), _among(found.roots, part)
        has_sums = any(map(_is_summed, roots.values()))
        if any(n.target in _POINTWISE or (has_sums and _is_sum_of_products(n)) for n in kept):
            yield _Found(kept, roots)


def _is_sum_of_products(node: Node) -> bool:
    return node.target in _SUMS_OF_PRODUCTS or is_pulled_back(node)


def _is_summed(expression: Expression) -> bool:
    """Whether a tensor is a sum over an index, or is put together of parts."""
    own = set(sum(expression.dims, ()))
    return any(term.places or not term.indices <= own for term in expression.terms)


def _among(expressions: Mapping[Node, Expression], part: set[Node]) -> dict[Node, Expression]:
    return {node: found for node, found in expressions.items() if node in part}


def _cheaper(graph: Graph, part: _Found, moves: Moves) -> dict[Node, Node]:
    """Return what to put in place of each root; nothing where that is no less work."""
    lowering = Lowering(graph)
    try:
        replaced = {root: lowering.lower(found, root) for root, found in part.roots.items()}
    except NotAProduct:
        replaced = {}
    before = [*part.kept, *part.roots]
    leaves = set().union(*(found.leaves() for found in part.roots.values()))
    after = [*lowering.made, *(leaf for leaf in leaves if moves.has_made(leaf))]
    # More matrix products have to be worth it.
    grows = sum(map(flops, lowering.made)) > sum(map(flops, before))
    least = WORTH_A_PRODUCT if grows else 1
    if replaced and least * sum(map(work, after)) < sum(map(work, before)):
        return replaced
    lowering.drop()
    return {}
