"""Contractions of whole Hessians and of nested ones: numbers, prices, and what is not built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.fx import Graph

from passes.graph import value_of
from rewriter import OptimizedLoss, optimize_nested
from tests.oracle import check, flops_per_forward
from tests.versions import forward_mode_of_open_sizes

DIM, ROWS = 7, 6


def network(
    dim: int = DIM, outputs: int = 1, activation: Callable[[], nn.Module] = nn.Tanh
) -> nn.Sequential:
    """A network whose hidden layer is most of its work."""
    torch.manual_seed(3)
    layers = nn.Linear(dim, 48), activation(), nn.Linear(48, 48), activation()
    return nn.Sequential(*layers, nn.Linear(48, outputs)).double()


def points(dim: int = DIM) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(ROWS, dim, dtype=torch.float64).requires_grad_()


def grad(values: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), x, create_graph=True)[0]


def by_rows(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x), x)
    return torch.stack([grad(g[:, d], x) for d in range(x.shape[1])], 1)


def by_transform(full: Callable[..., Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    def rows(net: nn.Module, x: Tensor) -> Tensor:
        parameters: dict[str, Tensor] = dict(net.named_parameters())
        return vmap(full(lambda x: functional_call(net, parameters, (x,)).squeeze()))(x)

    return rows


def _graph(decorated: OptimizedLoss, *args: Any) -> Graph:
    module = decorated.explain(*args).graph
    assert module is not None
    return module.graph


def assert_no_hessian(decorated: OptimizedLoss, *args: Any) -> None:
    """No tensor of the step has two dimensions of the point's."""
    graph = _graph(decorated, *args)
    shapes = [value_of(n).shape for n in graph.nodes if isinstance(value_of(n), Tensor)]
    assert not [shape for shape in shapes if list(shape).count(DIM) > 1]


HESSIANS = {
    "rows": by_rows,
    "hessian": by_transform(hessian),
    "jacrev of jacrev": by_transform(lambda f: jacrev(jacrev(f))),
}
PRODUCTS = {
    "einsum": lambda full, v: torch.einsum("nij,nj->ni", full, v),
    "bmm from the left": lambda full, v: torch.bmm(v[:, None], full)[:, 0],
    "mul and sum": lambda full, v: (full * v[:, None]).sum(2),
}


@pytest.mark.parametrize(
    ("full", "product"),
    [("rows", "einsum"), ("hessian", "bmm from the left"), ("jacrev of jacrev", "mul and sum")],
)
def test_hessian_times_vector(full: str, product: str) -> None:
    """One derivative of a gradient along v, in place of D of them."""

    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return PRODUCTS[product](HESSIANS[full](net, x), v).square().mean()

    net, x, v = network(), points(), torch.randn(ROWS, DIM, dtype=torch.float64)
    decorated = check(loss, [net], x, v, strategy="taylor")
    assert flops_per_forward(decorated, net, x, v) <= 12.5
    assert_no_hessian(decorated, net, x, v)


def test_hessian_times_thin_matrix() -> None:
    """As many derivatives of the gradient as there are columns."""

    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return (by_transform(hessian)(net, x) @ v).square().mean()

    net, x, v = network(), points(), torch.randn(ROWS, DIM, 2, dtype=torch.float64)
    decorated = check(loss, [net], x, v, strategy="taylor")
    assert flops_per_forward(decorated, net, x, v) <= 6 * (1 + 2) + 0.5
    assert_no_hessian(decorated, net, x, v)


@forward_mode_of_open_sizes
def test_open_batch() -> None:
    """Unit vectors for each row of a batch of any size are known to be such."""

    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("nij,nj->ni", by_transform(hessian)(net, x), v).square().mean()

    net, x, v = network(), points(), torch.randn(ROWS, DIM, dtype=torch.float64)
    decorated = optimize_nested(loss, backend="eager", dynamic=True)
    assert {site.strategy for site in decorated.explain(net, x, v).sites} == {"taylor"}
    assert flops_per_forward(decorated, net, x, v) <= 12.5


@pytest.mark.parametrize("full", ["rows", "hessian"])
def test_along_columns(full: str) -> None:
    """``vᵀHv`` for each column of a thin matrix: value, and two coefficients for each."""

    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("nij,nik,njk->nk", HESSIANS[full](net, x), v, v).square().mean()

    net, x, v = network(), points(), torch.randn(ROWS, DIM, 2, dtype=torch.float64)
    decorated = check(loss, [net], x, v, strategy="taylor")
    assert flops_per_forward(decorated, net, x, v) <= 3 * (1 + 2 * 2)
    assert_no_hessian(decorated, net, x, v)


def from_hessian(net: nn.Module, x: Tensor) -> Tensor:
    """``vᵀ H v`` with v computed from the point, and the gradient's own rows."""
    v = x.detach().sin()
    return torch.einsum("ni,nij,nj->n", v, by_transform(hessian)(net, x), v).square().mean()


def from_product(net: nn.Module, x: Tensor) -> Tensor:
    """``vᵀ (H v)`` with v cut off inside of what is differentiated."""
    v = x.detach()
    return (grad((grad(net(x), x) * v).sum(1), x) * v).sum(1).square().mean()


@pytest.mark.parametrize("loss", [from_hessian, from_product])
def test_along_what_is_computed(loss: Callable[..., Tensor]) -> None:
    """Value, one tangent, one second coefficient, three times with the gradient."""
    net, x = network(), points()
    decorated = check(loss, [net], x, strategy="taylor")
    assert flops_per_forward(decorated, net, x) <= 9
    assert_no_hessian(decorated, net, x)


def all_second(net: nn.Module, x: Tensor) -> Tensor:
    return (by_transform(hessian)(net, x) - 1).square().mean() + net(x).square().mean()


def all_second_by_loop(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x)[:, 1], x)
    return sum(((grad(g[:, d], x) - 1).square().mean() for d in range(2)), net(x).square().mean())


@pytest.mark.parametrize(
    ("loss", "activation"),
    [(all_second_by_loop, nn.ReLU), (all_second, nn.LeakyReLU), (all_second, nn.Hardtanh)],
)
def test_piecewise_linear(loss: Callable[..., Tensor], activation: Callable[[], nn.Module]) -> None:
    """Second derivatives that are zero cost nothing: three forward passes are the data loss's."""
    net, x = network(2, 2, activation), points(2)
    decorated = check(loss, [net], x)
    assert flops_per_forward(decorated, net, x) <= 3
    # Forward; back to weights, activations and the point.
    assert _products(decorated, net, x) == 3 + 3 + 3


def _products(decorated: OptimizedLoss, *args: Any) -> int:
    products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}
    return sum(node.target in products for node in _graph(decorated, *args).nodes)


def sampled(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x), x)
    return torch.stack([grad(g[:, d], x)[:, d] for d in (3, 17, 4)]).sum(0).square().mean()


def picked(net: nn.Module, x: Tensor, dims: Tensor) -> Tensor:
    g = grad(net(x), x).index_select(1, dims)
    parts = [grad(g[:, i], x)[:, dims][:, i] for i in range(len(dims))]
    return torch.stack(parts).sum(0).square().mean()


def picked_one_by_one(net: nn.Module, x: Tensor, dims: Tensor) -> Tensor:
    """A position of the indices is the same one, whether it is selected or sliced."""
    g, total = grad(net(x), x)[:, dims], torch.zeros_like(x[:, 0])
    for k in range(len(dims)):
        total = total + grad(g[:, k], x)[:, dims[k : k + 1]].sum(1)
    return total.square().mean()


@pytest.mark.parametrize(
    ("loss", "dims"),
    [(sampled, []), (picked, [[3, 17, -1]]), (picked_one_by_one, [[3, 17, 4]])],
)
def test_sampled_dimensions(loss: Callable[..., Tensor], dims: list[list[int]]) -> None:
    """Directions are repeated for each row after the first layer, not before: ``2 + S`` vectors
    behind it, and one before."""
    wide, args = 256, [torch.tensor(d).abs() for d in dims]
    net, x = network(wide), points(wide)
    decorated = check(loss, [net], x, *args, strategy="taylor")
    first, rest = 2 * ROWS * wide * 48, 2 * ROWS * (48 * 48 + 48)
    limit = 3 * first + 3 * (2 + 3) * rest + 3 * 3 * 2 * wide * 48
    assert decorated.explain(net, x, *args).flops <= limit


def of_outputs(net: nn.Module, x: Tensor) -> Tensor:
    """A differential equation for each of several functions of the same coordinates."""
    u = net(x)
    residuals = []
    for m in range(2):
        g = grad(u[:, m], x)
        residuals.append(grad(g[:, 0], x)[:, 0] + g[:, 1] - u[:, m])
    return torch.stack(residuals).square().mean()


def test_several_outputs() -> None:
    """One pass with the directions of one function: 1 + 2 + 1 vectors for all of them."""
    net, x = network(2, 2), points(2)
    decorated = check(of_outputs, [net], x, strategy="taylor", dynamic=True)
    assert flops_per_forward(decorated, net, x) <= 3 * 4


def laplacian(values: Tensor, x: Tensor) -> Tensor:
    g = grad(values, x)
    return sum((grad(g[:, d], x)[:, d] for d in range(x.shape[1])), torch.zeros(()))


def biharmonic(net: nn.Module, x: Tensor) -> Tensor:
    return laplacian(laplacian(net(x)[:, 0], x), x).square().mean()


@pytest.mark.parametrize(
    ("dim", "vectors"), [(2, 1 + 3 * 4 + 1), (3, (2 + 3) ** 2), (5, (2 + 5) ** 2)]
)
def test_biharmonic(dim: int, vectors: int) -> None:
    """Fourth derivatives along few directions, or Taylor mode over Taylor mode, whichever is
    cheaper."""
    net, x = network(dim), points(dim)
    decorated = check(biharmonic, [net], x, strategy="taylor")
    assert flops_per_forward(decorated, net, x) <= 3 * vectors


def flux(net: nn.Module, x: Tensor) -> Tensor:
    """``∂(u ∂u/∂x)/∂x``: a product of derivatives is differentiated."""
    u = net(x)[:, 0]
    return grad(u * grad(u, x)[:, 0], x)[:, 0].square().mean()


def test_derivative_of_a_product() -> None:
    net, x = network(2), points(2)
    decorated = check(flux, [net], x, strategy="taylor")
    assert {site.strategy for site in decorated.explain(net, x).sites} == {"taylor"}
