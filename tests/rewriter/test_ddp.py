"""A decorated loss inside of a module that DistributedDataParallel wraps, as trainers do it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo_config
from torch.autograd import grad

from rewriter import NestedGradientWarning, OptimizedLoss, optimize_nested, specialising
from tests.oracle import relative_error

D = torch.float64
dist = torch.distributed


class Train(nn.Module):
    """A training step as the forward of a module."""

    def __init__(self, net: nn.Module, loss: Any) -> None:
        super().__init__()
        self.net, self.loss = net, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.net, x)


def loss(net: nn.Module, x: Tensor) -> Tensor:
    """A part of the graph that does not hold the forward pass would find zeros here."""
    u = net(x)
    (g,) = grad(u.sum(), x, create_graph=True, materialize_grads=True)
    return g.square().sum() + u.square().mean()


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net_and_points() -> tuple[nn.Module, Tensor]:
    """Parameters of more than one megabyte, where the first bucket of gradients ends."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 600), nn.Tanh(), nn.Linear(600, 600), nn.Tanh())
    net.append(nn.Linear(600, 1))
    return net.to(D), torch.randn(4, 8, dtype=D, requires_grad=True)


def assert_right(decorated: OptimizedLoss) -> None:
    net, x = net_and_points()
    expected = loss(net, x)
    grads = grad(expected, list(net.parameters()))
    value = nn.parallel.DistributedDataParallel(Train(net, decorated))(x)
    value.backward()
    assert relative_error(value, expected) < 1e-9
    for parameter, reference in zip(net.parameters(), grads, strict=True):
        assert relative_error(parameter.grad, reference) < 1e-9


@pytest.mark.usefixtures("group")
def test_one_graph() -> None:
    decorated = optimize_nested(loss, backend="eager", strict=True)
    assert_right(decorated)
    assert len(decorated.steps) == 1


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:Grad strides do not match")
def test_a_graph_in_pieces_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever cuts it; here Dynamo's optimizer for this wrapper, switched on once more."""
    capturing = specialising.capturing

    @contextlib.contextmanager
    def cutting(*args: Any, **kwargs: Any) -> Iterator[None]:
        with capturing(*args, **kwargs), dynamo_config.patch(optimize_ddp=True):
            yield

    monkeypatch.setattr(specialising, "capturing", cutting)
    decorated = optimize_nested(loss, backend="eager")
    with pytest.warns(NestedGradientWarning, match="was cut into pieces"):
        assert_right(decorated)
    assert not decorated.steps
