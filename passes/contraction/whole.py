"""Rows of a derivative that are stacked in full are the derivative."""

from __future__ import annotations

from dataclasses import replace

from passes.contraction.terms import Expression, Index, Term


def whole(expression: Expression, index: Index) -> Expression:
    """``Σₖ δ(i, k) ∂f[…; k, …] → ∂f[…; i, …]`` where k takes every value.

    Args:
        expression: A sum of terms, each at one position of a dimension.
        index: i, the index of that dimension.
    """
    if not isinstance(index.size, int):
        return expression
    terms = expression.terms
    groups: dict[object, dict[int, tuple[Term, int]]] = {}
    for term in terms:
        for place in _places(term, index):
            group = groups.setdefault(_without(term, index, place, expression.dims), {})
            group.setdefault(term.fixed[index], (term, place))
    merged: list[Term] = []
    gone: set[int] = set()
    for group in groups.values():
        members = {id(term) for term, _ in group.values()}
        if len(group) < index.size or gone & members:
            continue
        term, place = group[0]
        gone |= members
        fixed = {i: v for i, v in term.fixed.items() if i not in (index, *term.slots[place])}
        slots = (*term.slots[:place], (index,), *term.slots[place + 1 :])
        merged.append(replace(term, slots=slots, fixed=fixed))
    return expression.with_terms([*(t for t in terms if id(t) not in gone), *merged])


def _places(term: Term, index: Index) -> list[int]:
    """Return the slots, of one index each, that are held where the result is."""
    value = term.fixed.get(index)
    if value is None or any(index in factor.indices for factor in term.factors):
        return []
    return [
        place
        for place, slot in enumerate(term.slots)
        if len(slot) == 1
        and slot[0] != index
        and slot[0].size == index.size
        and term.fixed.get(slot[0]) == value
        and not any(slot[0] in factor.indices for factor in term.factors)
        and sum(other.count(slot[0]) for other in term.slots) == 1
    ]


def _without(term: Term, index: Index, place: int, dims: tuple[Index | None, ...]) -> object:
    """Return what a term is but for one slot and the position of the result, with the indices that
    it alone has numbered anew."""
    own: dict[Index, object] = {}

    def name(i: Index | None) -> object:
        if i is None or i in dims:
            return i
        return own.setdefault(i, ("own", len(own)))

    slots = tuple(
        "here" if at == place else tuple(map(name, slot)) for at, slot in enumerate(term.slots)
    )
    head = (term.base, name(term.row), tuple(map(name, term.outs)), slots, term.points, term.scale)
    factors = tuple((f.node, tuple(map(name, f.indices))) for f in term.factors)
    hidden = (index, *term.slots[place])
    fixed = frozenset((name(i), v) for i, v in term.fixed.items() if i not in hidden)
    return head, factors, fixed
