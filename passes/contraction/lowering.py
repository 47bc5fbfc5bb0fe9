"""Compute contractions of derivatives in Taylor mode."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes.contraction.along import along_layer, first_layers, stacked
from passes.contraction.directions import Direction, Part, explicit_of
from passes.contraction.terms import Base, Computed, Factor, Index, example_of, leaves_of
from passes.graph import drop_dead, finish, placeholders
from passes.nest import dissolve_marks
from passes.simplify.narrow import narrow_stacks
from passes.taylor import Jets, push_series
from passes.taylor.jets import Series, plus
from passes.tracing import fake_mode_of, trace
from passes.tracking import run


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
    collapsed = order > 1 and all(_is_linear_in_numbers(demand, order) for demand in last)
    collapsed = collapsed and len({_numbers(demand, order) for demand in last}) == 1
    explicit = explicit_of(parts)
    inputs = list(dict.fromkeys(n for item in [*base.inputs, *explicit] for n in leaves_of(item)))
    examples = [example_of(item) for item in inputs]
    own = placeholders(base.body.graph)
    points = sorted({vector[0] for direction in directions for vector, _ in direction})
    layers = first_layers(own[points[0]]) if len(points) == 1 else []

    def compute(*values: Any) -> list[Tensor]:
        given: dict[Any, Any] = dict(zip(inputs, values, strict=True))
        given |= {item: computed(item, given) for item in explicit}
        body_inputs = [computed(item, given) for item in base.inputs]
        if not directions:
            terms = [run(base.body, body_inputs)[0]]
            return [_value(demand, terms, directions, given, Jets(0)) for demand in demands]
        weights = None
        if collapsed:
            weights = _weights(last[0], directions, order, given, body_inputs[points[0]])
        jets = Jets(order, weights)
        rest = (None,) * (order - 1)

        def layer(out: Tensor, args: tuple) -> Series:
            point = body_inputs[points[0]]
            return Series((along_layer(directions, point, args[-1], given, out), *rest))

        def moved(at: int) -> Series | None:
            if layers or at not in points:
                return None
            return Series((stacked(directions, at, body_inputs[at], given), *rest))

        starts = dict.fromkeys(layers, layer)
        along = list(map(moved, range(len(body_inputs))))
        primal, found = push_series(base.body, jets, body_inputs, along, starts)
        terms = [primal[0], *found[0].terms]
        return [_value(demand, terms, directions, given, jets) for demand in demands]

    module = trace(compute, examples, fake_mode_of(examples))
    dissolve_marks(module)
    while narrow_stacks(
        module.graph
    ):  # what the joint graph's reverse pass then need not pull back
        drop_dead(module.graph)
    finish(module)
    return Lowered(module, inputs)


@dataclass(frozen=True)
class RowsApart:
    """What `passes.contraction.rows` may take for proven of a call of a lowered graph.

    Attributes:
        inputs: Positions of the inputs that are read row by row.
        results: For each result the dimension whose position n is computed from row n of these;
            None if there is none.
        order: The highest derivative.
    """

    inputs: tuple[int, ...]
    results: tuple[int | None, ...]
    order: int


def rows_of(base: Base, demands: Sequence[Demand], inputs: Sequence[Node]) -> RowsApart:
    """Return what of a lowered graph keeps rows apart: operands do."""
    parts = [part for demand in demands for part in demand.parts]
    points = base.apart | {v[0] for part in parts for v, _ in part.direction or ()}
    apart = {base.inputs[at] for at in points}
    rest = [item for at, item in enumerate(base.inputs) if at not in points]
    others = {n for item in rest for n in leaves_of(item)}
    for part in parts:
        read = [(f.node, tuple(i == part.indices[0] for i in f.indices)) for f in part.factors]
        for vector, _ in part.direction or ():
            if vector[1] == "product":
                read += [(node, tuple(p == "row" for p in at)) for node, at in vector[2:]]
        for node, rows in read:
            is_apart = isinstance(node, Node) and rows[:1] == (True,) and not any(rows[1:])
            (apart if is_apart else others).update(leaves_of(node))
    results = tuple(map(_row_dim, demands))
    order = base.order + max(part.order for part in parts)
    return RowsApart(tuple(k for k, n in enumerate(inputs) if n in apart - others), results, order)


def _row_dim(demand: Demand) -> int | None:
    rows = {part.indices[0] for part in demand.parts}
    if len(rows) != 1 or any(row in part.fixed for part in demand.parts for row in rows):
        return None
    (row,) = rows
    return demand.dims.index(row) if row in demand.dims else None


def computed(item: Any, given: Mapping[Any, Any]) -> Any:
    """Return the value of a node, of what is computed from nodes, or of a constant."""
    if isinstance(item, Computed):
        return run(item.body, [computed(read, given) for read in item.inputs])[0]
    return given[item] if isinstance(item, Node) else item


def _is_linear_in_numbers(demand: Demand, order: int) -> bool:
    """Whether the highest derivatives of a demand are summed with one weight for all rows, and
    with the same explicit tensors along the result's dimensions."""
    highest = [part for part in demand.parts if part.order == order]
    return all(
        _read_by(part) == _read_by(highest[0]) and not any(d in part.fixed for d in demand.dims)
        for part in highest
    )


def _numbers(demand: Demand, order: int) -> frozenset[Any]:
    """Return what a demand's highest derivatives are multiplied by, in a form that can be
    compared."""
    found = []
    for part in demand.parts:
        if part.order == order:
            factors = [f for f in part.factors if f not in part.left]
            held = [(f.node, tuple(i and part.fixed[i] for i in f.indices)) for f in factors]
            found.append((part.direction, part.scale, tuple(held)))
    return frozenset(Counter(found).items())


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
    for at, index in enumerate(dims):
        if index is not None and index in fixed:
            positions = torch.arange(like.shape[at], device=product.device) == fixed[index]
            shape = [-1 if d == at else 1 for d in range(len(dims))]
            product = product * positions.to(product.dtype).view(shape)
    return product
