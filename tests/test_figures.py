"""Prices, in forward passes of the network: exact, so asserted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.simplify import fixpoint
from tests.cases import mlp, penalty
from tests.oracle import check, flops_per_forward


def squared_penalty(net: nn.Module, x: Tensor) -> Tensor:
    """Penalty that also non-scalar outputs can have."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (g.flatten(1).norm(dim=1) - 1).square().mean()


def one_forward(net: nn.Module, x: Tensor) -> Tensor:
    """Penalty and data loss on one forward."""
    x = x.detach().requires_grad_()
    u = net(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean() + (u - 0.5).square().mean()


def two_forwards(net: nn.Module, x: Tensor) -> Tensor:
    """The same written with two."""
    data = (net(x) - 0.5).square().mean()
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean() + data


def func_form(net: nn.Module, x: Tensor) -> Tensor:
    """The same in `torch.func`."""
    g = torch.func.grad(lambda z: net(z).sum())(x)
    return (g.norm(dim=1) - 1).square().mean() + (net(x) - 0.5).square().mean()


SMOOTH, PIECEWISE = (nn.Tanh, nn.SiLU), (nn.ReLU, nn.LeakyReLU)


@pytest.mark.parametrize("activation", [*SMOOTH, *PIECEWISE])
def test_penalty(activation: Callable[[], nn.Module]) -> None:
    net, x = mlp(activation), torch.randn(128, 64, dtype=torch.float64)
    loss = check(penalty, [net], x)
    limit = 6.05 if activation in SMOOTH else 4.05
    assert flops_per_forward(loss, net, x) <= limit


@pytest.mark.parametrize("activation", [nn.Tanh, nn.LeakyReLU])
@pytest.mark.parametrize("loss", [one_forward, two_forwards, func_form])
def test_penalty_with_data(
    loss: Callable[..., Tensor], activation: Callable[[], nn.Module]
) -> None:
    net, x = mlp(activation), torch.randn(128, 64, dtype=torch.float64)
    limit = 6.05 if activation in SMOOTH else 4.05
    assert flops_per_forward(check(loss, [net], x), net, x) <= limit


def critic(activation: Callable[[], nn.Module]) -> nn.Module:
    """A convolutional critic; padding and strides as in WGAN-GP."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 5, stride=2, padding=2), activation(),
        nn.Conv2d(8, 16, 5, stride=2, padding=2), activation(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2), activation(),
        nn.Flatten(), nn.Linear(32 * 16, 1),
    ).double()  # fmt: skip


@pytest.mark.parametrize(("activation", "limit"), [(nn.LeakyReLU, 4.1), (nn.SiLU, 6.1)])
def test_convolutional_critic(activation: Callable[[], nn.Module], limit: float) -> None:
    net, x = critic(activation), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    assert flops_per_forward(check(squared_penalty, [net], x), net, x) <= limit


@pytest.mark.parametrize("strategy", ["jvp_over_gradient", "reverse"])
def test_each_strategy_by_name(strategy: str) -> None:
    net, x = mlp(nn.Tanh, 3, 16, 8), torch.randn(12, 8, dtype=torch.float64)
    loss = check(one_forward, [net], x, strategy=strategy)
    (site,) = loss.explain(net, x).sites
    assert site.strategy == strategy


def seeded_by_itself(net: nn.Module, x: Tensor) -> Tensor:
    """The seed is computed by the body too."""
    u, pull = torch.func.vjp(net, x)
    return pull(u)[0].square().sum()


def test_seed_from_the_body() -> None:
    """What comes back through the seed and through the point goes on as one."""
    net, x = mlp(nn.Tanh, 3, 16, 8), torch.randn(12, 8, dtype=torch.float64)
    report = check(seeded_by_itself, [net], x).explain(net, x)
    assert report.flops <= report.flops_as_written
    assert report.sites[0].strategy == "jvp_over_gradient"


def test_never_dearer_than_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rules that merge them, the rewritten forms are dearer, and the loss as written is
    taken."""
    left = [rule for rule in fixpoint.RULES if rule.__name__ != "gather_sums"]
    monkeypatch.setattr(fixpoint, "RULES", left)
    net, x = mlp(nn.Tanh, 3, 16, 8), torch.randn(12, 8, dtype=torch.float64)
    report = check(seeded_by_itself, [net], x).explain(net, x)
    assert report.flops <= report.flops_as_written
    assert report.sites[0].strategy == "as written"
    assert {s for c in report.candidates for s in c.strategies.values()} == {
        "jvp_over_gradient", "reverse", "as written",
    }  # fmt: skip
