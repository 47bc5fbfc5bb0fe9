"""Reverse mode over reverse mode: what `autograd.grad(..., create_graph=True)` does, in the joint
graph."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from passes import derivative
from passes.bodies import Linearizations
from passes.nest import all_sites
from passes.strategies.base import FORWARD, Inside, Strategy


class Reverse(Strategy):
    """Leave the node to autograd: the pullback of a gradient is reverse mode over its traced
    operators. Applies to every site."""

    name = "reverse"

    def build(
        self,
        module: GraphModule,
        node: Node,
        active: set[Node],
        inside: Inside,
        known: Linearizations,
    ) -> dict[str, str]:
        """Change nothing: `passes.derivative.gradient` means reverse mode."""
        taken = {site.name: self.name for site in all_sites(module, [node])}
        return dict.fromkeys(taken, FORWARD) if node.target is derivative.tangent else taken
