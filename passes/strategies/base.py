"""What a strategy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeAlias

from torch.fx import GraphModule, Node

from passes.bodies import Linearizations

# Puts every derivative of a body into the form wished for, in place, given the nodes that carry a
# gradient; returns site name → strategy taken.
Inside: TypeAlias = Callable[[GraphModule, set[Node]], dict[str, str]]

# What every strategy leaves a directional derivative as: forward mode, pulled back by reverse mode.
FORWARD = "forward"


class Refused(Exception):
    """A strategy does not apply to a site; the message is the reason a report shows."""


class Strategy(ABC):
    """One way to evaluate a derivative node and its pullback."""

    name: str

    @abstractmethod
    def build(
        self,
        module: GraphModule,
        node: Node,
        active: set[Node],
        inside: Inside,
        known: Linearizations,
    ) -> dict[str, str]:
        """Put a derivative node, and those inside its body, into this strategy's form, in place.

        Args:
            module: The derivative graph that holds the node.
            node: A node that calls `passes.derivative.gradient`.
            active: The nodes of that graph that carry a gradient from outside.
            inside: Puts the derivatives of a body into their forms, in place.
            known: Linearisations of this derivative graph's bodies, which grows.

        Returns:
            Site name → strategy taken, for this site and those inside its body.

        Raises:
            Refused: The strategy does not apply; the graph is unchanged.
        """
