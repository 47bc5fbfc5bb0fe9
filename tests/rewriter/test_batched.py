"""Batches of cotangents: `is_grads_batched` and the vectorized forms of `autograd.functional`,
around losses and modules."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional, grad

from rewriter import optimize_nested
from tests.oracle import assert_same, outcome

D = torch.float64


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def points() -> Tensor:
    torch.manual_seed(2)
    return torch.randn(5, 3, dtype=D, requires_grad=True)


def all_rows(y: Tensor, x: Tensor, create_graph: bool) -> Tensor:
    """Return dy/dx, shape (outputs, batch, inputs), with one cotangent for each output."""
    basis = torch.eye(y.shape[-1], dtype=D).expand(*y.shape, -1).movedim(-1, 0)
    return grad(y, x, basis, create_graph=create_graph, is_grads_batched=True)[0]


def trace(net: nn.Module, x: Tensor) -> Tensor:
    """The divergence of a free-form flow."""
    return torch.einsum("i...i", all_rows(net(x), x, True)).square().sum()


def rows_of_rows(net: nn.Module, x: Tensor) -> Tensor:
    """Third order, through a batch of the gradient of a batch."""
    first = all_rows(net(x).tanh(), x, True)
    second = all_rows(first.square().sum(0), x, True)
    return second.sin().sum() + first.sum()


def value_too(net: nn.Module, x: Tensor) -> Tensor:
    y = net(x)
    return (y.sum(-1) - torch.einsum("i...i", all_rows(y, x, True))).square().sum()


def of_a_gradient(net: nn.Module, x: Tensor) -> Tensor:
    """Where residuals get a batch of cotangents too."""
    (g,) = grad(net(x).square().sum(), x, create_graph=True)
    return all_rows(g, x, True).square().sum()


def vectorized(net: nn.Module, x: Tensor) -> Tensor:
    """Batches inside of batches."""
    f = lambda y: net(y).square().sum()  # noqa: E731
    value = functional.hessian(f, x[0], create_graph=True, vectorize=True).square().sum()
    return value + functional.jacobian(net, x[:2], create_graph=True, vectorize=True).sin().sum()


@pytest.mark.parametrize("loss", [trace, rows_of_rows, value_too, of_a_gradient, vectorized])
def test_around_a_module(loss: Callable[..., Tensor]) -> None:
    net, x = network(), points()
    fast = optimize_nested(network(), backend="eager")
    fast.load_state_dict(net.state_dict())
    assert_same(outcome(loss, [fast], (x,), {}), outcome(loss, [net], (x,), {}))
    loss(fast, x)
    assert fast.forward.steps, "nothing was captured"


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.inductor)])
def test_rows(backend: str, create_graph: bool) -> None:
    """Compiled code cannot read a batch that only the dispatcher sees."""
    net, x = network(), points()
    expected = all_rows(net(x).sin(), x, False)

    @optimize_nested(backend=backend)
    def of_loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).sin()

    fast = optimize_nested(network(), backend=backend)
    fast.load_state_dict(net.state_dict())
    for y in (of_loss(net, x), fast(x).sin()):
        torch.testing.assert_close(all_rows(y, x, create_graph), expected, rtol=1e-9, atol=1e-12)


def test_multiples_of_a_loss() -> None:
    net, x = network(), points()
    factors = torch.arange(3, dtype=D)

    @optimize_nested(backend="eager")
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        (g,) = grad(net(x).sum(), x, create_graph=True)
        return g.square().sum()

    mine, reference = (
        grad(f(net, x), x, factors, is_grads_batched=True)[0] for f in (loss, loss.as_written)
    )
    torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)
