"""Merging across marks: what is one value, and what a derivative tells apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from passes.markers import GRADIENT, LEAF, POINT
from tests.passes.flat import (
    Loss,
    Marks,
    active_of,
    assert_rewrites,
    assert_step,
    calls,
    flat_graph,
    nested,
    net,
    random_points,
    shared,
)
from tests.passes.random_losses import random_loss

aten = torch.ops.aten


def tanh_calls(loss: Loss, *inputs: Tensor) -> int:
    """Check a loss through `share` and `nest`; count what is left of its tanh."""
    module, _ = assert_rewrites(loss, *inputs)
    return calls(module, aten.tanh.default)


@pytest.fixture
def inputs() -> list[Tensor]:
    """Points, a weight that requires grad, and points of another kind."""
    torch.manual_seed(6)
    return [random_points(5, 3), random_points(3, 3, grad=True), random_points(5, 3)]


# Merged


def test_data_and_leaf(inputs: list[Tensor]) -> None:
    """``net(x)`` beside ``net(leaf(x))`` is one tensor."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return net(x, w).square().sum() + m.gradient(net(p, w), p).square().sum()

    assert tanh_calls(loss, *inputs) == 1


def test_leaf_first(inputs: list[Tensor]) -> None:
    """The later use takes the earlier value, whichever of the two is differentiated."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        g = m.gradient(net(p, w), p)
        return net(x, w).square().sum() + g.square().sum() + net(x, w).sum()

    assert tanh_calls(loss, *inputs) == 1


def test_point_of_an_input_that_carries_a_gradient(inputs: list[Tensor]) -> None:
    """A point is an identity to what lies outside."""
    inputs[0].requires_grad_()

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.point(x)
        return net(x, w).square().sum() + m.gradient(net(p, w), p).square().sum()

    assert tanh_calls(loss, *inputs) == 1


def test_stopped_constant(inputs: list[Tensor]) -> None:
    """A stop of what carries no gradient is nothing."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        return net(x, w).square().sum() + net(m.stop(x), w).sum()

    assert tanh_calls(loss, *inputs) == 1


def test_two_leaves(inputs: list[Tensor]) -> None:
    """Two fresh leaves of one tensor, one derivative each."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(x), m.leaf(x)
        g = m.gradient(net(p, w).square(), p)
        h = m.gradient(net(q, w), q)
        return (g * h).sum()

    module, _ = assert_rewrites(loss, *inputs)
    assert calls(module, aten.tanh.default) == 1
    assert calls(module, LEAF) == 1


def test_use_that_no_derivative_sees(inputs: list[Tensor]) -> None:
    """The constant factor keeps its own value; the data term may take either."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        g = m.gradient(net(p, w) * net(x, w), p)
        return g.square().sum() + net(x, w).sum() + net(p, w).square().sum()

    assert tanh_calls(loss, *inputs) == 2


def test_two_gradients_of_one_tensor(inputs: list[Tensor]) -> None:
    """``gradient(u, x), gradient(u, t) → gradient(u, (x, t))``."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(x), m.leaf(c)
        u = net(p * q, w)
        return (m.gradient(u, p) * m.gradient(u, q).sin()).sum()

    module, after = assert_rewrites(loss, *inputs)
    (mark,) = module.graph.find_nodes(op="call_function", target=GRADIENT)
    assert len(mark.args[1]) == 2
    assert sum("site" in node.meta for node in after.graph.nodes) == 1


def test_same_gradient_twice(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return m.gradient(net(p, w), p).sin().sum() + m.gradient(net(p, w), p).square().sum()

    module, _ = assert_rewrites(loss, *inputs)
    assert calls(module, GRADIENT) == 1


# Kept apart: inner derivatives


def constant_factor(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    p = m.leaf(x)
    return m.gradient(net(p, w) * net(x, w), p).square().sum()


def stopped_factor(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    """What depends on the point through a stop is constant to its derivative."""
    p = m.leaf(x)
    return m.gradient(net(p, w) * net(m.stop(p), w), p).square().sum()


def leaf_of_the_leaf(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    p = m.leaf(x)
    return m.gradient(net(p, w) * net(m.leaf(p), w), p).square().sum()


def two_points_in_one_product(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    p, q = m.leaf(x), m.leaf(x)
    u = net(p, w).square() * net(q, w)
    return (m.gradient(u, p) * m.gradient(u, q).sin()).sum()


def point_of_a_point(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    """The inner point is inside the outer's function."""
    p = m.point(x)
    q = m.point(p)
    g = m.gradient(net(q, w) * net(p, w), q)
    return m.gradient(g.square(), p).square().sum()


DISTINCT = [constant_factor, stopped_factor, leaf_of_the_leaf, two_points_in_one_product]


@pytest.mark.parametrize("loss", DISTINCT)
def test_factors_stay_apart(loss: Loss, inputs: list[Tensor]) -> None:
    assert tanh_calls(loss, *inputs) == 2


def test_point_of_a_point(inputs: list[Tensor]) -> None:
    assert tanh_calls(point_of_a_point, *inputs) == 2


def test_product_that_is_half_constant(inputs: list[Tensor]) -> None:
    """Both products depend on the point and have the same value, and their derivatives differ."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        moving, still = net(p, w), net(x, w)
        half = moving * still
        whole = moving * moving
        g = m.gradient(whole * still, p)
        return g.square().sum() + half.sum()

    assert tanh_calls(loss, *inputs) == 2


def test_value_of_what_was_merged(inputs: list[Tensor]) -> None:
    """After ``net(p)`` took the constant ``net(x)``, its sine no longer depends on the point."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        still = x @ w
        aside = (p @ w).tanh()
        u = (p @ w).tanh()
        g = m.gradient(still * u, p)
        return g.square().sum() + aside.sum()

    module, _ = assert_rewrites(loss, *inputs)
    assert calls(module, aten.mm.default) == 2


def test_constant_taken_after_the_point(inputs: list[Tensor]) -> None:
    """The same, the constant written last."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        aside = (p @ w).tanh()
        u = (p @ w).tanh()
        g = m.gradient(u * (x @ w), p)
        return g.square().sum() + aside.sum()

    module, _ = assert_rewrites(loss, *inputs)
    assert calls(module, aten.mm.default) == 2


def test_dependence_through_a_gradient_only(inputs: list[Tensor]) -> None:
    """``x + g`` and ``p + g`` both depend on the point: one through the gradient alone."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        g = m.gradient(net(p, w), p)
        aside = x + g
        h = m.gradient((p + g).square(), p)
        return aside.sum() + h.square().sum()

    assert_rewrites(loss, *inputs)


def test_unused_point(inputs: list[Tensor]) -> None:
    """A gradient of zero at a point of equal value is not the gradient at the other."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(x), m.leaf(x)
        g, h = m.gradient(net(p, w), p, q)
        return g.square().sum() + h.sum()

    assert_rewrites(loss, *inputs)


def test_gradients_of_equal_values(inputs: list[Tensor]) -> None:
    """Two functions of one value at the point, of which one is half constant."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        g = m.gradient(net(p, w) * net(p, w), p)
        h = m.gradient(net(p, w) * net(x, w), p)
        return (g * h.sin()).sum()

    module, _ = assert_rewrites(loss, *inputs)
    assert calls(module, GRADIENT) == 2


def test_gradients_at_equal_points(inputs: list[Tensor]) -> None:
    """Two points of one value are two variables of one function."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(x), m.leaf(x)
        u = p.square() * q
        return (m.gradient(u, p) - 2 * m.gradient(u, q)).sin().sum()

    assert_rewrites(loss, *inputs)


def test_views_of_views(inputs: list[Tensor]) -> None:
    """``x → (5, 1, 3) → (5, 3)`` is x; but not where a derivative is taken in between."""

    def around(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return m.gradient(net(p.unsqueeze(1).squeeze(1), w), p).square().sum()

    def between(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        v = p.unsqueeze(1)
        return m.gradient(net(v.squeeze(1), w) * net(p, w), v).square().sum()

    module, _ = assert_rewrites(around, *inputs)
    assert calls(module, aten.unsqueeze.default) == 0
    assert_rewrites(between, *inputs)


def test_seeds_tell_gradients_apart(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        u = net(p, w)
        (g,), (h,) = m.pull([u], [p], [c]), m.pull([u], [p], [c.sin()])
        return (g * h).sum()

    module, _ = assert_rewrites(loss, *inputs)
    assert calls(module, GRADIENT) == 2


def test_dependent_points_are_not_joined(inputs: list[Tensor]) -> None:
    """``∂u/∂p`` goes on through ``h``, so the two are no gradient in two variables."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        h = m.point(net(p, w))
        u = net(h, w)
        return (m.gradient(u, p) * m.gradient(u, h).sin()).sum()

    module, _ = assert_rewrites(loss, *inputs)
    assert calls(module, GRADIENT) == 2


# Kept apart: the outer gradient


def test_leaf_of_an_input_that_carries_a_gradient(inputs: list[Tensor]) -> None:
    """``net(x)`` has a gradient for ``x``, and ``net(leaf(x))`` has none."""
    inputs[0].requires_grad_()

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return net(x, w).square().sum() + m.gradient(net(p, w), p).square().sum()

    assert tanh_calls(loss, *inputs) == 2


def test_stop_of_a_hidden_value(inputs: list[Tensor]) -> None:
    """The stop of a value that depends on the weights counts."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        h = x @ w
        return (h.tanh() * m.stop(h).tanh()).sum()

    assert tanh_calls(loss, *inputs) == 2


# Never merged


def test_draws(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        one, two = (aten.bernoulli.p(torch.empty_like(x), 0.5) for _ in "ab")
        return (one * net(x, w)).sum() + (two * net(x, w)).square().sum()

    module = flat_graph(loss, *inputs)
    assert calls(module, aten.bernoulli.p) == 2
    shared(module, inputs)
    assert calls(module, aten.bernoulli.p) == 2
    assert calls(module, aten.tanh.default) == 1


def test_constants_of_two_types(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        whole = torch.full((3,), 1)
        half = torch.full((3,), 1, dtype=torch.float64)
        return (net(x, w) * (half / 2)).sum() + (whole // 2).sum() + (x * 2 + x * 2.0).sum()

    module, _ = assert_rewrites(loss, *inputs)
    assert calls(module, aten.full.default) == 2


# The pass as a whole


def test_nothing_to_share(inputs: list[Tensor]) -> None:
    module = flat_graph(lambda m, x, w, c: net(x, w).sum(), *inputs)
    before = str(module.graph)
    assert shared(module, inputs) == 0
    assert str(module.graph) == before


def test_counts_what_it_merges(inputs: list[Tensor]) -> None:
    """Two products, two tanh and two squares become one each."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        return net(x, w).square().sum() + net(m.stop(x), w).square().mean()

    module = flat_graph(loss, *inputs)
    assert shared(module, inputs) == 3
    assert shared(module, inputs) == 0


def test_active_nodes(inputs: list[Tensor]) -> None:
    """What carries a gradient of the weights: not stops, not leaves, not integers."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        h = m.stop(x @ w)
        p = m.leaf(net(x, w))
        order = (x @ w).argsort(1)
        return h.sum() + m.gradient(p.square(), p).sum() + order.sum() + m.point(w).sum()

    module = flat_graph(loss, *inputs)
    active = {str(node) for node in active_of(module, inputs)}
    assert {"arg1_1", "mm", "tanh"} <= active
    assert active.isdisjoint({"arg0_1", "arg2_1", "stop", "leaf", "gradient"})
    assert not any(name.startswith(("argsort", "sort_1")) for name in active)
    assert any(node.target is POINT for node in active_of(module, inputs))


def test_a_point_is_no_expression(inputs: list[Tensor]) -> None:
    """What a derivative is taken at is a variable; an equal expression beside it is a constant."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        h, again = net(x, w), net(x, w)
        return m.gradient(h * again, h).square().sum()

    assert tanh_calls(loss, *inputs) == 2


# Seeds that make a gradient; the later ones once found something.
SEEDS = [0, 1, 3, 8, 11, 12, 13, 16, 19, 21, 22, 24, 82, 348, 716, 1098, 1548, 1648, 1710, 1850]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_losses(seed: int) -> None:
    """Same values and gradients after `share` and `nest`, and nothing is left to merge."""
    made = random_loss(seed)
    assert made is not None
    loss, inputs = made
    assert_rewrites(loss, *inputs)


def test_graph_with_marks_is_its_own_oracle(inputs: list[Tensor]) -> None:
    """A flat graph can be nested, and so run, before and after."""
    module = flat_graph(constant_factor, *inputs)
    before, _ = nested(module), shared(module, inputs)
    assert_step(before, constant_factor, inputs)
    assert_step(nested(module), constant_factor, inputs)
