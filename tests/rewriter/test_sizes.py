"""Losses whose derivatives PyTorch cannot compute for open sizes are captured for each size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional, grad
from torch.nn.functional import cross_entropy

from rewriter import optimize_nested
from tests.oracle import assert_same, outcome


def row_by_row(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """A seed is a constant of the graph, with an example value that `make_fx` makes for it."""
    x = x.detach().requires_grad_()
    logits = net(x)
    total = cross_entropy(logits, labels)
    for k in range(logits.shape[1]):
        seed = torch.zeros_like(logits)
        seed[:, k] = 1
        total = total + grad(logits, x, seed, create_graph=True)[0].square().mean()
    return total


def at_once(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    logits = net(x)
    seeds = torch.eye(logits.shape[1], dtype=x.dtype).unsqueeze(1).expand(-1, len(x), -1)
    (rows,) = grad(logits, x, seeds, create_graph=True, is_grads_batched=True)
    return cross_entropy(logits, labels) + rows.square().mean()


def of_a_sum(net: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    jacobian: Callable[..., Tensor] = functional.jacobian  # pyright: ignore[reportAssignmentType]
    rows = jacobian(lambda z: net(z).sum(0), x, create_graph=True, vectorize=True)
    return cross_entropy(net(x), labels) + rows.square().mean()


@pytest.mark.parametrize("loss", [row_by_row, at_once, of_a_sum])
def test_jacobian_of_a_classifier(loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    decorated = optimize_nested(loss, backend="eager")
    for n in (6, 4, 7):
        given = torch.randn(n, 5, dtype=torch.float64), torch.arange(n) % 3
        assert_same(outcome(decorated, [net], given, {}), outcome(loss, [net], given, {}))
    assert decorated.refusals == []
