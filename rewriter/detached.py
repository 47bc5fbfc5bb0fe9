"""Find inner derivatives that the outer gradient does not see."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.fx import GraphModule, Node

from passes.graph import elements, has_hints, is_float, reaches, results, value_of, where
from passes.markers import GRADIENT, LEAF, STOP, TANGENT
from passes.nest import active_nodes


def detached_derivatives(
    module: GraphModule,
    requiring_grad: set[Node],
    differentiable: Sequence[int],
    captured: GraphModule,
) -> list[str]:
    """Return where a derivative enters the loss as a constant although parameters move it.

    Every way from it to an output that is differentiated leads over ``detach``, ``.item()``,
    `no_grad`, or a missing ``create_graph=True``. Training then follows a gradient that is not the
    loss's own: right for a weight or a diagnostic, a silent mistake for a penalty.

    Args:
        module: The flat graph.
        requiring_grad: Its inputs that require grad.
        differentiable: Positions of its results that are differentiated.
        captured: What Dynamo captured.
    """
    ends = {results(module.graph)[i] for i in differentiable}
    forgotten = _without_create_graph(captured)
    return [
        f"the derivative at {where(mark)} enters the loss as a constant: "
        + (_FORGOTTEN if where(mark) in forgotten else _DETACHED)
        for mark in _derivatives(module, requiring_grad)
        if ends & reaches(mark.users) and not ends & reaches(mark.users, through=_passes)
    ]


def lost_derivatives(
    module: GraphModule, requiring_grad: set[Node], n_outputs: int, captured: GraphModule
) -> list[str]:
    """Return where ``create_graph=True`` is missing in a loss that has no gradient for want of it:
    a result that is one number is made of a derivative that parameters move.

    Args:
        module: The flat graph; none of its results requires grad.
        requiring_grad: Its inputs that require grad.
        n_outputs: How many of its results are the loss's own.
        captured: What Dynamo captured.
    """
    forgotten = _without_create_graph(captured)
    ends = set(filter(_is_one_number, results(module.graph)[:n_outputs]))
    return [
        f"the loss has no gradient: the derivative at {where(mark)} enters it as a constant: "
        f"{_FORGOTTEN} (where the value alone is wanted, call the loss under torch.no_grad)"
        for mark in _derivatives(module, requiring_grad)
        if where(mark) in forgotten and ends & reaches(mark.users)
    ]


_FORGOTTEN = (
    "it is taken without create_graph=True, so the gradient of the loss does not see it; write "
    "create_graph=True there"
)
_DETACHED = (
    "it is detached on the way (.detach(), .item(), no_grad or create_graph=False), so the "
    "gradient of the loss does not see it"
)


def _derivatives(module: GraphModule, requiring_grad: set[Node]) -> Iterator[Node]:
    """Yield the derivatives that parameters move."""
    active = active_nodes(module, requiring_grad)
    return (n for n in module.graph.nodes if n.target in (GRADIENT, TANGENT) and n in active)


def _without_create_graph(captured: GraphModule) -> set[str]:
    """Return the lines at which a derivative is taken without ``create_graph``."""
    found = captured.graph.find_nodes(op="call_function", target=torch.autograd.grad)
    return {where(node) for node in found if not _creates_graph(node)}


def _creates_graph(node: Node) -> bool:
    position = 4  # of torch.autograd.grad's parameters
    if len(node.args) > position:
        return bool(node.args[position])
    return bool(node.kwargs.get("create_graph"))


def _is_one_number(node: Node) -> bool:
    return is_float(node) and has_hints(node) and elements(value_of(node)) == 1


def _passes(node: Node) -> bool:
    return node.target not in (STOP, LEAF)
