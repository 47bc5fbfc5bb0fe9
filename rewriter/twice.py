"""Functions that PyTorch differentiates once only, written out in operators it can differentiate
again.

Each is the same function with the same derivative where it has a kink. They need more memory than
the originals and stand in only for a loss that PyTorch refuses as written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node


def write_out(captured: GraphModule) -> int:
    """Replace the functions of a captured graph that have no second derivative, in place; return
    how many there were."""
    changes = 0
    for node in captured.graph.nodes:
        if is_differentiable_once(node):
            node.target = _WRITTEN_OUT[node.target]
            changes += 1
    captured.recompile()
    return changes


def is_differentiable_once(node: Node) -> bool:
    """Whether PyTorch may refuse a loss because of this node of its captured graph."""
    return node.op == "call_function" and node.target in _WRITTEN_OUT


def cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    """``‖x1ᵢ − x2ⱼ‖ₚ``; zero has derivative zero, as in `torch.cdist`."""
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:
    """``‖xᵢ − xⱼ‖ₚ`` for ``i < j``."""
    n = input.shape[0]
    i, j = torch.triu_indices(n, n, 1, device=input.device).unbind()
    return torch.linalg.vector_norm(input[i] - input[j], p, dim=-1)


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """``x/6 + 1/2`` between −3 and 3, constant outside."""
    inside = (input > -3) & (input < 3)
    value = torch.where(inside, input / 6 + 0.5, (input >= 3).to(input.dtype))
    return input.copy_(value) if inplace else value


def multi_margin_loss(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None,
    size_average: bool | None = None, reduce: bool | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """``Σⱼ max(0, margin − x_y + xⱼ)ᵖ / C`` over ``j ≠ y``."""
    rows, columns = torch.atleast_2d(input), target.reshape(-1, 1)
    excess = margin - rows.gather(1, columns) + rows
    classes = torch.arange(rows.shape[1], device=rows.device)
    counts = (excess > 0) & (classes != columns)
    excess = torch.where(counts, excess, 0) ** p
    if weight is not None:
        excess = excess * weight[columns]
    each = excess.sum(1) / rows.shape[1]
    return _reduced(each.reshape(target.shape), size_average, reduce, reduction)


def multilabel_margin_loss(
    input: Tensor, target: Tensor, size_average: bool | None = None, reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """``Σ max(0, 1 − x_y + xⱼ) / C`` over labels ``y`` before the first −1 and other classes
    ``j``."""
    rows, labels = torch.atleast_2d(input), torch.atleast_2d(target)
    given = (labels >= 0).to(torch.int64).cumprod(1) > 0
    at = torch.where(given, labels, 0)
    is_label = torch.zeros_like(labels).scatter_add(1, at, given.to(labels.dtype)) > 0
    excess = 1 - rows.gather(1, at).unsqueeze(2) + rows.unsqueeze(1)
    counts = (excess > 0) & given.unsqueeze(2) & ~is_label.unsqueeze(1)
    each = torch.where(counts, excess, 0).sum([1, 2]) / rows.shape[1]
    return _reduced(each.reshape(target.shape[:-1]), size_average, reduce, reduction)


def _reduced(
    each: Tensor, size_average: bool | None, reduce: bool | None, reduction: str
) -> Tensor:
    if size_average is not None or reduce is not None:
        summed = "mean" if size_average in (None, True) else "sum"
        reduction = "none" if reduce is False else summed
    if reduction == "none":
        return each
    return each.mean() if reduction == "mean" else each.sum()


_WRITTEN_OUT: dict[Any, Callable[..., Tensor]] = {
    torch.cdist: cdist,
    torch.functional.cdist: cdist,
    torch.pdist: pdist,
    F.pdist: pdist,
    F.hardsigmoid: hardsigmoid,
    F.multi_margin_loss: multi_margin_loss,
    F.multilabel_margin_loss: multilabel_margin_loss,
}
