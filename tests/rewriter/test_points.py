"""Coordinates that are tensors of their own, as users separate them: numbers and prices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from tests.oracle import check, flops_per_forward

ROWS = 8


def network() -> nn.Sequential:
    """A network whose hidden layer is most of its work."""
    torch.manual_seed(3)
    layers = nn.Linear(2, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(48, 1)).double()


def points() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(ROWS, 2, dtype=torch.float64).requires_grad_()


def grad(values: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(values, x, torch.ones_like(values), create_graph=True)[0]


def laplacian(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    u = net(torch.cat([x, y], 1))
    return (grad(grad(u, x), x) + grad(grad(u, y), y) + u).square().mean()


def of_parts(parts: Callable[[Tensor], tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    def loss(net: nn.Module, xy: Tensor) -> Tensor:
        return laplacian(net, *parts(xy))

    return loss


def inputs(net: nn.Module, xy: Tensor) -> Tensor:
    x, y = (xy.detach()[:, k : k + 1].requires_grad_() for k in range(2))
    return laplacian(net, x, y)


def vectors(net: nn.Module, xy: Tensor) -> Tensor:
    """Without a second dimension."""
    x, y = xy.unbind(1)
    u = net(torch.stack([x, y], -1))
    return (grad(grad(u, x), x) + grad(grad(u, y), y) + u[:, 0]).square().mean()


def together(net: nn.Module, xy: Tensor) -> Tensor:
    """Both at once, of two outputs at once, and the mixed derivative."""
    x, y = xy.split(1, 1)
    u = net(torch.cat([x, y], 1))
    g = torch.autograd.grad([u.sum(), u.sin().sum()], [x, y], create_graph=True)
    (second,) = torch.autograd.grad(g[0].sum(), [x], create_graph=True)
    mixed = torch.autograd.grad(g[1].sum(), [x, y], create_graph=True)
    return (second + mixed[0] + 2 * mixed[1]).square().mean()


def scaled(net: nn.Module, xy: Tensor) -> Tensor:
    """Coordinates are scaled in the model; ``u_xy`` is differentiated at one after the other."""
    x, y = xy.split(1, 1)
    u = net(torch.cat([(x - 0.5) / 0.2, y.sin()], 1))
    return (grad(grad(u, x), y) + grad(grad(u, y), y)).square().mean()


SPELLINGS = {
    "inputs": inputs,
    "split": of_parts(lambda xy: xy.split(1, dim=1)),
    "tensor_split": of_parts(lambda xy: torch.tensor_split(xy, 2, dim=1)),
    "unbind": vectors,
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_laplacian_in_single_coordinates(name: str) -> None:
    """``2 + D`` vectors, as in the coordinates together: the bodies are one, at two points."""
    net, xy = network(), points()
    decorated = optimize_nested(SPELLINGS[name], backend="eager")
    assert {site.strategy for site in decorated.explain(net, xy).sites} == {"taylor"}
    assert flops_per_forward(decorated, net, xy) <= 6 + 3 * 2 + 0.5


@pytest.mark.parametrize("loss", [inputs, together, scaled])
def test_numbers(loss: Callable[..., Tensor]) -> None:
    net, xy = network(), points()
    report = check(loss, [net], xy, strategy="taylor").explain(net, xy)
    assert {site.strategy for site in report.sites} == {"taylor"}


def tied(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Rows are apart at x, and mix at y."""
    u = net(torch.tanh(x @ y))
    return grad(grad(u, x)[:, 0], y).square().mean()


def test_rows_that_mix_at_one_point() -> None:
    net, y = network(), points()
    x = torch.randn(ROWS, ROWS, dtype=torch.float64).requires_grad_()
    report = check(tied, [net], x, y).explain(net, x, y)
    reasons = [c.reason for s in report.sites for c in s.candidates if c.strategy == "taylor"]
    assert any("rows mix at aten::mm" in reason for reason in reasons), reasons


def inner(net: nn.Module, xy: Tensor) -> Tensor:
    """A value that an inner derivative hands out is differentiated at the other coordinate."""
    x, y = xy.split(1, 1)
    u = net(torch.cat([x, y], 1))
    flux = u + 2 * grad(u, x)
    return grad(grad(flux, y), y).square().mean()


def test_value_of_an_inner_derivative() -> None:
    check(inner, [network()], points(), strategy="taylor")


def at_a_number(net: nn.Module, xy: Tensor) -> Tensor:
    """The point is made inside: its one value is known to the trace, and is no constant of it."""

    def energy(scale: Tensor) -> Tensor:
        return net(xy * scale.square()).sin().sum()

    return torch.func.hessian(energy)(torch.tensor(0.5, dtype=xy.dtype)).sum()


def test_point_of_one_number() -> None:
    check(at_a_number, [network()], points())
