"""Proof that each row of what a body computes depends on the same row of its point alone."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from passes.custom_rules import CUSTOM
from passes.derivative import taylor
from passes.graph import is_equal, reaches, value_of, where
from passes.markers import stop
from passes.tangent_tables import ELEMENTWISE, FROM_BACKWARD

aten = torch.ops.aten


class RowsMix(Exception):
    """A derivative that is no operand of a contraction; the message is the reason a report
    shows."""


# Each element of the result depends on the elements at the same place (broadcast from the right).
POINTWISE = {
    *ELEMENTWISE, *FROM_BACKWARD, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor,
    aten.div.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.add.Scalar, aten.sub.Scalar,
    aten.rsub.Scalar,
    aten.neg.default, aten.pow.Tensor_Scalar, aten.where.self, aten.clamp.default,
    aten.clamp_min.default, aten.clamp_max.default, aten.maximum.default, aten.minimum.default,
    aten.clone.default, aten.alias.default, aten.detach.default, aten.acosh.default,
    aten.atanh.default, aten.log_sigmoid_forward.default, aten._to_copy.default,
}  # fmt: skip

# Along the dimensions of the second argument only.
_ALONG = {
    aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default,
    aten._softmax.default, aten._log_softmax.default, aten.logsumexp.default,
}  # fmt: skip


class Rows:
    """What of a body keeps the rows of its point apart, and holds no derivative.

    Args:
        graph: The body.
        point: One of its inputs.

    Attributes:
        kept: The nodes that depend on the point, row n, the first dimension, on row n alone.
        reasons: Other nodes that depend on the point, and read only nodes of ``kept`` → why they
            are not of them.
    """

    def __init__(self, graph: Graph, point: Node) -> None:
        moving = reaches([point], through=lambda node: node.target is not stop)
        rows = value_of(point).shape[:1]
        self.kept = {point} if rows else set[Node]()
        self.reasons = {} if rows else {point: "the point has no rows"}
        for node in graph.nodes:
            if node not in moving or node.op != "call_function":
                continue
            if not all(n in self.kept for n in node.all_input_nodes if n in moving):
                continue
            value = value_of(node)
            if node.target is taylor:
                _, *inputs = node.args
                apart = {inputs[at] for at in node.meta["rows"].inputs}
                if all(n in apart for n in node.all_input_nodes if n in moving):
                    self.kept.add(node)
                else:
                    self.reasons[node] = "rows mix in an inner derivative"
                continue
            whole = isinstance(value, Tensor) and value.dim() > 0
            if (
                whole
                and is_equal(value.shape[0], rows[0])
                and "site" not in node.meta
                and _keeps_rows(node, moving)
            ):
                self.kept.add(node)
            else:
                self.reasons[node] = f"rows mix at {_name(node)}, {where(node)}"


def _keeps_rows(node: Node, moving: set[Node]) -> bool:
    """Whether row n of the result depends on row n of what moves."""
    args: Any = node.args
    target = node.target
    if target in CUSTOM:
        reads = [arg for i, arg in enumerate(args) if i not in CUSTOM[target].rows]
        return not any(n in moving for n in _nodes_in((reads, node.kwargs)))
    if target is operator.getitem and args[0].target is taylor:
        return args[0].meta["rows"].results[args[1]]
    if target in POINTWISE:
        rank = value_of(node).dim()
        reads = [n for n in node.all_input_nodes if n in moving]
        return all(value_of(n).dim() == rank for n in reads)
    if target is aten.mm.default or target is aten.mv.default:
        return args[1] not in moving
    if target is aten.addmm.default:
        return args[2] not in moving and (args[0] not in moving or value_of(args[0]).dim() == 2)
    if target in (aten.bmm.default, aten.baddbmm.default):
        return all(value_of(n).dim() == 3 for n in node.all_input_nodes if n in moving)
    if target in _ALONG and len(args) > 1:
        dims = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
        rank = value_of(args[0]).dim()
        return bool(dims) and all(d % rank != 0 for d in dims)
    if target in (aten.unsqueeze.default, aten.select.int, aten.squeeze.dim, aten.cumsum.default):
        rank = value_of(args[0]).dim() + (target is aten.unsqueeze.default)
        return args[1] % rank != 0
    if target is aten.squeeze.dims:
        return all(d % value_of(args[0]).dim() != 0 for d in args[1])
    if target is aten.slice.Tensor:
        rank = value_of(args[0]).dim()
        return (len(args) > 1 and args[1] % rank != 0) or _same_rows(args[0], node)
    if target is aten.cat.default:
        dim = args[1] if len(args) > 1 else 0
        return dim % value_of(node).dim() != 0
    if target is aten.permute.default:
        return args[1][0] % value_of(args[0]).dim() == 0
    if target is aten.expand.default:
        return value_of(args[0]).dim() == value_of(node).dim() and _same_rows(args[0], node)
    if target in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return _same_rows(args[0], node)
    if target is aten.convolution.default:
        return args[0] in moving and args[1] not in moving and args[2] not in moving
    return False


def _nodes_in(arguments: Any) -> list[Node]:
    return [item for item in pytree.tree_leaves(arguments) if isinstance(item, Node)]


def _same_rows(before: Node, after: Node) -> bool:
    """Whether a reshape leaves the first dimension alone: contiguous rows stay rows."""
    a: Tensor = value_of(before)
    b: Tensor = value_of(after)
    return a.dim() > 0 and is_equal(a.shape[0], b.shape[0])


def _name(node: Node) -> str:
    target = node.target
    return target.name() if isinstance(target, torch._ops.OpOverload) else str(target)
