"""Groups of a convolution as rows of its batch: same value, these operators, idempotent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from passes.graph import copy_graph, drop_dead, elements
from passes.price import price
from passes.simplify.factors import keep_factors
from passes.simplify.groups import fold_groups
from passes.simplify.masks import narrow_masks
from tests.passes.flat import random_points
from tests.passes.test_factors import kept, largest
from tests.passes.test_simplify import assert_same, traced

aten = torch.ops.aten
N = 3  # samples
IMAGES, SMALL, WEIGHT = (1, N * 4, 6, 7), (1, N * 6, 3, 3), (6, 4, 3, 3)
IMAGE = [2, 2], [1, 0], [1, 1]  # stride, padding, dilation
ROWS, PLACES, KERNEL = (2, N * 4, 9), (2, N * 8, 5), (8, 2, 3)
ROW = [1], [0], [2]


def repeated(w: Tensor) -> Tensor:
    shape = N, *w.shape
    return w[None].expand(shape).clone().reshape(N * w.shape[0], *w.shape[1:])


def convolved(x: Tensor, w: Tensor, *settings: Any) -> Tensor:
    return aten.convolution(x, w, None, *settings, False, [0] * (x.dim() - 2), N)


def transposed(x: Tensor, w: Tensor, *settings: Any) -> Tensor:
    return aten.convolution(x, w, None, *settings, True, [0] * (x.dim() - 2), N)


def gradient(number: int, d: Tensor, x: Tensor, w: Tensor, *settings: Any, groups: int = N) -> Any:
    mask = [at == number for at in range(3)]
    zeros = [0] * (x.dim() - 2)
    backward = aten.convolution_backward
    return backward(d, x, w, None, *settings, False, zeros, groups, mask)[number]


def of_samples(d: Tensor, x: Tensor, w: Tensor, *settings: Any, groups: int = N) -> Tensor:
    shape = N, *w.shape
    return gradient(1, d, x, repeated(w), *settings, groups=groups).reshape(shape)


@dataclass(frozen=True)
class Case:
    function: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    changes: int = 1


CASES = {
    "convolution": Case(lambda x, w: convolved(x, repeated(w), *IMAGE), (IMAGES, WEIGHT)),
    "transposed": Case(lambda x, w: transposed(x, repeated(w), *IMAGE), (SMALL, WEIGHT)),
    "groups of groups": Case(
        lambda x, w: aten.convolution(x, repeated(w), None, *ROW, False, [0], 2 * N),
        (ROWS, KERNEL),
    ),
    "gradient in the point": Case(
        lambda d, x, w: gradient(0, d, x, repeated(w), *IMAGE), (SMALL, IMAGES, WEIGHT)
    ),
    "summed gradient": Case(
        lambda d, x, w: of_samples(d, x, w, *IMAGE).sum(0), (SMALL, IMAGES, WEIGHT)
    ),
    "summed, groups of groups": Case(
        lambda d, x, w: of_samples(d, x, w, *ROW, groups=2 * N).sum(0, keepdim=True),
        (PLACES, ROWS, KERNEL),
    ),
    "a weight for each": Case(
        lambda x, w: convolved(x, w, *IMAGE), (IMAGES, (N * 6, *WEIGHT[1:])), 0
    ),
    "a gradient for each and their sum": Case(
        lambda d, x, w: (g := of_samples(d, x, w, *IMAGE)).sum(0) + g.sin().sum(0),
        (SMALL, IMAGES, WEIGHT),
        0,
    ),
    "a gradient for each": Case(
        lambda d, x, w: of_samples(d, x, w, *IMAGE), (SMALL, IMAGES, WEIGHT), 0
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_groups_are_rows(name: str) -> None:
    case = CASES[name]
    inputs = [random_points(*shape) for shape in case.shapes]
    module = traced(case.function, *inputs)
    reference = copy_graph(module)
    assert fold_groups(module.graph) == case.changes
    drop_dead(module.graph)
    module.recompile()
    assert_same(module, reference, inputs)
    assert fold_groups(module.graph) == 0
    narrow_masks(module.graph)
    drop_dead(module.graph)
    module.recompile()
    assert_same(module, reference, inputs)
    assert narrow_masks(module.graph) == 0
    if case.changes:
        assert not module.graph.find_nodes(op="call_function", target=aten.clone.default)
        assert price(module).flops <= price(reference).flops


def norms(g: Tensor) -> Tensor:
    return g.flatten(1).square().sum(1)


FEW = (1, N * 24, 2, 2), (1, N * 16, 5, 5), (24, 16, 3, 3), (N,)
ROWS_FEW = (1, N * 24, 2), (1, N * 16, 7), (24, 16, 3), (N,)
BACK = aten.convolution_backward


def of_transposed(x: Tensor, d: Tensor, w: Tensor) -> Tensor:
    args = repeated(w), None, [2, 2], [0, 0], [1, 1], True, [0, 0], N, [False, True, False]
    return BACK(d, x, *args)[1].reshape(N, *w.shape)


def pulled_back(
    d: Tensor, x: Tensor, w: Tensor, s: Tensor, *settings: Any, side: int, groups: int = N
) -> Tensor:
    """What comes back to each side from a sum of gradients with weights, through the gradients."""
    g = of_samples(d, x, w, *settings, groups=groups)
    own = (s.reshape(N, *[1] * w.dim()) * g).reshape(-1, *w.shape[1:])
    if side == 0:
        return aten.convolution(x, own, None, *settings, False, [0] * (x.dim() - 2), groups)
    return gradient(0, d, x, own, *settings, groups=groups)


WINDOWS = [2, 2], [0, 0], [1, 1]
SPREAD = [2], [0], [2]
KEPT = {
    "norms": Case(lambda d, x, w, s: norms(of_samples(d, x, w, *WINDOWS)), FEW),
    "norms of rows": Case(lambda d, x, w, s: norms(of_samples(d, x, w, *SPREAD)), ROWS_FEW),
    "norms of a transposed one": Case(lambda d, x, w, s: norms(of_transposed(d, x, w)), FEW),
    "to the places": Case(lambda *xs: pulled_back(*xs, *WINDOWS, side=0), FEW),
    "to what is seen": Case(lambda *xs: pulled_back(*xs, *WINDOWS, side=1), FEW),
    "to what is seen, rows": Case(lambda *xs: pulled_back(*xs, *SPREAD, side=1), ROWS_FEW),
    "a product that is read": Case(lambda d, x, w, s: of_samples(d, x, w, *WINDOWS).sin(), FEW, 0),
    "many places": Case(
        lambda d, x, w, s: norms(of_samples(d, x, w, *IMAGE)), (SMALL, IMAGES, WEIGHT, (N,)), 0
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_gradients_of_samples_are_not_formed(name: str) -> None:
    case = KEPT[name]
    inputs = [random_points(*shape) for shape in case.shapes]
    module, _ = kept(case.function, inputs, case.changes)
    assert keep_factors(module.graph) == 0
    if case.changes:
        assert largest(module) < N * elements(torch.empty(case.shapes[2]))
