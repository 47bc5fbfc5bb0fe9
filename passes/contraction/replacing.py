"""Replace contractions of derivatives by Taylor mode, in a derivative graph."""

from __future__ import annotations

import operator
from collections.abc import Collection

from torch.fx import GraphModule, Node

from passes import derivative
from passes.contraction.directions import NotPlanned, parts_of
from passes.contraction.lowering import Demand, lower
from passes.contraction.raising import Raised
from passes.contraction.terms import Base
from passes.graph import arguments, drop_dead, value_of
from passes.nest import all_sites, sites
from passes.order import sort_nodes
from passes.taylor import NoSeries


def replace_contractions(module: GraphModule) -> tuple[set[str], dict[str, str]]:
    """Compute in Taylor mode every contraction of a second or higher derivative that can be.

    Args:
        module: A derivative graph; changed in place.

    Returns:
        The sites that are gone, and why the others are not, by name.
    """
    before = {site.name for site in all_sites(module, sites(module))}
    raised = Raised(module)
    reasons = {node.meta["site"].name: why for node, why in raised.refusals.items()}
    groups: dict[Base, list[Demand]] = {}
    for node, expression in raised.expressions.items():
        bases = {term.base for term in expression.terms}
        is_used = any(user not in raised.expressions for user in node.users)
        if not is_used or len(bases) != 1:
            continue
        if max(term.order for term in expression.terms) < 2:
            continue
        try:
            parts = [p for t in expression.terms for p in parts_of(t, expression.dims)]
        except NotPlanned as reason:
            reasons |= {site.name: str(reason) for site in sites_below(module, node)}
            continue
        groups.setdefault(bases.pop(), []).append(Demand(node, expression, tuple(parts)))
    for number, (base, demands) in enumerate(groups.items()):
        try:
            _replace(module, base, demands, f"taylor_{number}")
        except NoSeries as reason:
            reasons |= {s.name: str(reason) for d in demands for s in sites_below(module, d.node)}
    drop_dead(module.graph)
    module.recompile()
    left = {site.name for site in all_sites(module, sites(module))}
    return before - left, {name: why for name, why in reasons.items() if name in left}


def sites_below(module: GraphModule, node: Node) -> list:
    from passes.graph import needs
    return all_sites(module, [n for n in needs([node]) if "site" in n.meta])


def _replace(module: GraphModule, base: Base, demands: list[Demand], name: str) -> None:
    lowered = lower(base, demands)
    module.register_module(name, lowered.module)
    first = demands[0].node
    with module.graph.inserting_before(first):
        graph = module.graph.get_attr(name)
        call = module.graph.call_function(derivative.taylor, (graph, *lowered.inputs))
    call.meta = {"val": tuple(value_of(d.node) for d in demands)}
    for position, demand in enumerate(demands):
        with module.graph.inserting_after(call):
            item = module.graph.call_function(operator.getitem, (call, position))
        item.meta = {"val": value_of(demand.node)}
        demand.node.replace_all_uses_with(item)
    sort_nodes(module.graph)
