"""Gradient penalties: of an MLP alone, with data, and of a convolutional critic."""

import torch
from torch import Tensor, nn

from examples.workloads.networks import conv_critic, mlp
from examples.workloads.workload import Case, Workload


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    """Mean of (‖∇ₓ net‖ − 1)² at points x (batch, dim) that require grad."""
    u = net(x)
    (g,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    return (g.flatten(1).norm(dim=1) - 1).square().mean()


def func_penalty(net: nn.Module, x: Tensor) -> Tensor:
    """`penalty` in torch.func."""
    g = torch.func.grad(lambda x: net(x).sum())(x)
    return (g.flatten(1).norm(dim=1) - 1).square().mean()


def with_data(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`penalty` and the mean square error to y (batch, 1), one forward pass written."""
    u = net(x)
    (g,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    return (g.norm(dim=1) - 1).square().mean() + (u - y).square().mean()


def with_data_apart(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`with_data`, two forward passes written."""
    return penalty(net, x) + (net(x) - y).square().mean()


def func_with_data(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """`with_data` in torch.func."""
    return func_penalty(net, x) + (net(x) - y).square().mean()


def critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, mixed: Tensor) -> Tensor:
    """The loss of WGAN-GP's critic on images (batch, 3, 32, 32); the mixed ones require grad."""
    return critic(fake).mean() - critic(real).mean() + 10 * penalty(critic, mixed)


def func_critic_loss(critic: nn.Module, real: Tensor, fake: Tensor, mixed: Tensor) -> Tensor:
    """`critic_loss` in torch.func."""
    return critic(fake).mean() - critic(real).mean() + 10 * func_penalty(critic, mixed)


def _points(full: bool) -> Tensor:
    return torch.randn(8192 if full else 256, 512).requires_grad_()


def gp_mlp(full: bool) -> list[Case]:
    """Penalty alone, for a smooth and for a piecewise linear network, and for a small one."""
    small = torch.randn(128, 2).requires_grad_()
    shapes = (
        ("tanh", mlp([512] * 8 + [1]), _points(full), 6.05),
        ("LeakyReLU", mlp([512] * 8 + [1], nn.LeakyReLU), _points(full), 4.05),
        ("small tanh", mlp([2, 32, 32, 32, 1]), small, 6.05),
    )
    return [
        Case(name, penalty, (net, x), lambda n=net, x=x: n(x), func_penalty, figure)
        for name, net, x, figure in shapes
    ]


def gp_data(full: bool) -> list[Case]:
    """Penalty and data on the same points."""
    cases = []
    for name, activation, figure in (("tanh", nn.Tanh, 6.05), ("LeakyReLU", nn.LeakyReLU, 4.05)):
        for count, loss in (("one forward", with_data), ("two forwards", with_data_apart)):
            net, x = mlp([512] * 8 + [1], activation), _points(full)
            args = net, x, torch.randn(len(x), 1)
            forward = lambda n=net, x=x: n(x)  # noqa: E731
            cases.append(Case(f"{name}, {count}", loss, args, forward, func_with_data, figure))
    return cases


def wgan_gp(full: bool) -> list[Case]:
    """Penalty on interpolates and the critic's loss."""
    batch, critic = (64, conv_critic(128)) if full else (16, conv_critic(64))
    images = [torch.randn(batch, 3, 32, 32) for _ in range(3)]
    images[2].requires_grad_()
    forward = lambda: critic(images[0])  # noqa: E731
    return [Case("critic", critic_loss, (critic, *images), forward, func_critic_loss, None)]


WORKLOADS = [
    Workload(2, "gp_mlp", "(‖∇ₓu‖ − 1)²", gp_mlp),
    Workload(3, "gp_data", "(‖∇ₓu‖ − 1)² and data", gp_data),
    Workload(4, "wgan_gp", "penalty of a critic, and its loss", wgan_gp),
]
