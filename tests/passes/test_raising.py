"""Derivatives inside of derivatives are read once each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.contraction import raising
from tests.oracle import check


def _natural_step(net: nn.Module, x: Tensor) -> Tensor:
    """Conjugate gradients: each product's direction is computed from the one before."""
    params = list(net.parameters())
    grads = torch.autograd.grad(net(x).square().mean(), params, create_graph=True)
    v: list[Any] = [g.detach() for g in grads]
    for _ in range(4):
        dot = sum((g * d).sum() for g, d in zip(grads, v, strict=True))
        products = torch.autograd.grad(dot, params, create_graph=True)
        v = [d - 0.1 * p for d, p in zip(v, products, strict=True)]
    return sum((g * d).sum() for g, d in zip(grads, v, strict=True))


@pytest.mark.slow
def test_products_of_products_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = raising.Raised.__init__

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        made.append(1)
        assert len(made) < 400, "bodies are read again for each point around them"
        original(self, *args, **kwargs)

    monkeypatch.setattr(raising.Raised, "__init__", counted)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    check(_natural_step, [net], torch.randn(4, 2, dtype=torch.float64))
    assert made
