"""Sums of products of tensors, over named indices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from passes.contraction.terms import Index
from passes.graph import is_equal, value_of

Dim = tuple[Index, ...]  # what a dimension is made of, the outermost first; nothing for size 1
Names = Mapping[Index, Dim]


class NotAProduct(Exception):
    """The algebra has no word for it; the operator stays as it is."""


@dataclass(frozen=True)
class Factor:
    """A tensor, and the indices of its dimensions.

    Attributes:
        node: The tensor, or positions.
        dims: What each dimension is made of.
        picks: Whether the node holds positions in one more dimension, the last. The tensor is 1
            there and 0 elsewhere.
    """

    node: Node
    dims: tuple[Dim, ...]
    picks: bool = False

    @property
    def indices(self) -> Dim:
        """All of them, in the order of memory."""
        return sum(self.dims, ())


@dataclass(frozen=True)
class Place:
    """A part of the values of an index of a concatenation: there it is other indices.

    Attributes:
        start: The first value.
        stop: One behind the last.
        dim: What counts from ``start`` on.
    """

    start: int
    stop: int
    dim: Dim


@dataclass(frozen=True)
class Term:
    """``scale · Π factors``, summed over every index that is not in the result; zero wherever an
    index has not its place."""

    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    places: tuple[tuple[Index, Place], ...] = ()

    @property
    def indices(self) -> set[Index]:
        """What it depends on, by its factors."""
        return {index for factor in self.factors for index in factor.indices}

    def place(self, index: Index) -> Place | None:
        """Return where an index is held."""
        return dict(self.places).get(index)

    def renamed(self, names: Names) -> Term:
        """Return the term with indices replaced."""
        places = []
        for index, place in self.places:
            new = names.get(index, (index,))
            if len(new) != 1:
                raise NotAProduct("a concatenated dimension is split")
            places.append((new[0], replace(place, dim=_renamed(place.dim, names))))
        factors = (replace(f, dims=tuple(_renamed(d, names) for d in f.dims)) for f in self.factors)
        return Term(self.scale, tuple(factors), tuple(places))


@dataclass(frozen=True)
class Expression:
    """A tensor: a sum of terms, and what each of its dimensions is made of.

    A term that does not depend on an index of the dimensions is the same for all of its values.
    """

    dims: tuple[Dim, ...]
    terms: tuple[Term, ...]

    def renamed(self, names: Names) -> Expression:
        """Return the expression with indices replaced."""
        return Expression(
            tuple(_renamed(d, names) for d in self.dims),
            tuple(t.renamed(names) for t in self.terms),
        )

    def fresh(self) -> Expression:
        """Return the expression with new indices in place of all."""
        names = {index: (Index(index.size),) for index in self._indices()}
        return self.renamed(names)

    def _indices(self) -> Iterator[Index]:
        yield from sum(self.dims, ())
        for term in self.terms:
            yield from term.indices
            for index, place in term.places:
                yield from (index, *place.dim)

    def leaves(self) -> set[Node]:
        """Return the tensors it is made of."""
        return {factor.node for term in self.terms for factor in term.factors}

    def is_held(self, index: Index) -> bool:
        """Whether an index is one of a concatenation."""
        return any(term.place(index) for term in self.terms)

    def scaled(self, scale: float) -> Expression:
        """Return the expression times a number."""
        terms = (replace(term, scale=term.scale * scale) for term in self.terms)
        return replace(self, terms=tuple(terms))


def leaf(node: Node) -> Expression:
    """Return a tensor as it is."""
    dims = tuple(() if is_equal(size, 1) else (Index(size),) for size in value_of(node).shape)
    return Expression(dims, (Term(1.0, (Factor(node, dims),)),))


def size_of_dim(dim: Dim) -> Any:
    """Return how many values a dimension has."""
    return math.prod(index.size for index in dim)


def _renamed(dim: Dim, names: Names) -> Dim:
    return tuple(new for index in dim for new in names.get(index, (index,)))


def aligned(one: Expression, other: Expression) -> tuple[Expression, Expression, tuple[Dim, ...]]:
    """Return two expressions that are broadcast against each other with the same indices for the
    same dimensions, and these."""
    rank = max(len(one.dims), len(other.dims))
    one = replace(one, dims=((),) * (rank - len(one.dims)) + one.dims)
    other = other.fresh()
    other = replace(other, dims=((),) * (rank - len(other.dims)) + other.dims)
    for at in range(rank):
        a, b = one.dims[at], other.dims[at]
        if not a or not b:
            continue
        to_one, to_other = _matched(a, b, one, other)
        one, other = one.renamed(to_one), other.renamed(to_other)
    return one, other, tuple(a or b for a, b in zip(one.dims, other.dims, strict=True))


def _matched(a: Dim, b: Dim, one: Expression, other: Expression) -> tuple[Names, Names]:
    if len(a) == len(b) and all(is_equal(i.size, j.size) for i, j in zip(a, b, strict=True)):
        return {}, {j: (i,) for i, j in zip(a, b, strict=True)}
    if len(a) == 1 and not one.is_held(a[0]) and is_equal(size_of_dim(b), a[0].size):
        return {a[0]: b}, {}
    if len(b) == 1 and not other.is_held(b[0]) and is_equal(size_of_dim(a), b[0].size):
        return {}, {b[0]: a}
    to_one, to_other = _common_parts(a, b)
    for names, x in ((to_one, one), (to_other, other)):
        if any(len(new) > 1 and x.is_held(index) for index, new in names.items()):
            raise NotAProduct("a dimension is cut across")
    return to_one, to_other


def _common_parts(a: Dim, b: Dim) -> tuple[Names, Names]:
    """Split indices until two dimensions are made of the same: (2, 6) and (4, 3) of (2, 2, 3)."""
    parts: tuple[dict[Index, Dim], ...] = ({i: () for i in a}, {j: () for j in b})
    left = [[(i, i) for i in a], [(j, j) for j in b]]
    while all(left):
        (one, i), (other, j) = left[0].pop(0), left[1].pop(0)
        are_same = is_equal(i.size, j.size)
        if not are_same and not (isinstance(i.size, int) and isinstance(j.size, int)):
            raise NotAProduct("two dimensions are made of different indices")
        smaller = i if are_same or i.size < j.size else j
        for index, part, rest in ((one, i, left[0]), (other, j, left[1])):
            if not are_same and part is not smaller:
                if part.size % smaller.size:
                    raise NotAProduct("two dimensions are made of different indices")
                rest.insert(0, (index, Index(part.size // smaller.size)))
        parts[0][one] += (smaller,)
        parts[1][other] += (smaller,)
    if any(left):
        raise NotAProduct("two dimensions of different sizes")
    names = ({i: new for i, new in found.items() if new != (i,)} for found in parts)
    to_one, to_other = names
    return to_one, to_other


def summed(expression: Expression, at: Sequence[int], *, keep: bool = False) -> Expression:
    """Sum over dimensions."""
    gone = [index for d in at for index in expression.dims[d]]
    terms = [_summed_term(term, gone) for term in expression.terms]
    dims = [() if d in at else dim for d, dim in enumerate(expression.dims)]
    dims = [dim for d, dim in enumerate(dims) if keep or d not in at]
    return Expression(tuple(dims), tuple(terms))


def _summed_term(term: Term, gone: Sequence[Index]) -> Term:
    scale, places = term.scale, dict(term.places)
    for index in gone:
        place = places.pop(index, None)
        for i in place.dim if place else (index,):
            if i in term.indices:
                continue
            if not isinstance(i.size, int):
                raise NotAProduct("a sum of what is repeated a symbolic number of times")
            scale *= i.size
    return Term(scale, term.factors, tuple(places.items()))


def permuted(expression: Expression, order: Sequence[int]) -> Expression:
    """Put dimensions in another order."""
    return replace(expression, dims=tuple(expression.dims[d] for d in order))


def reshaped(expression: Expression, sizes: Sequence[Any]) -> Expression:
    """Group the indices into other dimensions; an index is split where it has to be."""
    if any(isinstance(size, int) and size == 0 for size in sizes):
        raise NotAProduct("an empty tensor")
    left, dims = list(sum(expression.dims, ())), []
    for size in sizes:
        dim: Dim = ()
        while not is_equal(size_of_dim(dim), size):
            if not left:
                raise NotAProduct("sizes that do not come out")
            index = left.pop(0)
            missing = size // size_of_dim(dim) if isinstance(size, int) else None
            if isinstance(index.size, int) and missing and index.size > missing:
                if index.size % missing or expression.is_held(index):
                    raise NotAProduct("a dimension is cut across")
                outer, rest = Index(missing), Index(index.size // missing)
                expression = expression.renamed({index: (outer, rest)})
                left.insert(0, rest)
                index = outer
            dim = (*dim, index)
        dims.append(dim)
    if left:
        raise NotAProduct("sizes that do not come out")
    return replace(expression, dims=tuple(dims))


def expanded(expression: Expression, sizes: Sequence[Any]) -> Expression:
    """Repeat along dimensions of size 1, and along new ones in front."""
    dims = ((),) * (len(sizes) - len(expression.dims)) + expression.dims
    new = [d or (() if is_equal(s, 1) else (Index(s),)) for d, s in zip(dims, sizes, strict=True)]
    return replace(expression, dims=tuple(new))
