"""Which directions a contraction asks for: mixed derivatives as sums of pure ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.fx import Node

from passes.contraction.terms import Computed, Factor, Index, Term
from passes.contraction.views import source_of

# Of one point, by its position among the operand's inputs: a basis vector, as its position in the
# point's dimensions after the first; or explicit tensors (positions of the dimensions that each
# has), multiplied.
Vector = tuple[Any, ...]
# A sum of vectors with numbers before them.
Direction = frozenset[tuple[Vector, float]]

# Directions of one operand: beyond it a graph gets too large.
MOST = 1024


class NotPlanned(Exception):
    """A contraction that is not computed in Taylor mode; the message is the reason."""


@dataclass(frozen=True)
class Part:
    """``scale · Π factors · Dᵏf[indices](v, …, v)``, at a place of the result.

    Attributes:
        scale: A number, 1/k! taken out.
        factors: Explicit tensors, see `passes.contraction.terms.Factor`.
        fixed: Values of indices that occur in factors or in the result.
        indices: Those of f's result: the row, and f's other dimensions.
        direction: v; None for k = 0.
        order: k.
    """

    scale: float
    indices: tuple[Index, ...]
    factors: tuple[Factor, ...]
    fixed: Mapping[Index, int]
    direction: Direction | None
    order: int

    @property
    def left(self) -> tuple[Factor, ...]:
        """The factors that are no numbers where the fixed indices are."""
        return tuple(
            f for f in self.factors if any(i is not None and i not in self.fixed for i in f.indices)
        )


def parts_of(term: Term, dims: Sequence[Index | None]) -> Iterator[Part]:
    """Take a term apart into derivatives along single directions.

    An index that a slot shares with the result, or with another slot, is enumerated; one that only
    explicit tensors are summed over makes these tensors a direction.

    Raises:
        NotPlanned: The derivative has an index that is not contracted, or too many directions.
    """
    if term.row is None:
        raise NotPlanned(term.base.mixing)
    if len(set(dims) - {None}) < len([d for d in dims if d is not None]):
        raise NotPlanned("a whole derivative of a batch is used, zeros and all")
    term = replace(term, factors=tuple(map(source_of, term.factors)))
    counted = [index for slot in term.slots for index in slot]
    many = []
    for index in dict.fromkeys(counted):
        if index in term.fixed:
            continue
        if index in dims and counted.count(index) == 1:
            raise NotPlanned("a whole gradient or Hessian is used: an index is not contracted")
        many += [index] if index in dims or counted.count(index) > 1 else _apart(term, index, dims)
    many = list(dict.fromkeys(many))
    for held in at_each(term, many, "the number of directions is not known, or too large"):
        yield from _along_single_directions(held, dims)


def at_each(term: Term, many: Sequence[Index], otherwise: str) -> Iterator[Term]:
    """Yield a term with indices held at each of their positions, where it is not zero.

    Raises:
        NotPlanned: Their sizes are not known, or too large; says ``otherwise``.
    """
    sizes = [index.size for index in many]
    if not all(isinstance(size, int) for size in sizes) or math.prod(sizes) > MOST:
        raise NotPlanned(otherwise)
    for values in itertools.product(*map(range, sizes)):
        held: Term | None = term
        for index, value in zip(many, values, strict=True):
            held = None if held is None else held.at(index, value)
        if held is not None:
            yield held


def _apart(term: Term, index: Index, dims: Sequence[Index | None]) -> list[Index]:
    """Return the indices that are enumerated so that what is summed over an index is a vector: none
    if it is one, the columns of a thin matrix, or else the index itself."""
    having = [f for f in term.factors if index in f.indices]
    others = {i for f in having for i in f.indices if i is not None and i not in term.fixed}
    columns = sorted(others - {index, term.row}, key=lambda i: i.number)
    if not having or not all(c in dims and isinstance(c.size, int) for c in columns):
        return [index]
    is_thin = not isinstance(index.size, int) or math.prod(c.size for c in columns) < index.size
    return columns if is_thin else [index]


def _along_single_directions(term: Term, dims: Sequence[Index | None]) -> Iterator[Part]:
    slots = [_vector(term, *pair) for pair in zip(term.slots, term.points, strict=True)]
    used = {factor for _, factors in slots for factor in factors}
    factors = tuple(f for f in term.factors if f not in used)
    left = {i for f in factors for i in f.indices if i is not None and i not in term.fixed}
    if not left <= {term.row, *term.outs, *dims}:
        raise NotPlanned("an explicit tensor is summed over an index of its own")
    assert term.row is not None, "parts_of has refused it"
    indices = (term.row, *term.outs)
    if not slots:
        yield Part(term.scale, indices, factors, term.fixed, None, 0)
        return
    for scale, direction in polarized([vector for vector, _ in slots]):
        yield Part(term.scale * scale, indices, factors, term.fixed, direction, term.order)


def _vector(term: Term, slot: tuple[Index, ...], point: int) -> tuple[Vector, tuple[Factor, ...]]:
    """Return the vector that a slot is contracted with, and the factors it is made of."""
    if all(index in term.fixed for index in slot):
        return (point, "basis", *(term.fixed[index] for index in slot)), ()
    if any(index in term.fixed for index in slot):
        raise NotPlanned("a direction is a basis vector in some dimensions only")
    factors = tuple(f for f in term.factors if any(i in slot for i in f.indices))
    places: list[Any] = []
    for factor in factors:
        at: list[Any] = []
        for index in factor.indices:
            if index is None or index == term.row:
                at.append("row" if index == term.row else None)
            elif index in term.fixed:
                at.append(("at", term.fixed[index]))
            else:
                at.append(slot.index(index))
        places.append((factor.node, tuple(at)))
    return (point, "product", *places), factors


def polarized(vectors: Sequence[Vector]) -> list[tuple[float, Direction]]:
    """Return ``Dᵏφ(v₁, …, vₖ)`` as a sum of ``Dᵏφ(s, …, s)``.

    For two vectors ``½ (D²(v + w) − D²(v) − D²(w))``, whose pure terms are often wanted anyway;
    else ``1/(2ᵏ⁻¹ k!) Σ Πε · Dᵏ(v₁ + Σ εᵢ vᵢ)`` over the signs.
    """
    count = len(vectors)
    if len(set(vectors)) == 1:
        return [(1.0, frozenset({(vectors[0], 1.0)}))]
    if count == 2:
        v, w = vectors
        both = frozenset({(v, 1.0), (w, 1.0)})
        return [
            (0.5, both),
            (-0.5, frozenset({(v, 1.0)})),
            (-0.5, frozenset({(w, 1.0)})),
        ]
    found: dict[Direction, float] = {}
    for signs in itertools.product((1.0, -1.0), repeat=count - 1):
        total: dict[Vector, float] = {}
        for vector, sign in zip(vectors, (1.0, *signs), strict=True):
            total[vector] = total.get(vector, 0.0) + sign
        there = sorted(((v, c) for v, c in total.items() if c), key=str)
        if there:
            # Dᵏ(c v) = cᵏ Dᵏ(v): one of all multiples.
            scale = there[0][1]
            direction = frozenset((v, c / scale) for v, c in there)
            weight = math.prod(signs) / (2 ** (count - 1) * math.factorial(count)) * scale**count
            found[direction] = found.get(direction, 0.0) + weight
    return [(weight, direction) for direction, weight in found.items() if weight]


def explicit_of(parts: Sequence[Part]) -> list[Node | Computed]:
    """Return the explicit tensors that parts read, each once."""
    found: dict[Node | Computed, None] = {}
    for part in parts:
        for vector, _ in part.direction or ():
            if vector[1] == "product":
                found.update(dict.fromkeys(node for node, _ in vector[2:]))
        found.update(dict.fromkeys(f.node for f in part.factors))
    return list(found)
