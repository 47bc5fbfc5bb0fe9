"""Operators whose derivative in PyTorch is not everywhere the gradient of what they compute.

The derivative of it need not be symmetric, and forward mode is no substitute for reverse mode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.graph import arguments, placeholders, reaches
from passes.nest import body_of, sites

aten = torch.ops.aten

NOT_A_GRADIENT: dict[Any, str] = {
    aten.as_strided_scatter.default: "PyTorch gives what is overwritten a gradient too",
    aten.cholesky_inverse.default: "it reads a triangle and its gradient is symmetric",
    aten.triangular_solve.default: "it reads a triangle and its second derivative does not",
    aten.linalg_pinv.atol_rtol_tensor: "with hermitian=True it reads a triangle only",
    aten.max_unpool2d.default: "equal indices overwrite each other and all get a gradient",
    aten.max_unpool3d.default: "equal indices overwrite each other and all get a gradient",
}
# Tables of which some rows have a gradient that is not the tangent's transpose → the positions of
# the padding row, and of whether gradients are divided by how often a row is read.
_TABLES: dict[Any, tuple[int | None, int]] = {
    aten.embedding.default: (2, 3),
    aten._embedding_bag.default: (None, 3),
}


def not_a_gradient(body: GraphModule, points: Sequence[Node]) -> str:
    """Return why a graph's derivative in forward mode may be another one than in reverse mode;
    nothing if it is the same.

    Args:
        body: The graph.
        points: The inputs that move.
    """
    moving = reaches(points)
    for node in body.graph.nodes:
        reason = _reason(node, moving)
        if reason:
            return f"{node.target}: {reason}"
    for inner in sites(body):
        within = body_of(body, inner)
        _, _, _, _, *inputs = arguments(inner)
        pairs = zip(placeholders(within.graph), inputs, strict=False)
        reason = not_a_gradient(within, [own for own, outer in pairs if outer in moving])
        if reason:
            return reason
    return ""


def _reason(node: Node, moving: set[Node]) -> str:
    if node.target is aten.linalg_pinv.atol_rtol_tensor and not node.kwargs.get("hermitian"):
        return ""
    if node.target not in _TABLES:
        return NOT_A_GRADIENT.get(node.target, "")
    args = arguments(node)
    padding, scaling = _TABLES[node.target]
    if args[0] not in moving:
        return ""
    if padding is not None and len(args) > padding and args[padding] >= 0:
        return "the padding row of its table has a tangent and no gradient"
    if len(args) > scaling and args[scaling]:
        return "gradients are scaled by how often a row is read, tangents are not"
    return ""
