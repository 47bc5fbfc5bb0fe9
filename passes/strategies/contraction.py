"""Contraction: of a first derivative, the products that are asked for, and not the Jacobian."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping

from torch.fx import GraphModule

from passes.contraction.jacobians import contract_jacobians
from passes.nest import all_sites, sites

NAME = "contraction"


def contract(
    module: GraphModule, names: Collection[str], refusals: MutableMapping[tuple[str, str], str]
) -> dict[str, str]:
    """Compute contractions of first derivatives by as few tangents and cotangents as can be, in
    place.

    ``J v``, ``w J``, ``v J v``, a trace, a norm: see `passes.contraction.jacobians`. The derivative
    nodes that are left take a form of their own, `passes.strategies.jvp_over_gradient` where it
    applies.

    Args:
        module: A derivative graph, or a body.
        names: The sites that may be computed so; one contraction may need several.
        refusals: Gets (site name, strategy) → reason.

    Returns:
        Site name → strategy, for the sites that are computed so.
    """
    found = [site.name for site in all_sites(module, sites(module)) if site.name in names]
    contracted, reasons = contract_jacobians(module, names.__contains__)
    for name in found:
        if name not in contracted:
            default = "no contraction of its first derivative is asked for"
            refusals[name, NAME] = reasons.get(name, default)
    return dict.fromkeys(contracted, NAME)
