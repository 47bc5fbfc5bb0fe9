"""Contracted higher derivatives, as users write them: numbers and prices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacfwd, jacrev, vmap

from passes.price import FlopCounter, evaluated, price, size_hints
from rewriter import optimize_nested
from tests.oracle import assert_same, check, flops_per_forward, outcome

DIM = 4


def network(activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """A network whose hidden layer is most of its work."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(DIM, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 1)
    )
    return net.double()


def points() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(16, DIM, dtype=torch.float64).requires_grad_()


def grad(values: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), x, create_graph=True)[0]


def loop(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """Weighted Laplacian, as PINN codes write it."""
    u = net(x)
    (g,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    total = torch.zeros_like(u[:, 0])
    for d in range(DIM):
        one = torch.ones_like(g[:, d])
        (second,) = torch.autograd.grad(g[:, d], x, one, create_graph=True)
        total = total + w[d] * second[:, d]
    return (total - 1).square().mean()


def columns(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """The same by slices of sums."""
    u = net(x)
    parts = [grad(grad(u, x)[:, d : d + 1], x)[:, d : d + 1] * w[d] for d in range(DIM)]
    return (torch.cat(parts, 1).sum(1) - 1).square().mean()


def stacked(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
    """The trace of a Hessian that is stacked from rows."""
    g = grad(net(x), x)
    full = torch.stack([grad(g[:, d], x) for d in range(DIM)], 1)
    return ((full.diagonal(dim1=1, dim2=2) * w).sum(1) - 1).square().mean()


def by_transform(full: Callable[..., Any]) -> Callable[..., Tensor]:
    def loss(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        parameters = dict(net.named_parameters())
        second = vmap(full(lambda x: functional_call(net, parameters, (x,))[0]))(x)
        return ((second.diagonal(dim1=1, dim2=2) * w).sum(1) - 1).square().mean()

    return loss


def weights() -> Tensor:
    return torch.tensor([0.7, -1.2, 0.4, 2.0], dtype=torch.float64)


LAPLACIANS = {
    "loop": loop,
    "columns": columns,
    "stacked": stacked,
    "hessian": by_transform(hessian),
    "jacfwd of jacrev": by_transform(lambda f: jacfwd(jacrev(f))),
}


@pytest.mark.parametrize("name", LAPLACIANS)
def test_laplacian(name: str) -> None:
    """``2 + D`` vectors: the value, D tangents, and one sum of second derivatives."""
    net, x, w = network(), points(), weights()
    decorated = check(LAPLACIANS[name], [net], x, w)
    report = decorated.explain(net, x, w)
    assert "taylor" in {site.strategy for site in report.sites}
    with torch.no_grad():
        assert flops_per_forward(decorated, net, x, w) <= 6 + 3 * DIM + 1


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Softplus, nn.Mish])
def test_activations(activation: Callable[[], nn.Module]) -> None:
    check(along_vectors, [network(activation)], points(), points().detach(), strategy="taylor")


def burgers(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    g = grad(u, x)
    u_x, u_t = g[:, :1], g[:, 1:2]
    return (u_t + u * u_x - 0.1 * grad(u_x, x)[:, :1]).square().mean()


def mixed(net: nn.Module, x: Tensor) -> Tensor:
    """Mixed second derivatives, one of which is in a factor of another."""
    u = net(x)
    row = grad(grad(u, x)[:, 1], x)
    return (row[:, 0] * 0.3 + row[:, 2].sin() * u[:, 0]).square().mean()


def chain(net: nn.Module, x: Tensor) -> Tensor:
    """``u u_x + u_xxx + u_xxxx``."""
    u = net(x)
    u_x = grad(u, x)[:, :1]
    u_xxx = grad(grad(u_x, x)[:, :1], x)[:, :1]
    return (u * u_x + u_xxx + grad(u_xxx, x)[:, :1]).square().mean()


def mixed_third(net: nn.Module, x: Tensor) -> Tensor:
    """``u_xxy + u_xyz``: pure third derivatives along sums of directions."""
    second = grad(grad(net(x), x)[:, 0], x)
    return (grad(second[:, 0], x)[:, 1] + grad(second[:, 1], x)[:, 2]).square().mean()


def along_vectors(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """``vᵀHv``."""
    g = grad(net(x), x)
    hv = grad((g * v).sum(1), x)
    return (hv * v).sum(1).square().mean()


def row_weights(net: nn.Module, x: Tensor) -> Tensor:
    """Each row has weights of its own."""
    g = grad(net(x), x)
    total = sum(x[:, d] ** 2 * grad(g[:, d], x)[:, d] for d in range(3))
    return total.square().mean()


def two_networks(net: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    """A sum over two operands."""
    total = 0.0
    for scale, u in ((1.0, net(x)), (2.0, other(x).exp())):
        g = grad(u, x)
        total = total + sum(scale * grad(g[:, d], x)[:, d] for d in range(2))
    return total.square().mean()


def biharmonic(net: nn.Module, x: Tensor) -> Tensor:
    def laplacian(values: Tensor) -> Tensor:
        g = grad(values, x)
        return sum((grad(g[:, d], x)[:, d] for d in range(2)), torch.zeros(()))

    return laplacian(laplacian(net(x)[:, 0])).square().mean()


def one_row(net: nn.Module, x: Tensor) -> Tensor:
    """Boundary conditions: second derivatives at single rows."""
    row = grad(grad(net(x), x)[:, 0], x)
    return row[0, 0] ** 2 + row[3, 0].sin() * row[-1, 0]


def one_row_inside(net: nn.Module, x: Tensor) -> Tensor:
    """The rows are chosen before the second derivative is taken."""
    return grad(grad(net(x), x)[1, 0], x)[:, 0].square().sum()


def gradient_too(net: nn.Module, x: Tensor) -> Tensor:
    """The whole gradient is used beside the Laplacian."""
    g = grad(net(x), x)
    return (sum(grad(g[:, d], x)[:, d] for d in range(DIM)) + g.square().sum(1)).square().mean()


@pytest.mark.parametrize(
    "loss", [burgers, mixed, chain, mixed_third, row_weights, one_row, one_row_inside]
)
def test_numbers(loss: Callable[..., Tensor]) -> None:
    """In Taylor mode, cheaper or not."""
    check(loss, [network()], points(), strategy="taylor")


@pytest.mark.parametrize("loss", [gradient_too, biharmonic])
def test_numbers_of_the_cheapest(loss: Callable[..., Tensor]) -> None:
    check(loss, [network()], points())


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    """Second derivatives of one of several outputs."""
    full = vmap(hessian(lambda z: net(z)))(x)
    return (full[:, 0, 1, 1] + full[:, 2, 0, 0] * full[:, 1, 2, 2]).square().sum()


def loops(net: nn.Module, x: Tensor) -> Tensor:
    parts = [
        grad(grad(net(x)[:, k], x)[:, d], x)[:, d].square().sum() for k in (0, 2) for d in (0, 1)
    ]
    return torch.stack(parts).sum()


def test_one_of_several_outputs() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIM, 24), nn.Tanh(), nn.Linear(24, 3)).double()
    check(outputs, [net], points())
    check(loops, [net], points(), strategy="taylor")


@pytest.mark.parametrize("name", ["columns", "hessian"])
def test_open_sizes(name: str) -> None:
    """Identities are not known to be such: what is a direction then has an index of its own."""
    check(LAPLACIANS[name], [network()], points(), weights(), dynamic=True)


@pytest.mark.parametrize("name", ["loop", "stacked"])
def test_another_batch(name: str) -> None:
    """A row costs the same where the number of rows is a symbol."""
    loss, net, x, w = LAPLACIANS[name], network(), points().detach(), weights()
    decorated = optimize_nested(loss, backend="eager")
    first, second = x.clone().requires_grad_(), x[:12].clone().requires_grad_()
    closed, opened = (decorated.explain(net, rows, w) for rows in (first, second))
    assert opened.flops_formula.free_symbols and not closed.flops_formula.free_symbols
    assert opened.flops * 16 == closed.flops * 12
    assert_same(outcome(decorated, [net], (second, w), {}), outcome(loss, [net], (second, w), {}))


def test_value_alone() -> None:
    """Without a gradient of the loss: the value, D tangents, one sum of second derivatives."""

    def value(net: nn.Module, x: Tensor, w: Tensor) -> Tensor:
        return loop(net, x, w).detach()

    net, x, w = network(), points(), weights()
    (step,) = check(value, [net], x, w).steps
    graph = step.rewritten.value_graph()
    with FlopCounter() as forward, torch.no_grad():
        net(x)
    assert evaluated(price(graph).flops, size_hints(graph)) <= (2 + DIM) * forward.flops


def test_value_without_create_graph() -> None:
    """As a local energy is written: nothing is differentiated afterwards. A gradient that a site
    reads stays as constant as it was."""

    def energy(net: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        g = grad(net(x), x)
        rows = [torch.autograd.grad(g[:, d].sum(), x, retain_graph=True)[0] for d in range(DIM)]
        total = sum(row[:, d] for d, row in enumerate(rows))
        (constant,) = torch.autograd.grad(net(x).sum(), x)
        (late,) = torch.autograd.grad((constant * x).square().sum(), x)
        return -0.5 * (total + g.square().sum(1)).detach(), total, total.detach(), late

    net, x = network(), points()
    loss = optimize_nested(energy, backend="eager")
    for mine, reference in zip(loss(net, x), energy(net, x), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-9, atol=1e-12)
        assert not mine.requires_grad
    (step,) = loss.steps
    graph = step.rewritten.value_graph()
    with FlopCounter() as forward, torch.no_grad():
        net(x)
    assert evaluated(price(graph).flops, size_hints(graph)) <= (4 + DIM) * forward.flops


def test_along_vectors() -> None:
    net, x = network(), points()
    v = torch.randn(16, DIM, dtype=torch.float64)
    report = check(along_vectors, [net], x, v).explain(net, x, v)
    assert {site.strategy for site in report.sites} == {"taylor"}


def test_two_networks() -> None:
    check(two_networks, [network(), network(nn.Sigmoid)], points(), strategy="taylor")


def test_chain_is_quadratic_in_the_order() -> None:
    """``u_xxxx``: four coefficients beside the value, three times with the gradient."""
    net, x = network(), points()
    assert flops_per_forward(optimize_nested(chain, backend="eager"), net, x) <= 16


class Centred(nn.Module):
    """Less the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def test_rows_that_mix() -> None:
    """A batch's mean ties rows together: one row's second derivative is not its own."""
    net = network()
    net = nn.Sequential(*net[:2], Centred(), *net[2:])
    x, w = points(), weights()
    report = check(loop, [net], x, w).explain(net, x, w)
    assert "taylor" not in {site.strategy for site in report.sites}
    considered = [c for site in report.sites for c in site.candidates if c.strategy == "taylor"]
    assert any("rows mix at aten::mean.dim" in c.reason for c in considered)
