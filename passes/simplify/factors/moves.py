"""Multiply sums of products, and take parts of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.contraction.terms import Index
from passes.graph import is_equal
from passes.simplify.emit import call
from passes.simplify.factors.terms import (
    Expression,
    Factor,
    NotAProduct,
    Place,
    Term,
    aligned,
)

aten = torch.ops.aten

Read = Callable[[Any], Expression]  # an operand as an expression


class Moves:
    """Works with sums of products of tensors of a graph.

    Some of it needs a tensor that is not in the graph, as a part of another; it is added, and of no
    use if nothing comes of it.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._made: dict[Any, Node] = {}

    def times(self, one: Expression, other: Expression) -> Expression:
        """Multiply, element by element."""
        one, other, dims = aligned(one, other)
        products = (self._product(a, b) for a in one.terms for b in other.terms)
        return Expression(dims, tuple(term for term in products if term is not None))

    def _product(self, one: Term, other: Term) -> Term | None:
        """Multiply two terms; None if they are held at different places, where it is zero."""
        places = dict(one.places)
        for index, place in other.places:
            here = one.place(index)
            if here is None:
                one = self._held(one, index, place)
                places[index] = place
            elif (here.start, here.stop) == (place.start, place.stop):
                pair = (Expression((p.dim,), (t,)) for p, t in ((here, one), (place, other)))
                a, b, (dim,) = _joined(*pair)
                (one,), (other,) = a.terms, b.terms
                places[index] = replace(here, dim=dim)
            elif here.stop <= place.start or place.stop <= here.start:
                return None
            else:
                raise NotAProduct("parts that overlap")
        for index, place in one.places:
            if other.place(index) is None:
                other = self._held(other, index, place)
        return Term(one.scale * other.scale, one.factors + other.factors, tuple(places.items()))

    def _held(self, term: Term, index: Index, place: Place) -> Term:
        """Return a term at some of the values of an index."""
        factors = []
        for factor in term.factors:
            if index in factor.indices:
                if (index,) not in factor.dims:
                    factor = self.apart(factor)
                at = factor.dims.index((index,))
                if factor.picks and at == len(factor.dims) - 1:
                    raise NotAProduct("a part of a table")
                part = (factor.node, at, place.start, place.stop)
                dims = (*factor.dims[:at], place.dim, *factor.dims[at + 1 :])
                node = self.make(aten.slice.Tensor, part, factor.node)
                factor = replace(factor, node=node, dims=dims)
            factors.append(factor)
        return replace(term, factors=tuple(factors))

    def part(self, x: Expression, at: int, start: int, stop: int) -> Expression:
        """Return some of the values of a dimension."""
        if len(x.dims[at]) != 1:
            raise NotAProduct("a slice across indices")
        (index,) = x.dims[at]
        place = Place(start, stop, (Index(stop - start),))
        terms = []
        for term in x.terms:
            held = self._product(Term(1.0, (), ((index, place),)), term)
            if held is not None:
                left = tuple((i, p) for i, p in held.places if i is not index)
                (found,) = [p for i, p in held.places if i is index]
                terms.append(Expression((found.dim,), (replace(held, places=left),)))
        if not terms:
            raise NotAProduct("a part that is zero")
        total = terms[0]
        for other in terms[1:]:
            total = _plus(total, other)
        return Expression((*x.dims[:at], total.dims[0], *x.dims[at + 1 :]), total.terms)

    def apart(self, factor: Factor) -> Factor:
        """Return a factor with a dimension for each index.

        Raises:
            NotAProduct: A size is not known.
        """
        sizes = tuple(index.size for index in factor.indices)
        if factor.picks or not all(isinstance(size, int) for size in sizes):
            raise NotAProduct("a part of a dimension of a table, or of symbolic size")
        node = self.make(aten.reshape.default, (factor.node, sizes), factor.node)
        return Factor(node, tuple((index,) for index in factor.indices))

    def make(self, target: Any, args: tuple[Any, ...], like: Node) -> Node:
        """Return a call of an operator on nodes of the graph, right behind the last of them."""
        if (target, args) not in self._made:
            last = max(item for item in args if isinstance(item, Node))
            while last.next.op == "placeholder":
                last = last.next
            with self.graph.inserting_after(last):
                self._made[target, args] = call(self.graph, target, args, {}, like)
        return self._made[target, args]

    def has_made(self, node: Node) -> bool:
        """Whether a node is one of those that were added."""
        return node in self._made.values()

    def drop_unused(self) -> None:
        """Take away what nothing came of."""
        for node in reversed(self._made.values()):
            if not node.users:
                self.graph.erase_node(node)
        self._made.clear()


def _joined(one: Expression, other: Expression) -> tuple[Expression, Expression, Any]:
    """As `aligned` for one dimension, the other indices of the second left as they are."""
    a, b = one.dims[0], other.dims[0]
    if len(a) == len(b) and all(is_equal(i.size, j.size) for i, j in zip(a, b, strict=True)):
        names = {j: (i,) for i, j in zip(a, b, strict=True)}
        return one, other.renamed(names), (a,)
    if len(a) == 1 and not one.is_held(a[0]):
        return one.renamed({a[0]: b}), other, (b,)
    if len(b) == 1 and not other.is_held(b[0]):
        return one, other.renamed({b[0]: a}), (a,)
    raise NotAProduct("two parts are made of different indices")


def _plus(one: Expression, other: Expression) -> Expression:
    """Add two expressions of one dimension that share all other indices."""
    one, other, dims = _joined(one, other)
    return Expression(dims, one.terms + other.terms)
