"""Plan contractions of Jacobians: which index goes through the body by a tangent, which by a
cotangent, which is enumerated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from passes.contraction.terms import Base, Expression, Factor, Index, Term
from passes.graph import hint

# Beyond it not every set of factors is tried.
MOST_FACTORS = 8


@dataclass(frozen=True)
class Push:
    """Vectors that are pushed forward or pulled back through a body, as one batch.

    ``J[n, o; i] Π factors``, summed over the side that goes through: with ``forward`` a tangent
    ``V[enumerated, n, i]`` gives ``Σᵢ J V [enumerated, n, o]``, else a cotangent
    ``V[enumerated, n, o]`` gives ``Σₒ V J [enumerated, n, i]``.

    Attributes:
        base: f.
        point: The position of x among its inputs.
        forward: Whether they are tangents.
        row: n.
        side: The indices that they are summed over.
        enumerated: The indices of the batch. One that is also of the side is a unit vector's.
        factors: What they are made of.
    """

    base: Base
    point: int
    forward: bool
    row: Index | None
    side: tuple[Index, ...]
    enumerated: tuple[Index, ...]
    factors: tuple[Factor, ...]

    @property
    def count(self) -> int:
        """How many vectors there are, at the sizes at hand."""
        return _number(self.enumerated)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two pushes have in common that are the same vectors."""
        numbers: dict[Any, int] = {None: -1, self.row: 0}
        order = [*self.side, *self.enumerated, *(i for f in self.factors for i in f.indices)]
        for index in order:
            numbers.setdefault(index, len(numbers))
        named = [(f.node, tuple(numbers[i] for i in f.indices)) for f in self.factors]
        enumerated = tuple(numbers[i] for i in self.enumerated)
        return self.base, self.point, self.forward, len(self.side), enumerated, tuple(named)


@dataclass(frozen=True)
class Planned:
    """A term: a push, and what is left to be multiplied.

    Attributes:
        term: The term, no index of it held.
        push: The vectors.
        left: The factors that are not in them.
    """

    term: Term
    push: Push
    left: tuple[Factor, ...]

    @property
    def result(self) -> tuple[Index, ...]:
        """The indices of what comes out of the push."""
        other = self.term.outs if self.push.forward else self.term.slots[0]
        row = () if self.term.row is None else (self.term.row,)
        return (*self.push.enumerated, *row, *other)


def pushes(term: Term, dims: Sequence[Index | None]) -> Iterator[Planned]:
    """Yield the ways to compute a term of a first derivative, tangents first.

    Any factors may be in the vectors; an index of theirs that is used elsewhere is enumerated.
    """
    sides = (term.slots[0], term.outs)
    every = range(len(term.factors))
    choices: list[Sequence[int]] = [(), every]
    choices += [[at for at in every if set(term.factors[at].indices) & set(s)] for s in sides]
    if len(every) <= MOST_FACTORS:
        choices = [
            c for size in (0, *(n + 1 for n in every)) for c in itertools.combinations(every, size)
        ]
    for forward, side, other in ((True, *sides), (False, *reversed(sides))):
        for positions in choices:
            chosen = tuple(term.factors[at] for at in positions)
            left = tuple(term.factors[at] for at in every if at not in positions)
            elsewhere = {*dims, *other, *(i for f in left for i in f.indices)}
            inside = [*side, *(i for f in chosen for i in f.indices)]
            batch = tuple(
                i for i in dict.fromkeys(inside) if i and i in elsewhere and i != term.row
            )
            push = Push(*differentiated(term), forward, term.row, side, batch, chosen)
            yield Planned(term, push, left)


def whole(term: Term, *, forward: bool) -> Planned:
    """Return the plan that enumerates one side: the Jacobian, which other terms can share."""
    side = term.slots[0] if forward else term.outs
    push = Push(*differentiated(term), forward, term.row, side, side, ())
    return Planned(term, push, term.factors)


def differentiated(term: Term) -> tuple[Base, int]:
    """Return the f of a first derivative, and the position of the point among its inputs."""
    (point,) = term.points
    return term.base, point


def best(terms: Iterable[tuple[Term, Sequence[Index | None]]]) -> list[Planned]:
    """Return the plans of terms with fewest vectors in all: each its own best, or all of a body
    from its Jacobian, enumerated over the smaller side."""
    asked = list(terms)
    found: list[Planned | None] = [None] * len(asked)
    for operand in dict.fromkeys(differentiated(term) for term, _ in asked):
        own = [(at, t, d) for at, (t, d) in enumerate(asked) if differentiated(t) == operand]
        plans = [
            [min(pushes(term, dims), key=lambda plan: plan.push.count) for _, term, dims in own],
            *([whole(term, forward=f) for _, term, _ in own] for f in (True, False)),
        ]
        for (at, *_), plan in zip(own, min(plans, key=total), strict=True):
            found[at] = plan
    return [plan for plan in found if plan is not None]


def total(plans: Iterable[Planned]) -> int:
    """Return how many vectors plans need, those that are the same once."""
    return sum({plan.push.key: plan.push.count for plan in plans}.values())


def cost(expression: Expression) -> float:
    """Return how many vectors an expression needs by itself; infinitely many if it is not a sum of
    first derivatives."""
    if not is_of_first_order(expression):
        return math.inf
    joined, held = together(expression)
    terms = [term for term in joined.terms if term.order]
    # A constant that is no node yet.
    terms += [term.times(1.0, Factor(part.key, part.indices)) for part, term in held if term.order]
    return total(best((term, expression.dims) for term in terms))


def is_of_first_order(expression: Expression) -> bool:
    """Whether there are first derivatives in a sum, and none of higher order."""
    return max((term.order for term in expression.terms), default=0) == 1


def together(expression: Expression) -> tuple[Expression, list[tuple[Held, Term]]]:
    """Join the terms that differ only in the values at which they hold indices.

    ``Σₖ cₖ J[n, k; i] at s = k → Σₒ H[s, o] J[n, o; i]``: rows of a Jacobian that were computed one
    by one. Where H is a multiple of the identity one index takes the other's place.

    Returns:
        The expression with the terms that hold nothing, and for each other group the H that is to
        become a factor of a term.
    """
    groups: dict[Any, list[Term]] = {}
    canonical = _Canonical(expression.dims)
    for term in map(canonical.renamed, expression.terms):
        what = term.base, term.row, term.outs, term.slots, term.points
        key = *what, term.factors, frozenset(term.fixed)
        groups.setdefault(key, []).append(term)
    free: list[Term | None] = []
    held: list[tuple[Held, Term]] = []
    for terms in groups.values():
        found, term = _held(terms).simple(replace(terms[0], fixed={}, scale=1.0), expression.dims)
        if found.indices:
            held.append((found, term))
        else:
            free.append(term.times(found.number))
    return expression.with_terms(free), held


@dataclass(frozen=True)
class Held:
    """A constant tensor over some indices, of which most elements are zero.

    Attributes:
        indices: Its dimensions.
        elements: Position → what is there, if not zero.
    """

    indices: tuple[Index, ...]
    elements: Mapping[tuple[int, ...], float] = field(hash=False)

    @property
    def number(self) -> float:
        """Its value, if it has no indices."""
        return self.elements.get((), 0.0)

    @property
    def key(self) -> Any:
        """What two constants have in common that are the same."""
        return tuple(sorted(self.elements.items()))

    def simple(self, term: Term, dims: Sequence[Index | None]) -> tuple[Held, Term]:
        """Take out of it what is an identity, or the same everywhere, as a factor of a term."""
        for a, b in itertools.permutations(range(len(self.indices)), 2):
            one, other = self.indices[a], self.indices[b]
            full = _is_full({at[a] for at in self.elements}, one, other)
            if full and other not in dims and all(at[a] == at[b] for at in self.elements):
                renamed = term.renamed({other: one})
                assert renamed is not None
                return self._without(b).simple(renamed, dims)
        for a, index in enumerate(self.indices):
            by_rest: dict[Any, set[int]] = {}
            for at, scale in self.elements.items():
                by_rest.setdefault((*at[:a], None, *at[a + 1 :], scale), set()).add(at[a])
            if all(_is_full(values, index) for values in by_rest.values()):
                return self._without(a).simple(term, dims)
        return self, term

    def _without(self, dim: int) -> Held:
        elements = {(*at[:dim], *at[dim + 1 :]): scale for at, scale in self.elements.items()}
        return Held((*self.indices[:dim], *self.indices[dim + 1 :]), elements)


def _held(terms: Sequence[Term]) -> Held:
    indices = tuple(sorted(terms[0].fixed, key=lambda index: index.number))
    elements: dict[tuple[int, ...], float] = {}
    for term in terms:
        at = tuple(term.fixed[index] for index in indices)
        elements[at] = elements.get(at, 0.0) + term.scale
    return Held(indices, elements)


class _Canonical:
    """Gives the indices that derivatives of one body are summed over, or held at, the same names.

    Args:
        dims: The indices of the result, which keep theirs.
    """

    def __init__(self, dims: Sequence[Index | None]) -> None:
        self._dims = dims
        self._names: dict[Any, Index] = {}

    def renamed(self, term: Term) -> Term:
        """Return the term with these names; values of indices that nothing has are left out."""
        places = [term.row, *term.outs, *(i for slot in term.slots for i in slot)]
        names: dict[Index, Index] = {}
        for place, index in enumerate(places):
            if index is not None and index not in self._dims and index not in names:
                new = self._names.setdefault((term.base, term.points, place), Index(index.size))
                names[index] = new
        used = {*places, *self._dims, *(i for f in term.factors for i in f.indices)}
        fixed = {index: value for index, value in term.fixed.items() if index in used}
        renamed = replace(term, fixed=fixed).renamed(names)
        assert renamed is not None
        return renamed


def _is_full(values: set[int], *indices: Index) -> bool:
    """Whether values are all that indices have; symbolic sizes are not asked."""
    return all(isinstance(i.size, int) and i.size == len(values) for i in indices)


def _number(indices: Iterable[Index]) -> int:
    return math.prod(hint(index.size) for index in indices)
