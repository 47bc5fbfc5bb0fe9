"""Products of batches that were made one: ``einsum("nik,nik->nk")`` is a ``bmm`` of n·k rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.graph import are_equal, arguments, is_equal, is_one, reaches, value_of
from passes.nest import sites
from passes.simplify.emit import call
from passes.simplify.filled import RESHAPES

aten = torch.ops.aten


def split_batches(module: GraphModule) -> int:
    """``bmm(a as [B₁·B₂, 1, J], b as [B₁·B₂, J, 1]) → Σⱼ a[B₁, B₂, j] b[B₁, B₂, j]``, where a
    derivative is among the operands: the indices of a batch are then there one by one.

    Args:
        module: A derivative graph; changed in place, not recompiled.

    Returns:
        How many products were changed.
    """
    graph = module.graph
    derived = reaches(sites(module))
    changed = 0
    for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
        if node not in derived or not all(user.target in RESHAPES for user in node.users):
            continue
        _, rows, columns = value_of(node).shape
        sources = [source for source in map(_source, arguments(node)) if source is not None]
        if not is_one(rows) or not is_one(columns) or len(sources) < 2:
            continue
        shapes = [_without_ones(source) for source in sources]
        batch, size = value_of(node).shape[0], value_of(arguments(node)[0]).shape[2]
        *lead, last = shapes[0]
        is_joined = is_equal(last, size) and is_equal(math.prod(lead), batch)
        if not is_joined or not are_equal(*shapes):
            continue
        with graph.inserting_before(node):
            left, right = (_squeezed(source) for source in sources)
            product = call(graph, aten.mul.Tensor, (left, right), {}, node)
            total = call(graph, aten.sum.dim_IntList, (product, [-1]), {}, node)
        for user in list(node.users):
            user.replace_input_with(node, total)
        graph.erase_node(node)
        changed += 1
    return changed


def _source(operand: Any) -> Node | None:
    """Return what a reshape that joins dimensions reads."""
    if not isinstance(operand, Node) or operand.target not in RESHAPES:
        return None
    source = arguments(operand)[0]
    return source if len(_without_ones(source)) > 2 else None


def _without_ones(node: Any) -> list[Any]:
    return [size for size in value_of(node).shape if not is_one(size)]


def _squeezed(source: Node) -> Node:
    ones = [dim for dim, size in enumerate(value_of(source).shape) if is_one(size)]
    return call(source.graph, aten.squeeze.dims, (source, ones), {}, source)
