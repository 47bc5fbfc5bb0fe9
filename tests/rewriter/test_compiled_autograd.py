"""Compiled autograd (`torch._dynamo.compiled_autograd`) around losses and modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from rewriter import optimize_nested
from tests.oracle import relative_error


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    yield
    compiled_autograd.reset()
    torch._dynamo.reset()


def make() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)
    return nn.Sequential(*layers).double(), torch.randn(5, 3, dtype=torch.float64)


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
    return g.square().sum() + u.mean()


def data(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).square().sum()


def compiler(graph: Any) -> Any:
    return torch.compile(graph, backend="eager")


def decorated(f: Any) -> Any:
    return optimize_nested(f, backend="eager")


@pytest.mark.parametrize("is_around", [True, False], ids=["around", "backward"])
@pytest.mark.parametrize("what", ["module", "loss"])
@pytest.mark.parametrize("loss", [penalty, data])
def test_gradients(loss: Any, what: str, is_around: bool) -> None:
    """Around the whole step it runs as written; around the backward pass alone, our own backward is
    called from the compiled one, which takes a gradient for everything that requires one."""
    net, x = make()
    fast = copy.deepcopy(net)
    call = decorated(loss) if what == "loss" else loss
    fast = decorated(fast) if what == "module" else fast
    loss(net, x).backward()
    for _ in range(2):
        fast.zero_grad()
        if is_around:
            with compiled_autograd._enable(compiler):
                call(fast, x).backward()
        else:
            value = call(fast, x)
            with compiled_autograd._enable(compiler):
                value.backward()
        for mine, reference in zip(fast.parameters(), net.parameters(), strict=True):
            assert relative_error(mine.grad, reference.grad) < 1e-9
    owner: Any = call if what == "loss" else fast.forward
    assert bool(owner.steps) is not is_around
