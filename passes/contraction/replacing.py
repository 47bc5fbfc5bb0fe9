"""Put Taylor mode in the place of contracted derivatives, in a derivative graph."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch.fx import GraphModule, Node

from passes import derivative
from passes.contraction.directions import NotPlanned, parts_of
from passes.contraction.gradients import with_gradients
from passes.contraction.lowering import Demand, Lowered, lower
from passes.contraction.raising import Raised
from passes.contraction.terms import Base, Expression
from passes.graph import drop_dead, needs, value_of
from passes.nest import all_sites, sites
from passes.order import sort_nodes
from passes.origin import mark_of, note_new, note_site
from passes.taylor import NoSeries

aten = torch.ops.aten
# Node that is used other than linearly → operand → contraction on it.
Asked: TypeAlias = dict[Node, dict[Base, Demand]]


def replace_contractions(
    module: GraphModule, may: Callable[[str], bool] = lambda name: True
) -> tuple[set[str], dict[str, str]]:
    """Compute in Taylor mode what is asked for of second and higher derivatives.

    Args:
        module: A derivative graph; changed in place.
        may: Whether a site, by name, may be computed so.

    Returns:
        The sites that are gone, and why others are not, by name.
    """
    names = {site.name for site in all_sites(module, sites(module))}
    raised = Raised(module)
    reasons = {node.meta["site"].name: why for node, why in raised.refusals.items()}
    asked: Asked = {}
    for node, expression in raised.expressions.items():
        below = _sites_below(module, node)
        if all(user in raised.expressions for user in node.users) or not all(map(may, below)):
            continue
        try:
            asked[node] = _demands(node, expression)
        except NotPlanned as reason:
            reasons |= dict.fromkeys(below, str(reason))
    lowered: dict[Base, Lowered] = {}
    while len(lowered) < len(_bases(asked)):
        asked = _worth_it(asked)
        lowered = {}
        for base in _bases(asked):
            group = [found[base] for found in asked.values() if base in found]
            try:
                lowered[base] = lower(base, group)
            except NoSeries as reason:
                lost = [node for node, found in asked.items() if base in found]
                for node in lost:
                    reasons |= dict.fromkeys(_sites_below(module, node), str(reason))
                    del asked[node]
                break
    _replace(module, asked, lowered)
    sort_nodes(module.graph)
    drop_dead(module.graph)
    module.recompile()
    left = {site.name for site in all_sites(module, sites(module))}
    return names - left, {name: why for name, why in reasons.items() if name in left}


def _sites_below(module: GraphModule, node: Node) -> list[str]:
    below = [n for n in needs([node]) if "site" in n.meta]
    return [site.name for site in all_sites(module, below)]


def _demands(node: Node, expression: Expression) -> dict[Base, Demand]:
    """Return what a node asks for, operand by operand.

    Raises:
        NotPlanned: It is not a contraction with directions.
    """
    found = {}
    every = list(expression.terms)
    if any(term.order > 1 for term in every):
        every = [t for term in every for t in with_gradients(term, expression.dims)]
    for base in dict.fromkeys(term.base for term in every):
        terms = [term for term in every if term.base == base]
        parts = tuple(part for term in terms for part in parts_of(term, expression.dims))
        found[base] = Demand(value_of(node), expression.dims, parts)
    return found


def _bases(asked: Asked) -> list[Base]:
    return list(dict.fromkeys(base for found in asked.values() for base in found))


def _worth_it(asked: Asked) -> Asked:
    """Leave out values and first derivatives of operands of which nothing higher is asked for,
    unless they are parts of sums with higher ones."""
    high = {base for found in asked.values() for base, d in found.items() if _is_high(base, d)}
    return {node: found for node, found in asked.items() if not high.isdisjoint(found)}


def _is_high(base: Base, demand: Demand) -> bool:
    return any(base.order + part.order > 1 for part in demand.parts)


def _replace(module: GraphModule, asked: Asked, lowered: dict[Base, Lowered]) -> None:
    graph = module.graph
    values: dict[Node, Node] = {}
    for number, (base, part) in enumerate(lowered.items()):
        group = [node for node, found in asked.items() if base in found]
        name = f"taylor_{number}"
        note_site(part.module, mark_of(group[-1]).site, group[-1])
        note_new(part.module, "choose", f"{name}.")
        module.register_module(name, part.module)
        with graph.inserting_before(group[0]):
            call = graph.call_function(derivative.taylor, (graph.get_attr(name), *part.inputs))
            call.meta = {"val": tuple(asked[node][base].like for node in group)}
            for position, node in enumerate(group):
                item = graph.call_function(operator.getitem, (call, position))
                item.meta = {"val": asked[node][base].like}
                before = values.get(node)
                if before is not None:
                    item = graph.call_function(aten.add.Tensor, (before, item))
                    item.meta = {"val": asked[node][base].like}
                values[node] = item
    for node, value in values.items():
        node.replace_all_uses_with(value)
