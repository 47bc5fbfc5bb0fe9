"""Functions without a second derivative in PyTorch: the value as written, the gradient against
differences of the value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import optimize_nested, twice
from tests.rewriter.test_operators import linear, points, squared_gradient

_LABEL = torch.tensor([0, 3, 1, 2, 2, 0])
_LABELS = torch.tensor([[0, 3, -1, 1], [2, -1, 0, 0], [-1, 0, 1, 2]] * 2)

BODIES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "cdist": lambda m, x: torch.cdist(m(x)[:, :3], x[:4]),
    "cdist_to_itself": lambda m, x: torch.cdist(m(x), m(x)),
    "cdist_1": lambda m, x: torch.cdist(m(x)[:, :3], x, p=1.0).sin(),
    "cdist_3": lambda m, x: torch.cdist(m(x)[:, :3], x[:4], p=3.0),
    "pdist": lambda m, x: F.pdist(m(x)).tanh(),
    "hardsigmoid": lambda m, x: F.hardsigmoid(4 * m(x)) ** 3,
    "multi_margin": lambda m, x: F.multi_margin_loss(m(x), _LABEL, p=2, margin=0.7),
    "multilabel_margin": lambda m, x: F.multilabel_margin_loss(m(x), _LABELS, reduction="none"),
}

# PyTorch has these from 2.14 on.
DISTANCES = {"cdist", "cdist_to_itself", "cdist_1", "cdist_3", "pdist"}

# PyTorch's derivative of hardsigmoid has its 1/6 in float32.
EXACT = {"hardsigmoid": lambda m, x: (F.relu6(4 * m(x) + 3) / 6) ** 3}


@pytest.mark.parametrize("name", BODIES)
def test_second_derivative(name: str) -> None:
    loss = squared_gradient(BODIES[name])
    net, x = linear(), points()
    if name in DISTANCES and torch.__version__ >= "2.14":
        refused = contextlib.nullcontext()
    else:
        refused = pytest.raises(RuntimeError, match="not implemented")
    with refused:
        loss(net, x.clone()).backward()
    net.zero_grad()
    exact = squared_gradient(EXACT.get(name, BODIES[name]))
    decorated = optimize_nested(loss, backend="eager")
    value = decorated(net, x)
    torch.testing.assert_close(value, exact(net, x), rtol=1e-12, atol=1e-14)
    value.backward()
    torch.manual_seed(1)
    direction = [torch.randn_like(p) for p in net.parameters()]
    slope = sum((p.grad * v).sum() for p, v in zip(net.parameters(), direction, strict=True))

    def moved(step: float) -> float:
        other = linear()
        with torch.no_grad():
            for p, v in zip(other.parameters(), direction, strict=True):
                p += step * v
        return exact(other, x).item()

    h = 1e-4
    expected = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    assert slope.item() == pytest.approx(expected, rel=1e-8, abs=1e-10)


_ROWS = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.5, 1.5]])


@pytest.mark.parametrize(
    ("written_out", "original", "args"),
    [
        (twice.hardsigmoid, F.hardsigmoid, [torch.tensor([-4.0, -3.0, 0.5, 3.0, 4.0])]),
        (twice.cdist, torch.cdist, [torch.eye(3), torch.eye(3).double()]),
        (twice.pdist, F.pdist, [torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 2.0]])]),
        (twice.multi_margin_loss, F.multi_margin_loss, [_ROWS, torch.tensor([1, 0])]),
        (
            twice.multilabel_margin_loss,
            F.multilabel_margin_loss,
            [_ROWS, torch.tensor([[1, -1, 0], [2, 0, 0]])],
        ),
    ],
    ids=["hardsigmoid", "cdist", "pdist", "multi_margin", "multilabel_margin"],
)
def test_kinks(
    written_out: Callable[..., Tensor], original: Callable[..., Tensor], args: list[Tensor]
) -> None:
    """The same value, and the same derivative where there is none."""
    found = []
    for function in (written_out, original):
        x = args[0].double().requires_grad_()
        y = function(x, *args[1:])
        found.append((y.detach(), *grad((y * (1 + torch.arange(y.numel()).view_as(y))).sum(), x)))
    torch.testing.assert_close(*found)


def test_only_where_eager_refuses() -> None:
    """A loss that differentiates the distances once keeps PyTorch's own operator."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        (g,) = grad(net(p).tanh().sum(), p, create_graph=True)
        return g.square().sum() + torch.cdist(net(x), net(x + 1)).sum()

    report = optimize_nested(loss, backend="eager").explain(linear(), points())
    assert "_cdist_forward" in report.stages[0].text
