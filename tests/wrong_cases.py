"""Losses whose derivatives PyTorch gets wrong, or refuses, each as a function of a few lines.

A function makes what its loss needs and returns, by its kind in `tests.wrong_in_pytorch`:

- ``gradient``: the loss, its arguments, and the tensor whose gradient is compared;
- ``second``: a number that holds a second derivative, and the plain function that it is of;
- ``result``: a function whose value is compared with its own as written.

The page shows what stands above ``return``; what is imported here, it shows once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as fwad
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.parametrizations import weight_norm


def score_matching() -> Any:
    net = nn.Sequential(nn.Linear(2, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 1))
    points = torch.randn(32, 2, requires_grad=True)

    def loss(net, x):
        (score,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        rows = [torch.autograd.grad(s.sum(), x, create_graph=True)[0] for s in score.unbind(1)]
        divergence = sum(row[:, i] for i, row in enumerate(rows))
        return (divergence + 0.5 * score.square().sum(1)).mean()

    return loss, (net, points), net[0].weight


def equation() -> Any:
    net = nn.Sequential(nn.Linear(2, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 1))
    points = torch.rand(32, 2, requires_grad=True)

    def loss(net, x):
        (u_x,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        (u_xx,) = torch.autograd.grad(u_x[:, 0].sum(), x, create_graph=True)
        return (u_x[:, 1] - u_xx[:, 0] - x.prod(1)).square().mean()

    return loss, (net, points), net[0].weight


def hessian_trace() -> Any:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x):
            return x + self.linear(self.norm(x).tanh())

    net = nn.Sequential(nn.Linear(4, 8), Block(), Block(), nn.Linear(8, 3))
    images, labels, signs = torch.randn(6, 4), torch.randint(3, (6,)), torch.ones(6, 4)
    signs[:, ::2] = -1

    def loss(net, x):
        x = x.detach().requires_grad_()
        value = F.cross_entropy(net(x), labels)
        (g,) = torch.autograd.grad(value, x, create_graph=True)
        (h,) = torch.autograd.grad((g * signs).sum(), x, create_graph=True)
        return (h * signs).sum().square()

    return loss, (net, images), net[0].bias


def style() -> Any:
    net = nn.Sequential(nn.Conv1d(1, 4, 3), nn.InstanceNorm1d(4), nn.SiLU(), nn.Conv1d(4, 1, 3))
    signal, direction = torch.randn(2, 1, 12, requires_grad=True), torch.randn(2, 1, 12)

    def loss(net, x):
        (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
        (curvature,) = torch.autograd.grad((g * direction).sum(), x, create_graph=True)
        return curvature.square().mean()

    return loss, (net, signal), net[0].weight


def meta_learning() -> Any:
    net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.SiLU(), nn.Linear(8, 1))
    support, query = torch.randn(2, 5, 3).unbind()

    def force_error(net, weights, x):
        force = -grad(lambda x: functional_call(net, weights, (x,)).sum())(x)
        return (force + x).square().mean()

    def loss(net, x):
        weights = dict(net.named_parameters())
        step = grad(lambda w: force_error(net, w, x))(weights)
        fast = {name: w - 0.1 * step[name] for name, w in weights.items()}
        return force_error(net, fast, query)

    return loss, (net, support), net[0].weight


def flow_map() -> Any:
    net = nn.Sequential(nn.Linear(3, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 3))
    points, velocity = torch.randn(2, 16, 3).unbind()

    def loss(net, x):
        u, du = jvp(net, (x,), (velocity,))[:2]
        return (u + du - velocity).square().mean()

    return loss, (net, points), net[0].weight


def batch_jvp() -> Any:
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    net = nn.Sequential(nn.Linear(3, 16), norm, nn.SiLU(), nn.Linear(16, 3))
    points, velocity = torch.randn(2, 16, 3).unbind()

    def loss(net, x):
        return jvp(net, (x,), (velocity,))[1].square().mean()

    return loss, (net, points), net[0].weight


def layer_norm_forward() -> Any:
    a, b, w = torch.randn(3, 5).unbind()

    def f(t):
        return F.layer_norm(a + t * b, (5,)) @ w

    def second(t):
        one = torch.ones(())
        return jvp(lambda t: jvp(f, (t,), (one,))[1], (t,), (one,))[1]

    return second, f


def hessian_vector() -> Any:
    net = nn.Sequential(weight_norm(nn.Linear(3, 8)), nn.Tanh(), nn.Linear(8, 1))
    points = torch.randn(16, 3)
    direction = net.get_parameter("0.parametrizations.weight.original1")

    def loss(net, x):
        weight = net.get_parameter("0.parametrizations.weight.original1")
        (g,) = torch.autograd.grad(net(x).square().mean(), weight, create_graph=True)
        return g.square().sum()

    return loss, (net, points), direction


def gaussian_process() -> Any:
    x, y = torch.linspace(0, 2, 6), torch.tensor([0.0, 0.8, 0.9, 0.1, -0.7, -1.0])
    scales = torch.tensor([0.3, -0.2, -1.0])
    squares = (x[:, None] - x).square()

    def likelihood(t):
        amplitude, length, noise = (scales + t).exp()
        kernel = amplitude * torch.exp(-squares / length) + noise * torch.eye(6)
        return y @ torch.linalg.solve(kernel, y) + torch.linalg.slogdet(kernel)[1]

    def second(t):
        return jacfwd(jacfwd(likelihood))(t)

    return second, likelihood


def solve() -> Any:
    a, b = torch.randn(2, 3, 3).unbind()
    y = torch.randn(3)

    def f(t):
        return y @ torch.linalg.solve(a + 3 * torch.eye(3) + t * b, y)

    def second(t):
        one = torch.ones(())
        return jvp(lambda t: jvp(f, (t,), (one,))[1], (t,), (one,))[1]

    return second, f


def slogdet() -> Any:
    a, b = torch.randn(2, 3, 3).unbind()

    def f(t):
        return torch.linalg.slogdet(a + 3 * torch.eye(3) + t * b)[1]

    def second(t):
        one = torch.ones(())
        return jvp(lambda t: jvp(f, (t,), (one,))[1], (t,), (one,))[1]

    return second, f


def determinant() -> Any:
    a, b = torch.randn(2, 3, 3).unbind()

    def f(t):
        return torch.linalg.det(a + 3 * torch.eye(3) + t * b)

    def second(t):
        one = torch.ones(())
        return jvp(lambda t: jvp(f, (t,), (one,))[1], (t,), (one,))[1]

    return second, f


def pair_distances() -> Any:
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    atoms = torch.randn(5, 3, requires_grad=True)

    def loss(net, x):
        energy = net(F.pdist(x)[:, None]).sum()
        (force,) = torch.autograd.grad(-energy, x, create_graph=True)
        return force.square().mean()

    return loss, (net, atoms), net[0].weight


def distances() -> Any:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    atoms, centres = torch.randn(5, 3, requires_grad=True), torch.randn(4, 3)

    def loss(net, x):
        (g,) = torch.autograd.grad(net(torch.cdist(x, centres)).sum(), x, create_graph=True)
        return g.square().mean()

    return loss, (net, atoms), net[0].weight


def attention() -> Any:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    tokens = torch.randn(1, 1, 6, 4, requires_grad=True)

    def loss(net, x):
        h = net(x)
        y = F.scaled_dot_product_attention(h, h, x)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return g.square().mean()

    return loss, (net, tokens), net[0].weight


def batch_norm_transform() -> Any:
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
    points = torch.randn(16, 3)

    def loss(net, x):
        return grad(lambda x: net(x).sum())(x).square().mean()

    return loss, (net, points), net[0].weight


def compiled_trace() -> Any:
    x = torch.tensor([[0.10, 0.20, 0.30], [0.40, 0.50, 0.60], [0.70, 0.80, 0.95]])

    def f(t):
        return torch.mean(1.0 / (t + torch.trace(t) * torch.eye(3)))

    def corner():
        return hessian(f)(x)[1, 2, 1, 1]

    return corner


def dual_numbers() -> Any:
    def f(x):
        return x.square().sum()

    def directional(f):
        with fwad.dual_level():
            dual = fwad.make_dual(torch.arange(3.0), torch.ones(3))
            return fwad.unpack_dual(f(dual)).tangent

    return f, directional


def tangent_gradient() -> Any:
    a, b = torch.randn(2, 3, 3).unbind()
    y = torch.randn(3)

    def f(t):
        return y @ torch.linalg.solve(a + 3 * torch.eye(3) + t * b, y)

    def second(t):
        return grad(lambda t: jvp(f, (t,), (torch.ones(()),))[1])(t)

    return second, f


def equal_singular_values() -> Any:
    direction = torch.randn(3, 3)

    def f(t):
        return torch.linalg.det(torch.eye(3) + (t - 0.5) * direction)

    def second(t):
        return hessian(f)(t)

    return second, f


def eigenvectors() -> Any:
    a, b = torch.randn(2, 3, 3).unbind()

    def f(t):
        return torch.linalg.eigh(a + a.mT + t * (b + b.mT))[1].square()[0, 0]

    def second(t):
        return grad(lambda t: jvp(f, (t,), (torch.ones(()),))[1])(t)

    return second, f


def zero_factor() -> Any:
    a = torch.tensor([0.5, 1.0, 2.0, -0.3])

    def f(t):
        return torch.cumprod(torch.stack([t + a[0], t - 0.5, a[2] * t, a[3] + t]), 0).sum()

    def second(t):
        one = torch.ones(())
        return jvp(lambda t: jvp(f, (t,), (one,))[1], (t,), (one,))[1]

    return second, f


def random_numbers() -> Any:
    def noisy():
        np.random.seed(0)
        return torch.from_numpy(np.random.randn(3)).square().sum()

    return noisy


def data_parallel() -> Any:
    class Train(nn.Module):
        def __init__(self, net, loss):
            super().__init__()
            self.net, self.loss = net, loss

        def forward(self, x):
            return self.loss(self.net, x)

    def loss(net, x):
        u = net(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True, materialize_grads=True)
        return g.square().sum(1).mean() + u.square().mean()

    width = 600
    layers = [nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    net = nn.Sequential(*layers, nn.Linear(width, 1))
    points = torch.randn(16, 8, requires_grad=True)

    def step(loss):
        return DistributedDataParallel(Train(net, loss))(points)

    return loss, step
