"""Modules that return what other results are computed from, and leaves that they make."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.func import functional_call, jvp
from torch.fx.experimental.proxy_tensor import make_fx

from passes.graph import results
from passes.segments import read_results, segments
from rewriter import optimize_nested
from rewriter.chain import Chain
from tests.oracle import assert_same, relative_error, step

D = torch.float64


def points(size: int = 5) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(size, 3, dtype=D)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(3, 6, dtype=D)
        self.norm = nn.BatchNorm1d(6, dtype=D)
        self.last = nn.Linear(6, 2, dtype=D)


class Leaf(Base):
    """The point is made in the module."""

    def forward(self, x: Tensor) -> Any:
        c = x.clone().detach().requires_grad_(True)
        return {"in": c, "out": self.last(self.first(c).tanh())}


class LeafOfTheSameMemory(Base):
    def forward(self, x: Tensor) -> Any:
        c = x.detach().requires_grad_(True)
        return {"in": c, "out": self.last(self.first(c).tanh()) * c.sum()}


class FromALeaf(Base):
    """What is returned is computed from a leaf that is not."""

    def forward(self, x: Tensor) -> Any:
        c = x.clone().detach().requires_grad_(True)
        h = c * 2
        return {"in": h, "out": self.last(self.first(h).tanh())}


class Latent(Base):
    """Statistics that are updated, a draw, a size and a value of several results cross the cut."""

    def forward(self, x: Tensor) -> Any:
        a, b = x.sin().split([1, 2], dim=1)
        n = x.shape[0]
        h = self.norm(self.first(x))
        noise = torch.rand_like(h)
        u = self.last((h * noise).tanh() + x.new_ones(n, 1)) * a / n
        return {"in": h, "out": u + b}


class Three(Base):
    """A chain of three, the middle one read by the last."""

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        k = h.tanh() * h
        return {"in": h, "more": (k, k.argmax(1)), "out": self.last(k + h)}


def decorated(net: nn.Module) -> Any:
    return optimize_nested(net, backend="eager")


def penalty(net: Any, x: Tensor) -> Tensor:
    found = net(x)
    u, h = found["out"], found["in"]
    (g,) = grad(u.square().sum(), h, create_graph=True)
    value = g.square().sum() + u.square().sum()
    if "more" in found:
        (g,) = grad(u.sin().sum(), found["more"][0], create_graph=True)
        (f,) = grad(found["more"][0].sum(), h, create_graph=True)
        value = value + (g * f).square().sum()
    return value


def picky(net: Any, x: Tensor) -> Tensor:
    value = penalty(net, x)
    if value.requires_grad:
        value.register_hook(torch.clone)
    return value


KINDS: list[Any] = [Leaf, LeafOfTheSameMemory, FromALeaf, Latent, Three]


@pytest.mark.parametrize("kind", KINDS)
def test_decorated(kind: Callable[[], Any]) -> None:
    """Two batch sizes, the second of them open."""
    net, fast = kind(), decorated(kind())
    for size in (5, 7, 6):
        x = points(size)
        assert_same(step(penalty, [fast], (x,), {}), step(penalty, [net], (x,), {}))
    assert len(fast.forward.steps) == 2
    assert isinstance(fast.forward.steps[0].base, Chain)


@pytest.mark.filterwarnings("ignore:picky runs as written")
@pytest.mark.parametrize("kind", [Leaf, Latent])
def test_by_layer(kind: Callable[[], Any]) -> None:
    loss, net, fast, x = optimize_nested(picky, backend="eager"), kind(), kind(), points()
    for _ in range(2):
        assert_same(step(loss, [fast], (x,), {}), step(picky, [net], (x,), {}))
    assert kind.__name__ in loss.layers.said


def test_leaf() -> None:
    """It is the caller's: a leaf of its own memory that gets a ``.grad``, under `no_grad` too."""
    x, grads = points(), []
    for module in (Leaf(), decorated(Leaf())):
        found = module(x)
        c = found["in"]
        assert c.is_leaf and c.requires_grad and not x.requires_grad
        assert c.data_ptr() != x.data_ptr()
        found["out"].sum().backward()
        grads.append(c.grad)
        with torch.no_grad():
            found = module(x)
        assert found["in"].requires_grad and not found["out"].requires_grad
    assert relative_error(*grads) < 1e-12


def test_forward_mode() -> None:
    """Through a chain, and as written where PyTorch makes no leaf."""
    net, x = Three(), points()
    fast = decorated(copy.deepcopy(net))

    def along(net: nn.Module, x: Tensor) -> Tensor:
        found = jvp(lambda z: net(z)["out"], (x,), (x.sin(),))
        return found[1].square().sum() + found[0].sum()

    assert_same(step(along, [fast], (x,), {}), step(along, [net], (x,), {}))
    assert fast.forward.steps


def test_moved_parameters() -> None:
    """Second derivatives in the parameters through a chain."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        parameters = {n: p for n, p in net.named_parameters() if "norm" not in n}
        grads = grad(net(x)["out"].square().sum(), list(parameters.values()), create_graph=True)
        moved = {n: p - 0.1 * g for (n, p), g in zip(parameters.items(), grads, strict=True)}
        return penalty(lambda x: functional_call(net, moved, (x,)), x)

    net, x = Three(), points()
    fast = decorated(copy.deepcopy(net))
    assert_same(step(loss, [fast], (x,), {}), step(loss, [net], (x,), {}))


def test_segments() -> None:
    """The same values, one after the other; what needs no cut is not cut."""

    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        h = x @ w
        a, b = h.split([1, 2], dim=1)
        return h, a.sin(), (a * b).sum(), w.cos()

    x, w = points(), torch.randn(3, 3, dtype=D)
    module = make_fx(f)(x, w)
    outputs = results(module.graph)
    cuts = read_results(module, set(outputs))
    assert [str(cut) for cut in cuts] == [str(outputs[0])]
    parts = segments(module, cuts)
    values = dict(zip(module.graph.find_nodes(op="placeholder"), (x, w), strict=True))
    for part in parts:
        found = part.module(*(values[node] for node in part.takes))
        values |= dict(zip(part.gives, found, strict=True))
    assert len(parts) == 2
    for node, expected in zip(outputs, f(x, w), strict=True):
        assert torch.equal(values[node], expected)
    assert len(segments(module, [])) == 1
