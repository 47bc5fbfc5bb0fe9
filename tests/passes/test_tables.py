"""Rows of tables kept as factors: same value, no table for each sample, idempotent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from passes.graph import copy_graph, drop_dead
from passes.simplify.factors import keep_factors
from passes.simplify.groups import fold_groups
from tests.passes.flat import random_points
from tests.passes.test_factors import kept, largest
from tests.passes.test_simplify import assert_same, traced

aten = torch.ops.aten
N, T, LENGTH, WIDTH = 4, 3, 50, 5
# Samples that look up a row twice, three times, and rows of each other.
POSITIONS = torch.tensor([[0, 7, 7], [49, 49, 49], [1, 2, 3], [7, 0, 2]])


def offsets(of: Tensor) -> Tensor:
    return aten.arange.start_step(0, N * LENGTH, LENGTH).reshape(N, *[1] * (of.dim() - 1))


def gradients(table: Tensor, positions: Tensor, d: Tensor) -> Tensor:
    """The gradient of each sample in the table, as `vmap` writes it down."""
    known = aten.embedding(table, positions)  # it fails if they are outside of the table
    zeros = aten.full([N * LENGTH, WIDTH], 0, dtype=d.dtype)
    where = aten.clamp(positions + offsets(positions), -N * LENGTH, N * LENGTH - 1)
    return aten.index_put(zeros, [where], d * known, True).reshape(N, -1)


def norms(w: Tensor, i: Tensor, d: Tensor) -> Tensor:
    return gradients(w, i, d).square().sum(1)


def gram(w: Tensor, i: Tensor, d: Tensor) -> Tensor:
    g = gradients(w, i, d)
    return g @ g.t()


def total(w: Tensor, i: Tensor, d: Tensor) -> Tensor:
    return gradients(w, i, d).reshape(N, LENGTH, WIDTH).sum(0)


def looked_up_again(w: Tensor, i: Tensor, d: Tensor) -> Tensor:
    rows = (gradients(w, i, d) * 2).reshape(N * LENGTH, WIDTH)
    return aten.index_select(rows, 0, (i + offsets(i)).reshape(-1))


def in_a_direction(w: Tensor, i: Tensor, d: Tensor) -> Tensor:
    return (gradients(w, i, d) * w.reshape(1, -1)).sum(1)


def of_negative(w: Tensor, i: Tensor, d: Tensor) -> Tensor:
    """Nothing says that −1 and the last row are not both meant."""
    zeros = aten.full([N * LENGTH, WIDTH], 0, dtype=d.dtype)
    g = aten.index_put(zeros, [i + offsets(i)], d, True).reshape(N, -1)
    return g.square().sum(1)


def written_over(w: Tensor, i: Tensor, d: Tensor) -> Tensor:
    zeros = aten.full([N * LENGTH, WIDTH], 0, dtype=d.dtype)
    values = d * aten.embedding(w, i)
    return aten.index_put(zeros, [i + offsets(i)], values).reshape(N, -1).square().sum(1)


def formed(w: Tensor, i: Tensor, d: Tensor) -> Tensor:
    return gradients(w, i, d).sin()


@dataclass(frozen=True)
class Case:
    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    changes: int = 1


CASES = {
    "norms": Case(norms),
    "Gram": Case(gram),
    "sum": Case(total),
    "looked up again": Case(looked_up_again),
    "in a direction": Case(in_a_direction),
    "negative positions": Case(of_negative, 0),
    "not a sum": Case(written_over, 0),
    "a table that is read": Case(formed, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_no_table_for_each_sample(name: str) -> None:
    case = CASES[name]
    inputs = [random_points(LENGTH, WIDTH), POSITIONS, random_points(N, T, WIDTH)]
    module, _ = kept(case.function, inputs, case.changes)
    assert keep_factors(module.graph) == 0
    if case.changes:
        assert largest(module) <= max(LENGTH * WIDTH, (N * T) ** 2)


@pytest.mark.parametrize("positions", [POSITIONS, POSITIONS[:, 0]])
def test_tables_of_samples_are_one(positions: Tensor) -> None:
    def rows(w: Tensor, i: Tensor) -> Tensor:
        tables = w[None].expand(N, LENGTH, WIDTH).clone().reshape(-1, WIDTH)
        return aten.embedding(tables, i + offsets(i))

    inputs = [random_points(LENGTH, WIDTH), positions]
    module = traced(rows, *inputs)
    reference = copy_graph(module)
    assert fold_groups(module.graph) == 1
    drop_dead(module.graph)
    module.recompile()
    assert_same(module, reference, inputs)
    assert not module.graph.find_nodes(op="call_function", target=aten.clone.default)
    assert fold_groups(module.graph) == 0
