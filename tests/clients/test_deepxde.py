"""DeepXDE trains a tower: derivatives by `dde.grad`, steps by `dde.Model`."""

from __future__ import annotations

import pytest
import torch

from tests.clients.common import check, check_captured, check_float32, example, towered

clients = example("deepxde", "client_deepxde")

SIZES = {
    "burgers": (clients.burgers, {"points": 60, "width": 8, "depth": 2}),
    "beam": (clients.beam, {"points": 10, "width": 8, "depth": 2}),
}


@pytest.mark.parametrize("name", SIZES)
def test_float64(name: str) -> None:
    make, sizes = SIZES[name]
    check_captured(check(make, **sizes))


@pytest.mark.parametrize("name", SIZES)
def test_float32(name: str) -> None:
    make, sizes = SIZES[name]
    check_float32(make, **sizes)


def test_predictions() -> None:
    """`Model.predict` calls the network in eval mode, with nothing to differentiate."""
    client = clients.burgers(towered, torch.float64, points=20, width=4, depth=1)
    points = torch.rand(5, 2, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(client.net(points), type(client.net).forward(client.net, points))
