"""Put the derivatives of a graph into the forms wished for."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch import Tensor
from torch.fx import GraphModule, Node

from passes.bodies import Linearizations
from passes.graph import graphs_in, has_hints, placeholders, value_of
from passes.nest import active_nodes, body_of, sites
from passes.strategies import contraction, taylor
from passes.strategies.base import Refused, Strategy
from passes.strategies.jvp_over_gradient import JvpOverGradient
from passes.strategies.reverse import Reverse

REVERSE = Reverse()
# Those of a single site. Where one is refused the next is taken.
STRATEGIES: tuple[Strategy, ...] = (JvpOverGradient(), REVERSE)
# In order of preference at equal price.
NAMES = (*(strategy.name for strategy in STRATEGIES), contraction.NAME, taylor.NAME)


def put_in_form(
    module: GraphModule,
    active: set[Node],
    wish: Mapping[str, str],
    refusals: MutableMapping[tuple[str, str], str],
    known: Linearizations,
) -> dict[str, str]:
    """Put every derivative of a graph, and those inside their bodies, into the form wished for, or
    into reverse mode where that is refused or nothing is wished.

    Args:
        module: A derivative graph; changed in place, not recompiled.
        active: Its nodes that carry a gradient from outside.
        wish: Site name → strategy.
        refusals: Gets (site name, strategy) → reason.
        known: Linearisations that were made for this derivative graph, which grows.

    Returns:
        Site name → strategy taken. A derivative that is also computed inside of another's body has
        one name for all; the outermost one counts.
    """
    unknown = {node.meta["site"].name for node in sites(module) if _has_unknown_sizes(module, node)}
    for name in unknown.intersection(wish):
        refusals[name, wish[name]] = "a size in it depends on values"
    wish = {name: strategy for name, strategy in wish.items() if name not in unknown}
    by_name = {strategy.name: strategy for strategy in STRATEGIES}
    by_name[taylor.NAME] = by_name[contraction.NAME] = STRATEGIES[0]  # of what is left
    own: dict[str, str] = {}
    found: dict[str, str] = {}
    contracted: dict[str, str] = {}
    first = {name for name, strategy in wish.items() if strategy == contraction.NAME}
    higher = {name for name, strategy in wish.items() if strategy == taylor.NAME}
    if first:
        contracted = contraction.contract(module, first, refusals)
    if higher:
        found = taylor.contract(module, higher, refusals)
    if found or contracted:
        active = active_nodes(module, active.intersection(placeholders(module.graph)))

    def inside(body: GraphModule, nodes: set[Node]) -> dict[str, str]:
        return put_in_form(body, nodes, wish, refusals, known)

    for node in sites(module):
        name = node.meta["site"].name
        strategy = by_name.get(wish.get(name, REVERSE.name), REVERSE)
        try:
            taken = strategy.build(module, node, active, inside, known)
        except Refused as refusal:
            refusals[name, strategy.name] = str(refusal)
            taken = REVERSE.build(module, node, active, inside, known)
        own[name] = taken.pop(name)
        found = taken | found
    return found | own | contracted


def _has_unknown_sizes(module: GraphModule, node: Node) -> bool:
    """Whether a tensor in a derivative's body, or inside of that, has a size that depends on
    values: a filter's, a list of neighbours'."""
    inside = (n for graph in graphs_in(body_of(module, node)) for n in graph.graph.nodes)
    return any(isinstance(value_of(n), Tensor) and not has_hints(n) for n in inside)
