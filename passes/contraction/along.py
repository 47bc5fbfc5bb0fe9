"""Directions as tensors, and what a first linear layer makes of them.

A direction that all rows share, such as a basis vector, has one row. A layer takes it as it is,
``(1 vᵀ) W = 1 (vᵀ W)``, for a basis vector a row of W; only then is it repeated. So directions in a
point of many dimensions cost next to nothing before the first layer's result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from passes.contraction.directions import Direction
from passes.graph import arguments, reaches

aten = torch.ops.aten


def first_layers(point: Node) -> list[Node]:
    """Return the linear layers of a body that reads its only point, a matrix, in such layers alone;
    nothing of any other body."""
    moving = reaches([point])
    for node in point.users:
        if node.kwargs or node.target not in (aten.mm.default, aten.addmm.default):
            return []
        *rest, left, weight = arguments(node)
        if left is not point or any(n in moving for n in (*rest, weight)):
            return []
    return list(point.users)


def stacked(
    directions: Sequence[Direction], at: int, point: Tensor, given: Mapping[Any, Any]
) -> Tensor:
    """Return what directions are in one of the points, shape (directions, *point.shape).

    Args:
        directions: In all of them.
        at: The point's position.
        point: Its value.
        given: The explicit tensors that directions are made of.
    """
    found = []
    for direction in directions:
        own = [(vector, scale) for vector, scale in direction if vector[0] == at]
        total = _sum(own, lambda v: _vector(v, point, given)) if own else point.new_zeros(())
        found.append(total.expand(point.shape))
    return torch.stack(found)


def along_layer(
    directions: Sequence[Direction],
    point: Tensor,
    weight: Tensor,
    given: Mapping[Any, Any],
    out: Tensor,
) -> Tensor:
    """Return what a layer makes of directions, shape (directions, *out.shape).

    Args:
        directions: In the point.
        point: The layer's input, shape (rows, features).
        weight: Shape (features, results).
        given: The explicit tensors that directions are made of.
        out: The layer's result, shape (rows, results).
    """
    run = _run(directions)
    if run is not None:
        return weight.narrow(0, run.start, len(run)).unsqueeze(1).expand(-1, *out.shape)

    def one(vector: Any) -> Tensor:
        _, kind, *rest = vector
        if kind == "basis":
            return weight.narrow(0, rest[0], 1)
        value = _vector(vector, point, given)
        return value.expand(value.shape[0], point.shape[1]) @ weight

    return torch.stack([_sum(d, one).expand(out.shape) for d in directions])


def _run(directions: Sequence[Direction]) -> range | None:
    """Return the positions if directions are basis vectors one after the other."""
    places: list[int] = []
    for direction in directions:
        ((_, kind, *rest), scale), *more = direction
        if more or kind != "basis" or scale != 1:
            return None
        places.append(rest[0])
    found = range(places[0], places[-1] + 1)
    return found if list(found) == places else None


def _sum(direction: Iterable[tuple[Any, float]], value: Any) -> Tensor:
    total = None
    for vector, scale in sorted(direction, key=str):
        one = value(vector)
        one = one if scale == 1 else one * scale
        total = one if total is None else total + one
    assert total is not None
    return total


def _vector(vector: Any, point: Tensor, given: Mapping[Any, Any]) -> Tensor:
    """Return a vector, of size 1 along dimensions of the point that it does not depend on."""
    _, kind, *rest = vector
    shape = point.shape[1:]
    if kind == "basis":
        flat = sum(k * math.prod(shape[i + 1 :]) for i, k in enumerate(rest))
        places = torch.arange(math.prod(shape), device=point.device) == flat
        return places.to(point.dtype).reshape(1, *shape)
    total = point.new_ones((1,) * point.dim())
    for node, places in rest:
        total = total * laid_out(given[node], list(map(_place, places)), point.dim())
    return total


def _place(place: Any) -> Any:
    """Return where a dimension of a vector's factor is in the point."""
    if isinstance(place, int):
        return place + 1
    return {"row": 0, None: ("at", 0)}.get(place, place)


def laid_out(value: Tensor, places: Sequence[Any], rank: int) -> Tensor:
    """Return a tensor with its dimensions at the given places among ``rank``, and of size 1
    elsewhere; at ``("at", k)`` position k of a dimension is taken."""
    for dim in range(len(places) - 1, -1, -1):
        if isinstance(places[dim], tuple):
            value = value.select(dim, places[dim][1])
    left = [place for place in places if not isinstance(place, tuple)]
    value = value.permute(sorted(range(len(left)), key=left.__getitem__))
    for dim in range(rank):
        if dim not in left:
            value = value.unsqueeze(dim)
    return value
