"""Add a call to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.graph import value_of
from passes.origin import note


def call(
    graph: Graph, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], like: Node
) -> Node:
    """Add a call where the graph inserts; it comes from where ``like`` does."""
    made = graph.call_function(target, tuple(args), dict(kwargs))
    values, options = torch.fx.map_arg((made.args, made.kwargs), value_of)
    made.meta = {**like.meta, "val": target(*values, **options)}
    note(made, source="")  # new, although from there
    return made


def size_of(graph: Graph, node: Node, dim: int) -> Any:
    """Return a size of a tensor, as a node where it is symbolic."""
    size = value_of(node).shape[dim]
    if isinstance(size, int):
        return size
    made = graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
    made.meta["val"] = size
    return made
