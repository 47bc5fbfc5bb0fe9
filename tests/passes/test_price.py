"""Prices: exact FLOPs, bytes, and symbolic sizes, against PyTorch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from passes.graph import placeholders
from passes.price import FlopCounter, Price, node_flops, price, size_hints
from passes.tracing import trace
from tests.passes.flat import random_points


def traced(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    return make_fx(lambda *values: (function(*values),), tracing_mode="fake")(*inputs)


def dynamic(function: Callable[..., Any], *inputs: Tensor) -> GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=False)
    return trace(lambda *values: (function(*values),), [mode.from_tensor(x) for x in inputs], mode)


CONVOLUTION: Callable[..., Tensor] = torch.nn.functional.conv2d

# function, shapes, FLOPs: two per multiply-add
FLOPS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]] = {
    "mm": (torch.mm, ((2, 3), (3, 5)), 2 * 2 * 3 * 5),
    "addmm": (torch.addmm, ((5,), (2, 3), (3, 5)), 2 * 2 * 3 * 5),
    "bmm": (torch.bmm, ((4, 2, 3), (4, 3, 5)), 2 * 4 * 2 * 3 * 5),
    "baddbmm": (torch.baddbmm, ((5,), (4, 2, 3), (4, 3, 5)), 2 * 4 * 2 * 3 * 5),
    "two": (lambda a, b, c: a @ b @ c, ((2, 3), (3, 5), (5, 7)), 2 * 2 * 3 * 5 + 2 * 2 * 5 * 7),
    "elementwise": (lambda a: a.exp() * a, ((9, 9),), 0),
    "convolution": (CONVOLUTION, ((2, 3, 6, 6), (4, 3, 3, 3)), 2 * 2 * 16 * 3 * 4 * 9),
    "strided": (
        lambda x, w: CONVOLUTION(x, w, stride=2, padding=1),
        ((2, 3, 6, 6), (4, 3, 3, 3)),
        2 * 2 * 9 * 3 * 4 * 9,
    ),
}


@pytest.mark.parametrize("name", FLOPS)
def test_flops(name: str) -> None:
    function, shapes, expected = FLOPS[name]
    inputs = [random_points(*shape) for shape in shapes]
    assert price(traced(function, *inputs)).flops == expected
    with FlopCounter() as counter:
        function(*inputs)
    assert counter.flops == expected
    with FlopCounterMode(display=False) as reference:
        function(*inputs)
    assert reference.get_total_flops() == expected


def test_node_flops_is_the_sum() -> None:
    module = traced(lambda a, b: (a @ b).tanh() @ b, random_points(2, 3), random_points(3, 3))
    each = [node_flops(n) for n in module.graph.nodes if n.op == "call_function"]
    assert sorted(each) == [0, 36, 36]
    assert price(module).flops == 72


def test_bytes_moved() -> None:
    """Each operator reads its inputs and writes its results; views are free."""
    rows, columns = 6, 4
    x = torch.ones(rows, columns)
    size = 4 * rows * columns

    def moved(function: Callable[[Tensor], Tensor]) -> sympy.Expr:
        return price(traced(function, x)).bytes_moved

    assert moved(lambda x: x.sin()) == 2 * size
    assert moved(lambda x: x + x) == 2 * size
    assert moved(lambda x: x.t().unsqueeze(0)) == 0
    assert moved(lambda x: x.sum()) == size + 4
    assert moved(lambda x: x.double()) == size + 2 * size
    assert moved(lambda x: x.max(1).indices) == size + rows * (4 + 8)


def test_price_at_sizes() -> None:
    n = sympy.Symbol("n")
    kept = sympy.Max(4 * n, 12, evaluate=False)
    assert Price(6 * n, n**2, kept, 3).at({n: 5}) == (30, 25, 20, 3)
    assert Price(6 * n, n**2, kept, 3).at({n: 2}).bytes_kept == 12


def test_symbolic_sizes() -> None:
    """A formula in the batch size, exact at every batch size."""

    def function(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return (x @ w).tanh() @ v

    w, v = random_points(11, 13), random_points(13, 2)
    module = dynamic(function, random_points(5, 11), w, v)
    cost = price(module)
    (batch,) = cost.flops.free_symbols & set(size_hints(module)) - _sizes_of(module, 1, 2)
    hints = size_hints(module)
    assert hints[batch] == 5
    assert cost.at(hints)[0] == 2 * 5 * (11 * 13 + 13 * 2)
    other = cost.at(hints | {batch: 70})[0]
    with FlopCounter() as counter:
        function(random_points(70, 11), w, v)
    assert other == counter.flops


def _sizes_of(module: GraphModule, *positions: int) -> set[Any]:
    nodes = [placeholders(module.graph)[i] for i in positions]
    return {size.node.expr for node in nodes for size in node.meta["val"].shape}


def test_size_hints_of_numbers() -> None:
    assert size_hints(traced(torch.sin, random_points(3))) == {}


def mlp(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.addmm(v[0], (x @ w).tanh(), v)


def convolutions(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.conv2d(torch.nn.functional.silu(torch.conv2d(x, w, stride=2)), v)


def transposed(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.conv_transpose2d(x, w, stride=2) * v


def attention(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x @ w, x @ v, x)


# network, shapes of the points and of two weights
NETWORKS: dict[Callable[..., Tensor], tuple[tuple[int, ...], ...]] = {
    mlp: ((5, 3), (3, 7), (7, 2)),
    convolutions: ((2, 2, 9, 9), (4, 2, 3, 3), (3, 4, 2, 2)),
    transposed: ((2, 2, 4, 4), (2, 3, 3, 3), (3, 1, 1)),
    attention: ((2, 5, 8), (8, 8), (8, 8)),
}


@pytest.mark.parametrize("net", NETWORKS)
def test_counter_agrees_with_pytorch(net: Callable[..., Tensor]) -> None:
    """Forward, gradient and the gradient of the gradient."""
    x, w, v = (random_points(*shape, grad=True) for shape in NETWORKS[net])

    def work() -> None:
        out = net(x, w, v)
        (g,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        g.square().sum().backward()

    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounter() as mine:
            work()
        with FlopCounterMode(display=False) as reference:
            work()
    assert mine.flops == reference.get_total_flops() > 0


def test_counter_counts_fake_tensors() -> None:
    """Nothing is computed, sizes may be symbols."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    x, w = mode.from_tensor(random_points(5, 3)), mode.from_tensor(random_points(3, 4))
    with mode, FlopCounter() as counter:
        x @ w
    symbols = counter.total.free_symbols
    assert len(symbols) >= 2
    sizes: dict[Any, int] = {
        size.node.expr: hint
        for tensor, hints in ((x, (5, 3)), (w, (3, 4)))
        for size, hint in zip(tensor.shape, hints, strict=True)
    }
    assert counter.total.subs(sizes) == 2 * 5 * 3 * 4


def test_counter_takes_composite_operators_apart() -> None:
    with FlopCounter() as counter:
        torch.einsum("bij,bjk->bik", random_points(2, 3, 4), random_points(2, 4, 5))
        torch.nn.functional.linear(random_points(2, 3), random_points(4, 3))
    assert counter.flops == 2 * 2 * 3 * 4 * 5 + 2 * 2 * 3 * 4
