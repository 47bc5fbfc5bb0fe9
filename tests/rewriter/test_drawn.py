"""Draws from NumPy's generator are inputs of the graph: its numbers, and where it ends."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import optimize_nested

Loss = Callable[[nn.Module, Tensor], Tensor]


def gradient(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return grad(net(x).sum(), x, create_graph=True)[0]


def interpolated(net: nn.Module, x: Tensor) -> Tensor:
    """The penalty of a critic, as it is written."""
    share = torch.Tensor(numpy.random.random((x.size(0), 1))).to(x)
    return ((gradient(net, share * x + (1 - share) * x.flip(0)).norm(2, 1) - 1) ** 2).mean()


def at_times(net: nn.Module, x: Tensor) -> Tensor:
    """Computed with by NumPy before it is a tensor, between draws of Python's generator."""
    drawn = numpy.random.randn(x.shape[0], 2).astype(numpy.float64)
    drawn = 1 / (1 + numpy.exp(-drawn))
    t = torch.from_numpy(numpy.maximum(drawn[:, 0], drawn[:, 1]))[:, None]
    return gradient(net, x * t * random.random() * numpy.random.rand()).square().mean()


def chosen(net: nn.Module, x: Tensor) -> Tensor:
    rows = numpy.random.choice(x.shape[0], 3, replace=False)
    return gradient(net, x[rows]).square().mean()


def permuted(net: nn.Module, x: Tensor) -> Tensor:
    order = torch.from_numpy(numpy.random.permutation(len(x)))
    kept = torch.from_numpy(numpy.random.randint(0, 2, size=3))
    return (gradient(net, x[order] + numpy.random.uniform(-1, 1)).square() * kept).mean()


def branched(net: nn.Module, x: Tensor) -> Tensor:
    """Which way is taken depends on a draw, and another one follows on one of them."""
    g, w = gradient(net, x), torch.from_numpy(numpy.random.randn(3))
    if (g * w).sum() < 0:
        return g.square().mean()
    return g.square().mean() * numpy.random.rand()


@pytest.mark.parametrize("loss", [interpolated, at_times, chosen, permuted, branched])
def test_draws_of_numpy(loss: Loss) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    own = copy.deepcopy(net)
    decorated = optimize_nested(loss, backend="eager")
    for number in range(5):
        x = torch.randn(6 if number < 3 else 7, 3, dtype=torch.float64)
        left = []
        for form, module in ((loss, net), (decorated, own)):
            numpy.random.seed(number)
            random.seed(number)
            value = form(module, x)
            gradients = grad(value, list(module.parameters()), allow_unused=True)
            left.append((value, *gradients, numpy.random.rand(), random.random()))
        for right, mine in zip(*left, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)
    assert decorated.refusals == []


def test_a_refused_capture_draws_once() -> None:
    """Where a draw stands before what cannot be captured, it is drawn for the loss as written."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        share = torch.from_numpy(numpy.random.rand(len(x), 1))
        with open(__file__):
            return gradient(net, x * share).square().mean()

    net, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=torch.float64)
    decorated = optimize_nested(loss, backend="eager", capture="dynamo")
    numpy.random.seed(1)
    expected, ends = loss(net, x), numpy.random.rand()
    numpy.random.seed(1)
    with pytest.warns(UserWarning, match="runs as written"):
        found = decorated(net, x)
    assert (found.item(), numpy.random.rand()) == (expected.item(), ends)


@pytest.mark.parametrize(
    "made",
    [
        lambda a: torch.Tensor(a),
        lambda a: torch.DoubleTensor(a) * 2,
        lambda a: torch.FloatTensor(a),
        lambda a: torch.tensor(a),
        lambda a: torch.tensor(a, dtype=torch.float32),
        lambda a: torch.from_numpy(a).T.contiguous().T,
    ],
)
def test_tensors_of_arrays(made: Callable[[numpy.ndarray], Tensor]) -> None:
    """They have the constructor's type, for arrays that are arguments; nobody is warned."""

    def loss(net: nn.Module, x: Tensor, array: numpy.ndarray) -> Tensor:
        scale = made(array)
        return (gradient(net, x * scale.to(x)).square() * scale).mean()

    torch.manual_seed(0)
    net, x = nn.Linear(3, 1).double(), torch.randn(4, 3, dtype=torch.float64)
    net = nn.Sequential(net, nn.Tanh())
    decorated = optimize_nested(loss, backend="eager", capture="dynamo")
    for seed in (1, 2):
        array = numpy.random.default_rng(seed).random((4, 1))
        found, expected = decorated(net, x, array), loss(net, x, array)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert len(decorated.steps) == 1
