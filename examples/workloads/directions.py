"""Second and fourth derivatives along drawn directions: estimates of Laplacians in many dimensions,
and a Hessian that is zero."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

from examples.workloads.networks import mlp
from examples.workloads.workload import Case, Workload


def along(values: Tensor, x: Tensor, direction: Tensor) -> Tensor:
    """Return the derivative of values (batch,) along directions that broadcast to x (batch, dim),
    each row's by its own row."""
    (g,) = torch.autograd.grad(values.sum(), x, create_graph=True)
    return (g * direction).sum(1)


def stochastic_laplacian(net: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
    """Hutchinson's estimate of Δu at x (batch, dim) that requires grad: the mean of vᵀHv over
    directions (samples, batch, dim) of variance one. No gradient of it."""
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    total = torch.zeros_like(x[:, 0])
    for v in directions:
        (hv,) = torch.autograd.grad((g * v).sum(), x, create_graph=True)
        total = total + (hv * v).sum(1)
    return (total / len(directions)).detach()


def func_stochastic_laplacian(net: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
    """`stochastic_laplacian` in torch.func: full Hessians."""
    second = vmap(hessian(lambda x: net(x)[0]))(x.detach())
    return torch.einsum("sni,nij,snj->sn", directions, second, directions).mean(0)


def stochastic_biharmonic(net: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
    """Estimate of ΔΔu: a third of the mean of the fourth derivatives along normal directions.

    Source: Hu, Shi, Karniadakis, Kawaguchi (2023), "Hutchinson trace estimation for
    high-dimensional and high-order physics-informed neural networks", theorem 3.4.
    """
    u, total = net(x)[:, 0], torch.zeros_like(x[:, 0])
    for v in directions:
        derivative = u
        for _ in range(4):
            derivative = along(derivative, x, v)
        total = total + derivative
    return (total / (3 * len(directions))).detach()


def sampled(net: nn.Module, x: Tensor, dims: Tensor) -> Tensor:
    """Mean square of an estimate of Δu − 1 at x (batch, dim) that requires grad: the second
    derivatives in the dimensions drawn, dims (samples,), scaled up."""
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    chosen, total = g[:, dims], torch.zeros_like(x[:, 0])
    for k in range(len(dims)):
        (second,) = torch.autograd.grad(chosen[:, k].sum(), x, create_graph=True)
        total = total + second[:, dims[k : k + 1]].sum(1)
    return (total * (x.shape[1] / len(dims)) - 1).square().mean()


def func_sampled(net: nn.Module, x: Tensor, dims: Tensor) -> Tensor:
    """`sampled` in torch.func: forward over reverse mode along unit vectors."""
    parameters = dict(net.named_parameters())
    ones = torch.nn.functional.one_hot(dims, x.shape[1]).to(x.dtype)

    def second(x: Tensor, v: Tensor) -> Tensor:
        gradient = torch.func.grad(lambda x: functional_call(net, parameters, (x,))[0])
        return torch.func.jvp(gradient, (x,), (v,))[1] @ v

    found = vmap(vmap(second, (None, 0)), (0, None))(x, ones)
    return (found.mean(1) * x.shape[1] - 1).square().mean()


def hessian_norm(net: nn.Module, x: Tensor) -> Tensor:
    """Mean square of the outputs, and of all their second derivatives, at points x (batch, dim)."""
    second = vmap(hessian(net))(x)
    return net(x).square().mean() + second.square().mean()


def _forward(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: net(x)


def laplacian_stochastic(full: bool) -> list[Case]:
    """Hutchinson's estimates for a network that is not being trained."""
    dim, batch = 50, 1024 if full else 8
    net = mlp([dim, 768, 768, 512, 512, 1]).requires_grad_(False)
    x = torch.randn(batch, dim).requires_grad_()
    cases = []
    for count in (1, 16, 50) if full else (1, 16):
        signs = torch.randn(count, batch, dim).sign()
        cases.append(
            Case(
                f"second order, {count} samples",
                stochastic_laplacian,
                (net, x, signs),
                _forward(net, x),
                func_stochastic_laplacian,
                flops_over_f=2.1 + count,
                backward=False,
            )
        )
    count = 16 if full else 2
    cases.append(
        Case(
            f"fourth order, {count} samples",
            stochastic_biharmonic,
            (net, x, torch.randn(count, batch, dim)),
            _forward(net, x),
            flops_over_f=2.1 + 3 * count,
            backward=False,
        )
    )
    return cases


def sampled_dimensions(full: bool) -> list[Case]:
    """Sixteen of many dimensions."""
    cases = []
    for dim in (100, 1000, 10_000, 100_000) if full else (100, 1000, 10_000):
        net, x = mlp([dim, 128, 128, 128, 1]), torch.randn(100, dim).requires_grad_()
        args = net, x, torch.randint(dim, (16,))
        cases.append(Case(f"16 of {dim}", sampled, args, _forward(net, x), func_sampled))
    return cases


def vmap_hessian_relu(full: bool) -> list[Case]:
    """All second derivatives of a network that has none."""
    net = mlp([2, *[512] * 6, 3], nn.ReLU)
    x = torch.randn(10_000 if full else 500, 2)
    return [Case("ReLU", hessian_norm, (net, x), _forward(net, x), flops_over_f=3.05)]


WORKLOADS = [
    Workload(
        9, "laplacian_stochastic", "Σ vᵀHv, Σ D⁴u[v, v, v, v], no gradients", laplacian_stochastic
    ),
    Workload(10, "sampled_dimensions", "∂ᵢᵢu for drawn i", sampled_dimensions, compiles_long=True),
    Workload(19, "vmap_hessian_relu", "‖D²u‖² of a ReLU network", vmap_hessian_relu),
]
