"""The recipe for a gradient penalty with a `GradScaler` is one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.autograd import grad

from rewriter import optimize_nested

X = torch.linspace(-1, 1, 6).reshape(3, 2)


def penalty(net: nn.Module, scaler: GradScaler, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    loss = net(x).square().sum()
    (g,) = grad(scaler.scale(loss), x, create_graph=True)
    loss = loss + (g / scaler.get_scale()).norm()
    return loss * 2 if scaler.is_enabled() else loss


def of_several(net: nn.Module, scaler: GradScaler, x: Tensor) -> Tensor:
    first, (second,) = scaler.scale((penalty(net, scaler, x), [net(x).sum()]))  # pyright: ignore
    return scaler.scale(first + second)  # pyright: ignore


@pytest.mark.parametrize("loss", [penalty, of_several])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_scaler_in_a_loss(loss: Any, enabled: bool) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    made = optimize_nested(loss, backend="eager")
    for _ in range(2):  # each scaler makes its scale at the first call
        scalers = [GradScaler("cpu", 8.0, enabled=enabled) for _ in range(2)]
        for factor in (4.0, 2.0, 16.0):
            found = []
            for scaler, function in zip(scalers, (made, loss), strict=True):
                value = function(net, scaler, X)
                found.append((value, *grad(value, list(net.parameters()))))
                scaler.update(factor)
            torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
            states = [scaler.state_dict() for scaler in scalers]
            assert states[0] == states[1]
    assert len(made.steps) == 1 + enabled and not made.refusals
