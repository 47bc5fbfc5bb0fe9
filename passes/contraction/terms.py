"""Sums of contractions of explicit tensors with one derivative tensor, over named indices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from passes.graph import attribute_of, is_one, value_of

_numbers = itertools.count()


@dataclass(frozen=True)
class Index:
    """A summation or result index.

    Attributes:
        size: How many values it has: a number or a symbolic size.
        number: What tells it from others.
    """

    size: Any = field(compare=False)
    number: int = field(default_factory=lambda: next(_numbers))


@dataclass(frozen=True)
class Computed:
    """An explicit tensor that is computed where it is needed.

    Attributes:
        body: ``inputs → (the tensor,)``, plain operators.
        code: What the body computes; two bodies of the same code are one.
        inputs: Nodes, and what is computed from nodes.
        like: The example value.
    """

    body: GraphModule = field(compare=False, repr=False)
    code: str
    inputs: tuple[Any, ...]
    like: Any = field(compare=False, repr=False)


def code_of(body: GraphModule) -> str:
    """Return what tells a graph from others, whatever the names in it."""
    numbers = {node: number for number, node in enumerate(body.graph.nodes)}
    lines = []
    for node in body.graph.nodes:
        target = "" if node.op == "placeholder" else str(node.target)
        if node.op == "get_attr":
            value = attribute_of(body, target)
            target = code_of(value) if isinstance(value, GraphModule) else str(id(value))
        read = map_arg((node.args, node.kwargs), lambda n: _Number(numbers[n]))
        lines.append(f"{node.op} {target} {read if node.op != 'placeholder' else ''}")
    return "\n".join(lines)


class _Number(int):
    """A node, as its place in a graph."""

    def __repr__(self) -> str:
        return f"%{int(self)}"


def leaves_of(item: Any) -> list[Node]:
    """Return the nodes that an explicit tensor is, or is computed from."""
    if isinstance(item, Computed):
        return [leaf for read in item.inputs for leaf in leaves_of(read)]
    return [item] if isinstance(item, Node) else []


def example_of(item: Any) -> Any:
    """Return an example of an explicit tensor, without a history; anything else as it is."""
    value = item.like if isinstance(item, Computed) else value_of(item)
    return value.detach() if isinstance(value, Tensor) else value


@dataclass(frozen=True)
class Factor:
    """An explicit tensor; None where it has one element along a dimension and is repeated."""

    node: Node | Computed
    indices: tuple[Index | None, ...]


@dataclass(frozen=True)
class Base:
    """``f(x, t, …, θ)[n, o]``: what is differentiated, row by row, at some of its inputs.

    Attributes:
        body: ``f``; its first result counts.
        code: What the body computes; two bodies of the same code are one.
        inputs: What the body reads, in the order in which it does: the same for all points.
        order: How many derivatives f is itself.
        mixing: Why its rows mix, where they do: f[o] is a whole, without n.
        apart: Positions of the inputs whose rows are proven to be apart.
    """

    body: GraphModule = field(compare=False)
    code: str
    inputs: tuple[Any, ...]
    order: int = 0
    mixing: str = field(default="", compare=False)
    apart: frozenset[int] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class Term:
    """``scale · Π factors · ∂ᵏf[n, outs; slots]``, summed over every index that is not in the
    result.

    Attributes:
        base: f.
        row: n; None where rows mix, and their dimension is one of the others.
        outs: The indices of the dimensions of f's result after the first.
        slots: For each of the k derivatives the indices of its point's other dimensions.
        points: For each of them the position of the point among the inputs of f.
        scale: A number.
        factors: Explicit tensors.
        fixed: Indices that have one value.
    """

    base: Base
    row: Index | None
    outs: tuple[Index, ...]
    slots: tuple[tuple[Index, ...], ...] = ()
    points: tuple[int, ...] = ()
    scale: float = 1.0
    factors: tuple[Factor, ...] = ()
    fixed: Mapping[Index, int] = field(default_factory=dict)

    @property
    def order(self) -> int:
        """k."""
        return len(self.slots)

    def differentiated(self, slot: tuple[Index, ...], point: int) -> Term:
        """Return the term with one derivative more."""
        return replace(self, slots=(*self.slots, slot), points=(*self.points, point))

    def renamed(self, names: Mapping[Index, Index]) -> Term | None:
        """Return the term with indices replaced; None if it is zero, an index having two
        values."""

        def new(index: Any) -> Any:
            return names.get(index, index)

        fixed: dict[Index, int] = {}
        for index, value in self.fixed.items():
            if fixed.setdefault(new(index), value) != value:
                return None
        return replace(
            self,
            row=new(self.row),
            outs=tuple(map(new, self.outs)),
            slots=tuple(tuple(map(new, slot)) for slot in self.slots),
            factors=tuple(Factor(f.node, tuple(map(new, f.indices))) for f in self.factors),
            fixed=fixed,
        )

    def at(self, index: Index, value: int) -> Term | None:
        """Return the term with an index held at a value; None if it is zero there."""
        if self.fixed.get(index, value) != value:
            return None
        return replace(self, fixed={**self.fixed, index: value})

    def with_factors(self, new: Callable[[Any], Any]) -> Term:
        """Return the term with other tensors in place of its explicit ones."""
        factors = tuple(Factor(new(f.node), f.indices) for f in self.factors)
        return replace(self, factors=factors)

    def times(self, scale: float = 1.0, *factors: Factor) -> Term:
        """Return the term times a number and explicit tensors."""
        return replace(self, scale=self.scale * scale, factors=(*self.factors, *factors))


@dataclass(frozen=True)
class Expression:
    """A tensor: a sum of terms.

    Attributes:
        terms: The terms.
        dims: An index for each dimension; None for one of size 1.
    """

    terms: tuple[Term, ...]
    dims: tuple[Index | None, ...]

    @property
    def is_stacked(self) -> bool:
        """Whether a term is at one position of a dimension."""
        return any(dim in term.fixed for term in self.terms for dim in self.dims)

    @property
    def has_rows(self) -> bool:
        """Whether one of the dimensions is the operands' rows."""
        rows = {term.row for term in self.terms}
        return len(rows) == 1 and not rows.isdisjoint(set(self.dims) - {None})

    def with_terms(self, terms: Sequence[Term | None]) -> Expression:
        """Return an expression of the same dimensions; terms that are zero are left out."""
        return replace(self, terms=tuple(term for term in terms if term is not None))

    def with_factors(self, new: Callable[[Any], Any]) -> Expression:
        """Return the expression with other tensors in place of its explicit ones."""
        return self.with_terms([term.with_factors(new) for term in self.terms])

    def renamed(self, names: Mapping[Index, Index]) -> Expression:
        """Return the expression with indices replaced."""
        dims = tuple(None if d is None else names.get(d, d) for d in self.dims)
        return replace(self.with_terms([t.renamed(names) for t in self.terms]), dims=dims)

    def at(self, dim: int, value: int) -> Expression:
        """Return the slice at a position of a dimension, which stays with size 1."""
        index = self.dims[dim]
        dims = (*self.dims[:dim], None, *self.dims[dim + 1 :])
        if index is None:
            return self
        return replace(self.with_terms([t.at(index, value) for t in self.terms]), dims=dims)

    def without_single(self, *kept: int | None) -> Expression:
        """Return the expression with the indices that have one value held at it, save those of some
        dimensions."""
        found = self
        for dim, index in enumerate(self.dims):
            if dim not in kept and index is not None and is_one(index.size):
                found = found.at(dim, 0)
        return found

    def permuted(self, order: Sequence[int]) -> Expression:
        """Return the expression with its dimensions in another order."""
        return replace(self, dims=tuple(self.dims[d] for d in order))

    def times(self, scale: float = 1.0, *factors: Factor) -> Expression:
        """Return the expression times a number and explicit tensors."""
        return self.with_terms([t.times(scale, *factors) for t in self.terms])

    def plus(self, other: Expression) -> Expression | None:
        """Return the sum of two expressions of the same shape; None if one is repeated along a
        dimension of the other, or is zero but on a diagonal of the other."""
        if _pattern(self.dims) != _pattern(other.dims):
            return None
        pairs = zip(other.dims, self.dims, strict=True)
        other = other.renamed({old: new for old, new in pairs if old is not None and new})
        return replace(self, terms=(*self.terms, *other.terms))


def _pattern(dims: Sequence[Index | None]) -> list[int]:
    """Return for each dimension the first one with the same index; -1 for one of size 1."""
    return [-1 if index is None else dims.index(index) for index in dims]
