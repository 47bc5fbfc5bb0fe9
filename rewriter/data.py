"""Assignments to ``x.data`` in a captured graph."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Graph
from torch.fx.node import has_side_effect

from passes.graph import placeholders


def set_data(x: Tensor, value: Tensor) -> Tensor:
    """Do what ``x.data = value`` does; one node of the captured graph."""
    x.data = value
    return x


has_side_effect(set_data)


def replaced_data(captured: Graph) -> tuple[int, ...]:
    """Return the positions of the inputs whose ``data`` a captured graph assigns: they get memory
    of their own."""
    position = {node: i for i, node in enumerate(placeholders(captured))}
    found = captured.find_nodes(op="call_function", target=set_data)
    return tuple(sorted({position[n.args[0]] for n in found if n.args[0] in position}))
