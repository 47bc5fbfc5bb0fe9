"""Full Jacobians of which little is used: products with vectors, norms, sums over parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from examples.workloads.networks import mlp
from examples.workloads.workload import Case, Workload


def quadratic_form(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Mean square of vᵀJv at points x and directions v, both (batch, dim), by full Jacobians."""
    jacobians = vmap(jacrev(net))(x)
    return torch.einsum("ni,nij,nj->n", v, jacobians, v).square().mean()


def quadratic_form_by_rows(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """`quadratic_form`, the Jacobians stacked from a gradient for each output; x requires grad."""
    outputs = net(x).sum(0)
    rows = [torch.autograd.grad(u, x, create_graph=True)[0] for u in outputs]
    jacobians = torch.stack(rows, dim=1)
    return (v * (jacobians @ v[:, :, None])[..., 0]).sum(1).square().mean()


def batch_norm_of_jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """‖J‖² per point, of the Jacobian of the whole batch: (batch, outputs, batch, inputs)."""
    return jacrev(net)(x).square().sum() / len(x)


def func_norm_of_jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """`batch_norm_of_jacobian` as one writes it who knows that the points do not mix."""
    return vmap(jacrev(net))(x).square().sum() / len(x)


def per_sample(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return ∂u/∂θ at each point, by parameter: (batch, *its shape)."""
    parameters = dict(net.named_parameters())

    def value(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, parameters, (x[None],))[0, 0]

    return vmap(grad(value), (None, 0))(parameters, x)


def sensitivity(net: nn.Module, x: Tensor) -> Tensor:
    """Mean over points (batch, dim) of ‖∂u/∂θ‖²."""
    return (
        torch.stack([g.flatten(1).square().sum(1) for g in per_sample(net, x).values()])
        .sum(0)
        .mean()
    )


def gram(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Mean square distance of the Gram matrix of ∂u/∂θ, the empirical tangent kernel, to a target
    (batch, batch)."""
    rows = torch.cat([g.flatten(1) for g in per_sample(net, x).values()], dim=1)
    return (rows @ rows.T - target).square().mean()


def _forward(net: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: net(x)


def hutchinson_full(full: bool) -> list[Case]:
    """One product is asked of each Jacobian."""
    net, x = mlp([32, 128, 128, 32]), torch.randn(8192 if full else 64, 32).requires_grad_()
    args, forward = (net, x, torch.randn(len(x), 32).sign()), _forward(net, x)
    return [
        Case("vmap(jacrev)", quadratic_form, args, forward, flops_over_f=6.3),
        Case("rows", quadratic_form_by_rows, args, forward, quadratic_form, 6.3),
    ]


def block_jacobian(full: bool) -> list[Case]:
    """Nearly all of the Jacobian is zero."""
    net, x = mlp([16, 128, 128, 16]), torch.randn(1024 if full else 64, 16)
    args, figure = (net, x), 3 * 16 + 3.5
    loss, func = batch_norm_of_jacobian, func_norm_of_jacobian
    return [Case("‖J‖²", loss, args, _forward(net, x), func, figure)]


def parameter_jacobian(full: bool) -> list[Case]:
    """Gradients of each sample in all parameters, summed up at once."""
    net, x = mlp([1, 64, 64, 1]), torch.randn(1024 if full else 256, 1)
    target, forward = torch.eye(len(x)), _forward(net, x)
    return [
        Case("Σ‖∂u/∂θ‖²", sensitivity, (net, x), forward),
        Case("Gram matrix", gram, (net, x, target), forward),
    ]


WORKLOADS = [
    Workload(15, "hutchinson_full", "vᵀJv", hutchinson_full),
    Workload(16, "block_jacobian", "‖J‖² of a batch", block_jacobian),
    Workload(17, "parameter_jacobian", "∂u/∂θ of each sample", parameter_jacobian),
]
