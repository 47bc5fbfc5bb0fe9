"""Derivatives of expressions: one index more, of the point, and the vector that it meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from passes.contraction.constants import Constants, is_identity
from passes.contraction.terms import Expression, Factor, Index, Term
from passes.graph import value_of


@dataclass(frozen=True)
class Differentiable:
    """A result of a body.

    Attributes:
        expression: What it is.
        points: For each term the position of the point among the inputs of its operand.
    """

    expression: Expression
    points: tuple[int, ...]


def pulled_back(
    found: Differentiable, seed: Any, n_batch: int, point: Tensor, constants: Constants
) -> Expression:
    """``∂/∂x[n, j] Σ s[b, …] E[…]``: rows are apart, so n is E's own row."""
    expression = found.expression
    at = tuple(Index(size) for size in point.shape)
    if _are_units(expression, seed, n_batch, constants):
        (term,), (place,) = expression.terms, found.points
        names = {} if term.row is None else {term.row: at[0]}
        moved = expression.renamed(names)
        slot = at if term.row is None else at[1:]
        terms = tuple(t.differentiated(slot, place) for t in moved.terms)
        return Expression(terms, (*moved.dims, *at))
    batch = [Index(size) for size in value_of(seed).shape[:n_batch]]
    dims = (*batch, *at)
    terms = []
    for term, place in zip(expression.terms, found.points, strict=True):
        names = {} if term.row is None else {term.row: at[0]}
        moved = term.renamed(names)
        assert moved is not None
        seeds = [None if d is None else names.get(d, d) for d in expression.dims]
        factor = Factor(seed, (*batch, *seeds))
        slot = at if term.row is None else at[1:]
        moved = moved.differentiated(slot, place).times(1.0, factor)
        terms.append(_simple(moved, dims, constants))
    return Expression(tuple(terms), dims).without_single(*range(n_batch + 1))


def pushed_along(
    found: Differentiable, direction: Any, n_batch: int, constants: Constants
) -> Expression:
    """``Σⱼ ∂E/∂x[n, j] v[b, n, j]``."""
    expression = found.expression
    if _are_units(expression, direction, n_batch, constants):
        (term,), (place,) = expression.terms, found.points
        row = () if term.row is None else (term.row,)
        slot = tuple(Index(size) for size in value_of(direction).shape[n_batch + len(row) :])
        moved = term.differentiated(slot, place)
        return Expression((moved,), (*row, *slot, *expression.dims))
    batch = tuple(Index(size) for size in value_of(direction).shape[:n_batch])
    dims = (*batch, *expression.dims)
    terms = []
    for term, place in zip(expression.terms, found.points, strict=True):
        row = () if term.row is None else (term.row,)
        sizes = value_of(direction).shape[n_batch + len(row) :]
        slot = tuple(Index(size) for size in sizes)
        moved = term.differentiated(slot, place)
        moved = moved.times(1.0, Factor(direction, (*batch, *row, *slot)))
        terms.append(_simple(moved, dims, constants))
    return Expression(tuple(terms), dims)


def _are_units(expression: Expression, vectors: Any, n_batch: int, constants: Constants) -> bool:
    """Whether vectors are all unit vectors, numbered by the dimensions of their space: what
    numbers them is then what they select, rows too."""
    if n_batch < 2 or len(expression.terms) != 1 or len(set(expression.dims)) < n_batch:
        return False
    known = constants.value(vectors)
    return known is not None and known.dim() == 2 * n_batch and is_identity(known, n_batch)


def _simple(term: Term, dims: Sequence[Index | None], constants: Constants) -> Term:
    """Take constants apart: numbers into the scale, identities into indices."""
    for factor in term.factors:
        known = constants.repeated(factor.node)
        apart = None if known is None else constants.apart(known, factor.indices)
        if apart is None:
            continue
        scale, equal = apart
        names = {}
        if equal is not None:
            free = [index for index in equal if index not in dims]
            if not free:
                continue
            names = {free[-1]: equal[0] if equal[1] is free[-1] else equal[1]}
        rest = tuple(f for f in term.factors if f is not factor)
        moved = replace(term, scale=term.scale * scale, factors=rest).renamed(names)
        assert moved is not None
        return _simple(moved, dims, constants)
    return term
