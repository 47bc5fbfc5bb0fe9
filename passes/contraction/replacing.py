"""Put Taylor mode in the place of contracted derivatives, in a derivative graph."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes import derivative
from passes.contraction.batches import split_batches
from passes.contraction.directions import NotPlanned, parts_of
from passes.contraction.gradients import with_gradients
from passes.contraction.lowering import Demand, Lowered, lower, rows_of
from passes.contraction.raising import Flatten, Raised
from passes.contraction.rows import RowsMix
from passes.contraction.terms import Base, Expression
from passes.graph import copy_graph, drop_dead, needs, placeholders, value_of
from passes.nest import all_sites, sites
from passes.order import sort_nodes
from passes.origin import mark_of, note_new, note_site
from passes.price import evaluated, price, size_hints
from passes.simplify import simplify
from passes.taylor import NoSeries

aten = torch.ops.aten
# Node that is used other than linearly → operand → contraction on it.
Asked: TypeAlias = dict[Node, dict[Base, Demand]]


@dataclass(frozen=True)
class Plan:
    """What of a derivative graph is computed in Taylor mode.

    Attributes:
        asked: Node → operand → contraction on it.
        lowered: Operand → the graph of its contractions.
        reasons: Site name → why it is not part of it.
        covered: The names of the sites below what is computed so.
    """

    asked: Asked
    lowered: dict[Base, Lowered]
    reasons: dict[str, str]
    covered: frozenset[str]

    @property
    def order(self) -> int:
        """The highest derivative of an operand."""
        parts = [
            (base, part)
            for found in self.asked.values()
            for base, d in found.items()
            for part in d.parts
        ]
        return max((base.order + part.order for base, part in parts), default=0)

    @property
    def flops(self) -> int:
        """What it costs at the sizes at hand."""
        modules = [copy_graph(part.module) for part in self.lowered.values()]
        for module in modules:
            simplify(module)
        return sum(evaluated(price(m).flops, size_hints(m)) for m in modules)


def replace_contractions(
    module: GraphModule, may: Callable[[str], bool] = lambda name: True
) -> tuple[set[str], dict[str, str]]:
    """Compute in Taylor mode what is asked for of second and higher derivatives.

    A derivative of a derivative is one of higher order, or Taylor mode over Taylor mode: two
    Laplacians one after the other are directions squared, and as fourth derivatives many more.
    Where the two differ the cheaper one is taken.

    Args:
        module: A derivative graph; changed in place.
        may: Whether a site, by name, may be computed so.

    Returns:
        The sites that are gone, and why others are not, by name.
    """
    names = {site.name for site in all_sites(module, sites(module))}
    split_batches(module)
    taken = plan(module, may)
    if taken.order > 3 or any(
        site.order > 1 and site.name in taken.reasons for site in all_sites(module, sites(module))
    ):
        nested = plan(module, may, flatten=Flattening())
        taken = min(taken, nested, key=lambda p: (-len(p.covered), p.flops))
    apply(module, taken)
    left = {site.name for site in all_sites(module, sites(module))}
    return names - left, {name: why for name, why in taken.reasons.items() if name in left}


def plan(
    module: GraphModule,
    may: Callable[[str], bool] = lambda name: True,
    known: dict[Node, Tensor] | None = None,
    flatten: Flatten | None = None,
    *,
    first: bool = False,
) -> Plan:
    """Find what of a derivative graph can be computed in Taylor mode.

    Args:
        module: A derivative graph.
        may: Whether a site, by name, may be computed so.
        known: Inputs of the graph that are constants, and their values.
        flatten: See `passes.contraction.raising.Raised`.
        first: Whether to compute first derivatives too, and everything row by row: what is summed
            over rows is summed outside.
    """
    raised = Raised(module, known, flatten=flatten)
    reasons = {node.meta["site"].name: why for node, why in raised.refusals.items()}
    asked: Asked = {}
    expressions = raised.expressions
    if first:
        expressions = {n: found for n, found in expressions.items() if found.has_rows}
    for node in _used_otherwise(expressions):
        expression, below = expressions[node], _sites_below(module, node)
        if not all(map(may, below)):
            continue
        try:
            asked[node] = _demands(node, expression, first)
        except NotPlanned as reason:
            reasons |= dict.fromkeys(below, str(reason))
    lowered: dict[Base, Lowered] = {}
    while len(lowered) < len(_bases(asked)):
        asked = asked if first else _worth_it(asked)
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
    covered = frozenset(name for node in asked for name in _sites_below(module, node))
    return Plan(asked, lowered, reasons, covered)


def _used_otherwise(expressions: Mapping[Node, Expression]) -> list[Node]:
    """Return the nodes that are used by what is no expression, in the graph's order; in place of a
    stack its parts, which may have more in common."""
    waiting = [n for n in expressions if not all(user in expressions for user in n.users)]
    found: set[Node] = set()
    while waiting:
        node = waiting.pop()
        parts = [read for read in node.all_input_nodes if read in expressions]
        if parts and expressions[node].is_stacked:
            waiting += parts
        else:
            found.add(node)
    return [node for node in expressions if node in found]


class Flattening:
    """Computes the derivatives inside of bodies by plain operators; each body once."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[GraphModule, GraphModule]] = {}

    def __call__(self, body: GraphModule, known: dict[Node, Tensor]) -> GraphModule:
        """Return a copy of a body without derivatives.

        Raises:
            RowsMix: One of them is not computed so.
        """
        if id(body) not in self._found:
            flat = copy_graph(body)
            new = dict(zip(placeholders(body.graph), placeholders(flat.graph), strict=True))
            given = {new[node]: value for node, value in known.items()}
            taken = plan(flat, known=given, flatten=self, first=True)
            apply(flat, taken)
            self._found[id(body)] = body, flat
            if sites(flat):
                raise RowsMix(next(iter(taken.reasons.values()), "an inner derivative is left"))
        flat = self._found[id(body)][1]
        if sites(flat):
            raise RowsMix("an inner derivative that is not computed in Taylor mode")
        return flat


def _sites_below(module: GraphModule, node: Node) -> list[str]:
    below = [n for n in needs([node]) if "site" in n.meta]
    return [site.name for site in all_sites(module, below)]


def _demands(node: Node, expression: Expression, first: bool) -> dict[Base, Demand]:
    """Return what a node asks for, operand by operand.

    Raises:
        NotPlanned: It is not a contraction with directions.
    """
    found = {}
    every = list(expression.terms)
    if first or any(term.order > 1 for term in every):
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


def apply(module: GraphModule, taken: Plan) -> None:
    """Put Taylor mode in the place of what a plan computes, in place."""
    asked, lowered = taken.asked, taken.lowered
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
            demands = [asked[node][base] for node in group]
            call.meta = {
                "val": tuple(demand.like for demand in demands),
                "rows": rows_of(base, demands, part.inputs),
            }
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
    sort_nodes(graph)
    drop_dead(graph)
    module.recompile()
