"""What `torch.autograd` iterates over: generators, ``filter``, ``map``, views of dicts."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from tests.several_calls import check_calls

grad = torch.autograd.grad
Loss = Callable[[nn.Module, Tensor], Tensor]


def net(*, draws: bool = False) -> nn.Module:
    torch.manual_seed(0)
    inside = [nn.BatchNorm1d(5), nn.Dropout(0.3)] if draws else []
    return nn.Sequential(nn.Linear(3, 5), *inside, nn.Tanh(), nn.Linear(5, 1)).double()


def calls() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, dtype=torch.float64),) for _ in range(3)]


def error(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def norm(gradients: Any) -> Tensor:
    return sum(g.square().sum() for g in gradients)


def parameters(net: nn.Module, x: Tensor) -> Tensor:
    return norm(grad(error(net, x), net.parameters(), create_graph=True))


def by_name(net: nn.Module, x: Tensor) -> Tensor:
    return norm(grad(outputs=error(net, x), inputs=net.parameters(), create_graph=True))


def filtered(net: nn.Module, x: Tensor) -> Tensor:
    weights = filter(lambda p: p.dim() > 1, net.parameters())
    return norm(grad(error(net, x), weights, create_graph=True))


def an_expression(net: nn.Module, x: Tensor) -> Tensor:
    taken = (p for p in net.parameters() if p.requires_grad)
    gradients = grad(error(net, x), taken, create_graph=True)
    return torch.cat([g.flatten() for g in gradients]).square().mean()


def mapped(net: nn.Module, x: Tensor) -> Tensor:
    values = map(lambda named: named[1], net.named_parameters())
    gradients = tuple(g for g in grad(error(net, x), values, create_graph=True))
    return norm(gradients)


def backwards(net: nn.Module, x: Tensor) -> Tensor:
    gradients = grad(error(net, x), reversed(list(net.parameters())), create_graph=True)
    pairs = zip(reversed(list(net.parameters())), gradients, strict=True)
    return norm(p - 0.1 * g for p, g in pairs)


def one_step_of_a_learner(net: nn.Module, x: Tensor) -> Tensor:
    named = dict(net.named_parameters())
    gradients = grad(error(net, x), named.values(), create_graph=True)
    moved = {n: p - 0.1 * g for (n, p), g in zip(named.items(), gradients, strict=True)}
    return torch.func.functional_call(net, moved, (x,)).square().mean()


def chained(net: nn.Module, x: Tensor) -> Tensor:
    some = itertools.chain(net[0].parameters(), itertools.islice(net[-1].parameters(), 1))
    return norm(grad(error(net, x), some, create_graph=True))


def taken_once(net: nn.Module, x: Tensor) -> Tensor:
    """What is left of a generator is differentiated for, and nothing is left afterwards."""
    rest = net.parameters()
    first = next(rest)
    gradients = grad(error(net, x), rest, create_graph=True)
    return norm(gradients) + first.sum() + len(list(rest)) + 2 * len(gradients)


def outputs_and_seeds(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    outputs = (v.sum() for v in (u, u.square()))
    seeds = (torch.full((), s, dtype=x.dtype) for s in (0.5, 2.0))
    return norm(grad(outputs, net.parameters(), seeds, create_graph=True))


def a_product_with_the_hessian(net: nn.Module, x: Tensor) -> Tensor:
    gradients = grad(error(net, x), net.parameters(), create_graph=True)
    v = [torch.randn_like(p) for p in net.parameters()]
    products = grad(gradients, net.parameters(), grad_outputs=iter(v), create_graph=True)
    return sum((a * b).sum() for a, b in zip(products, v, strict=True))


def through_backward(net: nn.Module, x: Tensor) -> Tensor:
    error(net, x).backward(inputs=net.parameters(), create_graph=True)
    gradients = [p.grad for p in net.parameters()]
    net.zero_grad()
    return norm(gradients)


LOSSES = [
    parameters, by_name, filtered, an_expression, mapped, backwards, one_step_of_a_learner, chained,
    taken_once, outputs_and_seeds, a_product_with_the_hessian, through_backward,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True:UserWarning")
@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_captured_whole(loss: Loss) -> None:
    check_calls(loss, [net()], calls(), strict=True)


def test_statistics_and_draws_are_those_of_eager() -> None:
    check_calls(parameters, [net(draws=True)], calls(), strict=True)


def test_value_and_grad_names_the_gradients_of_all() -> None:
    own = net()
    loss = optimize_nested(parameters, backend="eager", strict=True)
    (x,) = calls()[0]
    value, grads = loss.value_and_grad(own, x)
    expected = parameters(own, x)
    found = dict(zip(dict(own.named_parameters()), grad(expected, own.parameters()), strict=True))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=0)
    for name, g in found.items():
        torch.testing.assert_close(grads[f"net.{name}"], g, rtol=1e-9, atol=1e-12)


def test_a_mapping_that_is_no_dict_is_the_users_error() -> None:
    class Named(dict[str, Tensor]):
        """A dict of one's own."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return norm(grad(error(net, x), Named(net.named_parameters()), create_graph=True))

    (x,) = calls()[0]
    with pytest.raises(TypeError, match="must be a dict"):
        optimize_nested(loss, backend="eager")(net(), x)
