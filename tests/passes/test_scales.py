"""Row scales: computed once, and added before the product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from passes.graph import copy_graph, drop_dead
from passes.price import price
from passes.simplify.common import merge_common
from passes.simplify.scales import merge_products, share_scaled
from tests.passes.flat import calls, random_points

aten = torch.ops.aten
R, C, SQUARE, S = (5, 4), (4, 5), (4, 4), (5, 1)


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    return make_fx(lambda *values: tuple(function(*values)), tracing_mode="fake")(*inputs)


def assert_rule(
    rule: Callable[[Graph], int],
    function: Callable[..., Any],
    shapes: tuple[tuple[int, ...], ...],
    changes: int,
    products: int,
) -> None:
    """Same value, so many changes, so many products and convolutions left, idempotent."""
    inputs = [random_points(*shape) for shape in shapes]
    module = traced(function, *inputs)
    merge_common(module.graph)
    drop_dead(module.graph)
    reference, before = copy_graph(module), price(module).flops
    assert rule(module.graph) == changes
    drop_dead(module.graph)
    module.graph.lint()
    module.recompile()
    for mine, theirs in zip(module(*inputs), reference(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    dear = (aten.mm.default, aten.convolution.default, aten.convolution_backward.default)
    assert sum(calls(module, target) for target in dear) == products
    assert rule(module.graph) == 0
    assert (price(module).flops < before) == (changes > 0)


def chain(x: Tensor, w: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    x = aten.mm(x, w)
    x = aten.where(mask > 0, x, x * 0.1)
    return aten.mm(aten.mul(x, mask).neg().reshape(5, 2, 2).reshape(5, 4), v)


def of_convolution(x: Tensor, w: Tensor) -> Tensor:
    return aten.convolution(x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def pulled_back(g: Tensor, x: Tensor, w: Tensor) -> Tensor:
    only = [True, False, False]
    one = [1, 1]
    return aten.convolution_backward(g, x, w, None, one, one, one, False, [0, 0], 1, only)[0]


def weight_gradient(g: Tensor, x: Tensor, w: Tensor, stride: int = 1) -> Tensor:
    only = [False, True, False]
    strides, one = [stride, stride], [1, 1]
    return aten.convolution_backward(g, x, w, None, strides, one, one, False, [0, 0], 1, only)[1]


IMAGES, KERNEL = (5, 2, 4, 4), (2, 2, 3, 3)

SHARED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int, int]] = {
    "product": (lambda s, x, w: (x @ w, (s * x) @ w), (S, R, SQUARE), 1, 1),
    "other order": (lambda s, x, w: (x @ w, (x * s) @ w), (S, R, SQUARE), 1, 1),
    "a number": (lambda x, w: (x @ w, (3 * x) @ w), (R, SQUARE), 1, 1),
    "its negative": (lambda x, w: (x @ w, (-x / 4) @ w), (R, SQUARE), 1, 1),
    "a scale and a number": (
        lambda s, x, w: (x @ w, (s * (x * 0.5)) @ w),
        (S, R, SQUARE),
        1,
        1,
    ),
    "a chain after a number": (
        lambda x, w, v, m: (chain(x, w, v, m), chain(x / 7, w, v, m)),
        (R, SQUARE, SQUARE, R),
        2,
        2,
    ),
    "two scales": (lambda s, t, x, w: (x @ w, (s * (x * t)) @ w), (S, S, R, SQUARE), 1, 1),
    "a chain": (
        lambda s, x, w, v, m: (chain(x, w, v, m), chain(s * x, w, v, m)),
        (S, R, SQUARE, SQUARE, R),
        2,
        2,
    ),
    "from ones": (
        lambda s, w, v: (torch.ones(5, 1, dtype=s.dtype) @ w @ v, s @ w @ v),
        (S, (1, 4), SQUARE),
        2,
        2,
    ),
    "from what adds up to ones": (
        lambda s, w: (
            (torch.zeros_like(s) + torch.ones((), dtype=s.dtype).expand(5, 1)) @ w,
            s @ w,
        ),
        (S, (1, 4)),
        1,
        1,
    ),
    "convolution": (
        lambda s, x, w: (of_convolution(x, w), of_convolution(s.reshape(5, 1, 1, 1) * x, w)),
        (S, IMAGES, KERNEL),
        1,
        1,
    ),
    "pullback of a convolution": (
        lambda s, g, x, w: (pulled_back(g, x, w), pulled_back(g * s.reshape(5, 1, 1, 1), x, w)),
        (S, IMAGES, IMAGES, KERNEL),
        1,
        1,
    ),
    # What must stay.
    "a product that is a scale": (
        lambda x, v, w: (torch.ones(5, 1, dtype=x.dtype) @ w, x @ v, (x @ v) @ w),
        (R, (4, 1), (1, 4)),
        1,
        2,
    ),
    "views to and from numbers": (
        lambda s, x: (x.reshape(()).reshape(1, 1) * 2, s.reshape(()).reshape(1) * x.reshape(1)),
        ((1, 1), (1, 1)),
        0,
        0,
    ),
    "different numbers": (
        lambda x, y, w: (torch.where(y > 0, x, y) @ w, torch.where(y > 0, 2 * x, 3 * y) @ w),
        (R, R, SQUARE),
        0,
        2,
    ),
    "zero and infinity": (
        lambda x, w: (x @ w, (x * 0) @ w, (x / float("inf")) @ w),
        (R, SQUARE),
        0,
        3,
    ),
    "alone": (lambda s, x, w: ((s * x) @ w,), (S, R, SQUARE), 0, 1),
    "scale of columns": (lambda s, x, w: (x @ w, (s * x) @ w), ((1, 4), R, SQUARE), 0, 2),
    "not linear": (lambda s, x, w: (x.tanh() @ w, (s * x).tanh() @ w), (S, R, SQUARE), 0, 2),
    "rows are mixed": (lambda s, x, w: (w @ x, w @ (s * x)), (S, R, (5, 5)), 0, 2),
    "rows are mixed by a view": (
        lambda s, x, w: (x.reshape(4, 5) @ w, (s * x).reshape(4, 5) @ w),
        (S, R, (5, 5)),
        0,
        2,
    ),
    "different masks": (
        lambda s, x, y, w: (
            aten.where(y > 0, x, y) @ w,
            aten.where(y < 0, s * x, s * y) @ w,
        ),
        (S, R, R, SQUARE),
        0,
        2,
    ),
    "zero elsewhere": (
        lambda s, x, w: tuple(
            aten.where(x > 0, torch.zeros((), dtype=x.dtype), z) @ w for z in (x, s * x)
        ),
        (S, R, SQUARE),
        1,
        1,
    ),
    "one branch only": (
        lambda s, x, y, w: (aten.where(y > 0, x, y) @ w, aten.where(y > 0, s * x, y) @ w),
        (S, R, R, SQUARE),
        0,
        2,
    ),
    "convolution with a bias": (
        lambda s, x, w, b: tuple(
            aten.convolution(z, w, b, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
            for z in (x, s.reshape(5, 1, 1, 1) * x)
        ),
        (S, IMAGES, KERNEL, (2,)),
        0,
        2,
    ),
}


@pytest.mark.parametrize("name", SHARED)
def test_share_scaled(name: str) -> None:
    assert_rule(share_scaled, *SHARED[name])


MERGED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int, int]] = {
    "left up to a scale": (
        lambda s, a, x, y: ((s * a).permute(1, 0) @ x + a.permute(1, 0) @ y,),
        (S, R, R, R),
        1,
        1,
    ),
    "right up to a scale": (
        lambda s, a, x, y: (a.t() @ y + (a * s).t() @ x,),
        (S, R, R, R),
        1,
        1,
    ),
    "left up to a number": (
        lambda a, x, y: ((2 * a).permute(1, 0) @ x + a.permute(1, 0) @ y,),
        (R, R, R),
        1,
        1,
    ),
    "left operand of the other": (
        lambda s, a, x, y: (x.t() @ (s * a) + y.t() @ a,),
        (S, R, R, R),
        1,
        1,
    ),
    "weight of a convolution": (
        lambda s, g, x, y, w: (
            weight_gradient(g * s.reshape(5, 1, 1, 1), x, w) + weight_gradient(g, y, w),
        ),
        (S, IMAGES, IMAGES, IMAGES, KERNEL),
        1,
        1,
    ),
    # What must stay.
    "convolutions of other strides": (
        lambda s, g, x, y, w: (
            weight_gradient(g * s.reshape(5, 1, 1, 1), x, w) + weight_gradient(g, y, w, 3),
        ),
        (S, IMAGES, IMAGES, (5, 2, 10, 10), KERNEL),
        0,
        2,
    ),
    "nothing in common": (lambda a, b, x, y: (a @ x + b @ y,), (SQUARE, SQUARE, C, C), 0, 2),
    "read elsewhere": (lambda a, x, y: (a @ x + a @ y, a @ x), (SQUARE, C, C), 0, 2),
    "different scales": (
        lambda s, t, a, x, y: ((s * a).t() @ x + (t * a).t() @ y,),
        (S, S, R, R, R),
        0,
        2,
    ),
    "broadcast": (lambda a, x, y: (a @ x + a @ y,), (SQUARE, C, (4, 1)), 0, 2),
    "times a number": (
        lambda a, x, y: (aten.add.Tensor(a @ x, a @ y, alpha=2),),
        (SQUARE, C, C),
        0,
        2,
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_merge_products(name: str) -> None:
    assert_rule(merge_products, *MERGED[name])


def test_mixed_types_are_left_alone() -> None:
    s, x, w = random_points(*S), random_points(*R).float(), random_points(*SQUARE)
    module = traced(lambda s, x, w: (x @ w.float(), (s * x) @ w), s, x, w)
    assert share_scaled(module.graph) == 0


def test_symbolic_sizes() -> None:
    inputs = random_points(*S).reshape(5), random_points(*IMAGES), random_points(*KERNEL)

    def function(s: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        scaled = x * s.unsqueeze(1).reshape(-1, 1, 1, 1)
        return of_convolution(x, w), of_convolution(scaled, w)

    module = make_fx(function, tracing_mode="symbolic")(*inputs)
    assert share_scaled(module.graph) == 1
    drop_dead(module.graph)
    module.recompile()
    more = random_points(7), random_points(7, 2, 4, 4), inputs[2]
    for mine, theirs in zip(module(*more), function(*more), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
