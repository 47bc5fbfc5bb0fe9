"""Points of another width in the same process, whose size Dynamo makes a symbol: Taylor mode
stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

from rewriter import optimize_nested
from tests.oracle import assert_same, outcome
from tests.versions import forward_mode_of_open_sizes

ROWS, HIDDEN = 8, 48


def grad(values: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(values.sum(), x, create_graph=True)[0]


class Free(nn.Module):
    """A network of weights that are no parameters: nothing of it has a fixed size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, 1)
        self.weights = [torch.randn(*s, dtype=torch.float64).requires_grad_() for s in sizes]

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.weights
        for weight in hidden:
            x = torch.tanh(x @ weight)
        return x @ last


def network(width: int) -> nn.Module:
    layers = nn.Linear(width, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(HIDDEN, 1)).double()


def columns(net: nn.Module, x: Tensor) -> Tensor:
    """The Laplacian in two of the coordinates."""
    g = grad(net(x), x)
    return (grad(g[:, 0], x)[:, 0] + grad(g[:, 1], x)[:, 1]).square().mean()


def traces(net: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(net.named_parameters())
    full = vmap(hessian(lambda x: functional_call(net, parameters, (x,))[0]))(x)
    return full.diagonal(dim1=1, dim2=2).sum(1).square().mean()


@pytest.mark.parametrize(
    ("loss", "made", "directions"),
    [
        (columns, Free, lambda width: 2),
        pytest.param(traces, network, lambda width: width, marks=[forward_mode_of_open_sizes]),
    ],
)
def test_widths(
    loss: Callable[..., Tensor],
    made: Callable[[int], nn.Module],
    directions: Callable[[int], int],
) -> None:
    """A graph for each width, each in Taylor mode at its price."""
    torch.manual_seed(3)
    decorated = optimize_nested(loss, backend="eager")
    for number, width in enumerate((2, 3, 4), start=1):
        net, x = made(width), torch.randn(ROWS, width, dtype=torch.float64).requires_grad_()
        mine, reference = (outcome(f, [net], (x,), {}) for f in (decorated, loss))
        assert_same(mine, reference)
        assert len(decorated.steps) == number
        forward = 2 * ROWS * (width * HIDDEN + HIDDEN * HIDDEN + HIDDEN)
        flops = decorated.explain(net, x).flops
        assert flops is not None
        assert flops <= (6 + 3 * directions(width) + 1) * forward


def test_marked_width() -> None:
    """A width that the user keeps open is not fixed: a graph for all of them."""
    decorated = optimize_nested(columns, backend="eager")
    for width in (2, 3):
        net, x = Free(width), torch.randn(ROWS, width, dtype=torch.float64).requires_grad_()
        torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(net.weights[0], 0)
        value, expected = decorated(net, x), columns(net, x)
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=0.0)
    assert len(decorated.steps) == 1
