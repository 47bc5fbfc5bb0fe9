"""Partial differential equations and potentials."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from examples.workloads.networks import mlp
from examples.workloads.workload import Case, Workload

VISCOSITY = 0.01 / math.pi


def force_matching(net: nn.Module, r: Tensor, forces: Tensor) -> Tensor:
    """Mean square error of forces −dE/dr at distances r (pairs, 1), by vmap(jacrev)."""
    predicted = -vmap(jacrev(lambda r: net(r)[0]))(r)
    return (predicted - forces).square().mean()


def burgers(net: nn.Module, points: Tensor) -> Tensor:
    """Mean square of u_t + u u_x − ν u_xx at points (batch, 2) that require grad."""
    u = net(points)
    (g,) = torch.autograd.grad(u, points, torch.ones_like(u), create_graph=True)
    u_x, u_t = g[:, :1], g[:, 1:]
    (second,) = torch.autograd.grad(u_x, points, torch.ones_like(u_x), create_graph=True)
    return (u_t + u * u_x - VISCOSITY * second[:, :1]).square().mean()


def func_burgers(net: nn.Module, points: Tensor) -> Tensor:
    """`burgers` in torch.func."""

    def residual(p: Tensor) -> Tensor:
        u, g = net(p)[0], torch.func.grad(lambda p: net(p)[0])
        u_xx = torch.func.grad(lambda p: g(p)[0])(p)[0]
        return g(p)[1] + u * g(p)[0] - VISCOSITY * u_xx

    return vmap(residual)(points).square().mean()


def laplacian(net: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Laplacian at x (batch, dim) that requires grad, as a loop over the dimensions; each term
    times ``weight`` (dim,)."""
    u = net(x)
    (g,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    total = torch.zeros_like(u[:, 0])
    for d in range(x.shape[1]):
        one = torch.ones_like(g[:, d])
        (second,) = torch.autograd.grad(g[:, d], x, one, create_graph=True)
        total = total + weight[d] * second[:, d]
    return total


def laplacian_value(net: nn.Module, x: Tensor) -> Tensor:
    """Laplacian at x (batch, dim) that requires grad, and no gradient of it."""
    return laplacian(net, x, torch.ones_like(x[0])).detach()


def func_laplacian_value(net: nn.Module, x: Tensor) -> Tensor:
    """`laplacian_value` in torch.func: full Hessians."""
    second = vmap(hessian(lambda x: net(x)[0]))(x.detach())
    return second.diagonal(dim1=1, dim2=2).sum(1)


def poisson(net: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Mean square of the weighted Laplacian − 1."""
    return (laplacian(net, x, weight) - 1).square().mean()


def func_poisson(net: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """`poisson` in torch.func: full Hessians."""
    parameters = dict(net.named_parameters())
    second = vmap(hessian(lambda x: functional_call(net, parameters, (x,))[0]))(x)
    return ((second.diagonal(dim1=1, dim2=2) * weight).sum(1) - 1).square().mean()


def biharmonic(net: nn.Module, x: Tensor) -> Tensor:
    """Mean square of the Laplacian of the Laplacian, as nested loops."""

    def laplacian_of(values: Tensor) -> Tensor:
        (g,) = torch.autograd.grad(values.sum(), x, create_graph=True)
        rows = [torch.autograd.grad(g[:, d].sum(), x, create_graph=True)[0][:, d] for d in dims]
        return torch.stack(rows).sum(0)

    dims = range(x.shape[1])
    return laplacian_of(laplacian_of(net(x)[:, 0])).square().mean()


def _big(dim: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    return mlp([dim, 768, 768, 512, 512, 1]).to(dtype)


def _forward(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: net(x)


def lennard_jones(full: bool) -> list[Case]:
    """Force matching of a pair potential."""
    net, r = mlp([1, 16, 16, 16, 16, 1]), torch.rand(1000, 1) + 0.9
    forces = 24 * (2 * r**-13 - r**-7)
    return [Case("vmap(jacrev)", force_matching, (net, r, forces), _forward(net, r))]


def burgers_cases(full: bool) -> list[Case]:
    """Burgers' equation."""
    net = mlp([2] + [20] * 8 + [1])
    x = (
        torch.rand(10_000, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    ).requires_grad_()
    return [Case("10 000 points", burgers, (net, x), _forward(net, x), func_burgers)]


def laplacian_values(full: bool) -> list[Case]:
    """The Laplacian alone, for a network that is not being trained."""
    cases, dim = [], 50
    for dtype, name in ((torch.float64, "float64"), (torch.float32, "float32")):
        net = _big(dim, dtype).requires_grad_(False)
        for batch in (1, 64, 2048) if full else (8, 64):
            x = torch.randn(batch, dim, dtype=dtype).requires_grad_()
            title, forward = f"D={dim}, {name}, {batch} points", _forward(net, x)
            cases.append(
                Case(
                    title,
                    laplacian_value,
                    (net, x),
                    forward,
                    func_laplacian_value,
                    flops_over_f=2 + dim,
                    backward=False,
                )
            )
    return cases


def laplacian_step(full: bool) -> list[Case]:
    """Residual of Poisson's equation: value and gradients."""
    cases = []
    for dim in (2, 3, 10, 50) if full else (2, 3, 10):
        net, x = _big(dim), torch.randn(8192 if full else 256, dim).requires_grad_()
        args, figure = (net, x, torch.ones(dim)), 6 + 3 * dim + 1.0
        cases.append(Case(f"D={dim}", poisson, args, _forward(net, x), func_poisson, figure))
    return cases


def weighted_laplacian(full: bool) -> list[Case]:
    """The same with a weight for each second derivative, some of them zero."""
    cases = []
    for rank in (5, 25, 50) if full else (5,):
        dim = 50 if full else 10
        weight = torch.cat([torch.rand(rank), torch.zeros(dim - rank)])
        net, x = _big(dim), torch.randn(1024 if full else 64, dim).requires_grad_()
        args = net, x, weight
        cases.append(Case(f"D={dim}, rank {rank}", poisson, args, _forward(net, x), func_poisson))
    return cases


def biharmonic_cases(full: bool) -> list[Case]:
    """The Laplacian of the Laplacian."""
    dim, batch = (5, 1024) if full else (2, 16)
    net, x = _big(dim), torch.randn(batch, dim).requires_grad_()
    return [Case(f"D={dim}", biharmonic, (net, x), _forward(net, x))]


WORKLOADS = [
    Workload(1, "lennard_jones", "force matching", lennard_jones),
    Workload(5, "laplacian_value", "Δu, no gradients", laplacian_values, compiles_long=True),
    Workload(6, "laplacian_step", "(Δu − 1)²", laplacian_step),
    Workload(7, "weighted_laplacian", "(Σ wᵢ ∂ᵢᵢu − 1)²", weighted_laplacian, compiles_long=True),
    Workload(8, "biharmonic", "(ΔΔu)²", biharmonic_cases, compiles_long=True),
    Workload(11, "burgers", "u_t + u u_x − ν u_xx", burgers_cases),
]
