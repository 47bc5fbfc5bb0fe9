"""Functions of the same points, whose rows are not the first dimension: numbers and prices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.oracle import check

FUNCTIONS, POINTS, WIDTH, BASIS = 2, 8, 24, 10


class DeepONet(nn.Module):
    """Functions by their values (functions, 5), points (points, 2) → (functions, points)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.branch = nn.Linear(5, BASIS).double()
        self.trunk = nn.Sequential(
            *(nn.Linear(2, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh()),
            nn.Linear(WIDTH, BASIS),
        ).double()

    def forward(self, functions: Tensor, x: Tensor) -> Tensor:
        return self.branch(functions) @ self.trunk(x).T


def grad(values: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), x, create_graph=True)[0]


def heat(net: DeepONet, functions: Tensor, x: Tensor) -> Tensor:
    """``u_t − u u_xx`` of each function."""
    u, residuals = net(functions, x), []
    for row in u:
        g = grad(row, x)
        residuals.append(g[:, 1] - row * grad(g[:, 0], x)[:, 0])
    return torch.stack(residuals).square().mean()


def weighted(net: DeepONet, functions: Tensor, x: Tensor) -> Tensor:
    """A weighted sum over functions, differentiated once for all of them."""
    u = net(functions, x)
    g = grad(u * functions.detach()[:, :1], x)
    return (grad(u.sum(0).sin(), x)[:, 1] - grad(g[:, 0], x)[:, 0]).square().mean()


@pytest.mark.parametrize(("loss", "vectors"), [(heat, 1 + 2 + 1), (weighted, None)])
def test_all_functions_in_one_pass(loss: Callable[..., Tensor], vectors: int | None) -> None:
    """As many vectors go through the trunk, three times with the gradient, as one function has,
    and through the product with the branch."""
    net, x = DeepONet(), torch.rand(POINTS, 2, dtype=torch.float64).requires_grad_()
    functions = torch.randn(FUNCTIONS, 5, dtype=torch.float64)
    options: dict[str, Any] = {} if vectors else {"strategy": "taylor"}
    report = check(loss, [net], functions, x, **options).explain(net, functions, x)
    assert "taylor" in {site.strategy for site in report.sites}
    if vectors is None:
        return
    trunk = 2 * POINTS * (2 * WIDTH + WIDTH * WIDTH + WIDTH * BASIS)
    product = 2 * FUNCTIONS * POINTS * BASIS
    branch = 2 * FUNCTIONS * 5 * BASIS
    assert report.flops is not None
    assert report.flops <= 3 * (vectors * (trunk + product) + branch)
