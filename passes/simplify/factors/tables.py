"""Rows of a table that are looked up, as products with ones.

    x[r, d] = Σ_v e[r, v] w[v, d],    ∂w[v, d] = Σ_r e[r, v] δ[r, d],    e[r, v] = 1 where i[r] = v

    Σ_v e[r, v] w[v] = w[i[r]],    Σ_v e[r, v] e[s, v] = 1 where i[r] = i[s]

Of the gradient of each sample in a table, which is zero in nearly all rows, the norm takes the
pairs of places that look up the same row, and no table. e is never made.

`vmap` puts the tables of samples one below the other and adds N times the length of a table to the
positions of sample N.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from passes.contraction.terms import Index
from passes.graph import are_equal, arguments, value_of
from passes.simplify.factors.moves import Moves, Read
from passes.simplify.factors.terms import (
    Dim,
    Expression,
    Factor,
    NotAProduct,
    Term,
    reshaped,
    size_of_dim,
    summed,
)
from passes.simplify.filled import RESHAPES, filling

aten = torch.ops.aten

Call = Callable[..., Node]  # adds a call of an operator on some arguments

LOOK_UPS = {aten.embedding.default, aten.index.Tensor, aten.index_select.default}
_WIDER = {*RESHAPES, aten.unsqueeze.default, aten.expand.default}


def looked_up(moves: Moves, node: Node, read: Read) -> Expression:
    """Return rows of a table."""
    table, *where = arguments(node)
    if node.target is aten.index_select.default and where.pop(0) != 0:
        raise NotAProduct("positions in another dimension")
    ones, sample = _ones(_single(where[0]), value_of(table).shape[0])
    rows, own = ones.dims[:-1], ones.dims[-1]
    length, sizes = own[0].size, value_of(table).shape[1:]
    x = reshaped(read(table), [value_of(table).shape[0] // length, length, *sizes])
    samples, *rest = x.dims
    dims = tuple(samples if at == sample else () for at in range(len(rows)))
    wide = replace(ones, dims=(*ones.dims, *[()] * len(sizes)))
    found = summed(moves.times(replace(x, dims=(*dims, *rest)), wide), [len(rows)])
    return reshaped(found, value_of(node).shape)


def added_up(moves: Moves, node: Node, read: Read) -> Expression:
    """Return what is added to the rows of a table of zeros."""
    table, positions, values, *is_sum = arguments(node)
    if is_sum != [True] or filling(table) != 0:
        raise NotAProduct("rows are written to what is not zero")
    positions, (length, *sizes) = _single(positions), value_of(table).shape
    ones, sample = _ones(positions, length)
    if not are_equal(value_of(values).shape, [*value_of(positions).shape, *sizes]):
        raise NotAProduct("values that are repeated")
    rows = ones.dims[:-1]
    x = reshaped(read(values), [*map(size_of_dim, rows), *sizes])
    narrow = replace(x, dims=(*x.dims[: len(rows)], (), *x.dims[len(rows) :]))
    wide = replace(ones, dims=(*ones.dims, *[()] * len(sizes)))
    total = moves.times(wide, narrow)
    total = summed(total, [at for at in range(len(rows)) if at != sample])
    if sample is None:
        return total
    samples, own, *rest = total.dims
    return replace(total, dims=(samples + own, *rest))


def _single(positions: Any) -> Node:
    """Return the positions in the first dimension, if there are none in others."""
    if isinstance(positions, (list, tuple)):
        if len(positions) != 1:
            raise NotAProduct("positions in several dimensions")
        (positions,) = positions
    if not isinstance(positions, Node) or value_of(positions).dtype is not torch.int64:
        raise NotAProduct("a mask of rows")
    return positions


def _ones(positions: Node, length: Any) -> tuple[Expression, int | None]:
    """Return e, its rows in the shape in which they were looked up, and which of its dimensions
    counts tables that stand one below the other."""
    if not isinstance(length, int):
        raise NotAProduct("a table of symbolic length")
    while positions.target in RESHAPES or _is_inside(positions, length):
        positions = arguments(positions)[0]
    positions, sample, length = of_samples(positions, length)
    if not any(_looks_up(user, positions, length) for user in positions.users):
        raise NotAProduct("positions that may be negative")  # a row has two then
    shape = value_of(positions).shape
    dims: list[Dim] = [(Index(size),) if size != 1 else () for size in shape]
    dims.append((Index(length),))
    ones = Term(1.0, (Factor(positions, tuple(dims), picks=True),))
    return Expression(tuple(dims), (ones,)), sample


def _looks_up(node: Node, positions: Node, length: int) -> bool:
    """Whether a node fails if the positions are not inside of a table of some length."""
    if node.target is not aten.embedding.default or node.args[1] is not positions:
        return False
    return value_of(node.args[0]).shape[0] == length


def _is_inside(node: Node, length: int) -> bool:
    """Whether a node gives positions bounds that those inside of a table meet anyway."""
    if node.target is not aten.clamp.default:
        return False
    low, high = (*arguments(node)[1:], None, None)[:2]
    return (low is None or low <= 0) and (high is None or high >= length - 1)


def of_samples(positions: Node, length: int) -> tuple[Node, int | None, int]:
    """Return the positions in each of some tables, which dimension counts these, and how long one
    is."""
    if positions.target is not aten.add.Tensor or positions.kwargs:
        return positions, None, length
    for own, offset in (arguments(positions), reversed(arguments(positions))):
        if not isinstance(own, Node) or not isinstance(offset, Node):
            continue
        start = offset
        while start.target in _WIDER:
            start = arguments(start)[0]
        if start.target is not aten.arange.start_step:
            continue
        first, end, step = (*arguments(start), 1)[:3]
        shape, rank = value_of(offset).shape, value_of(positions).dim()
        number = length // step
        if (first, end, number * step) != (0, length, length) or number < 2:
            continue
        at = [dim - len(shape) + rank for dim, size in enumerate(shape) if size != 1]
        # One dimension counts, and only by what is counted is it as long.
        if len(at) == 1 and are_equal(value_of(own).shape, value_of(positions).shape):
            return own, at[0], step
    return positions, None, length


def without_ones(term: Term, wanted: Dim, call: Call) -> tuple[Term, Factor | None]:
    """Take all e out of a term but one over an index that is wanted.

    Args:
        term: A term.
        wanted: The indices of the result.
        call: Adds a call.

    Returns:
        The term, and the e that is left, if any.

    Raises:
        NotAProduct: There is a table for each sample in the result, or several are.
    """
    left: Factor | None = None
    while ones := next((f for f in term.factors if f.picks), None):
        if len(ones.dims[-1]) != 1 or not all(isinstance(i.size, int) for i in ones.indices):
            raise NotAProduct("a part of a table")
        (own,) = ones.dims[-1]
        rows = set(sum(ones.dims[:-1], ()))
        factors = [f for f in term.factors if f is not ones]
        for at, factor in enumerate(factors):
            if own in factor.indices:
                factors[at] = (_same if factor.picks else _looked_up)(ones, factor, term, call)
        if own in wanted:
            if left is not None or rows & set(wanted):
                raise NotAProduct("a table for each sample")
            left = ones
        term = replace(term, factors=tuple(factors))
    return term, left


def _numbered(node: Node, indices: Dim, call: Call) -> Node:
    """Give each index a dimension."""
    sizes = tuple(index.size for index in indices)
    if not all(isinstance(size, int) for size in sizes):
        raise NotAProduct("a table of symbolic size")
    if are_equal(value_of(node).shape, sizes):
        return node
    return call(aten.reshape.default, (node, sizes))


def _same(one: Factor, other: Factor, term: Term, call: Call) -> Factor:
    """Return where the positions of two are the same."""
    if other.dims[-1] != one.dims[-1]:
        raise NotAProduct("a part of a table")
    rows = [sum(f.dims[:-1], ()) for f in (one, other)]
    every: Dim = tuple(dict.fromkeys(sum(rows, ())))
    spread = []
    for factor, own in zip((one, other), rows, strict=True):
        order = sorted(range(len(own)), key=lambda at, own=own: every.index(own[at]))
        node = _numbered(factor.node, own, call)
        if order != list(range(len(own))):
            node = call(aten.permute.default, (node, order))
        sizes = tuple(index.size if index in own else 1 for index in every)
        spread.append(call(aten.reshape.default, (node, sizes)))
    like = next(value_of(f.node) for f in term.factors if not f.picks)
    are_same = call(aten.eq.Tensor, tuple(spread))
    made = call(aten._to_copy.default, (are_same,), {"dtype": like.dtype})
    return Factor(made, tuple((index,) for index in every))


def _looked_up(ones: Factor, factor: Factor, term: Term, call: Call) -> Factor:
    """Return the rows of a factor that are looked up."""
    (own,), rows = ones.dims[-1], sum(ones.dims[:-1], ())
    rest = tuple(index for index in factor.indices if index is not own)
    if set(rest) & set(rows):
        raise NotAProduct("a table for each sample")
    node = _numbered(factor.node, factor.indices, call)
    order = [factor.indices.index(index) for index in (own, *rest)]
    if order != list(range(len(order))):
        node = call(aten.permute.default, (node, order))
    node = call(aten.reshape.default, (node, (own.size, -1)))
    made = call(aten.embedding.default, (node, _numbered(ones.node, rows, call)))
    every = (*rows, *rest)
    return Factor(_numbered(made, every, call), tuple((index,) for index in every))


def put_back(ones: Factor, node: Node, have: Dim, call: Call) -> tuple[Node, Dim]:
    """Add what there is for each position to the row that it is of.

    Args:
        ones: The e that is left.
        node: What there is.
        have: The index of each of its dimensions.
        call: Adds a call.

    Returns:
        The table, and its indices.
    """
    (own,), rows = ones.dims[-1], sum(ones.dims[:-1], ())
    if not set(rows) <= set(have):
        raise NotAProduct("a row that is repeated")
    rest = tuple(index for index in have if index not in rows)
    order = [have.index(index) for index in (*rows, *rest)]
    if order != list(range(len(order))):
        node = call(aten.permute.default, (node, order))
    sizes = [index.size for index in rest]
    zeros = call(aten.new_zeros.default, (node, [own.size, *sizes]))
    where = [_numbered(ones.node, rows, call)]
    return call(aten.index_put.default, (zeros, where, node, True)), (own, *rest)
