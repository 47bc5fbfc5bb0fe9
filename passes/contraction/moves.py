"""What linear operators do to an expression: they move, fix, join and sum indices."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.contraction.constants import Constants
from passes.contraction.terms import Expression, Factor, Index
from passes.contraction.whole import whole
from passes.graph import arguments, is_equal, is_one, value_of

aten = torch.ops.aten
# Where a split has its dimension.
_SPLITS = {aten.split_with_sizes.default: 2, aten.split.Tensor: 2, aten.unbind.int: 1}

Known = Mapping[Node, Expression]
Move = Callable[[Known, Constants, Node], Expression | None]


def _first(known: Known, node: Node) -> Expression | None:
    source = node.args[0]
    return known.get(source) if isinstance(source, Node) else None


def _same(known: Known, constants: Constants, node: Node) -> Expression | None:
    return _first(known, node)


def _negative(known: Known, constants: Constants, node: Node) -> Expression | None:
    found = _first(known, node)
    return None if found is None else found.times(-1.0)


def _select(known: Known, constants: Constants, node: Node) -> Expression | None:
    found = _first(known, node)
    _, dim, position = arguments(node)
    if found is None or not isinstance(position, int):
        return None
    dim %= len(found.dims)
    size = _size(node.args[0], dim)
    if position < 0 and not isinstance(size, int):
        return None
    held = found.at(dim, position % size if position < 0 else position)
    return replace(held, dims=(*held.dims[:dim], *held.dims[dim + 1 :]))


def _slice(known: Known, constants: Constants, node: Node) -> Expression | None:
    """A slice of one position, or of all."""
    found = _first(known, node)
    args = arguments(node)
    dim = args[1] if len(args) > 1 else 0
    start = args[2] if len(args) > 2 else None
    if found is None:
        return None
    dim %= len(found.dims)
    before, after = _size(node.args[0], dim), _size(node, dim)
    if is_equal(before, after):
        return found
    if not isinstance(before, int) or not isinstance(after, int):
        return None
    start = 0 if start is None else start + before if start < 0 else start
    return found.at(dim, start) if after == 1 else None


def _permute(known: Known, constants: Constants, node: Node) -> Expression | None:
    found = _first(known, node)
    if found is None:
        return None
    rank = len(found.dims)
    if node.target is aten.permute.default:
        order = [d % rank for d in arguments(node)[1]]
    else:
        a, b = (0, 1) if node.target is aten.t.default else arguments(node)[1:]
        order = list(range(rank))
        if rank < 2:
            return found
        order[a], order[b] = order[b], order[a]
    return found.permuted(order)


def _unsqueeze(known: Known, constants: Constants, node: Node) -> Expression | None:
    found = _first(known, node)
    if found is None:
        return None
    dim = arguments(node)[1] % (len(found.dims) + 1)
    return replace(found, dims=(*found.dims[:dim], None, *found.dims[dim:]))


def _reshape(known: Known, constants: Constants, node: Node) -> Expression | None:
    """A reshape that adds or takes away dimensions of size 1 only."""
    found = _first(known, node)
    if found is None:
        return None
    sizes = value_of(node).shape
    kept = [(d, _size(node.args[0], i)) for i, d in enumerate(found.dims) if d is not None]
    kept = [(d, size) for d, size in kept if not (isinstance(size, int) and size == 1)]
    dims: list[Index | None] = []
    for size in sizes:
        if isinstance(size, int) and size == 1:
            dims.append(None)
        elif kept and is_equal(kept[0][1], size):
            dims.append(kept.pop(0)[0])
        else:
            return None
    if kept:
        return None
    gone = [d for d in found.dims if d is not None and d not in dims]  # of one value
    held = found.with_terms([_all_at_zero(term, gone) for term in found.terms])
    return replace(held, dims=tuple(dims))


def _all_at_zero(term: Any, indices: Sequence[Index]) -> Any:
    for index in indices:
        term = None if term is None else term.at(index, 0)
    return term


def _diagonal(known: Known, constants: Constants, node: Node) -> Expression | None:
    found = _first(known, node)
    offset, a, b = (*arguments(node)[1:], *(0, 0, 1)[len(node.args) - 1 :])
    if found is None or offset != 0:
        return None
    a, b = a % len(found.dims), b % len(found.dims)
    first, second = found.dims[a], found.dims[b]
    if first is None or second is None or not is_equal(first.size, second.size):
        return None
    joined = found.renamed({second: first})
    rest = [d for i, d in enumerate(joined.dims) if i not in (a, b)]
    return replace(joined, dims=(*rest, first))


def _scaled(known: Known, constants: Constants, node: Node) -> Expression | None:
    """A product with a number or an explicit tensor, or a quotient by a number."""
    left, right = arguments(node)[:2]
    quotient = node.target in (aten.div.Tensor, aten.div.Scalar)
    if quotient and (node.kwargs or not isinstance(right, (int, float))):
        return None
    if isinstance(left, Node) and isinstance(right, Node):
        if left in known and right in known:
            return None
        expression, factor = (left, right) if left in known else (right, left)
        return _times(known[expression], factor, node)
    found = _first(known, node)
    if found is None or not isinstance(right, (int, float)):
        return None
    return found.times(1 / right if quotient else float(right))


def _times(found: Expression, factor: Node, node: Node) -> Expression | None:
    rank = value_of(node).dim()
    dims = (*[None] * (rank - len(found.dims)), *found.dims)
    if not isinstance(value_of(factor), Tensor) or value_of(factor).dim() > rank:
        return None
    sizes = value_of(factor).shape
    indices: list[Index | None] = []
    result = list(dims)
    for offset, size in enumerate(sizes):
        at = rank - len(sizes) + offset
        if isinstance(size, int) and size == 1:
            indices.append(None)
            continue
        result[at] = index = dims[at] or Index(size)
        indices.append(index)
    return replace(found.times(1.0, Factor(factor, tuple(indices))), dims=tuple(result))


def _sum(known: Known, constants: Constants, node: Node) -> Expression | None:
    found = _first(known, node)
    if found is None or node.kwargs:
        return None
    args = arguments(node)
    rank = len(found.dims)
    whole = node.target in (aten.sum.default, aten.mean.default) or not args[1]
    dims = set(range(rank)) if whole else {d % rank for d in args[1]}
    keep = len(args) > 2 and bool(args[2])
    scale = 1.0
    for d in dims:
        index, size = found.dims[d], _size(node.args[0], d)
        if index is None:
            continue
        if node.target in (aten.mean.default, aten.mean.dim):
            if not isinstance(size, int):
                return None
            scale /= size
        if not all(_has(term, index) for term in found.terms):
            return None
    left = tuple(
        (None if i in dims else d) for i, d in enumerate(found.dims) if keep or i not in dims
    )
    return replace(found.times(scale), dims=left)


def _has(term: Any, index: Index) -> bool:
    """Whether a term depends on an index: its sum is not a multiple of it."""
    used = {term.row, *term.outs, *(i for slot in term.slots for i in slot), *term.fixed}
    return index in used or any(index in factor.indices for factor in term.factors)


def _add(known: Known, constants: Constants, node: Node) -> Expression | None:
    left, right = arguments(node)[:2]
    if node.kwargs:
        return None
    sign = -1.0 if node.target is aten.sub.Tensor else 1.0
    a, b = (known.get(n) if isinstance(n, Node) else None for n in (left, right))
    if a is not None and b is not None:
        return a.plus(b.times(sign))
    there, other = (a, right) if a is not None else (b, left)
    if there is None or not _is_zero(constants, other):
        return None
    if isinstance(other, Node) and value_of(node).dim() != len(there.dims):
        return None
    if [d is None for d in there.dims] != [is_one(s) for s in value_of(node).shape]:
        return None
    return there if there is a else there.times(sign)


def _is_zero(constants: Constants, item: Any) -> bool:
    if isinstance(item, Node):
        value = constants.repeated(item)
        return value is not None and not bool(value.any())
    return isinstance(item, (int, float)) and item == 0


def _expand(known: Known, constants: Constants, node: Node) -> Expression | None:
    found = _first(known, node)
    shapes = value_of(node).shape
    if found is None or len(shapes) != len(found.dims):
        return None
    kept = [is_one(size) == (d is None) for d, size in zip(found.dims, shapes, strict=True)]
    return found if all(kept) else None


def _pieces(known: Known, constants: Constants, node: Node) -> Expression | None:
    """An item of a split into one piece, or into pieces of one position."""
    source, position = arguments(node)
    if source.target not in _SPLITS or not isinstance(position, int):
        return None
    found = known.get(source.args[0])
    if found is None:
        return None
    at = _SPLITS[source.target]
    dim = (source.args[at] if len(source.args) > at else source.kwargs.get("dim", 0)) % len(
        found.dims
    )
    if source.target is aten.unbind.int:
        return _without(found.at(dim, position % len(value_of(source))), dim)
    if is_equal(_size(source.args[0], dim), _size(node, dim)):
        return found
    if all(is_one(piece.shape[dim]) for piece in value_of(source)):
        return found.at(dim, position)
    return None


def _stack(known: Known, constants: Constants, node: Node) -> Expression | None:
    """``stack`` and ``cat`` of expressions: a sum of terms, each at one position."""
    args = arguments(node)
    parts = [known.get(part) for part in args[0]]
    dim = args[1] if len(args) > 1 else 0
    rank = value_of(node).dim()
    dim %= rank
    if node.target is aten.cat.default:
        if not all(is_one(_size(part, dim)) for part in args[0]):
            return None
        parts = [None if p is None else _without(p, dim) for p in parts]
    index = Index(len(parts))
    total: Expression | None = None
    for position, part in enumerate(parts):
        if part is None:
            return None
        placed = part.with_terms([term.at(index, position) for term in part.terms])
        placed = replace(placed, dims=(*placed.dims[:dim], index, *placed.dims[dim:]))
        total = placed if total is None else total.plus(placed)
        if total is None:
            return None
        if total.dims[dim] is not index:
            return None
    return None if total is None else whole(total, index)


def _without(found: Expression, dim: int) -> Expression:
    return replace(found, dims=(*found.dims[:dim], *found.dims[dim + 1 :]))


def _operands(known: Known, node: Node) -> tuple[Expression, Node, bool] | None:
    """Return the expression and the explicit tensor of a product, and whether the expression is on
    the left; None if both are expressions."""
    left, right = arguments(node)
    if left in known and right in known:
        return None
    first = left in known
    return known[left if first else right], right if first else left, first


def _product(known: Known, constants: Constants, node: Node) -> Expression | None:
    """``mm``, ``mv`` and ``dot`` with an explicit tensor."""
    operands = _operands(known, node)
    if operands is None:
        return None
    found, factor, first = operands
    contracted = found.dims[-1] if first else found.dims[0]
    if contracted is None or not all(_has(term, contracted) for term in found.terms):
        return None
    sizes = value_of(factor).shape
    new = [Index(size) for size in (sizes[1:] if first else sizes[:-1])]
    indices = (contracted, *new) if first else (*new, contracted)
    dims = (*found.dims[:-1], *new) if first else (*new, *found.dims[1:])
    return replace(found.times(1.0, Factor(factor, indices)), dims=dims)


def _batched_product(known: Known, constants: Constants, node: Node) -> Expression | None:
    """``bmm`` with an explicit tensor."""
    operands = _operands(known, node)
    if operands is None:
        return None
    found, factor, first = operands
    batch, row, column = found.dims
    contracted, kept = (column, row) if first else (row, column)
    if contracted is not None and not all(_has(term, contracted) for term in found.terms):
        return None
    sizes = value_of(factor).shape
    if batch is None and not is_one(sizes[0]):
        batch = Index(sizes[0])
    size = sizes[2 if first else 1]
    new = None if is_one(size) else Index(size)
    indices = (batch, contracted, new) if first else (batch, new, contracted)
    dims = (batch, kept, new) if first else (batch, new, kept)
    return replace(found.times(1.0, Factor(factor, indices)), dims=dims)


def _size(node: Any, dim: int) -> Any:
    return value_of(node).shape[dim]


MOVES: dict[Any, Move] = {
    aten.alias.default: _same, aten.clone.default: _same,
    aten.neg.default: _negative,
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.permute.default: _permute, aten.t.default: _permute, aten.transpose.int: _permute,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _reshape, aten.reshape.default: _reshape,
    aten._unsafe_view.default: _reshape, aten.squeeze.dim: _reshape, aten.squeeze.dims: _reshape,
    aten.squeeze.default: _reshape,
    aten.diagonal.default: _diagonal,
    aten.mul.Tensor: _scaled, aten.div.Tensor: _scaled, aten.mul.Scalar: _scaled,
    aten.div.Scalar: _scaled,
    aten.sum.default: _sum, aten.sum.dim_IntList: _sum, aten.mean.default: _sum,
    aten.mean.dim: _sum,
    aten.add.Tensor: _add, aten.sub.Tensor: _add,
    aten.expand.default: _expand,
    operator.getitem: _pieces,
    aten.stack.default: _stack, aten.cat.default: _stack,
    aten.mm.default: _product, aten.mv.default: _product, aten.dot.default: _product,
    aten.bmm.default: _batched_product,
}  # fmt: skip
