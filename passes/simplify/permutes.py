"""Add before the permutation, not after it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Graph, Node

from passes.graph import arguments, value_of
from passes.simplify.scales import emit, is_one

aten = torch.ops.aten


def permute_sums(graph: Graph) -> int:
    """``permute(x, p) + permute(y, p) → permute(x + y, p)``: the sum of two weight gradients meets
    the permutation that undoes theirs."""
    changes = 0
    for node in list(graph.find_nodes(op="call_function", target=aten.add.Tensor)):
        if node.kwargs or not all(_is_own_permutation(x) for x in node.args):
            continue
        (one, dims), (other, others) = (arguments(x) for x in arguments(node))
        a, b = value_of(one), value_of(other)
        if list(dims) != list(others) or a.stride() != b.stride() or a.dtype != b.dtype:
            continue
        if not _is_laid_out(value_of(node), [a.stride()[d] for d in dims]):
            continue
        with graph.inserting_before(node):
            total = emit(graph, aten.add.Tensor, one, other, node)
            permuted = emit(graph, aten.permute.default, total, list(dims), node)
        node.replace_all_uses_with(permuted)
        graph.erase_node(node)
        changes += 1
    return changes


def _is_laid_out(value: Tensor, strides: Sequence[int]) -> bool:
    """Whether a tensor has these strides, where it has more than one element."""
    found = zip(value.shape, value.stride(), strides, strict=True)
    return all(mine == theirs for size, mine, theirs in found if not is_one(size))


def _is_own_permutation(node: object) -> bool:
    return isinstance(node, Node) and node.target is aten.permute.default and len(node.users) == 1
