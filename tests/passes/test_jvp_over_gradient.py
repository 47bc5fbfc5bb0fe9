"""The pullback of a gradient as one forward-mode pass: values, cost, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from passes import derivative
from passes.bodies import Linearizations
from passes.graph import copy_graph, results
from passes.joint import Roles, trace_joint, trace_value
from passes.nest import all_sites, sites
from passes.price import price
from passes.strategies import (
    CONTRACTION,
    NAMES,
    STRATEGIES,
    TAYLOR,
    JvpOverGradient,
    Refused,
    Reverse,
    put_in_form,
)
from passes.verify import verify
from tests.passes.flat import (
    Eager,
    Loss,
    Marks,
    active_of,
    assert_step,
    calls,
    flat_graph,
    nested,
    net,
    random_points,
    step,
)
from tests.passes.random_losses import random_loss

aten = torch.ops.aten


def nothing_inside(body: GraphModule, active: set[Node]) -> dict[str, str]:
    """Leave the derivatives of a body as they are."""
    return {}


def in_form(module: GraphModule, inputs: list[Tensor]) -> tuple[GraphModule, dict[str, str]]:
    """A copy with every site in the JVP-over-gradient form."""
    form = copy_graph(module)
    active = active_of(form, inputs)
    found = all_sites(form, sites(form))
    wish = {site.name: "jvp_over_gradient" for site in found}
    taken = put_in_form(form, active, wish, {}, Linearizations())
    form.recompile()
    verify(form)
    return form, taken


def assert_form(loss: Loss, inputs: list[Tensor]) -> GraphModule:
    """Compare the form, run under autograd, with the loss as written; return it."""
    form, _ = in_form(nested(flat_graph(loss, *inputs)), inputs)
    assert_step(form, loss, inputs)
    return form


def joint_of(form: GraphModule, loss: Loss, inputs: list[Tensor]) -> GraphModule:
    """Trace loss and gradients, and compare them with the loss as written."""
    outputs = loss(Eager(), *inputs)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    active = active_of(form, inputs)
    moving = tuple(i for i, node in enumerate(results(form.graph)) if node in active)
    wanted = tuple(i for i, x in enumerate(inputs) if x.requires_grad)
    roles = Roles(wanted, frozenset(), len(outputs), moving, ())
    joint = trace_joint(form, roles, seeded=True)
    cotangents = [outputs[i].detach().cos() for i in moving]
    found = joint(*(x.detach() for x in inputs), *cotangents)
    expected = step(lambda *values: loss(Eager(), *values), inputs)
    for mine, reference in zip(found, expected, strict=True):
        mine = torch.zeros_like(reference) if mine is None else mine
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)
    return joint


def penalty(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    p = m.leaf(x)
    return m.gradient(net(p, w).square(), p).square().sum()


def with_values(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    """Gradient, output and a hidden value, all of which have a cotangent."""
    p = m.leaf(x)
    h = p @ w
    u = h.tanh()
    return (m.gradient(u, p) * u + h.sin()).square().sum()


def at_an_active_point(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    """Point, captured value and seed all depend on the weight."""
    p = m.point(net(x, w))
    (g,) = m.pull([net(p, w) * (c @ w)], [p], [(x @ w).cos()])
    return g.sin().sum()


def several_points(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    p, q = m.leaf(x), m.leaf(c)
    u = net(p * q, w)
    g, h = m.gradient(u, p, q)
    return (g * h).square().sum() + u.sum()


def second_order(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    p = m.leaf(x)
    g = m.gradient(net(p, w).square(), p)
    return (m.gradient(g[:, 0], p) * g).square().sum()


LOSSES = [penalty, with_values, at_an_active_point, several_points, second_order]


@pytest.mark.parametrize("loss", LOSSES)
def test_form_is_the_loss_as_written(loss: Loss, inputs: list[Tensor]) -> None:
    form = assert_form(loss, inputs)
    assert all(node.target is derivative.jvp_over_gradient for node in sites(form))
    joint_of(form, loss, inputs)


@pytest.mark.parametrize("loss", LOSSES)
def test_reverse_changes_nothing(loss: Loss, inputs: list[Tensor]) -> None:
    module = nested(flat_graph(loss, *inputs))
    before = str(module.graph)
    for node in sites(module):
        taken = Reverse().build(
            module, node, active_of(module, inputs), nothing_inside, Linearizations()
        )
        assert set(taken.values()) == {"reverse"}
    assert str(module.graph) == before
    joint_of(module, loss, inputs)


@pytest.mark.parametrize("loss", LOSSES)
def test_value_alone(loss: Loss, inputs: list[Tensor]) -> None:
    """Without gradients of the loss, any form traces to the same products."""
    module = nested(flat_graph(loss, *inputs))
    form, _ = in_form(module, inputs)
    values = [trace_value(graph) for graph in (module, form)]
    for graph in values:
        (value,) = graph(*(x.detach() for x in inputs))
        expected = loss(Eager(), *inputs)
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    assert calls(values[0], aten.mm.default) == calls(values[1], aten.mm.default)


def test_cost_of_a_penalty() -> None:
    """Gradient penalty of an MLP with L layers, in products of one layer each.

    The gradient costs 2(L - 1): ones times the last weight are a sum. Its JVP costs 2(L - 1), less
    the one that would move the gradient in the points, which are data. The gradients of L - 1
    weights are two products each, of what comes back and of its tangent; that of the last is a sum.
    """
    layers = 4

    def loss(m: Marks, x: Tensor, *weights: Tensor) -> Any:
        p = m.leaf(x)
        h = p
        for w in weights[:-1]:
            h = torch.tanh(h @ w)
        return m.gradient(h @ weights[-1], p).square().sum()

    inputs = [random_points(5, 4), *(random_points(4, 4, grad=True) for _ in range(layers))]
    form, _ = in_form(nested(flat_graph(loss, *inputs)), inputs)
    joint = joint_of(form, loss, inputs)
    one = 2 * 5 * 4 * 4
    expected = 2 * (layers - 1) + 2 * (layers - 1) - 1 + (layers - 1) + (layers - 1)
    assert price(joint).flops == expected * one


def test_record_of_what_was_taken(inputs: list[Tensor]) -> None:
    module = nested(flat_graph(second_order, *inputs))
    _, taken = in_form(module, inputs)
    assert {site.name for site in all_sites(module, sites(module))} == set(taken)
    assert set(taken.values()) == {"jvp_over_gradient"}
    assert [*(s.name for s in STRATEGIES), CONTRACTION, TAYLOR] == list(NAMES)


# Results that are one tensor


def difference(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    p, q = m.leaf(x), m.leaf(c)
    g, h = m.gradient(net(p + q, w).square(), p, q)
    return g, h


def test_first_of_two_equal_gradients(inputs: list[Tensor]) -> None:
    """``u(x + t)`` has the same gradient in both, and only one of them is used."""
    assert_form(lambda m, *v: difference(m, *v)[0].pow(3).sum(), inputs)


def test_second_of_two_equal_gradients(inputs: list[Tensor]) -> None:
    assert_form(lambda m, *v: difference(m, *v)[1].pow(3).sum(), inputs)


def test_two_equal_gradients(inputs: list[Tensor]) -> None:
    def loss(m: Marks, *values: Tensor) -> Any:
        g, h = difference(m, *values)
        return (g * h.sin()).sum()

    assert_form(loss, inputs)


def test_gradient_that_is_the_seed(inputs: list[Tensor]) -> None:
    """Derivative of the identity: result, seed, point and value may all be one tensor."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.point(net(x, w))
        (g,) = m.pull([p], [p], [p])
        return (g * p.sin() + g.square()).sum()

    assert_form(loss, inputs)


def test_seed_that_is_the_point(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.point(w)
        (g,) = m.pull([p.sin()], [p], [p])
        return (g * p).sum()

    assert_form(loss, inputs)


# Refusals


def refusal(loss: Loss, *inputs: Tensor) -> str:
    """Why the form is refused; the graph must be as before."""
    module = nested(flat_graph(loss, *inputs))
    before = str(module.graph)
    (node,) = sites(module)
    with pytest.raises(Refused) as caught:
        JvpOverGradient().build(
            module, node, active_of(module, list(inputs)), nothing_inside, Linearizations()
        )
    assert str(module.graph) == before
    return str(caught.value)


def test_batch_of_seeds_is_refused(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor) -> Any:
        p = m.leaf(x[0])
        (rows,) = m.pull([net(p, w)], [p], [torch.eye(3, dtype=x.dtype)], 1)
        return rows.square().sum()

    assert "several seeds" in refusal(loss, *inputs[:2])


def test_complex_tensors_are_refused() -> None:
    def loss(m: Marks, x: Tensor, z: Tensor) -> Any:
        p = m.leaf(x)
        return m.gradient((p * z).abs(), p).square().sum()

    z = torch.tensor([1 + 2j, 3 - 1j], requires_grad=True)
    assert "complex" in refusal(loss, torch.tensor([1.0, 2.0]), z)


@torch.library.custom_op("optimize_nested_tests::cubed", mutates_args=())
def cubed(x: Tensor) -> Tensor:
    """An operator of a user's: reverse mode, no forward mode."""
    return x**3


cubed.register_fake(torch.empty_like)
cubed.register_autograd(
    lambda ctx, grad: 3 * ctx.saved_tensors[0] ** 2 * grad,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def test_operator_without_forward_mode_is_refused(inputs: list[Tensor]) -> None:
    """Its tangent is unknown, not zero."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return m.gradient(cubed(p @ w).tanh(), p).square().sum()

    assert "cubed" in refusal(loss, *inputs)


# Random losses


@pytest.mark.parametrize("seed", [57, 60, 63, 64, 69, 70, 71, 72, 77, 81, 82, 83, 280])
def test_random_losses(seed: int) -> None:
    """The form under autograd, and traced with its gradients."""
    made = random_loss(seed)
    assert made is not None
    loss, inputs = made
    joint_of(assert_form(loss, inputs), loss, inputs)
