"""Forward mode under `no_grad`: targets that are derivatives, constants to the loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, functional
from torch.func import grad, hessian, jacfwd, jvp, vmap

from rewriter import NestedGradientWarning, optimize_nested
from tests.several_calls import check_calls

Loss = Callable[[nn.Module, Tensor], Tensor]


class Velocity(nn.Module):
    """``(points, times) → velocities``, shape (batch, 3)."""

    def __init__(self, dropout: float = 0.0, *, asks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inside, self.outside = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
        self.dropout, self.asks = nn.Dropout(dropout), asks

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        hidden = self.dropout(self.inside(torch.cat([z, t], 1)).tanh())
        if self.asks:
            with torch.no_grad():
                hidden = hidden * self.inside(torch.cat([z, t], 1)).sin()
        return self.outside(hidden)


def calls() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, dtype=torch.float64),) for _ in range(3)]


def times(x: Tensor) -> Tensor:
    return torch.rand(len(x), 1, dtype=x.dtype)


def target_of_a_mean_flow(net: nn.Module, x: Tensor) -> Tensor:
    noise, t = torch.randn_like(x), times(x)
    z, velocity = (1 - t) * x + t * noise, noise - x
    with torch.no_grad():
        _, moved = jvp(net, (z, t), (velocity, torch.ones_like(t)))
        target = velocity - t * moved
    return (net(z, t) - target).square().mean()


def target_by_functional(net: nn.Module, x: Tensor) -> Tensor:
    t = times(x)
    with torch.no_grad():
        value, moved = functional.jvp(net, (x, t), (torch.randn_like(x), torch.ones_like(t)))
    return (net(x, t) - value - moved).square().mean()


@torch.no_grad()
def moved_by_dual_numbers(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(net(dual, t)).tangent


def target_by_dual_numbers(net: nn.Module, x: Tensor) -> Tensor:
    t = times(x)
    return (net(x, t) - moved_by_dual_numbers(net, x, t)).square().mean()


def target_of_a_target(net: nn.Module, x: Tensor) -> Tensor:
    t, ones = times(x), torch.ones_like(x)
    with torch.no_grad():
        first, second = jvp(lambda z: jvp(lambda y: net(y, t), (z,), (ones,))[1], (x,), (ones,))
    return (net(x, t) - first * second).square().mean()


def jacobians(net: nn.Module, x: Tensor) -> Tensor:
    t = torch.zeros(1, 1, dtype=x.dtype)
    with torch.no_grad():
        found = vmap(jacfwd(lambda z: net(z[None], t)[0]))(x)
    return (net(x, times(x))[:, :, None] - found).square().mean()


def hessians(net: nn.Module, x: Tensor) -> Tensor:
    t = torch.zeros(1, 1, dtype=x.dtype)
    with torch.no_grad():
        found = vmap(hessian(lambda z: net(z[None], t).square().sum()))(x)
    return (net(x, times(x))[:, :, None] - found).square().mean()


def products_with_hessians(net: nn.Module, x: Tensor) -> Tensor:
    t = times(x)
    with torch.no_grad():
        value, moved = jvp(grad(lambda z: net(z, t).sum()), (x,), (torch.ones_like(x),))
    return (net(x, t) - value * moved).square().mean()


def beside_one_that_is_trained(net: nn.Module, x: Tensor) -> Tensor:
    t, ones = times(x), torch.ones_like(x)
    value, moved = jvp(lambda z: net(z, t), (x,), (ones,))
    with torch.no_grad():
        other, target = jvp(lambda z: net(z, t), (x,), (0.3 * ones,))
    return (moved - target).square().mean() + (value * other).mean()


def what_a_body_keeps(net: nn.Module, x: Tensor) -> Tensor:
    """What leaves the transform by another way is a constant too."""
    kept, t = [], times(x)

    def body(z: Tensor) -> tuple[Tensor, Tensor]:
        u = net(z, t)
        return u, u.sin()

    with torch.no_grad():
        value, moved, *aside = jvp(body, (x,), (torch.ones_like(x),), has_aux=True)
    kept += aside
    return (net(x, t) * kept[0] - moved + value).square().mean()


def a_constant_in_the_body(net: nn.Module, x: Tensor) -> Tensor:
    t = times(x)
    with torch.no_grad():
        moved = jvp(lambda z: net(z, t) * net(z.detach(), t), (x,), (torch.ones_like(x),))[1]
    return (net(x, t) - moved).square().mean()


LOSSES = [
    target_of_a_mean_flow, target_by_dual_numbers, target_of_a_target, jacobians,
    products_with_hessians, beside_one_that_is_trained, what_a_body_keeps, a_constant_in_the_body,
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_captured_whole(loss: Loss) -> None:
    check_calls(loss, [Velocity()], calls()[:2], strict=True)


@pytest.mark.filterwarnings("ignore:.*enters the loss as a constant")
@pytest.mark.parametrize("loss", [target_by_functional, hessians])
def test_a_target_by_way_of_pullbacks_is_captured_whole(loss: Loss) -> None:
    check_calls(loss, [Velocity()], calls()[:2])


def test_forward_mode_goes_on_where_the_network_itself_asks_for_no_gradient() -> None:
    check_calls(target_of_a_mean_flow, [Velocity(asks=True)], calls(), strict=True)


def test_draws_are_those_of_eager() -> None:
    check_calls(target_of_a_mean_flow, [Velocity(dropout=0.3)], calls(), strict=True)


def test_the_target_costs_its_tangents_alone() -> None:
    loss = check_calls(target_of_a_mean_flow, [Velocity()], calls()[:1], strict=True)
    report = loss.explain(Velocity(), *calls()[0])
    (site,) = report.sites
    assert (site.operator, site.strategy) == ("jvp", "forward")
    # Two layers, forward: 280; their tangents: 280; the gradient of a regression without that of
    # the input: 400.
    assert report.flops == 960


def test_a_gradient_that_stops_where_its_tangent_goes_on_is_left_as_written() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        def body(z: Tensor) -> Tensor:
            with torch.no_grad():
                weight = net(z, t)
            return (net(z, t) * weight).sum()

        t = times(x)
        with torch.no_grad():
            moved = jvp(grad(body), (x,), (torch.ones_like(x),))[1]
        return (net(x, t) - moved).square().mean()

    with pytest.warns(NestedGradientWarning, match="no_grad inside of forward mode"):
        optimize_nested(loss, backend="eager")(Velocity(), *calls()[0])
