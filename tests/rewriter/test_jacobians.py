"""Contracted Jacobians, as users write them: numbers, prices, and no Jacobian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacfwd, jacrev, vmap

from passes.graph import elements, value_of
from passes.price import FlopCounter
from rewriter import OptimizedLoss, Report
from tests.oracle import check

ROWS, DIM, HIDDEN = 8, 5, 6
Full = Callable[[nn.Module, Tensor], Tensor]
Use = Callable[[Tensor, Tensor], Tensor]


def network(n_in: int = DIM, n_out: int = DIM, *more: nn.Module) -> nn.Sequential:
    torch.manual_seed(3)
    hidden = [nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, n_out)]
    return nn.Sequential(nn.Linear(n_in, HIDDEN), nn.Tanh(), *more, *hidden).double()


def random(*shape: int) -> Tensor:
    torch.manual_seed(len(shape))
    return torch.randn(shape, dtype=torch.float64)


def of(net: nn.Module) -> Callable[[Tensor], Tensor]:
    parameters = dict(net.named_parameters())
    return lambda x: functional_call(net, parameters, (x,))


# Ways to write J[n, o, i].


def rows(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = net(x)
    found = [torch.autograd.grad(u[:, k].sum(), x, create_graph=True)[0] for k in range(u.shape[1])]
    return torch.stack(found, 1)


def functional(net: nn.Module, x: Tensor) -> Tensor:
    def summed(x: Tensor) -> Tensor:
        return net(x).sum(0)

    return torch.autograd.functional.jacobian(summed, x, create_graph=True).transpose(0, 1)


def reverse(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(jacrev(of(net)))(x)


def forward(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(jacfwd(of(net)))(x)


# Ways to write J[n, o, m, i].


def batch_reverse(net: nn.Module, x: Tensor) -> Tensor:
    return jacrev(of(net))(x)


def batch_forward(net: nn.Module, x: Tensor) -> Tensor:
    return jacfwd(of(net))(x)


def batch_functional(net: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(net, x, create_graph=True)


# What is asked of them.


def jv(J: Tensor, v: Tensor) -> Tensor:
    return (J @ v[..., None]).square().sum()


def vj(J: Tensor, v: Tensor) -> Tensor:
    return (v[:, None] @ J).square().mean()


def vjv(J: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("ni,nij,nj->n", v, J, v).square().sum()


def normal(J: Tensor, v: Tensor) -> Tensor:
    """A tangent, and a cotangent that is made of what it gives."""
    return (J.mT @ (J @ v[..., None])).square().sum()


def thin(J: Tensor, v: Tensor) -> Tensor:
    """Two directions at once, and a contraction with them from the other side."""
    two = torch.stack([v, v.sin()], 2)
    return (two.mT @ J @ two).square().sum()


def pairs(J: Tensor, v: Tensor) -> Tensor:
    """``⟨J, a bᵀ⟩`` and scaled, added, sliced, transposed Jacobians."""
    both = (J * v[:, :, None] * v.cos()[:, None]).sum((1, 2))
    more = (2 * J.mT - J / 3)[:, 1] @ v[0]
    return (both + more).square().sum()


def trace(J: Tensor, v: Tensor) -> Tensor:
    return (J.diagonal(dim1=1, dim2=2).sum(1) * v[:, 0]).square().sum()


def squares(J: Tensor, v: Tensor) -> Tensor:
    return J.pow(2).sum()


def product(J: Tensor, v: Tensor) -> Tensor:
    return (J * J).mean() + J.norm()


def of_rows(J: Tensor, v: Tensor) -> Tensor:
    """One penalty for each sample."""
    return J.abs().pow(3).sum((1, 2, 3)).square().sum() + (J / 2).square().sum((2, 3)).sin().sum()


def diagonal_blocks(J: Tensor, v: Tensor) -> Tensor:
    return (J.diagonal(dim1=0, dim2=2) + 1).square().sum() + torch.einsum(
        "nomi->noi", J
    ).sin().sum()


def block_products(J: Tensor, v: Tensor) -> Tensor:
    return torch.einsum("noni,ni->no", J, v).square().sum()


def contracted(full: Full, use: Use) -> Callable[..., Tensor]:
    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return use(full(net, x), v)

    return loss


def largest(report: Report) -> int:
    """Return the elements of the largest tensor of the step."""
    values = [value_of(node) for node in report.graph.graph.nodes]
    return max(elements(value) for value in values if isinstance(value, Tensor))


def checked(
    full: Full, use: Use, net: nn.Module, x: Tensor, v: Tensor, **options: Any
) -> tuple[OptimizedLoss, Report, float]:
    """Compare values and gradients; return the FLOPs in forward passes too."""
    loss = check(contracted(full, use), [net], x, v, **options)
    report = loss.explain(net, x, v)
    with FlopCounter() as counter, torch.no_grad():
        net(x)
    return loss, report, report.flops / counter.flops


# (Jacobian, use): 3 forward passes for each vector, and 3 for the value.
PRODUCTS = [
    (rows, vjv, 6.3), (rows, normal, 9), (functional, jv, 6), (functional, vj, 6),
    (reverse, vjv, 6.3), (reverse, normal, 9), (reverse, jv, 6), (forward, vj, 6),
    (forward, thin, 10), (reverse, pairs, 12),
]  # fmt: skip


@pytest.mark.parametrize(("full", "use", "limit"), PRODUCTS)
def test_products(full: Full, use: Use, limit: float) -> None:
    net, x, v = network(), random(ROWS, DIM), random(ROWS, DIM)
    _, report, flops = checked(full, use, net, x, v)
    assert {site.strategy for site in report.sites} == {"contraction"}
    assert flops <= limit
    assert largest(report) < ROWS * DIM * DIM


SMALLER = [
    (reverse, squares, 3, DIM), (reverse, product, 3, DIM), (forward, squares, DIM, 3),
    (batch_reverse, squares, 3, DIM), (batch_reverse, product, DIM, 3),
    (batch_forward, of_rows, 3, DIM), (batch_functional, diagonal_blocks, DIM, 3),
]  # fmt: skip


@pytest.mark.parametrize(("full", "use", "n_in", "n_out"), SMALLER)
def test_smaller_side(full: Full, use: Use, n_in: int, n_out: int) -> None:
    """Three vectors; of a batch's Jacobian the diagonal blocks only."""
    net, x = network(n_in, n_out), random(ROWS, n_in)
    _, report, flops = checked(full, use, net, x, x)
    assert {site.strategy for site in report.sites} == {"contraction"}
    assert flops <= 3 * 3 + 3.5
    assert largest(report) < ROWS * n_in * ROWS * n_out / 2
    assert largest(report) <= max(3 * ROWS * HIDDEN, ROWS * n_in * n_out)


def test_products_of_blocks() -> None:
    """One tangent in place of a Jacobian for each row."""
    net, x, v = network(), random(ROWS, DIM), random(ROWS, DIM)
    _, report, flops = checked(batch_reverse, block_products, net, x, v)
    assert flops <= 6
    assert largest(report) < ROWS * DIM * DIM


def divergence(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """As normalizing flows write it."""
    x = x.detach().requires_grad_()
    u = net(x)
    total = torch.zeros_like(u[:, 0])
    for d in range(DIM):
        total = total + torch.autograd.grad(u[:, d].sum(), x, create_graph=True)[0][:, d]
    return (total * v[:, 0]).square().sum() + u.square().sum()


def exact_trace(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    return trace(reverse(net, x), v)


@pytest.mark.parametrize("loss", [divergence, exact_trace])
def test_traces(loss: Callable[..., Tensor]) -> None:
    """A vector for each diagonal element."""
    net, x, v = network(), random(ROWS, DIM), random(ROWS, DIM)
    with FlopCounter() as counter, torch.no_grad():
        net(x)
    flops = check(loss, [net], x, v).explain(net, x, v).flops
    assert flops <= (3 * DIM + 3) * counter.flops


class Centred(nn.Module):
    """Less the mean over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


@pytest.mark.parametrize("layer", [Centred(), nn.BatchNorm1d(HIDDEN)], ids=["mean", "batch norm"])
def test_rows_that_mix(layer: nn.Module) -> None:
    """The blocks off the diagonal are not zero: the Jacobian stays as it is, and says why."""
    net, x = network(4, 3, layer), random(ROWS, 4)
    _, report, _ = checked(batch_functional, squares, net, x, x)
    (site,) = report.sites
    assert site.strategy == "reverse"
    (reason,) = [c.reason for c in site.candidates if c.strategy == "contraction"]
    operator = "mean.dim" if isinstance(layer, Centred) else "var_mean.correction"
    assert f"rows mix at aten::{operator}" in reason
    if not isinstance(layer, Centred):
        return  # forward mode has no rule for several tangents of a batch norm
    # The smaller side of all rows at once.
    _, report, flops = checked(batch_functional, squares, network(3, 8, layer), x[:, :3], x)
    assert report.sites[0].strategy == "contraction"
    assert flops <= 3 * ROWS * 3 + 3.5


def test_products_with_rows_that_mix() -> None:
    """A tangent needs no rows that are apart."""
    net, x, v = network(DIM, DIM, Centred()), random(ROWS, DIM), random(ROWS, DIM)

    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        J = batch_reverse(net, x)
        return (J * v[:, :, None, None] * v.cos()).sum((0, 1)).sum().square()

    report = check(loss, [net], x, v).explain(net, x, v)
    assert {site.strategy for site in report.sites} == {"contraction"}
    assert largest(report) < (ROWS * DIM) ** 2


@pytest.mark.parametrize("use", [vjv, pytest.param(normal, marks=[pytest.mark.slow])])
def test_open_sizes(use: Callable[..., Tensor]) -> None:
    net, v = network(), random(ROWS, DIM)
    decorated = check(contracted(reverse, use), [net], v, v, dynamic=True)
    report = decorated.explain(net, v, v)
    assert {site.strategy for site in report.sites} == {"contraction"}


def test_inside_of_a_gradient() -> None:
    """The score of an energy that holds ``vᵀJv``."""

    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        J = torch.stack(
            [torch.autograd.grad(net(x)[:, k].sum(), x, create_graph=True)[0] for k in range(2)], 1
        )
        energy = (v[:, None, :2] @ J @ v[..., None]).sum()
        return torch.autograd.grad(energy, x, create_graph=True)[0].square().sum()

    check(loss, [network(DIM, 2)], random(ROWS, DIM), random(ROWS, DIM))


def test_value_beside() -> None:
    """The value is used in the product's sum, and by itself."""

    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        J = reverse(net, x)
        return ((J @ v[..., None])[..., 0] + net(x)).square().sum() + J.pow(2).sum() + net(x).sum()

    net, x = network(3, DIM), random(ROWS, 3)
    report = check(loss, [net], x, x).explain(net, x, x)
    assert {site.strategy for site in report.sites} == {"contraction"}


def test_of_one_point() -> None:
    """No batch: there are no rows, and none are needed."""

    def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        J = torch.autograd.functional.jacobian(net, x, create_graph=True)
        K = jacfwd(of(net))(v)
        return (J @ v).square().sum() + (v @ K @ x).square()

    net, x, v = network(), random(DIM), random(1, DIM)[0]
    report = check(loss, [net], x, v).explain(net, x, v)
    assert {site.strategy for site in report.sites} == {"contraction"}
    assert largest(report) <= HIDDEN * HIDDEN


def test_as_cheap_as_it_can_be() -> None:
    """A Jacobian that is used as a whole, over its smaller side already."""
    net, x = network(DIM, 3), random(ROWS, DIM)
    _, report, _ = checked(reverse, squares, net, x, x)
    (site,) = report.sites
    assert site.strategy == "reverse"
    reasons = {c.strategy: c.reason for c in site.candidates}
    assert "as few vectors" in reasons["contraction"]


@pytest.mark.parametrize("way", [rows, functional, reverse, forward])
@pytest.mark.parametrize("use", [trace, jv, squares])
def test_of_no_samples(way: Full, use: Use) -> None:
    """A batch may be empty: the last of a data set, or what a mask leaves."""
    check(contracted(way, use), [network()], random(0, DIM), random(0, DIM))


def test_per_sample_of_no_samples() -> None:
    """Whose axes are another way around than the way they are written above."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        full = jacfwd(lambda z: net(z).sum(0))(x)
        return torch.einsum("kbk->bk", full).square().sum() + (full @ x[0:0].mT).sum()

    check(loss, [network()], random(0, DIM))


def test_in_parameters_of_no_samples() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        parameters = list(net.parameters())
        grads = torch.autograd.grad(net(x).square().sum(), parameters, create_graph=True)
        return sum((g.square().sum() for g in grads), torch.zeros(()))

    check(loss, [network()], random(0, DIM))
