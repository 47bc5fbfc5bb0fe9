"""Padding of tables that `vmap` has put one below the other."""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from passes.graph import arguments, value_of
from passes.markers import STOP
from passes.simplify.emit import call
from passes.simplify.factors.tables import of_samples

aten = torch.ops.aten


def write_out_padding(module: GraphModule) -> None:
    """``embedding(tables, i + offsets, p) → where(i ≠ p, row, stop(row))``: the row that has no
    gradient is row p of each table. A derivative taken from the flat operator would compare p with
    the positions of all tables, so that only the first had one.

    Args:
        module: A flat graph; changed in place.
    """
    for node in module.graph.find_nodes(op="call_function", target=aten.embedding.default):
        table, positions, *rest = arguments(node)
        length = value_of(table).shape[0]
        if not rest or rest[0] < 0 or not isinstance(length, int):
            continue
        own, sample, _ = of_samples(positions, length)
        if sample is None:
            continue
        with module.graph.inserting_before(node):
            row = call(module.graph, node.target, (table, positions), {}, node)
            fixed = call(module.graph, STOP, (row,), {}, node)
            moves = call(module.graph, aten.ne.Scalar, (own, rest[0]), {}, node)
            moves = call(module.graph, aten.unsqueeze.default, (moves, -1), {}, node)
            padded = call(module.graph, aten.where.self, (moves, row, fixed), {}, node)
        node.replace_all_uses_with(padded)
        module.graph.erase_node(node)
