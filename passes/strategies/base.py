"""What a strategy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch.fx import GraphModule, Node

# What every strategy leaves a directional derivative as: forward mode, pulled back by reverse mode.
FORWARD = "forward"


class Refused(Exception):
    """A strategy does not apply to a site; the message is the reason a report shows."""


class Strategy(ABC):
    """One way to evaluate a derivative node and its pullback."""

    name: str

    @abstractmethod
    def build(
        self, module: GraphModule, node: Node, active: set[Node], wish: Mapping[str, str]
    ) -> dict[str, str]:
        """Put a derivative node, and those inside its body, into this strategy's form, in place.

        Args:
            module: The derivative graph that holds the node.
            node: A node that calls `passes.derivative.gradient`.
            active: The nodes of that graph that carry a gradient from outside.
            wish: Site name → strategy, for the sites inside the body.

        Returns:
            Site name → strategy taken, for this site and those inside its body.

        Raises:
            Refused: The strategy does not apply; the graph is unchanged.
        """
