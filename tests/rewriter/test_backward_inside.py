"""`Tensor.backward()` and `torch.autograd.backward` inside of a loss that reads ``.grad``."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewriter import NestedGradientWarning, optimize_nested
from tests.cases import small_net as net
from tests.oracle import assert_same, check, outcome

pytestmark = pytest.mark.filterwarnings(
    "ignore:Using backward\\(\\) with create_graph=True:UserWarning"  # eager's own
)
Loss = Callable[[nn.Module, Tensor], Tensor]


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=torch.float64)


def method(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    net(p).square().sum().backward(create_graph=True, inputs=[p])
    return p.grad.square().sum()


def function(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    torch.autograd.backward(net(p).square().sum(), create_graph=True, inputs=[p])
    g, p.grad = p.grad, None
    return g.square().sum()


def one_input_not_in_a_list(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    net(p).square().sum().backward(create_graph=True, inputs=p)
    return p.grad.square().sum()


def with_a_seed(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    net(p).backward(
        torch.linspace(0, 1, 2, dtype=x.dtype).expand(4, 2), create_graph=True, inputs=p
    )
    return p.grad.square().sum()


def several_tensors(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    seeds = [None, torch.ones_like(u)]
    torch.autograd.backward([u.sin().sum(), u], seeds, create_graph=True, inputs=[p])
    return p.grad.square().sum()


def accumulated(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    net(p).square().sum().backward(create_graph=True, inputs=p)
    net(p).sin().sum().backward(create_graph=True, inputs=p)
    return (p.grad * net(x).sum()).square().sum()


def second_derivative(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    net(p).square().sum().backward(create_graph=True, inputs=p)
    g, p.grad = p.grad, None
    g[:, 0].sum().backward(create_graph=True, inputs=p)
    return p.grad.square().sum() + g.square().sum()


def two_leaves(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    q = x.detach().sin().requires_grad_()
    (net(p) * net(q)).sum().backward(create_graph=True, inputs=[p, q])
    return (p.grad * q.grad).sum() + q.grad.square().sum()


def beside_autograd_grad(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    u.square().sum().backward(create_graph=True, inputs=p)
    (g,) = torch.autograd.grad(u.sin().sum(), p, create_graph=True)
    return (g * p.grad).sum()


def without_create_graph(net: nn.Module, x: Tensor) -> Tensor:
    """A constant weight; the network's parameters keep no gradient of it."""
    p = x.detach().requires_grad_()
    net(p).square().sum().backward(inputs=[p])
    return (p.grad * net(x).sum()).sum()


CAPTURED: list[Loss] = [
    method,
    function,
    one_input_not_in_a_list,
    with_a_seed,
    several_tensors,
    accumulated,
    second_derivative,
    two_leaves,
    beside_autograd_grad,
]


@pytest.mark.parametrize("loss", CAPTURED, ids=lambda f: f.__name__)
def test_backward_in_some_inputs(loss: Loss) -> None:
    check(loss, [net()], points())


def test_constant() -> None:
    expected = outcome(without_create_graph, [net()], (points(),), {})
    decorated = optimize_nested(without_create_graph, backend="eager")
    with pytest.warns(NestedGradientWarning, match="enters the loss as a constant"):
        assert_same(outcome(decorated, [net()], (points(),), {}), expected)
    assert decorated.steps


def into_every_leaf(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    net(p).square().sum().backward(create_graph=True)
    return p.grad.square().sum()


def into_parameters(net: nn.Module, x: Tensor) -> Tensor:
    net(x).square().mean().backward(create_graph=True)
    return sum(p.grad.square().sum() for p in net.parameters())


@pytest.mark.parametrize("loss", [into_every_leaf, into_parameters], ids=lambda f: f.__name__)
def test_backward_into_parameters(loss: Loss) -> None:
    """The inner call leaves its gradient on the parameters, and the outer one adds to it."""
    expected = outcome(loss, [net()], (points(),), {})
    decorated = optimize_nested(loss, backend="eager")
    for _ in range(2):
        assert_same(outcome(decorated, [net()], (points(),), {}), expected)
    assert decorated.steps


@pytest.mark.parametrize("loss", [into_every_leaf, into_parameters], ids=lambda f: f.__name__)
def test_gradients_that_were_there_before(loss: Loss) -> None:
    """What earlier steps left on the parameters is added to, as in eager."""

    def twice(loss: Loss) -> list[Tensor]:
        module = net()
        for _ in range(2):
            loss(module, points()).backward()
            grads = [p.grad.detach() for p in module.parameters()]
            for p, g in zip(module.parameters(), grads, strict=True):
                p.grad = g
        return grads

    mine, expected = twice(optimize_nested(loss, backend="eager")), twice(loss)
    for ours, theirs in zip(mine, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)


def test_input_with_a_history() -> None:
    """Which leaves lie behind it is not known inside of the loss: as written."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        (net(p) * x.sum()).sum().backward(create_graph=True)
        return p.grad.square().sum()

    def end(loss: Loss) -> list[Tensor]:
        module, w = net(), torch.ones(3, 3, dtype=torch.float64, requires_grad=True)
        loss(module, points() @ w).backward()
        return [w.grad, *(p.grad for p in module.parameters())]

    expected = end(loss)
    with pytest.warns(NestedGradientWarning, match="has a history of its own"):
        mine = end(optimize_nested(loss, backend="eager"))
    for ours, theirs in zip(mine, expected, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-9, atol=1e-12)
