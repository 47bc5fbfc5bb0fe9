"""Positions that a tensor of indices picks: ``E[:, idx[k]] = Σᵢ P[k, i] E[:, i]``, ``P[k, i] =
δ(i, idx[k])``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.contraction.constants import Constants
from passes.contraction.moves import Known
from passes.contraction.terms import Computed, Expression, Factor, Index, code_of
from passes.graph import arguments, value_of
from passes.tracing import fake_mode_of, trace

aten = torch.ops.aten


def pick(known: Known, constants: Constants, node: Node) -> Expression | None:
    """``index_select``, and indexing of one dimension by one tensor of integers."""
    source, *rest = arguments(node)
    found = known.get(source)
    chosen = _chosen(node, rest)
    if found is None or chosen is None:
        return None
    dim, indices = chosen
    at = dim % len(found.dims)
    before, rank = found.dims[at], value_of(indices).dim()
    if before is None or not isinstance(before.size, int) or rank > 1:
        return None
    every, position = _part_of(indices)
    index = Index(value_of(every).shape[0]) if value_of(every).dim() else None
    own = () if index is None else (index,)
    factor = Factor(_picks(every, before.size, value_of(node).dtype), (*own, before))
    found = found.times(1.0, factor)
    if index is not None and position is not None:
        found = found.with_terms([term.at(index, position) for term in found.terms])
        own = (None,)
    return replace(found, dims=(*found.dims[:at], *own[:rank], *found.dims[at + 1 :]))


def _part_of(indices: Node) -> tuple[Node, int | None]:
    """Return the tensor of which indices are one position, and this; the indices themselves if they
    are several: a direction is the same one, however its position was taken."""
    source: Any = indices.args[0] if indices.args else None
    alone = tuple(value_of(indices).shape) == (1,)
    size = value_of(source).shape if isinstance(source, Node) else ()
    if len(size) == 1 and isinstance(size[0], int):
        if indices.target is aten.select.int:
            return source, arguments(indices)[2] % size[0]
        if indices.target is aten.slice.Tensor and alone:
            start = arguments(indices)[2] if len(indices.args) > 2 else None
            return source, (start or 0) % size[0]
    return indices, 0 if alone else None


def _chosen(node: Node, rest: list[Any]) -> tuple[int, Node] | None:
    """Return the dimension and the indices."""
    if node.target is aten.index_select.default:
        return rest[0], rest[1]
    given = [(dim, item) for dim, item in enumerate(rest[0]) if item is not None]
    if len(given) != 1 or value_of(given[0][1]).dtype not in (torch.int64, torch.int32):
        return None
    return given[0]


def _picks(indices: Node, size: int, dtype: torch.dtype) -> Computed:
    """Return P, shape (*indices.shape, size)."""

    def picks(at: Tensor) -> tuple[Tensor]:
        at = torch.where(at < 0, at + size, at).long().unsqueeze(-1)
        zeros = torch.zeros((*at.shape[:-1], size), dtype=dtype, device=at.device)
        return (zeros.scatter(-1, at, 1),)  # which refuses positions that are none

    examples = [value_of(indices)]
    body = trace(picks, examples, fake_mode_of(examples))
    like = next(iter(body.graph.output_node().all_input_nodes))
    return Computed(body, code_of(body), (indices,), value_of(like))
