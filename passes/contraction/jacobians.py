"""Compute contractions of Jacobians without the Jacobian, in a derivative graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.contraction.blocks import sum_blocks_only, unflatten
from passes.contraction.directions import NotPlanned
from passes.contraction.emitting import Emitter
from passes.contraction.first_order import (
    Planned,
    best,
    differentiated,
    is_of_first_order,
    together,
    total,
)
from passes.contraction.raising import Raised
from passes.contraction.terms import Base, Computed, Expression, Factor, Term
from passes.graph import arguments, drop_dead, hint, reaches, value_of
from passes.nest import sites
from passes.order import sort_nodes

aten = torch.ops.aten


@dataclass(frozen=True)
class _Asked:
    """A node that is a contraction of Jacobians.

    Attributes:
        expression: What it is; no index is held.
        below: The derivative nodes whose results it contracts.
    """

    expression: Expression
    below: tuple[Node, ...]

    @property
    def terms(self) -> list[Term]:
        return [term for term in self.expression.terms if term.order]

    @property
    def values(self) -> list[Term]:
        return [term for term in self.expression.terms if not term.order]


def contract_jacobians(
    module: GraphModule, may: Callable[[str], bool] = lambda name: True
) -> tuple[set[str], dict[str, str]]:
    """Push through the bodies of first derivatives the vectors that are asked for, and no others.

    ``J v`` is a tangent, ``w J`` a cotangent, ``v J v`` either, a trace one tangent or cotangent
    for each diagonal element; of what is asked for as a whole the smaller side is enumerated.

    Args:
        module: A derivative graph; changed in place.
        may: Whether a site, by name, may be computed so.

    Returns:
        The sites that are computed so, and why others are not, by name.
    """
    before = {node: node.meta["site"].name for node in sites(module)}
    if not any(map(may, before.values())):
        return set(), {}
    whole = unflatten(module)
    raised = Raised(module, one_by_one=True)
    if whole and sum_blocks_only(raised):
        raised = Raised(module, one_by_one=True)
    reasons = {before[node]: why for node, why in raised.refusals.items()}
    emitter = Emitter(module)
    asked = _asked(raised, emitter, may, reasons)
    plans = _worth_it(asked, before, reasons)
    for node, found in asked.items():
        if node not in plans:
            continue
        like = found.below[0]
        try:
            with module.graph.inserting_before(node):
                value = emitter.value(plans[node], found.values, found.expression.dims, node, like)
        except NotPlanned as reason:
            reasons |= dict.fromkeys((before[n] for n in found.below), str(reason))
            continue
        node.replace_all_uses_with(value)
        emitter.replaced[node] = value
    for node in module.graph.find_nodes(op="call_function", target=aten._unsafe_view.default):
        node.target = aten.reshape.default  # what it reads may have other strides now
    sort_nodes(module.graph)
    drop_dead(module.graph)
    module.recompile()
    gone = {before[n] for node in plans if node in emitter.replaced for n in asked[node].below}
    return gone, {name: why for name, why in reasons.items() if name not in gone}


def _asked(
    raised: Raised, emitter: Emitter, may: Callable[[str], bool], reasons: dict[str, str]
) -> dict[Node, _Asked]:
    """Return the contractions of first derivatives that are used other than linearly, in the order
    of the graph."""
    known = raised.expressions
    factors: set[Node | Computed] = set()
    found: dict[Node, _Asked] = {}
    for node in reversed(list(raised.module.graph.nodes)):
        if node not in known or not is_of_first_order(known[node]):
            continue
        if node not in factors and all(user in known for user in _users(node)):
            continue
        below = _below(raised, node)
        names = [n.meta["site"].name for n in below]
        if not all(map(may, names)):
            continue
        try:
            with raised.module.graph.inserting_before(node):
                expression = _joined(known[node], node, below[0], emitter)
            found[node] = _Asked(expression, below)
        except NotPlanned as reason:
            reasons |= dict.fromkeys(names, str(reason))
            continue
        factors.update(f.node for term in known[node].terms for f in term.factors)
    return dict(reversed(found.items()))


def _users(node: Node) -> list[Node]:
    """Return what reads a node; of a split its pieces."""
    pieces = [user for user in node.users if isinstance(value_of(user), (tuple, list))]
    return [
        *(user for user in node.users if user not in pieces),
        *(item for piece in pieces for item in (piece.users or [piece])),
    ]


def _joined(expression: Expression, node: Node, like: Node, emitter: Emitter) -> Expression:
    """Return an expression in which no index is held.

    Raises:
        NotPlanned: It is no contraction that is computed by pushing vectors.
    """
    if any(user.target is aten.as_strided.default for user in reaches([node])):
        raise NotPlanned("its memory is viewed")
    dims = [index for index in expression.dims if index is not None]
    if len(set(dims)) < len(dims):
        raise NotPlanned("the whole Jacobian of a batch is used, zeros and all")
    joined, held = together(expression)
    value = value_of(node)
    terms = list(joined.terms)
    for part, term in held:
        terms.append(term.times(1.0, emitter.constant(part, arguments(like)[4], like)))
    types = {_like(f).dtype for term in terms for f in term.factors}
    types |= {value_of(_point(term)).dtype for term in terms if term.order} | {value.dtype}
    if any(term.base.order for term in terms):
        raise NotPlanned("what is differentiated is itself a derivative")
    if len(types) > 1 or value.dtype.is_complex:
        raise NotPlanned("numbers of several types, or complex ones, are multiplied")
    bases = {term.base for term in terms if term.order}
    if any(not term.order and term.base not in bases for term in terms):
        raise NotPlanned("a value is added that is not differentiated here")
    return joined.with_terms(terms)


def _point(term: Term) -> Node:
    base, at = differentiated(term)
    return base.inputs[at]


def _like(factor: Factor) -> Tensor:
    return factor.node.like if isinstance(factor.node, Computed) else value_of(factor.node)


def _below(raised: Raised, node: Node) -> tuple[Node, ...]:
    """Return the derivative nodes whose results a node is linear in."""
    found: dict[Node, None] = {}
    stack, seen = [node], {node}
    while stack:
        for read in stack.pop().all_input_nodes:
            if read in seen:
                continue
            seen.add(read)
            if "site" in read.meta:
                found[read] = None
            elif read in raised.expressions or isinstance(value_of(read), (tuple, list)):
                stack.append(read)
    return tuple(found)


def _worth_it(
    asked: dict[Node, _Asked], names: dict[Node, str], reasons: dict[str, str]
) -> dict[Node, list[Planned]]:
    """Plan what needs fewer vectors than are pushed as written."""
    every = [(node, term) for node, found in asked.items() for term in found.terms]
    planned = best((term, asked[node].expression.dims) for node, term in every)
    written: dict[tuple[Base, int], set[Node]] = {}
    for found in asked.values():
        for term in found.terms:
            written.setdefault(differentiated(term), set()).update(found.below)
    fewer = {
        operand
        for operand, nodes in written.items()
        if total(p for p in planned if differentiated(p.term) == operand) < sum(map(_pushed, nodes))
    }
    plans: dict[Node, list[Planned]] = {}
    for (node, term), plan in zip(every, planned, strict=True):
        if any(differentiated(t) in fewer for t in asked[node].terms):
            plans.setdefault(node, []).append(plan)
            continue
        word = term.base.mixing or "as few vectors as can be go through its body as written"
        reasons |= {names[n]: word for n in asked[node].below if names[n] not in reasons}
        assert differentiated(term) not in fewer
    return plans


def _pushed(node: Node) -> int:
    """Return how many vectors a derivative node pushes."""
    _, _, _, n_batch, *inputs = arguments(node)
    return math.prod(map(hint, value_of(inputs[-1]).shape[:n_batch]))
