"""Add a call to a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.graph import value_of


def call(
    graph: Graph, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], like: Node
) -> Node:
    """Add a call where the graph inserts; it comes from where ``like`` does."""
    made = graph.call_function(target, tuple(args), dict(kwargs))
    values, options = torch.fx.map_arg((made.args, made.kwargs), value_of)
    made.meta = {**like.meta, "val": target(*values, **options)}
    return made
