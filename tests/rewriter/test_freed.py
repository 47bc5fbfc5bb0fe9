"""What nobody holds any more is gone: networks, losses and what was made of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested

pytestmark = pytest.mark.filterwarnings("ignore:.* runs as written")


def make(width: int = 4) -> nn.Module:
    layers = nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 1)
    return nn.Sequential(*layers).double()


X = torch.linspace(-1, 1, 15, dtype=torch.float64).view(5, 3)


def penalty(net: Any, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
    return g.square().sum() + u.mean()


def picky(net: Any, x: Tensor) -> Tensor:
    value = penalty(net, x)
    if value.requires_grad:
        value.register_hook(torch.clone)
    return value


def decorated(f: Any, **options: Any) -> Any:
    return optimize_nested(f, backend="eager", **options)


def called(loss: Any, *args: Any) -> None:
    for _ in range(2):
        loss(*args).backward()


class Trainer:
    def __init__(self) -> None:
        self.net = make()

    @decorated
    def loss(self, x: Tensor) -> Tensor:
        return penalty(self.net, x)


def closure() -> list[Any]:
    net = make()
    loss = decorated(lambda x: penalty(net, x))
    called(loss, X)
    return [net, loss, loss.steps[0]]


def method() -> list[Any]:
    """The method stays, its object goes."""
    trainer = Trainer()
    called(trainer.loss, X)
    return [trainer, trainer.net]


def module() -> list[Any]:
    net = decorated(make())
    called(penalty, net, X)
    return [net, net.forward.__func__, net.forward.steps[0]]


def by_layer() -> list[Any]:
    net, loss = make(), decorated(picky)
    called(loss, net, X)
    return [net, loss]


def recording() -> list[Any]:
    net = make()
    loss = decorated(lambda x: penalty(net, x), capture="trace")
    called(loss, X)
    return [net, loss, loss.steps[0]]


KEPT = decorated(penalty)
PICKY = decorated(picky)


def argument_of_a_loss_that_stays() -> list[Any]:
    net = make()
    called(KEPT, net, X)
    return [net]


def by_layer_of_a_loss_that_stays() -> list[Any]:
    """Its refusal is kept; what the refusal came from is not, nor is the layer's tower."""
    net = make()
    called(PICKY, net, X)
    (tower,) = PICKY.layers._called
    return [net, tower, tower.steps[0]]


@pytest.mark.parametrize(
    "made",
    [closure, method, module, by_layer, recording, argument_of_a_loss_that_stays,
     by_layer_of_a_loss_that_stays],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_freed(made: Callable[[], list[Any]]) -> None:
    refs = [weakref.ref(x) for x in made()]
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)


def test_a_sweep() -> None:
    """Networks one after the other: no graph, nor a name among the globals, stays behind."""

    def one(width: int) -> None:
        net = make(width)
        called(decorated(lambda x: penalty(net, x)), X)
        called(penalty, decorated(net), X)

    def count() -> tuple[int, int]:
        gc.collect()
        gc.collect()  # what Dynamo held is found once its holder is gone
        found = sum(isinstance(x, torch.fx.Node) for x in gc.get_objects())
        return found, sum(name.startswith("__compiled_fn") for name in globals())

    one(5)
    before = count()
    for width in (6, 7):
        one(width)
    assert count() == before
