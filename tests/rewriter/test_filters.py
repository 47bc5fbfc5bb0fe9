"""Filters inside of derivatives: how much is left depends on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import NestedGradientWarning, optimize_nested
from tests.oracle import assert_same, outcome

D = torch.float64


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(D)


def leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def of_what_is_left(net: nn.Module, x: Tensor) -> Tensor:
    p = leaf(x)
    u = net(p[p[:, 0] > 0])
    (g,) = grad(u.sum(), p, create_graph=True)
    return g.square().sum() + u.square().sum()


def results_left(net: nn.Module, x: Tensor) -> Tensor:
    p = leaf(x)
    u = net(p)[p[:, 0] > 0]
    return grad(u.square().sum(), p, create_graph=True)[0].square().sum()


def selected(net: nn.Module, x: Tensor) -> Tensor:
    p = leaf(x)
    (i,) = torch.where(p[:, 0] > 0)
    u = net(p[i])
    return grad(u.sum(), p, create_graph=True)[0].square().sum() + u.square().sum()


def laplacian_left(net: nn.Module, x: Tensor) -> Tensor:
    p = leaf(x)
    (g,) = grad(net(p[p[:, 0] > 0]).sum(), p, create_graph=True)
    second = [grad(g[:, k].sum(), p, create_graph=True)[0][:, k] for k in range(3)]
    return torch.stack(second).sum(0).square().sum()


def neighbours(net: nn.Module, x: Tensor) -> Tensor:
    """A force from pairs that are near each other."""
    p = leaf(x)
    distances = (p[:, None] - p[None]).square().sum(-1)
    i, j = torch.nonzero((distances < 1) & (distances > 0), as_tuple=True)
    energy = net(p[i] - p[j]).sum()
    return grad(energy, p, create_graph=True)[0].square().sum() + energy


def ewald(net: nn.Module, x: Tensor) -> Tensor:
    """Charges in a box: wave vectors and pairs, each up to a cutoff."""
    p = leaf(x)
    charges = torch.tanh(net(p))[:, 0]
    grid = torch.cartesian_prod(*[torch.arange(-2, 3, dtype=D)] * 3)
    waves = grid[(grid.square().sum(-1) > 0) & (grid.square().sum(-1) <= 4)]
    squares = waves.square().sum(-1)
    phases = waves @ p.T
    factor = (charges * phases.cos()).sum(-1) ** 2 + (charges * phases.sin()).sum(-1) ** 2
    i, j = torch.where(~torch.eye(len(x), dtype=torch.bool))
    r = (p[i] - p[j]).norm(dim=-1)
    near = r < 1.5
    pairs = charges[i[near]] * charges[j[near]] * torch.erfc(r[near]) / r[near]
    energy = (torch.exp(-squares / 4) / squares * factor).sum() + pairs.sum()
    return grad(energy, p, create_graph=True)[0].square().sum() + energy


def signs(count: int) -> Tensor:
    """Points of which so many pass the filters."""
    torch.manual_seed(1)
    x = torch.rand(5, 3, dtype=D) + 0.2
    x[count:, 0] *= -1
    return x


LOSSES: list[Any] = [
    of_what_is_left,
    results_left,
    selected,
    laplacian_left,
    neighbours,
    ewald,
]


@pytest.mark.parametrize("loss", LOSSES)
def test_captured(loss: Callable[..., Tensor]) -> None:
    """One graph for any count, also for none and for one."""
    decorated = optimize_nested(loss, backend="eager", strict=True, strategy="reverse")
    for count in (3, 0, 1, 5):
        x = signs(count) * (1 if count else 3)
        assert_same(
            outcome(decorated, [small_net()], (x,), {}), outcome(loss, [small_net()], (x,), {})
        )
    assert len(decorated.steps) == 1


def repeated(net: nn.Module, x: Tensor) -> Tensor:
    p = leaf(x)
    u = net(p.repeat_interleave((x[:, 0] > 0).long() + 1, 0))
    return grad(u.square().sum(), p, create_graph=True)[0].square().sum() + u.mean()


def counted(net: nn.Module, x: Tensor) -> Tensor:
    p = leaf(x)
    (g,) = grad(net(p).square().sum(), p, create_graph=True)
    return g[: int((p[:, 0] > 0).sum())].square().sum()


def in_parts(net: nn.Module, x: Tensor) -> Tensor:
    p = leaf(x)
    first, last = torch.split(net(p), torch.tensor([2, 3]).tolist())
    return grad(first.sum() ** 2 + last.sum() ** 2, p, create_graph=True)[0].square().sum()


REFUSED: dict[Any, str] = {
    repeated: "a size that depends on values",
}


@pytest.mark.parametrize("loss", [counted, in_parts])
def test_numbers_that_are_read_are_held_for(loss: Callable[..., Tensor]) -> None:
    decorated = optimize_nested(loss, backend="eager", strict=True)
    for _ in range(2):
        expected = outcome(loss, [small_net()], (signs(3),), {})
        assert_same(outcome(decorated, [small_net()], (signs(3),), {}), expected)
    assert len(decorated.steps) == 1


@pytest.mark.parametrize("loss", REFUSED)
def test_refused_in_words(loss: Callable[..., Tensor]) -> None:
    decorated = optimize_nested(loss, backend="eager")
    expected = outcome(loss, [small_net()], (signs(3),), {})
    with pytest.warns(NestedGradientWarning, match=f"{REFUSED[loss]}.*test_filters.py"):
        assert_same(outcome(decorated, [small_net()], (signs(3),), {}), expected)
