"""From marks to derivative nodes: which nodes go inside, which values leave, what is copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.testing import FileCheck

from passes import derivative
from passes.graph import placeholders, print_graph, results, where
from passes.linearize import flatten_output
from passes.markers import GRADIENT, LEAF, POINT, STOP, gradient_mark, leaf_mark
from passes.nest import NotNested, active_nodes, all_sites, body_of, nest, sites
from passes.tracing import trace_before_autograd
from rewriter import optimize_nested
from tests.oracle import outcome
from tests.passes.flat import (
    Loss,
    Marks,
    assert_rewrites,
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


def rewritten(loss: Loss, inputs: list[Tensor]) -> GraphModule:
    """Nest without sharing first, checked against the loss as written."""
    module = nested(flat_graph(loss, *inputs))
    assert_step(module, loss, inputs)
    return module


def penalty(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
    p = m.leaf(x)
    return m.gradient(net(p, w).square(), p).square().sum()


# One derivative


def test_one_derivative(inputs: list[Tensor]) -> None:
    """The body is what lies between point and output; the weight is captured."""
    module = rewritten(penalty, inputs)
    FileCheck().check("leaf: f64[5, 3] = stop(arg0_1)").check(
        "gradient(body_gradient, 1, 1, 0, leaf, arg1_1, full)"
    ).check_not("tanh").check("return").run(print_graph(module))
    (node,) = sites(module)
    FileCheck().check("leaf: f64[5, 3]").check_next("arg1_1: f64[3, 3]").check_next(
        "mm: f64[5, 3] = mm(leaf, arg1_1)"
    ).check_next("tanh: f64[5, 3] = tanh(mm)").check_next(
        "pow_1: f64[5, 3] = pow.Tensor_Scalar(tanh, 2)"
    ).check_next("return (pow_1,)").run(print_graph(body_of(module, node)))


def test_record_of_a_site(inputs: list[Tensor]) -> None:
    (node,) = sites(nested(flat_graph(penalty, *inputs)))
    site = node.meta["site"]
    assert (site.name, site.operator, site.order) == ("gradient", "gradient", 1)
    assert site.where == "loss.py:7: marks.gradient(u, x)"


def test_no_mark_is_left(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.point(m.leaf(x))
        u = net(m.stop(p), w) * net(p, w)
        return m.gradient(u, p).sum() + m.stop(c).sum()

    module = rewritten(loss, inputs)
    bodies = [body_of(module, node) for node in sites(module)]
    for graph in (module, *bodies):
        for mark in (GRADIENT, POINT, LEAF, STOP):
            assert calls(graph, mark) == 0
    assert calls(bodies[0], derivative.stop) == 1


def test_returns_how_many(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(x), m.leaf(c)
        return (m.gradient(net(p, w), p) * m.gradient(net(q, w), q)).sum()

    module = flat_graph(loss, *inputs)
    assert nest(module) == 2
    assert [site.name for site in all_sites(module, sites(module))] == ["gradient", "gradient_1"]
    assert nest(module) == 0


def test_constant_stays_outside(inputs: list[Tensor]) -> None:
    """What does not depend on the point is computed once, and captured."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return m.gradient(net(p, w) * (c @ w).cos(), p).square().sum()

    module = rewritten(loss, inputs)
    (node,) = sites(module)
    assert calls(module, aten.cos.default) == 1
    assert calls(body_of(module, node), aten.cos.default) == 0
    assert len(placeholders(body_of(module, node).graph)) == 3


def test_constant_of_the_graph_goes_inside(inputs: list[Tensor]) -> None:
    """A tensor that the graph holds is an attribute of the body, no input."""
    table = random_points(5, 3)

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return m.gradient(net(p, w) * table, p).square().sum()

    module = rewritten(loss, inputs)
    (node,) = sites(module)
    body = body_of(module, node)
    assert len(placeholders(body.graph)) == 2
    assert len(body.graph.find_nodes(op="get_attr")) == 1


# Values that leave


def test_value_and_gradient_are_one_site(inputs: list[Tensor]) -> None:
    """The output that is used outside is a result of the same node."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        u = net(p, w)
        return (m.gradient(u, p) * u).sum()

    module = rewritten(loss, inputs)
    (node,) = sites(module)
    assert calls(module, aten.tanh.default) == 0
    assert len(node.meta["val"]) == 2
    assert sorted(user.args[1] for user in node.users) == [0, 1]


def test_hidden_value_escapes(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        h = p @ w
        return (m.gradient(h.tanh().sin(), p) * h).sum() + h.tanh().square().sum()

    _, after = assert_rewrites(loss, *inputs)
    (node,) = sites(after)
    assert calls(after, aten.mm.default) == 0
    assert len(results(body_of(after, node).graph)) == 3


def test_operator_with_several_results_stays_whole(inputs: list[Tensor]) -> None:
    """The other results of an operator inside leave one by one."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        values, order = net(p, w).sort(1)
        parts = (p @ w).split(2, 1)
        g = m.gradient(values * c + parts[0].sum(), p)
        return g.square().sum() + values.sum() + (order * c).sum() + parts[1].sin().sum()

    module = rewritten(loss, inputs)
    (node,) = sites(module)
    assert calls(module, aten.sort.default) == 0
    assert calls(body_of(module, node), aten.sort.default) == 1


def test_point_is_used_outside(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return (m.gradient(net(p, w), p) * p).sum() + p.sin().sum()

    rewritten(loss, inputs)


def test_output_is_the_point(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.point(x @ w)
        (g,) = m.pull([p, p.sin()], [p], [c, c])
        return g.square().sum()

    rewritten(loss, inputs)


# Copies


def test_seed_made_of_the_body(inputs: list[Tensor]) -> None:
    """A seed that is computed from the body needs the body outside as well."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        u = net(p, w)
        (g,) = m.pull([u], [p], [u.square()])
        return g.square().sum()

    module = rewritten(loss, inputs)
    (node,) = sites(module)
    assert calls(module, aten.tanh.default) == 1
    assert calls(body_of(module, node), aten.tanh.default) == 1


def test_two_outputs_of_one_body(inputs: list[Tensor]) -> None:
    """Navier–Stokes: one network, a gradient of each component, and products of both."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        out = net(p, w)
        u, v = out[:, 0], out[:, 1]
        du, dv = m.gradient(u, p), m.gradient(v, p)
        return (u * du[:, 0] + v * du[:, 1] - dv[:, 0]).square().sum()

    _, after = assert_rewrites(loss, *inputs)
    first, second = sites(after)
    assert calls(body_of(after, first), aten.tanh.default) == 1
    assert calls(body_of(after, second), aten.tanh.default) == 1
    assert calls(after, aten.tanh.default) == 0


def test_derivative_at_a_hidden_value(inputs: list[Tensor]) -> None:
    """One derivative at the point, one at a value inside its body."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        h = net(p, w)
        u = net(h, w).square()
        return (m.gradient(u, p) * m.gradient(u, h).sin()).sum()

    module = rewritten(loss, inputs)
    assert len(sites(module)) == 2


def test_points_that_depend_on_another(inputs: list[Tensor]) -> None:
    """In one call each gradient is a total derivative: ``∂u/∂p`` goes on through ``h``."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        h = net(p, w)
        g, k = m.gradient(net(h, w) * p, p, h)
        return (g * k.sin()).sum()

    module = rewritten(loss, inputs)
    assert [len(results(body_of(module, n).graph)) for n in sites(module)] == [1, 1]
    assert all(node.args[1] == 1 for node in sites(module))


def test_points_that_depend_on_another_in_a_chain(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.point(x)
        q = m.point(net(p, w))
        r = m.point(net(q, w))
        g, h, k = m.gradient(net(r, w) * q * p, q, p, r)
        return (g * h * k).sum()

    rewritten(loss, inputs)


# Orders


def test_nested_orders(inputs: list[Tensor]) -> None:
    """A gradient of a gradient of a gradient: each body holds the next."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        u = net(p, w).square()
        for _ in range(3):
            u = m.gradient(u, p).square()
        return u.sum()

    module = rewritten(loss, inputs)
    (node,) = sites(module)
    found = all_sites(module, [node])
    assert [(site.name, site.order) for site in found] == [
        ("gradient", 1),
        ("gradient_1", 2),
        ("gradient_2", 3),
    ]
    (inner,) = sites(body_of(module, node))
    assert inner.target is derivative.gradient


def test_laplacian(inputs: list[Tensor]) -> None:
    """Second derivatives one by one: the first gradient has several masters."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        g = m.gradient(net(p, w).square(), p)
        rows = [m.gradient(g[:, i], p)[:, i] for i in range(3)]
        return (torch.stack(rows).sum(0) + g[:, 0]).square().sum()

    _, after = assert_rewrites(loss, *inputs)
    orders = {site.order for site in all_sites(after, sites(after))}
    assert orders == {1, 2}


def test_inner_gradient_at_another_point(inputs: list[Tensor]) -> None:
    """A meta-step: the outer point is what the inner gradient captures."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(c), m.leaf(x)
        inner = m.gradient(net(p * q, w), p)
        return m.gradient((p - 0.1 * inner).square(), q).square().sum()

    module = rewritten(loss, inputs)
    assert len(sites(module)) == 1


def test_gradient_as_seed(inputs: list[Tensor]) -> None:
    """A vector-Jacobian product with a gradient."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(x), m.leaf(c)
        g = m.gradient(net(p, w), p)
        (v,) = m.pull([net(q, w)], [q], [g])
        return v.square().sum()

    rewritten(loss, inputs)


def test_gradient_as_seed_at_the_same_point(inputs: list[Tensor]) -> None:
    """A Hessian-vector product along the gradient, the gradient constant."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        g = m.gradient(net(p, w).square(), p)
        (v,) = m.pull([g], [p], [g])
        return v.square().sum()

    rewritten(loss, inputs)


def test_derivative_at_a_hidden_value_of_the_gradient_it_contains(inputs: list[Tensor]) -> None:
    """``h`` lies inside the body of the first gradient, and the second differentiates that gradient
    at ``h``: either it is right or it is refused.
    """

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        h = net(p, w)
        g = m.gradient((h @ w).square(), p)
        return m.gradient(g.square() * h, h).square().sum()

    module = flat_graph(loss, *inputs)
    try:
        result = nested(module)
    except NotNested:
        return
    assert_step(result, loss, inputs)


def test_same_point_twice(inputs: list[Tensor]) -> None:
    """``autograd.grad(u, (x, x))`` returns the gradient twice."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        g, h = m.gradient(net(p, w), p, p)
        return (g * h.sin()).sum()

    rewritten(loss, inputs)


# Batches of seeds


def test_rows_of_a_jacobian(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x[0])
        rows = torch.eye(3, dtype=x.dtype)
        (jacobian,) = m.pull([net(p, w)], [p], [rows], 1)
        return jacobian.square().sum() + jacobian.sum(0).sin().sum()

    module = rewritten(loss, inputs)
    (node,) = sites(module)
    assert node.meta["site"].operator == "jacobian"
    assert node.meta["val"][0].shape == (3, 3)


# Zeros


def test_gradient_of_something_else_is_zero(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        return (m.gradient(net(c, w), p) + w.sum()).square().sum()

    module = flat_graph(loss, *inputs)
    assert nest(module) == 1
    assert not sites(module)
    expected = 15 * inputs[1].detach().sum().square()
    torch.testing.assert_close(step(module, inputs)[0], expected)


def test_output_that_does_not_depend_on_the_point(inputs: list[Tensor]) -> None:
    """Of several outputs only those that move count; their seeds go with them."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        (g,) = m.pull([net(c, w), net(p, w)], [p], [c.exp(), c])
        return g.square().sum()

    module = rewritten(loss, inputs)
    (node,) = sites(module)
    assert node.args[2] == 1


def test_one_point_of_two_is_not_reached(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(x), m.leaf(c)
        g, h = m.gradient(net(p, w), p, q)
        return (g + h).square().sum()

    rewritten(loss, inputs)


def symbolic(function: Any, *inputs: Tensor) -> GraphModule:
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=False)
    with torch.no_grad():
        module = trace_before_autograd(function, [mode.from_tensor(x) for x in inputs], mode)
    flatten_output(module.graph)
    return module


def test_zero_of_symbolic_size() -> None:
    """A derivative of what does not depend on the point is zero, in the size of each call."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        p = leaf_mark(x)
        u = y.sin()
        return gradient_mark([u], [p], [torch.ones_like(u)], 0)[0] + x.cos()

    module = symbolic(function, random_points(5), random_points(4))
    nest(module)
    x = random_points(7)
    torch.testing.assert_close(module(x, random_points(4))[0], x.cos())


def test_symbolic_sizes() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        p = leaf_mark(x)
        u = net(p, w)
        (g,) = gradient_mark([u], [p], [torch.ones_like(u)], 0)
        return (g * u).sum(1)

    w = random_points(3, 3)
    module = symbolic(function, random_points(5, 3), w)
    nest(module)
    x = random_points(7, 3)
    p = x.detach().requires_grad_()
    u = net(p, w)
    (g,) = torch.autograd.grad(u.sum(), p)
    torch.testing.assert_close(module(x, w)[0], (g * u).sum(1))


# Random draws


def test_draw_that_depends_on_the_point_is_in_the_body(inputs: list[Tensor]) -> None:
    """It is drawn once, with the draws that the body reads after it; the order is that written."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        first = torch.rand(5, 3, dtype=x.dtype)
        u = net(p, w) * first
        one = torch.bernoulli(u.sigmoid())
        two = torch.rand(5, 3, dtype=x.dtype)
        g = m.gradient(u * one * two, p)
        return (g * torch.rand(5, 3, dtype=x.dtype)).sum() + two.sum()

    module = nested(flat_graph(loss, *inputs))
    (node,) = sites(module)
    body = body_of(module, node)
    assert calls(body, aten.bernoulli.default) == 1 and calls(body, aten.rand.default) == 1
    assert calls(module, aten.rand.default) == 2

    def eager(x: Tensor, w: Tensor, c: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        u = net(p, w) * torch.rand(5, 3, dtype=x.dtype)
        v = u * torch.bernoulli(u.sigmoid()) * (two := torch.rand(5, 3, dtype=x.dtype))
        (g,) = torch.autograd.grad(v.sum(), p)
        return (g * torch.rand(5, 3, dtype=x.dtype)).sum() + two.sum()

    torch.manual_seed(5)
    expected = eager(*inputs)
    torch.manual_seed(5)
    torch.testing.assert_close(module(*inputs)[0], expected.detach())


def test_draw_that_two_derivatives_need_is_refused(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p, q = m.leaf(x), m.leaf(c)
        u = net(p, w) * net(q, w)
        v = u * torch.bernoulli(u.sigmoid())
        return m.gradient(v, p).sum() + m.gradient(v.sin(), q).sum()

    with pytest.raises(NotNested, match=r"a random draw .*bernoulli.* depends on the point"):
        nest(flat_graph(loss, *inputs))


def test_draws_stay_outside_and_in_order(inputs: list[Tensor]) -> None:
    """Masks do not depend on the point; they are captured, and drawn in the order written."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        one = torch.bernoulli(torch.full((5, 3), 0.5, dtype=x.dtype))
        g = m.gradient(net(p, w) * one, p)
        two = torch.bernoulli(torch.full((5, 3), 0.3, dtype=x.dtype))
        return (g * two).sum() + (one - two).sum()

    module = nested(flat_graph(loss, *inputs))
    assert calls(module, aten.bernoulli.default) == 2

    def seeded(run: Any) -> Any:
        def with_seed(*values: Tensor) -> Any:
            torch.manual_seed(1)
            return run(*values)

        return with_seed

    assert_step(seeded(module), lambda m, *v: seeded(lambda *u: loss(m, *u))(*v), inputs)


# What carries a gradient


def test_active_nodes_after_nesting(inputs: list[Tensor]) -> None:
    """A value that leaves a node carries a gradient only if it does inside the body."""

    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        p = m.leaf(x)
        still = p.sin()
        u = net(still, w)
        return (m.gradient(u, p) * u).sum(), still.cos()

    module = nested(flat_graph(loss, *inputs))
    (node,) = sites(module)
    weight = placeholders(module.graph)[1]
    active = active_nodes(module, {weight})
    items = {user.args[1]: user in active for user in node.users}
    assert items == {0: True, 1: True, 2: False}
    total, cosine = results(module.graph)
    assert total in active and cosine not in active


def test_stop_ends_activity(inputs: list[Tensor]) -> None:
    def loss(m: Marks, x: Tensor, w: Tensor, c: Tensor) -> Any:
        return m.stop(net(x, w)).sum(), net(x, w).sum(), net(x, w).argmax(1)

    module = nested(flat_graph(loss, *inputs))
    active = active_nodes(module, {placeholders(module.graph)[1]})
    assert [result in active for result in results(module.graph)] == [False, True, False]


# Where


def test_where_without_a_stack_trace() -> None:
    graph = torch.fx.Graph()
    node = graph.call_function(torch.sin, (graph.placeholder("x"),))
    assert where(node) == "?"


def test_where_names_the_innermost_frame_outside_of_torch() -> None:
    graph = torch.fx.Graph()
    node: Node = graph.call_function(torch.sin, (graph.placeholder("x"),))
    node.meta["stack_trace"] = "\n".join(
        [
            'File "train.py", line 30, in main',
            "    loss(net, x)",
            'File "loss.py", line 7, in loss',
            "    grad(u, x)",
            f'File "{torch.__file__}", line 1, in grad',
            "    return engine(u, x)",
        ]
    )
    assert where(node) == "loss.py:7: grad(u, x)"


# Everything together


@pytest.mark.parametrize("seed", [27, 28, 29, 30, 33, 37, 39, 41, 46, 47, 48, 49, 55, 56])
def test_random_losses(seed: int) -> None:
    made = random_loss(seed)
    assert made is not None
    loss, inputs = made
    rewritten(loss, inputs)


def written(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
    (h,) = torch.autograd.grad(g[:, 0].sum(), p, create_graph=True)
    return (h[:, :1] + u * g).square().mean() + net(x).square().mean()


def test_every_stage_of_the_pipeline_runs() -> None:
    """Value and gradients of each stage as of the loss as written; marks are nested to run."""
    torch.manual_seed(9)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
    net = net.double()
    x = random_points(5, 2)
    expected = outcome(written, [net], (x,), {})
    loss = optimize_nested(written, backend="eager")
    loss(net, x)
    stages = {stage.name: stage.module for stage in loss.steps[0].rewritten.stages}
    assert list(stages) == ["flatten", "share", "nest", "choose", "joint"]
    by_shape = {tuple(p.shape): p for p in net.parameters()} | {tuple(x.shape): x}
    reference = {tuple(p.shape): expected.grads[f"0.{n}"] for n, p in net.named_parameters()}
    for name, module in stages.items():
        if name in ("flatten", "share"):
            module = nested(module)
        shapes = [tuple(node.meta["val"].shape) for node in placeholders(module.graph)]
        own = [by_shape[shape].detach().clone() for shape in shapes]
        wanted = [i for i, shape in enumerate(shapes) if shape in reference]
        if name == "joint":
            value, *grads = module(*own)
            reached = loss.steps[0].rewritten.roles.wanted
            grads = dict(zip(reached, grads, strict=True))
        else:
            for i in wanted:
                own[i].requires_grad_()
            (value,) = module(*own)
            found = torch.autograd.grad(value, [own[i] for i in wanted], allow_unused=True)
            grads = dict(zip(wanted, found, strict=True))
        torch.testing.assert_close(value.detach(), expected.value, rtol=1e-10, atol=1e-12)
        for i in wanted:
            target = reference[shapes[i]]
            if target is None:
                assert grads[i] is None or not grads[i].any()
            else:
                torch.testing.assert_close(grads[i], target, rtol=1e-9, atol=1e-12)
