"""Shapes at the edge: tensors of no dimension, vectors read at a place, classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import jacrev, vmap

from rewriter import NestedGradientWarning, optimize_nested
from tests.cases import small_net
from tests.oracle import assert_same, check, outcome

D = torch.float64


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=D)


def place_of_a_vector(net: nn.Module, x: Tensor) -> Tensor:
    """One entry of a product that is read as a vector."""
    p = x.detach().requires_grad_()
    u = (net(p) @ torch.ones(2, 2, dtype=D)).flatten()[5]
    return grad(u * u, p, create_graph=True)[0].square().sum() + u


def dimensions_of_a_number(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p).square().sum().sum(0).mean(-1).squeeze(0).flip(0).cumsum(0).transpose(0, -1)
    return grad(u.sum(0, keepdim=True), p, create_graph=True)[0].square().sum()


def classified(net: nn.Module, x: Tensor) -> Tensor:
    """A classifier whose Jacobian is held small."""
    classes = torch.tensor([0, 1, 1, 0])
    jacobians = vmap(jacrev(lambda z: net(z[None])[0].log_softmax(-1)))(x)
    own = jacobians[torch.arange(4), classes].square().sum()
    return F.cross_entropy(net(x), classes) + own + jacobians.square().sum()


@pytest.mark.parametrize("loss", [place_of_a_vector, dimensions_of_a_number, classified])
def test_loss(loss: Callable[..., Tensor]) -> None:
    check(loss, [small_net()], points())


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
def test_data_inside_a_transform(transform: Callable[..., Callable[..., Tensor]]) -> None:
    """PyTorch stops the innermost derivative there, and no other."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return transform(lambda z: (net(z) * z.data.sum()).sum())(x).square().sum()

    x = points().requires_grad_()
    expected = outcome(loss, [small_net()], (x,), {})
    decorated = optimize_nested(loss, backend="eager")
    with pytest.warns(NestedGradientWarning, match="x.data inside of a transform"):
        assert_same(outcome(decorated, [small_net()], (x,), {}), expected)
