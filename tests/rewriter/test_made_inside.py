"""Parameters, modules and `Variable`s that a loss makes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Variable

from rewriter import NestedGradientWarning, optimize_nested
from tests.several_calls import check_calls

grad = torch.autograd.grad
Loss = Callable[[nn.Module, Tensor], Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def calls() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, dtype=torch.float64),) for _ in range(3)]


def slope(net: nn.Module, x: Tensor) -> Tensor:
    return grad(net(x).square().sum(), x, create_graph=True)[0].square().sum()


def a_parameter(net: nn.Module, x: Tensor) -> Tensor:
    p = nn.Parameter(torch.zeros(3, dtype=x.dtype))
    assert isinstance(p, nn.Parameter) and p.requires_grad and p.is_leaf
    return grad(net(x + p).square().sum(), p, create_graph=True)[0].square().sum()


def parameters_of_what_is_there(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    constant = nn.Parameter(u + 1, requires_grad=False)
    assert not constant.requires_grad
    return (u * constant).mean() + slope(net, nn.Parameter(x))


def a_module(net: nn.Module, x: Tensor) -> Tensor:
    """Its initialisation draws from the generator, in place under `no_grad`."""
    projection = nn.Linear(3, 3, dtype=x.dtype)
    p = x.clone().requires_grad_()
    (g,) = grad(net(projection(p)).square().sum(), projection.weight, create_graph=True)
    return g.square().sum()


def variables(net: nn.Module, x: Tensor) -> Tensor:
    """As penalties were written before 2018."""
    u = net(x)
    mixed = Variable(0.5 * x.data, requires_grad=True)
    seed, constant = Variable(torch.ones_like(x)), Variable(u)
    assert mixed.requires_grad and not constant.requires_grad
    (g,) = grad(net(mixed), mixed, grad_outputs=seed, create_graph=True)
    return (g.norm(2, dim=1) - 1).square().mean() + (u * constant).mean()


@pytest.mark.parametrize("loss", [a_parameter, parameters_of_what_is_there, a_module, variables])
def test_the_loss_is_captured_whole(loss: Loss) -> None:
    check_calls(loss, [net()], calls(), strict=True)


def test_a_parameter_that_is_kept_is_one() -> None:
    """A graph returns tensors, so the loss runs as written."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        net.shift = nn.Parameter(torch.zeros(3, dtype=x.dtype))
        return grad(net(x + net.shift).sum(), net.shift, create_graph=True)[0].square().sum()

    own, (x,) = net(), calls()[0]
    with pytest.warns(NestedGradientWarning, match="made in the loss is kept"):
        optimize_nested(loss, backend="eager")(own, x)
    assert isinstance(own.shift, nn.Parameter)
