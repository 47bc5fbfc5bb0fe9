"""`torch.distributions` made inside of a loss: values, draws, and arguments that are validated."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributions as D
from torch import Tensor, nn

from rewriter import optimize_nested
from tests.several_calls import check_calls

grad = torch.autograd.grad
Loss = Callable[[nn.Module, Tensor], Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 6)).double()


def calls() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, dtype=torch.float64),) for _ in range(2)]


def score(density: D.Distribution, x: Tensor) -> Tensor:
    z = x.detach().clone().requires_grad_()
    return grad(density.log_prob(z).sum(), z, create_graph=True)[0]


def halves(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_scale = net(x).chunk(2, dim=1)
    return mean, log_scale.exp()


def normal(net: nn.Module, x: Tensor) -> Tensor:
    density = D.Normal(*halves(net, x), validate_args=True)
    return score(density, x).square().mean() + density.entropy().mean()


def divergence(net: nn.Module, x: Tensor) -> Tensor:
    density = D.Independent(D.Normal(*halves(net, x)), 1)
    prior = D.Independent(D.Normal(torch.zeros_like(x), torch.ones_like(x)), 1)
    drawn = density.rsample()
    return D.kl_divergence(density, prior).mean() + (score(prior, x) * drawn).mean()


def multivariate(net: nn.Module, x: Tensor) -> Tensor:
    eye = torch.eye(3, dtype=x.dtype)
    density = D.MultivariateNormal(net(x)[:, :3], 0.5 * eye)
    prior = D.MultivariateNormal(torch.zeros_like(x), scale_tril=eye)
    spread = D.kl_divergence(density, prior).mean()
    return score(density, density.rsample()).square().mean() + spread


def choices(net: nn.Module, x: Tensor) -> Tensor:
    among = D.Categorical(logits=net(x))
    gradients = grad(among.log_prob(among.sample()).mean(), net.parameters(), create_graph=True)
    flips = D.Bernoulli(probs=net(x).sigmoid())
    return sum(g.square().sum() for g in gradients) + flips.log_prob(flips.sample()).mean()


def transformed(net: nn.Module, x: Tensor) -> Tensor:
    base = D.Normal(*halves(net, x))
    transforms = [D.TanhTransform(cache_size=1), D.AffineTransform(0.5, 2.0)]
    density = D.TransformedDistribution(base, transforms)
    return density.log_prob(density.rsample()).mean() + score(base, x).square().mean()


@pytest.mark.parametrize("loss", [normal, divergence, multivariate, choices, transformed])
def test_the_loss_is_captured_whole(loss: Loss) -> None:
    check_calls(loss, [net()], calls(), strict=True)


def of_a_scale(net: nn.Module, x: Tensor) -> Tensor:
    return score(D.Normal(net(x)[:, :3], x), x).square().mean()


def test_an_argument_outside_of_its_constraint_is_the_users_error() -> None:
    """As in eager: at the first call, and at a later one, where a specialisation is there."""
    own, loss = net(), optimize_nested(of_a_scale, backend="eager")
    x = calls()[0][0]
    with pytest.raises(ValueError, match="Expected parameter scale"):
        loss(own, x)
    loss = optimize_nested(of_a_scale, backend="eager", strict=True)
    torch.testing.assert_close(loss(own, x.exp()), of_a_scale(own, x.exp()), rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="Expected parameter scale"):
        loss(own, x)


def test_validation_is_left_to_the_user() -> None:
    """PyTorch switches it off for all of a program when something is compiled."""
    before = D.Distribution._validate_args
    try:
        for wish in (True, False):
            D.Distribution.set_default_validate_args(wish)
            optimize_nested(normal, backend="eager")(net(), *calls()[0])
            assert D.Distribution._validate_args is wish
    finally:
        D.Distribution.set_default_validate_args(before)


def test_without_validation_nothing_is_raised() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return score(D.Normal(net(x)[:, :3], x, validate_args=False), x).square().mean()

    check_calls(loss, [net()], calls(), strict=True)


def test_inside_of_a_transform_nothing_is_validated() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        mean = net(x)[:, :3].mean(0)
        density = torch.func.grad(lambda z: D.Normal(mean, 2.0).log_prob(z).sum())
        return torch.func.vmap(density)(x).square().mean()

    check_calls(loss, [net()], calls(), strict=True)
