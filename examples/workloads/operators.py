"""Networks that are operators or flows: derivatives for each function, and along the way."""

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from examples.workloads.networks import DeepONet, Velocity
from examples.workloads.workload import Case, Workload


def all_derivatives(net: nn.Module, functions: Tensor, points: Tensor, order: int) -> Tensor:
    """Mean square of the sum of all derivatives to an order, in all coordinates.

    Args:
        net: (functions, points) → values (functions, points).
        functions: The values that each is given by, (functions, sensors).
        points: Coordinates (points, dim) that require grad, the same for each function.
        order: The highest.
    """
    values, total = net(functions, points), torch.zeros(())
    for row in values:  # a derivative for each function: autograd sums over what it is given
        residual, level = row, [row]
        for _ in range(order):
            grads = [torch.autograd.grad(u.sum(), points, create_graph=True)[0] for u in level]
            level = [column for g in grads for column in g.unbind(1)]
            residual = residual + torch.stack(level).sum(0)
        total = total + residual.square().mean()
    return total / len(values)


def func_all_derivatives(net: nn.Module, functions: Tensor, points: Tensor, order: int) -> Tensor:
    """`all_derivatives` in torch.func: full derivative tensors at each function and point."""
    parameters = dict(net.named_parameters())

    def value(point: Tensor, function: Tensor) -> Tensor:
        return functional_call(net, parameters, (function[None], point[None]))[0, 0]

    residual, derivative = torch.zeros(()), value
    for k in range(order + 1):
        derivative = derivative if k == 0 else jacrev(derivative)
        found = vmap(vmap(derivative, (0, None)), (None, 0))(points, functions)
        residual = residual + found.flatten(2).sum(2) if k else found
    return residual.square().mean()


def likelihood(velocity: nn.Module, x: Tensor, e: Tensor, steps: int) -> Tensor:
    """Negative log-likelihood of points x (batch, dim) under a flow, by its exact divergence, and
    the mean of ‖eᵀJ‖² along the way for directions e (batch, dim), in Euler's steps.

    Source: Finlay et al. (2020), "How to train your neural ODE", equation 8.
    """
    point = x.detach().requires_grad_()
    change = cost = torch.zeros_like(x[:, 0])
    for step in range(steps):
        speed = velocity(point, 1 - step / steps)
        rows = [torch.autograd.grad(v.sum(), point, create_graph=True)[0] for v in speed.unbind(1)]
        divergence = torch.stack([row[:, i] for i, row in enumerate(rows)]).sum(0)
        (product,) = torch.autograd.grad((speed * e).sum(), point, create_graph=True)
        cost = cost + product.square().sum(1) / steps
        change, point = change - divergence / steps, point - speed / steps
    normal = -0.5 * point.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
    return (0.01 * cost - normal - change).mean()


def func_likelihood(velocity: nn.Module, x: Tensor, e: Tensor, steps: int) -> Tensor:
    """`likelihood` in torch.func: the Jacobian of each point."""
    point, change, cost = x, torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0])
    for step in range(steps):
        time = 1 - step / steps
        jacobians = vmap(jacrev(lambda p, t=time: velocity(p[None], t)[0]))(point)
        divergence = jacobians.diagonal(dim1=1, dim2=2).sum(1)
        product = torch.einsum("ni,nij->nj", e, jacobians)
        cost = cost + product.square().sum(1) / steps
        change, point = change - divergence / steps, point - velocity(point, time) / steps
    normal = -0.5 * point.square().sum(1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
    return (0.01 * cost - normal - change).mean()


def deeponet(full: bool) -> list[Case]:
    """Derivatives of every function at every point."""
    count, points = (80, 8000) if full else (8, 500)
    cases = []
    for order in (1, 2, 3) if full else (1, 2):
        net = DeepONet(sensors=50, dim=2, width=128)
        functions, x = torch.randn(count, 50), torch.rand(points, 2).requires_grad_()
        args, forward = (net, functions, x, order), lambda n=net, f=functions, x=x: n(f, x)
        cases.append(Case(f"order {order}", all_derivatives, args, forward, func_all_derivatives))
    return cases


def cnf_divergence(full: bool) -> list[Case]:
    """A continuous normalising flow in the plane."""
    net, steps = Velocity(2, [64, 64, 64]), 20
    x = torch.randn(8192 if full else 512, 2)
    args, forward = (net, x, torch.randn_like(x), steps), lambda: net(x, 0.5)
    return [Case(f"{steps} steps", likelihood, args, forward, func_likelihood)]


WORKLOADS = [
    Workload(12, "deeponet", "all derivatives of each function", deeponet, compiles_long=True),
    Workload(18, "cnf_divergence", "∇·v, ‖eᵀJ‖²", cnf_divergence, compiles_long=True),
]
