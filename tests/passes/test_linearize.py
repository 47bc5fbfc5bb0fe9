"""A function and its derivative as two graphs: composition, linearity, and what each costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from passes.graph import is_random, placeholders, reaches, results
from passes.linearize import Linearization, flatten_output, linearize, push_forward, split
from passes.tangent_rules import NoRule
from passes.tracing import trace
from tests.passes.flat import calls, random_points

aten = torch.ops.aten
Function = Callable[..., tuple[Any, ...]]


def mlp_gradient(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Gradient of the summed output in the points; layers without bias, tanh between."""

    def total(x: Tensor) -> Tensor:
        for weight in weights[:-1]:
            x = torch.tanh(x @ weight)
        return (x @ weights[-1]).sum()

    return (gradient(total, x),)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Traced by reverse mode; `torch.func` has a tracing of its own."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(f(x), x)[0]


def attention_gradient(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    return (gradient(lambda z: ((z @ w).softmax(-1) @ z.T).square().sum(), x), x.sum())


def convolution_gradient(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    def total(z: Tensor) -> Tensor:
        z = torch.nn.functional.conv2d(z, weight, bias, stride=2, padding=1)
        return torch.nn.functional.max_pool2d(torch.nn.functional.silu(z), 2).square().sum()

    return gradient(total, x), total(x)


def two_in_two_out(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return x.sin() * y, (x * x).sum(), y.exp()


def sorted_rows(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    values, order = x.sort(dim=1)
    largest = (values[:, 1:] * y).amax(1)
    return largest, order, torch.where(x > 0, x, x.exp())


def mlp_inputs() -> list[Tensor]:
    return [random_points(*s) for s in ((5, 3), (3, 4), (4, 6), (6, 2))]


# function, inputs, positions that move
CASES: dict[str, tuple[Function, Callable[[], list[Tensor]], list[int]]] = {
    "mlp": (mlp_gradient, mlp_inputs, [0]),
    "mlp_in_weights": (mlp_gradient, mlp_inputs, [1, 3]),
    "mlp_in_all": (mlp_gradient, mlp_inputs, [3, 0, 2, 1]),
    "attention": (attention_gradient, lambda: [random_points(4, 4), random_points(4, 4)], [0]),
    "attention_weight": (attention_gradient, lambda: [random_points(4, 4) for _ in "ab"], [1]),
    "convolution": (
        convolution_gradient,
        lambda: [random_points(2, 1, 8, 8), random_points(3, 1, 3, 3), random_points(3)],
        [0, 1, 2],
    ),
    "convolution_bias": (
        convolution_gradient,
        lambda: [random_points(2, 1, 8, 8), random_points(3, 1, 3, 3), random_points(3)],
        [2],
    ),
    "two_in_two_out": (two_in_two_out, lambda: [random_points(3), random_points(3)], [1]),
    "sorted_rows": (sorted_rows, lambda: [random_points(3, 4), random_points(3, 3)], [0, 1]),
}


def traced(function: Function, inputs: list[Tensor], *, dynamic: bool = False) -> GraphModule:
    mode = FakeTensorMode(
        allow_non_fake_inputs=True, shape_env=ShapeEnv() if dynamic else None, static_shapes=False
    )
    module = trace(function, [mode.from_tensor(x) for x in inputs], mode)
    flatten_output(module.graph)
    return module


def apply(
    lin: Linearization, inputs: list[Any], directions: list[Tensor], n_kept: int
) -> tuple[list[Any], list[Any]]:
    """Run ``P``, then ``T`` on its residuals."""
    out = lin.primal(*inputs)
    return list(out[:n_kept]), list(lin.tangent(*out[n_kept:], *directions))


def expected_tangents(
    function: Function, inputs: list[Tensor], moving: list[int], directions: list[Tensor]
) -> list[Tensor]:
    """Central differences of order four: independent of every rule."""

    def at(step: float) -> list[Tensor]:
        moved = dict(zip(moving, directions, strict=True))
        shifted = [x + step * moved[i] if i in moved else x for i, x in enumerate(inputs)]
        return [y.double() for y in function(*shifted)]

    h = 1e-3
    stencil = zip(at(-2 * h), at(-h), at(h), at(2 * h), strict=True)
    return [(a - 8 * b + 8 * c - d) / (12 * h) for a, b, c, d in stencil]


@pytest.mark.parametrize("name", CASES)
def test_composition_is_the_jvp(name: str) -> None:
    torch.manual_seed(2)
    function, make, moving = CASES[name]
    inputs = make()
    module = traced(function, inputs)
    outputs = list(function(*inputs))
    movable = [i for i, y in enumerate(outputs) if y.is_floating_point()]
    lin = linearize(module, moving, range(len(outputs)), movable)
    directions = [torch.randn_like(inputs[i]) for i in moving]
    values, tangents = apply(lin, inputs, directions, len(outputs))
    for mine, value in zip(values, outputs, strict=True):
        torch.testing.assert_close(mine, value, rtol=1e-12, atol=1e-12)
    reference = expected_tangents(function, inputs, moving, directions)
    for mine, position in zip(tangents, movable, strict=True):
        expected = reference[position]
        found = torch.zeros_like(expected) if mine is None else mine
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", CASES)
def test_tangent_is_linear(name: str) -> None:
    torch.manual_seed(2)
    function, make, moving = CASES[name]
    inputs = make()
    lin = linearize(traced(function, inputs), moving, (), (0,))
    one = [torch.randn_like(inputs[i]) for i in moving]
    two = [torch.randn_like(inputs[i]) for i in moving]
    residuals = lin.primal(*inputs)

    def along(directions: list[Tensor]) -> Tensor:
        return lin.tangent(*residuals, *directions)[0]

    both = along([2 * a - 3 * b for a, b in zip(one, two, strict=True)])
    torch.testing.assert_close(both, 2 * along(one) - 3 * along(two), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_tangent_recomputes_nothing(name: str) -> None:
    """Every node of ``T`` depends on a tangent; what does not belongs to ``P``."""
    function, make, moving = CASES[name]
    lin = linearize(traced(function, make()), moving, (), (0,))
    late = placeholders(lin.tangent.graph)[-len(moving) :]
    moved = reaches(late)
    still = [n for n in lin.tangent.graph.nodes if n.op == "call_function" and n not in moved]
    assert still == []


@pytest.mark.parametrize("layers", [2, 3, 5])
def test_cost_of_an_mlp_gradient(layers: int) -> None:
    """A gradient of L layers in the points costs 2(L - 1) products (the last layer's output is not
    needed, and ones times its weight are a sum), and its JVP 2(L - 1): the tangent passes each
    activation once forward, once back.
    """
    x, weights = random_points(5, 4), [random_points(4, 4) for _ in range(layers)]
    lin = linearize(traced(mlp_gradient, [x, *weights]), [0], (0,), (0,))
    assert calls(lin.primal, aten.mm.default) == 2 * (layers - 1)
    assert calls(lin.tangent, aten.mm.default) == 2 * (layers - 1)
    assert calls(lin.primal, aten.tanh.default) == layers - 1
    assert calls(lin.tangent, aten.tanh.default) == 0


def test_input_that_moves_nothing_costs_nothing() -> None:
    """The gradient in the points does not depend on the last layer's bias."""

    def function(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return (gradient(lambda z: (z @ w + b).sum(), x),)

    module = traced(function, [random_points(5, 3), random_points(3, 2), random_points(2)])
    lin = linearize(module, [2], (0,), (0,))
    assert results(lin.tangent.graph) == [None]
    assert len(lin.primal(*[random_points(*s) for s in ((5, 3), (3, 2), (2,))])) == 1


def test_zero_inputs_are_not_taken() -> None:
    """``f(x, e)`` at ``e = 0``: ``P`` takes ``x`` alone and has no terms in ``e``."""

    def function(x: Tensor, e: Tensor) -> tuple[Tensor, ...]:
        return (x.sin() + e * x.exp() + e * e * x.cosh(),)

    x, e = random_points(4), random_points(4)
    lin = linearize(traced(function, [x, e]), [1], (0,), (0,), zero=[1])
    assert len(placeholders(lin.primal.graph)) == 1
    (value,), (tangent,) = apply(lin, [x], [e], 1)
    torch.testing.assert_close(value, x.sin())
    torch.testing.assert_close(tangent, e * x.exp())
    assert calls(lin.primal, aten.mul.Tensor) == 0
    assert calls(lin.primal, aten.cosh.default) == 0


def test_zero_inputs_come_last() -> None:
    inputs = [random_points(3), random_points(3)]
    with pytest.raises(AssertionError, match="zero inputs come last"):
        linearize(traced(two_in_two_out, inputs), [0], (0,), (0,), zero=[0])


def test_random_draw_happens_once() -> None:
    """A dropout mask is drawn by ``P`` and handed to ``T``."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        mask = torch.bernoulli(torch.full((6,), 0.5, dtype=torch.float64))
        return ((x * mask).sin(),)

    x, v = random_points(6), random_points(6)
    lin = linearize(traced(function, [x]), [0], (0,), (0,))
    assert sum(is_random(n) for n in lin.primal.graph.nodes) == 1
    assert not any(is_random(n) for n in lin.tangent.graph.nodes)
    (value,), (tangent,) = apply(lin, [x], [v], 1)
    kept = value != 0
    torch.testing.assert_close(tangent[kept], (x.cos() * v)[kept])
    assert (tangent == v)[~kept].logical_or((tangent == 0)[~kept]).all()


def test_symbolic_sizes() -> None:
    """Traced once, run at another batch size."""
    torch.manual_seed(2)
    weights = [random_points(3, 4), random_points(4, 2)]
    lin = linearize(
        traced(mlp_gradient, [random_points(5, 3), *weights], dynamic=True), [0], (0,), (0,)
    )
    x, v = random_points(7, 3), random_points(7, 3)
    _, (tangent,) = apply(lin, [x, *weights], [v], 1)
    (expected,) = expected_tangents(mlp_gradient, [x, *weights], [0], [v])
    torch.testing.assert_close(tangent, expected, rtol=1e-7, atol=1e-8)


def test_a_zero_in_the_shape_of_a_tangent_belongs_to_the_primal() -> None:
    """The input that only moves has a symbolic size that an input of the primal has too."""

    def function(x: Tensor, zero: Tensor) -> tuple[Tensor, ...]:
        return (x * (zero + x.sum().expand_as(x)).sin(),)

    inputs = [random_points(5), torch.zeros(5, dtype=torch.float64)]
    lin = linearize(traced(function, inputs, dynamic=True), [1], (0,), (0,), zero=[1])
    x, v = random_points(7), random_points(7)
    value, *residuals = lin.primal(x)
    torch.testing.assert_close(value, x * x.sum().sin())
    torch.testing.assert_close(lin.tangent(*residuals, v), (x * x.sum().cos() * v,))


def test_no_rule() -> None:
    @torch.library.custom_op("optimize_nested_tests::halve", mutates_args=())
    def halve(x: Tensor) -> Tensor:
        return x / 2

    halve.register_fake(torch.empty_like)
    module = traced(lambda x: (halve(x).sin(),), [random_points(3)])
    with pytest.raises(NoRule, match="halve"):
        linearize(module, [0], (0,), (0,))


def test_primal_values_are_computed_once() -> None:
    """`push_forward` shares every value with the rules: the sine is not taken twice."""
    module = traced(lambda x: (x.tanh().exp(),), [random_points(3)])

    def function(x: Tensor, v: Tensor) -> tuple[Any, ...]:
        values, tangents = push_forward(module, [x], [v])
        return *values, *tangents

    both = traced(function, [random_points(3), random_points(3)])
    assert calls(both, aten.tanh.default) == 1
    assert calls(both, aten.exp.default) == 1


# split


def early_and_late() -> GraphModule:
    def function(x: Tensor, y: Tensor, late: Tensor) -> tuple[Tensor, ...]:
        h = (x @ y).tanh()
        return h.sum(), h * late.exp(), x

    return traced(function, [random_points(3, 3) for _ in "xyv"])


def test_split_composes() -> None:
    module = early_and_late()
    late = placeholders(module.graph)[2]
    lin = split(module, [late], 1)
    x, y, v = (random_points(3, 3) for _ in "xyv")
    early, (product, same) = apply(lin, [x, y], [v], 1)
    for mine, expected in zip([*early, product, same], module(x, y, v), strict=True):
        torch.testing.assert_close(mine, expected)
    assert calls(lin.primal, aten.mm.default) == 1
    assert calls(lin.primal, aten.exp.default) == 0
    assert calls(lin.tangent, aten.mm.default) == 0


def test_split_leaves_the_graph_as_it_is() -> None:
    module = early_and_late()
    before = str(module.graph)
    split(module, placeholders(module.graph)[2:], 1)
    assert str(module.graph) == before


def test_split_hands_over_each_value_once() -> None:
    """A value that several late nodes read is one residual."""

    def function(x: Tensor, late: Tensor) -> tuple[Tensor, ...]:
        h = x.tanh()
        return (h * late, h + late, h)

    module = traced(function, [random_points(3), random_points(3)])
    lin = split(module, placeholders(module.graph)[1:], 0)
    assert len(placeholders(lin.tangent.graph)) == 2
    assert len(results(lin.primal.graph)) == 1


def test_split_refuses_an_early_result_that_is_late() -> None:
    module = early_and_late()
    with pytest.raises(AssertionError, match="an early result depends on a late input"):
        split(module, placeholders(module.graph)[2:], 2)


def test_split_copies_constants_to_where_they_are_read() -> None:
    """A tensor that the graph holds is no residual."""
    constant = random_points(3)
    module = traced(lambda x, v: (x * constant, v * constant), [random_points(3), random_points(3)])
    lin = split(module, placeholders(module.graph)[1:], 1)
    assert len(placeholders(lin.tangent.graph)) == 1
    x, v = random_points(3), random_points(3)
    (early,), (late,) = apply(lin, [x], [v], 1)
    torch.testing.assert_close(early, x * constant)
    torch.testing.assert_close(late, v * constant)


def test_split_keeps_draws_that_nobody_reads() -> None:
    """The generator must end where eager leaves it."""

    def function(x: Tensor, late: Tensor) -> tuple[Tensor, ...]:
        torch.bernoulli(torch.full((3,), 0.5, dtype=torch.float64))
        return x.sin(), late.cos()

    module = traced(function, [random_points(3), random_points(3)])
    assert sum(is_random(n) for n in module.graph.nodes) == 1
    lin = split(module, placeholders(module.graph)[1:], 1)
    assert sum(is_random(n) for n in lin.primal.graph.nodes) == 1
    assert not any(is_random(n) for n in lin.tangent.graph.nodes)
