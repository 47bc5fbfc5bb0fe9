"""Taylor mode: what is asked for of higher derivatives, and nothing else of them."""

from __future__ import annotations

from collections.abc import Collection, MutableMapping

from torch.fx import GraphModule

from passes.contraction.replacing import replace_contractions
from passes.nest import all_sites, sites

NAME = "taylor"


def contract(
    module: GraphModule, names: Collection[str], refusals: MutableMapping[tuple[str, str], str]
) -> dict[str, str]:
    """Compute contractions of second and higher derivatives in Taylor mode, in place.

    A Laplacian, a mixed derivative, ``v·H·v``: derivatives along directions, of which a derivative
    graph computes whole gradients to take a column of each. Directions are propagated forwards
    together, and where only a weighted sum of the highest derivatives is asked for, only that sum
    is: see `passes.contraction` and `passes.taylor`.

    Args:
        module: A derivative graph, or a body.
        names: The sites that may be computed so; one contraction may need several.
        refusals: Gets (site name, strategy) → reason.

    Returns:
        Site name → strategy, for the sites that are gone.
    """
    gone, reasons = replace_contractions(module, names.__contains__)
    for site in all_sites(module, sites(module)):
        if site.name in names:
            default = "no second derivative along given directions is asked for of it"
            refusals[site.name, NAME] = reasons.get(site.name, default)
    return dict.fromkeys(gone, NAME)
