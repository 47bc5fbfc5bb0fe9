"""What operators do to sums of products."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.contraction.terms import Index
from passes.graph import arguments, is_equal, value_of
from passes.simplify.factors import convolutions, tables
from passes.simplify.factors.moves import Moves, Read
from passes.simplify.factors.terms import (
    Dim,
    Expression,
    Factor,
    Names,
    NotAProduct,
    Place,
    aligned,
    expanded,
    leaf,
    permuted,
    reshaped,
    summed,
)
from passes.simplify.filled import filling

aten = torch.ops.aten


def _same(moves: Moves, node: Node, read: Read) -> Expression:
    return read(node.args[0])


def _negative(moves: Moves, node: Node, read: Read) -> Expression:
    return read(node.args[0]).scaled(-1)


def _view(moves: Moves, node: Node, read: Read) -> Expression:
    return reshaped(read(node.args[0]), value_of(node).shape)


def _expand(moves: Moves, node: Node, read: Read) -> Expression:
    return expanded(read(node.args[0]), value_of(node).shape)


def _permute(moves: Moves, node: Node, read: Read) -> Expression:
    x, rank = read(node.args[0]), value_of(node).dim()
    if node.target is aten.permute.default:
        return permuted(x, [d % rank for d in arguments(node)[1]])
    order = list(range(rank))
    a, b = (0, 1) if node.target is aten.t.default else arguments(node)[1:]
    if rank > 1:
        order[a], order[b] = order[b], order[a]
    return permuted(x, order)


def _product(moves: Moves, node: Node, read: Read) -> Expression:
    one, other = arguments(node)
    if isinstance(one, Node) and isinstance(other, Node):
        return moves.times(read(one), read(other))
    if not isinstance(one, Node) or not isinstance(other, (int, float)):
        raise NotAProduct("a product with no tensor")
    return read(one).scaled(other)


def _quotient(moves: Moves, node: Node, read: Read) -> Expression:
    one, other = arguments(node)
    if isinstance(other, Node):
        read(other)  # it is a tensor of the same type
        return moves.times(read(one), leaf(moves.make(aten.reciprocal.default, (other,), node)))
    if not isinstance(one, Node) or not isinstance(other, (int, float)) or other == 0:
        raise NotAProduct("a quotient with no tensor")
    return read(one).scaled(1 / other)


def _square(moves: Moves, node: Node, read: Read) -> Expression:
    if arguments(node)[1] != 2:
        raise NotAProduct("a power")
    return moves.times(read(node.args[0]), read(node.args[0]))


def _sum(moves: Moves, node: Node, read: Read) -> Expression:
    args, rank = arguments(node), value_of(node.args[0]).dim()
    dims = [d % rank for d in args[1]] if len(args) > 1 and args[1] else range(rank)
    return summed(read(args[0]), list(dims), keep=len(args) > 2 and bool(args[2]))


def _squared_norm(moves: Moves, node: Node, read: Read) -> Expression:
    """The square of a norm: what is put in its place ends with a root."""
    args, rank = arguments(node), value_of(node.args[0]).dim()
    if len(args) > 1 and args[1] != 2:
        raise NotAProduct("another norm")
    dims = [d % rank for d in args[2]] if len(args) > 2 and args[2] else range(rank)
    squares = moves.times(read(args[0]), read(args[0]))
    return summed(squares, list(dims), keep=len(args) > 3 and bool(args[3]))


def _plus_or_minus(moves: Moves, node: Node, read: Read) -> Expression:
    left, right = arguments(node)
    if not isinstance(left, Node) or not isinstance(right, Node):
        raise NotAProduct("a sum with a number")
    sign = -1 if node.target is aten.sub.Tensor else 1
    one, other, dims = aligned(read(left), read(right).scaled(sign))
    return Expression(dims, one.terms + other.terms)


def _matrix_product(moves: Moves, node: Node, read: Read) -> Expression:
    left, right = map(read, node.args)
    rank = len(left.dims)
    rows = replace(left, dims=(*left.dims, ()))
    columns = replace(right, dims=(*right.dims[: rank - 2], (), *right.dims[rank - 2 :]))
    return summed(moves.times(rows, columns), [rank - 1])


def _cat(moves: Moves, node: Node, read: Read) -> Expression:
    nodes, *rest = arguments(node)
    at = (rest[0] if rest else 0) % value_of(node).dim()
    if len(nodes) == 1:
        return read(nodes[0])
    index = Index(value_of(node).shape[at])
    if not isinstance(index.size, int):
        raise NotAProduct("a concatenation of symbolic size")
    total, start = None, 0
    for part in nodes:
        x, stop = read(part).fresh(), start + value_of(part).shape[at]
        places = ((index, Place(start, stop, x.dims[at])),)
        terms = (replace(term, places=term.places + places) for term in x.terms)
        placed = Expression((*x.dims[:at], (index,), *x.dims[at + 1 :]), tuple(terms))
        start = stop
        if total is None:
            total = placed
            continue
        names = _same_dims(placed.dims, total.dims)
        total = Expression(total.dims, total.terms + placed.renamed(names).terms)
    assert total is not None
    return total


def _same_dims(dims: Sequence[Dim], like: Sequence[Dim]) -> Names:
    """Return the names that turn dimensions into those of another tensor."""
    names: dict[Index, Dim] = {}
    for a, b in zip(dims, like, strict=True):
        if len(a) != len(b) or not all(is_equal(i.size, j.size) for i, j in zip(a, b, strict=True)):
            raise NotAProduct("parts whose dimensions are made of different indices")
        names |= {i: (j,) for i, j in zip(a, b, strict=True)}
    return names


def _slice(moves: Moves, node: Node, read: Read) -> Expression:
    args: Any = (*arguments(node), *(None, 0, None, None, 1)[len(node.args) :])
    source, at, start, stop, step = args
    size = value_of(source).shape[at]
    bounds = (x for x in (size, start, stop) if x is not None)
    if step != 1 or not all(isinstance(x, int) for x in bounds):
        raise NotAProduct("a slice of symbolic size")
    start, stop, _ = slice(start, stop).indices(size)
    x = read(source)
    return x if (start, stop) == (0, size) else moves.part(x, at % len(x.dims), start, stop)


def _piece(moves: Moves, node: Node, read: Read) -> Expression:
    """One result of a split, or of the pullback of a convolution."""
    split, number = arguments(node)
    if split.target is aten.convolution_backward.default:
        return convolutions.pulled_back(moves, node, read)
    if split.target is not aten.split_with_sizes.default or split.kwargs:
        raise NotAProduct("an item of something else")
    source, sizes, *rest = arguments(split)
    at = (rest[0] if rest else 0) % value_of(source).dim()
    if len(sizes) == 1:
        return read(source)
    if not all(isinstance(size, int) for size in sizes):
        raise NotAProduct("a split into symbolic sizes")
    start = sum(sizes[:number])
    return moves.part(read(source), at, start, start + sizes[number])


def _where(moves: Moves, node: Node, read: Read) -> Expression:
    """``where(mask, 0, x)`` and ``where(mask, x, 0)``: zero in each factor that knows the row, so
    that none is left infinite where the product was not taken."""
    mask, one, other = arguments(node)
    x, position = (other, 2) if _is_zero(one) else (one, 1)
    if not _is_zero(other if position == 1 else one) or not isinstance(x, Node):
        raise NotAProduct("a choice between two tensors")
    found, masks, dims = aligned(read(x), leaf(mask))
    (masked,) = (f for term in masks.terms for f in term.factors)
    terms = []
    for term in found.terms:
        if not masked.indices or not set(masked.indices) <= term.indices:
            raise NotAProduct("a mask of its own rows")
        if all(f.picks for f in term.factors if set(f.indices) & set(masked.indices)):
            raise NotAProduct("a mask of positions")
        factors = [_masked(moves, f, masked, node, position) for f in term.factors]
        terms.append(replace(term, factors=tuple(factors)))
    return Expression(dims, tuple(terms))


def _masked(moves: Moves, factor: Factor, mask: Factor, node: Node, position: int) -> Factor:
    shared = set(mask.indices) & set(factor.indices)
    if not shared or factor.picks:  # what is one or zero is finite
        return factor
    if shared != set(mask.indices):
        raise NotAProduct("a mask of several dimensions")
    dims = [d for d in mask.dims if d]
    if any(d not in factor.dims for d in dims):
        factor = moves.apart(factor)
    if any(d not in factor.dims for d in dims):
        raise NotAProduct("a mask of several indices at once")
    sizes = [value_of(factor.node).shape[i] if d in dims else 1 for i, d in enumerate(factor.dims)]
    order = [d for d in factor.dims if d in dims]
    if order != dims or not all(isinstance(size, int) for size in sizes):
        raise NotAProduct("a mask in another order")
    shaped = moves.make(aten.reshape.default, (mask.node, tuple(sizes)), node)
    zero = arguments(node)[3 - position]
    args = (shaped, zero, factor.node) if position == 2 else (shaped, factor.node, zero)
    return Factor(moves.make(aten.where.self, args, node), factor.dims)


def _is_zero(item: Any) -> bool:
    """Whether an item is a single zero."""
    return filling(item) == 0 and (not isinstance(item, Node) or value_of(item).dim() == 0)


_COPIES = {aten.clone.default, aten.alias.default, aten.detach.default}
VIEWS: Mapping[Any, Callable[[Moves, Node, Read], Expression]] = {
    **dict.fromkeys(_COPIES, _same),
    aten.view.default: _view,
    aten._unsafe_view.default: _view,
    aten.reshape.default: _view,
    aten.unsqueeze.default: _view,
    aten.squeeze.dims: _view,
    aten.squeeze.dim: _view,
    aten.squeeze.default: _view,
    aten.expand.default: _expand,
    aten.permute.default: _permute,
    aten.t.default: _permute,
    aten.transpose.int: _permute,
}
_MOVES: Mapping[Any, Callable[[Moves, Node, Read], Expression]] = {
    **VIEWS,
    aten.neg.default: _negative,
    aten.mul.Tensor: _product,
    aten.mul.Scalar: _product,
    aten.div.Tensor: _quotient,
    aten.div.Scalar: _quotient,
    aten.pow.Tensor_Scalar: _square,
    aten.sum.default: _sum,
    aten.sum.dim_IntList: _sum,
    aten.add.Tensor: _plus_or_minus,
    aten.sub.Tensor: _plus_or_minus,
    aten.mm.default: _matrix_product,
    aten.bmm.default: _matrix_product,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    operator.getitem: _piece,
    aten.where.self: _where,
    aten.linalg_vector_norm.default: _squared_norm,
    aten.convolution.default: convolutions.applied,
    **dict.fromkeys(tables.LOOK_UPS, tables.looked_up),
    aten.index_put.default: tables.added_up,
}


def expression_of(moves: Moves, node: Node, read: Read) -> Expression:
    """Return a node as a sum of products of what its operands are.

    Raises:
        NotAProduct: It is none.
    """
    move = _MOVES.get(node.target)
    if move is None or (node.kwargs and node.target not in _COPIES):
        raise NotAProduct(str(node.target))
    return move(moves, node, read)


def finishing(node: Node) -> Sequence[tuple[Any, tuple[Any, ...]]]:
    """Return what follows on the product that a node is read as: operators, and their arguments
    behind the first."""
    if node.target is aten.linalg_vector_norm.default:
        return [(aten.sqrt.default, ())]
    return convolutions.folding(node)


def is_multilinear(node: Any) -> bool:
    """Whether a node may be a sum of products of its operands."""
    return isinstance(node, Node) and node.target in _MOVES and isinstance(value_of(node), Tensor)
