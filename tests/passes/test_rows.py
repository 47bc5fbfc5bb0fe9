"""Matrices of equal rows, and with columns of zeros: same value, fewer FLOPs, idempotent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from passes.graph import copy_graph, drop_dead
from passes.price import price
from passes.simplify.narrow import narrow_products
from passes.simplify.rows import multiply_rows_once
from tests.cases import mlp
from tests.oracle import check, flops_per_forward
from tests.passes.flat import random_points
from tests.passes.test_simplify import Case, assert_rule, tensors, traced

aten = torch.ops.aten
A, B, C = (5, 4), (4, 3), (5, 3)
MM, MUL, SUM, TURN = "mm", "mul.Tensor", "sum.dim_IntList", "permute"
CUT, GROW = "slice.Tensor", "expand"
FLOAT = {"dtype": torch.float64}


def ones(*shape: int) -> Tensor:
    return torch.full(shape, 1.0, **FLOAT)


def column(source: Tensor, start: int, end: int, *shape: int) -> Tensor:
    return aten.slice_scatter(torch.full(shape, 0.0, **FLOAT), source, 1, start, end)


def place(source: Tensor, index: int, *shape: int) -> Tensor:
    return aten.select_scatter(torch.full(shape, 0.0, **FLOAT), source, 1, index)


def turned(x: Tensor) -> Tensor:
    return x.permute(1, 0)


ROWS = {
    "ones": Case(lambda w, t: (ones(5, 1) @ w) * t, ((1, 3), C), 1, (GROW, MUL)),
    "numbers": Case(
        lambda w, t: (torch.full((5, 4), 0.5, **FLOAT) @ w) * t, (B, C), 1, (SUM, MUL, GROW, MUL)
    ),
    "unit vector": Case(
        lambda w, t: (column(ones(5, 1), 2, 3, 5, 4) @ w) * t, (B, C), 1, (CUT, GROW, MUL)
    ),
    "unit vector of one place": Case(
        lambda w, t: (place(ones(5), 2, 5, 4) @ w) * t, (B, C), 1, (CUT, GROW, MUL)
    ),
    "two columns": Case(
        lambda w, t: (column(ones(5, 2), 1, 3, 5, 4) @ w) * t, (B, C), 1,
        ("full", "full", "slice_scatter", CUT, MM, GROW, MUL),
    ),
    "a row of its own": Case(
        lambda r, w, t: (r.expand(5, 4) @ w) * t, ((1, 4), B, C), 1, (GROW, CUT, MM, GROW, MUL)
    ),
    "on the right": Case(
        lambda x, r: x @ r.expand(4, 3), (A, (1, 3)), 1, (GROW, SUM, CUT, MUL)
    ),
    "ones on the right": Case(lambda x: x @ ones(4, 1), (A,), 1, (SUM,)),
    "transposed on the left": Case(
        lambda x, r: turned(r.expand(5, 3)) @ x, (A, (1, 3)), 1, (GROW, SUM, CUT, TURN, MUL)
    ),
    "transposed ones": Case(lambda x: turned(ones(5, 1)) @ x, (A,), 1, (SUM,)),
    # What must stay.
    "columns": Case(
        lambda c, w, t: (c.expand(5, 4) @ w) * t, ((5, 1), B, C), 0, (GROW, MM, MUL)
    ),
    "read by what keeps a layout": Case(lambda w: ones(5, 1) @ w, ((1, 3),), 0, ("full", MM)),
    "one row": Case(
        lambda r, w, t: (r.expand(1, 4) @ w) * t, ((1, 4), B, (1, 3)), 0, (GROW, MM, MUL)
    ),
}  # fmt: skip
NARROW = {
    "columns on the left": Case(
        lambda s, w: column(s, 1, 3, 5, 4) @ w, ((5, 2), B), 1, (CUT, MM)
    ),
    "one column": Case(lambda s, w: column(s, 1, 2, 5, 4) @ w, ((5, 1), B), 2, (CUT, MUL)),
    "columns on the right": Case(
        lambda x, s: x @ column(s, 1, 3, 4, 5), (A, (4, 2)), 1, (MM, "full", "slice_scatter")
    ),
    "rows on the left": Case(
        lambda s, x: turned(column(s, 0, 2, 5, 4)) @ x, ((5, 2), C), 1,
        (TURN, MM, "full", "slice_scatter"),
    ),
    "rows on the right": Case(
        lambda x, s: x @ turned(column(s, 0, 2, 3, 4)), (A, (3, 2)), 1, (TURN, CUT, MM)
    ),
    "one place": Case(lambda s, w: place(s, -1, 5, 4) @ w, ((5,), B), 2, ("unsqueeze", CUT, MUL)),
    "one place of a transpose": Case(
        lambda s, x: turned(place(s, 1, 5, 4)) @ x, ((5,), C), 1,
        ("unsqueeze", MM, "full", "slice_scatter"),
    ),
    "one column that is read": Case(
        lambda a, b: (a @ b)[:, 1], (A, B), 1, (CUT, MM, "select.int")
    ),
    "outer product": Case(lambda a, b: a @ b, ((5, 1), (1, 3)), 1, (MUL,)),
    "columns that are read": Case(lambda a, b: (a @ b)[:, 1:], (A, B), 1, (CUT, MM)),
    "rows that are read": Case(lambda a, b: (a @ b)[:2], (A, B), 1, (CUT, MM)),
    # What must stay.
    "all is read": Case(lambda a, b: ((c := a @ b)[:, 1:], c.sin()), (A, B), 0, (MM, CUT, "sin")),
    "columns of something": Case(
        lambda x, s, w: aten.slice_scatter(x, s, 1, 1, 3) @ w, (A, (5, 2), B), 0,
        ("slice_scatter", MM),
    ),
    "every other column": Case(lambda a, b: (a @ b)[:, ::2], (A, B), 0, (MM, CUT)),
    "whole slice": Case(lambda a, b: aten.slice(a @ b, 1, 0, 3), (A, B), 0, (MM, CUT)),
}  # fmt: skip


def assert_fewer(rule: Callable[[Graph], int], case: Case) -> None:
    """As `assert_rule`, and FLOPs fall where the rule fires."""

    def cleaned(graph: Graph) -> int:
        changes = rule(graph)
        drop_dead(graph)
        return changes

    assert_rule(cleaned, case)
    module = traced(case.function, *tensors(case))
    before = price(copy_graph(module)).flops
    rule(module.graph)
    drop_dead(module.graph)
    assert (price(module).flops < before) == (case.changes > 0)


@pytest.mark.parametrize("name", ROWS)
def test_multiply_rows_once(name: str) -> None:
    assert_fewer(multiply_rows_once, ROWS[name])


@pytest.mark.parametrize("name", NARROW)
def test_narrow_products(name: str) -> None:
    assert_fewer(narrow_products, NARROW[name])


def burgers(net: nn.Module, x: Tensor) -> Tensor:
    """Three derivatives of a scalar, one of them of second order."""
    x = x.detach().requires_grad_()
    u = net(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)
    return (g[:, 1] + u[:, 0] * g[:, 0] - 0.1 * h[:, 0]).square().mean()


def test_second_derivative_in_one_coordinate() -> None:
    """What comes back goes along the coordinate as the derivative did, times a factor for each
    point: one pass fewer than 12."""
    net, x = mlp(nn.Tanh, 7, 12, 2), random_points(30, 2)
    assert flops_per_forward(check(burgers, [net], x), net, x) < 11


def one_output(net: nn.Module, x: Tensor) -> Tensor:
    """The derivative of one output of many."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x)[:, 1].sum(), x, create_graph=True)
    return g.square().sum()


def test_seed_of_one_output() -> None:
    """The other outputs cost nothing on the way back, nor do their weights' gradients."""
    few, many = (nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, n)) for n in (2, 30))
    x = random_points(8, 4)
    flops: list[Any] = []
    for net in (few.double(), many.double()):
        loss = check(one_output, [net], x)
        flops.append(loss.explain(net, x).flops)
    assert flops[0] == flops[1]
