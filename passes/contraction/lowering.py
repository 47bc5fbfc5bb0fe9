"""Compute contractions of derivatives in Taylor mode."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.contraction.directions import Direction, Part, nodes_of
from passes.contraction.terms import Base, Factor, Index
from passes.graph import value_of
from passes.taylor import Jets, push_series
from passes.taylor.jets import Series, plus
from passes.tracing import fake_mode_of, trace


@dataclass(frozen=True)
class Demand:
    """A value that is asked for, as derivatives along single directions.

    Attributes:
        like: Its example value.
        dims: The index of each dimension.
        parts: What it is the sum of.
    """

    like: Tensor
    dims: tuple[Index | None, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Lowered:
    """A graph that computes several demands on one operand.

    Attributes:
        module: ``inputs → one tensor per demand``.
        inputs: What it takes, nodes and constants of the derivative graph.
    """

    module: GraphModule
    inputs: list[Any]


def lower(base: Base, demands: Sequence[Demand]) -> Lowered:
    """Trace Taylor mode for all demands on one operand.

    Raises:
        NoSeries: An operator of the body has no Taylor rule.
    """
    parts = [part for demand in demands for part in demand.parts]
    directions = list(dict.fromkeys(p.direction for p in parts if p.direction is not None))
    order = max(part.order for part in parts)
    last = [d for d in demands if any(p.order == order for p in d.parts)]
    collapsed = len(last) == 1 and order > 1 and _is_linear_in_numbers(last[0], order)
    inputs = [*base.inputs, *nodes_of(parts)]
    examples = [_example(item) for item in inputs]

    def run(*values: Any) -> list[Tensor]:
        given = dict(zip([n if isinstance(n, Node) else None for n in inputs], values, strict=True))
        body_inputs: list[Any] = list(values[: len(base.inputs)])
        point = body_inputs[0]
        along = torch.stack([_direction(d, point, given) for d in directions])
        weights = None
        if collapsed:
            weights = _weights(last[0], directions, order, given, point)
        jets = Jets(order, weights)
        start = Series((along, *(None for _ in range(1, order))))
        still = [None] * (len(body_inputs) - 1)
        primal, found = push_series(base.body, jets, body_inputs, [start, *still])
        terms = [primal[0], *found[0].terms]
        return [_value(demand, terms, directions, given, jets) for demand in demands]

    return Lowered(trace(run, examples, fake_mode_of(examples)), inputs)


def _example(item: Any) -> Any:
    value = value_of(item)
    return value.detach().requires_grad_(False) if isinstance(value, Tensor) else value


def _is_linear_in_numbers(demand: Demand, order: int) -> bool:
    """Whether the highest derivatives of a demand are summed with one weight for all rows, and
    with the same explicit tensors along the result's dimensions."""
    highest = [part for part in demand.parts if part.order == order]
    return all(
        _read_by(part) == _read_by(highest[0]) and not any(d in part.fixed for d in demand.dims)
        for part in highest
    )


def _read_by(part: Part) -> list[Any]:
    """Return where f's result is held, and the explicit tensors that are no numbers with where each
    is held."""
    held = [(f, [i and part.fixed.get(i) for i in f.indices]) for f in part.left]
    return [[part.fixed.get(i) for i in part.indices], *held]


def _weights(
    demand: Demand,
    directions: list[Direction],
    order: int,
    given: Mapping[Any, Any],
    point: Tensor,
) -> Tensor:
    """Return what the demand's highest derivatives along each direction are multiplied by."""
    zero = point.new_zeros(())
    found = [zero] * len(directions)
    for part in demand.parts:
        if part.order == order and part.direction is not None:
            at = directions.index(part.direction)
            weight = zero + part.scale * math.factorial(order)
            for factor in part.factors:
                if factor not in part.left:
                    weight = weight * _read(factor, part.fixed, given)
            found[at] = found[at] + weight
    return torch.stack(found)


def _read(factor: Factor, fixed: Mapping[Index, int], given: Mapping[Any, Any]) -> Tensor:
    """Return a factor with the indices that are fixed taken out, and those of size 1."""
    value = given[factor.node]
    for dim in range(len(factor.indices) - 1, -1, -1):
        index = factor.indices[dim]
        if index is None:
            value = value.select(dim, 0)
        elif index in fixed:
            value = value.select(dim, fixed[index])
    return value


def _direction(direction: Direction, point: Tensor, given: Mapping[Any, Any]) -> Tensor:
    """Return a direction as a tensor of the point's shape."""
    total = None
    for vector, scale in sorted(direction, key=str):
        one = _vector(vector, point, given)
        one = one if scale == 1 else one * scale
        total = one if total is None else total + one
    assert total is not None
    return total.expand(point.shape)


def _vector(vector: Any, point: Tensor, given: Mapping[Any, Any]) -> Tensor:
    kind, *rest = vector
    shape = point.shape[1:]
    if kind == "basis":
        flat = sum(k * math.prod(shape[i + 1 :]) for i, k in enumerate(rest))
        eye = torch.eye(math.prod(shape), dtype=point.dtype, device=point.device)
        return eye[flat].reshape(1, *shape)
    total = point.new_ones((1,) * point.dim())
    for node, places in rest:
        value = given[node]
        for dim in range(len(places) - 1, -1, -1):
            if isinstance(places[dim], tuple):
                value = value.select(dim, places[dim][1])
            elif places[dim] is None:
                value = value.select(dim, 0)
        left = [
            0 if p == "row" else p + 1 for p in places if p is not None and not isinstance(p, tuple)
        ]
        value = value.permute(sorted(range(len(left)), key=left.__getitem__))
        for dim in range(point.dim()):
            if dim not in left:
                value = value.unsqueeze(dim)
        total = total * value
    return total


def _value(
    demand: Demand,
    terms: Sequence[Any],
    directions: list[Direction],
    given: Mapping[Any, Any],
    jets: Jets,
) -> Tensor:
    """Put a demand together from the coefficients along each direction."""
    total = None
    collapsed = False
    for part in demand.parts:
        term = terms[part.order]
        if term is None or (jets.is_collapsed(part.order) and collapsed):
            continue
        if jets.is_collapsed(part.order):
            collapsed, factors = True, part.left
            fixed: Mapping[Index, int] = {}
        else:
            if part.direction is not None:
                term = term[directions.index(part.direction)]
            scale = part.scale * math.factorial(part.order)
            term = term if scale == 1 else term * scale
            factors, fixed = part.factors, part.fixed
        operands = [_held(term, part, demand.dims)]
        for factor in factors:
            left = [i for i in factor.indices if i is not None and i not in part.fixed]
            operands.append((_read(factor, part.fixed, given), tuple(left)))
        total = plus(total, _contracted(operands, demand.dims, fixed, demand.like))
    if total is None:
        return terms[0].new_zeros(demand.like.shape)
    return total.expand(demand.like.shape)


def _held(term: Tensor, part: Part, dims: Sequence[Index | None]) -> tuple[Tensor, Sequence[Index]]:
    """Return a coefficient where it is held at a row, or at one of f's results, that the result has
    no dimension for."""
    left = list(part.indices)
    for dim in range(len(left) - 1, -1, -1):
        if left[dim] in part.fixed and left[dim] not in dims:
            term = term.select(dim, part.fixed[left.pop(dim)])
    return term, left


def _contracted(
    operands: Sequence[tuple[Tensor, Sequence[Index]]],
    dims: Sequence[Index | None],
    fixed: Mapping[Index, int],
    like: Tensor,
) -> Tensor:
    """Multiply tensors with named indices, sum over those that are not in the result, and put what
    is left at the positions that are fixed, zeros elsewhere."""
    every = list(dict.fromkeys(i for _, indices in operands for i in indices))
    order = [*(d for d in dims if d is not None), *(i for i in every if i not in dims)]
    product: Tensor | None = None
    for value, indices in operands:
        value = value.permute([indices.index(i) for i in order if i in indices])
        for at, index in enumerate(order):
            if index not in indices:
                value = value.unsqueeze(at)
        product = value if product is None else product * value
    assert product is not None
    for at in range(len(order) - 1, -1, -1):
        if order[at] not in dims:
            product = product.sum(at)
    for at, index in enumerate(dims):
        if index is None:
            product = product.unsqueeze(at)
        elif index in fixed:
            positions = torch.arange(like.shape[at], device=product.device) == fixed[index]
            shape = [-1 if d == at else 1 for d in range(len(dims))]
            product = product * positions.to(product.dtype).view(shape)
    return product
