"""Find inner derivatives that the outer gradient does not see."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import GraphModule, Node

from passes.graph import reaches, results, where
from passes.markers import GRADIENT, LEAF, STOP, TANGENT
from passes.nest import active_nodes


def detached_derivatives(
    module: GraphModule, requiring_grad: set[Node], differentiable: Sequence[int]
) -> list[str]:
    """Return where a derivative enters the loss as a constant although parameters move it.

    Every way from it to an output that is differentiated leads over ``detach``, ``.item()``,
    `no_grad`, or a missing ``create_graph=True``. Training then follows a gradient that is not the
    loss's own: right for a weight or a diagnostic, a silent mistake for a penalty.

    Args:
        module: The flat graph.
        requiring_grad: Its inputs that require grad.
        differentiable: Positions of its results that are differentiated.
    """
    ends = {results(module.graph)[i] for i in differentiable}
    active = active_nodes(module, requiring_grad)
    marks = [n for n in module.graph.nodes if n.target in (GRADIENT, TANGENT) and n in active]
    return [
        f"the derivative at {where(mark)} enters the loss as a constant: it is detached on the way "
        "(create_graph=False, .detach(), .item() or no_grad), so the gradient of the loss does not "
        "see it"
        for mark in marks
        if ends & reaches(mark.users) and not ends & reaches(mark.users, through=_passes)
    ]


def _passes(node: Node) -> bool:
    return node.target not in (STOP, LEAF)
