"""Put the derivatives of a graph into the forms wished for."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

from torch.fx import GraphModule, Node

from passes.bodies import Linearizations
from passes.graph import placeholders
from passes.nest import active_nodes, sites
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
