"""Embeddings with `max_norm`: the rows that are looked up are made shorter in the table itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import optimize_nested
from tests.oracle import relative_error

D = torch.float64
ROWS = torch.tensor([0, 2, 2, 1, 0])
BAGS = torch.tensor([[0, 1], [2, 2], [1, 0], [0, 0], [2, 1]])


class Typed(nn.Module):
    """A network of points and of their types."""

    def __init__(self, table: Any, rows: Tensor) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.rows = table.to(D), rows
        nn.init.normal_(table.weight)
        self.layers = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)).to(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(torch.cat([x, self.table(self.rows)], -1))


def force(net: Any, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    return grad(net(p).sum(), p, create_graph=True)[0].square().sum()


def penalty_on_the_table(net: Any, x: Tensor) -> Tensor:
    u = net(x).sum()
    return grad(u, net.table.weight, create_graph=True)[0].square().sum() + u


def tied(net: Any, x: Tensor) -> Tensor:
    """The table is read once more, after the look-up."""
    return force(net, x) + (net(x) @ net.table.weight[:1]).square().sum()


def of_a_product(net: Any, x: Tensor) -> Tensor:
    """What is looked up in, and changed, is a value of the loss."""
    weight = net.table.weight * 2
    rows = F.embedding(ROWS, weight, max_norm=0.7, norm_type=1.0)
    return net.layers(torch.cat([x, rows], -1)).square().sum() + weight.square().sum()


def without_gradients(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = net(x).square().mean()
    return force(net, x) * scale


def table(rows: Tensor, **options: Any) -> nn.Module:
    kind = nn.EmbeddingBag if rows.dim() > 1 else nn.Embedding
    return Typed(kind(4, 4, max_norm=1.0, **options), rows)


NETS: dict[str, Callable[[], nn.Module]] = {
    "rows": lambda: table(ROWS),
    "padded": lambda: table(ROWS, padding_idx=1),
    "bags": lambda: table(BAGS, mode="sum"),
}


def three_steps(loss: Callable[..., Tensor], net: Any, x: Tensor) -> list[Tensor]:
    """Return values, gradients and tables of three steps, between which all rows grow."""
    found, weight = [], net.table.weight
    for _ in range(3):
        net.zero_grad()
        value = loss(net, x)
        value.backward()
        assert net.table.weight is weight
        found += [value.detach(), weight.detach().clone()]
        found += [p.grad for p in net.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in net.parameters():
                p.add_(0.3)
    return found


def assert_right(loss: Any, given: Any, net: Any, reference: Any) -> None:
    torch.manual_seed(1)
    x = torch.randn(5, 3, dtype=D)
    expected = three_steps(reference, copy.deepcopy(net), x)
    for mine, theirs in zip(three_steps(loss, given, x), expected, strict=True):
        assert relative_error(mine, theirs) < 1e-9


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("loss", [force, penalty_on_the_table, tied, without_gradients])
def test_loss(loss: Callable[..., Tensor], kind: str) -> None:
    if loss is penalty_on_the_table and kind == "bags":
        pytest.skip("PyTorch has no second derivative of embedding_bag")
    net = NETS[kind]()
    decorated = optimize_nested(loss, backend="eager", strict=kind != "padded")
    assert_right(decorated, copy.deepcopy(net), net, loss)
    assert decorated.steps


def test_look_up_in_a_value() -> None:
    net = NETS["rows"]()
    decorated = optimize_nested(of_a_product, backend="eager", strict=True)
    assert_right(decorated, copy.deepcopy(net), net, of_a_product)


@pytest.mark.parametrize("kind", ["rows", "bags"])
def test_module(kind: str) -> None:
    net = NETS[kind]()
    decorated = optimize_nested(copy.deepcopy(net), backend="eager", strict=True)
    assert_right(force, decorated, net, force)


def test_frozen_table() -> None:
    net: Any = NETS["rows"]()
    net.table.weight.requires_grad_(False)
    decorated = optimize_nested(force, backend="eager", strict=True)
    assert_right(decorated, copy.deepcopy(net), net, force)
