"""A decorated loss among other things: threads, copies, other compilations, changed state."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rewriter import optimize_nested
from tests.oracle import relative_error
from tests.versions import traces_in_threads


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).square().sum(), p, create_graph=True)
    return g.square().sum()


def on_input(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum() + x.square().sum()


def along(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(net, (x,), (x.sin(),))[1].square().sum()


def make(width: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=torch.float64)


def gradients(loss: Callable[..., Tensor], net: nn.Module, x: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss(net, x), list(net.parameters()), allow_unused=True))


def assert_equal(mine: list[Any], expected: list[Any]) -> None:
    for ours, theirs in zip(mine, expected, strict=True):
        assert relative_error(ours, theirs) < 1e-9


@traces_in_threads
@pytest.mark.parametrize("shared", [True, False], ids=["one_loss", "two_losses"])
def test_threads(shared: bool) -> None:
    """Each thread has a network and points of its own."""
    plain = [penalty, penalty if shared else along]
    losses = [optimize_nested(f, backend="eager") for f in plain]
    losses[1] = losses[0] if shared else losses[1]
    nets, found = [make(5), make(6)], [[], []]
    x = points()

    def work(k: int) -> None:
        for _ in range(5):
            found[k].append(gradients(losses[k], nets[k], x))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        expected = gradients(plain[k], nets[k], x)
        assert len(found[k]) == 5
        for mine in found[k]:
            assert_equal(mine, expected)


class Model(nn.Module):
    """A model with its loss as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.net = make()

    @optimize_nested(backend="eager")
    def loss(self, x: Tensor) -> Tensor:
        return penalty(self.net, x)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copy_of_a_model_with_a_decorated_method(copied: Callable[[Any], Any]) -> None:
    model = Model()
    model.loss(points()).backward()
    model.zero_grad()
    other = copied(model)
    with torch.no_grad():
        other.net[0].weight.mul_(2)
    mine = torch.autograd.grad(other.loss(points()), list(other.parameters())[:-1])
    expected = torch.autograd.grad(penalty(other.net, points()), list(other.parameters())[:-1])
    assert_equal(list(mine), list(expected))
    assert model.state_dict().keys() == other.state_dict().keys()


class Trainer:
    """An object that holds a decorated loss as an attribute."""

    def __init__(self, loss: Any) -> None:
        self.loss, self.net = loss, make()


def test_deep_copy_of_an_object_that_holds_a_loss() -> None:
    """As with a function: the copy holds the same loss."""
    trainer = Trainer(optimize_nested(penalty, backend="eager"))
    trainer.loss(trainer.net, points()).backward()
    other = copy.deepcopy(trainer)
    assert_equal(
        gradients(other.loss, other.net, points()), gradients(penalty, other.net, points())
    )


def test_inside_torch_compile_with_gradients() -> None:
    net, x = make(), points().requires_grad_()
    loss = optimize_nested(penalty, backend="eager")
    whole = torch.compile(lambda net, x: 2 * loss(net, x) + net(x).sum(), backend="eager")
    plain = lambda net, x: 2 * penalty(net, x) + net(x).sum()  # noqa: E731
    assert_equal(gradients(whole, net, x), gradients(plain, net, x))


def test_inside_another_decorated_loss() -> None:
    inner = optimize_nested(penalty, backend="eager")
    outer = optimize_nested(lambda net, x: inner(net, x) + net(x).sum(), backend="eager")
    plain = lambda net, x: penalty(net, x) + net(x).sum()  # noqa: E731
    net, x = make(), points()
    assert_equal(gradients(outer, net, x), gradients(plain, net, x))
    assert outer.steps and outer.explain(net, x).sites
    assert_equal(gradients(inner, net, x), gradients(penalty, net, x))


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x.sin(),))[1],
        lambda f, x: torch.func.vmap(f)(torch.stack([x, x.sin()])),
        lambda f, x: torch.func.hessian(f)(x),
    ],
    ids=["grad", "jacrev", "jvp", "vmap", "hessian"],
)
def test_under_a_transform(transformed: Callable[..., Tensor]) -> None:
    net, x = make(), points()
    plain = lambda net, z: torch.func.grad(lambda y: net(y).sum())(z).square().sum()  # noqa: E731
    loss = optimize_nested(plain, backend="eager")
    mine = transformed(lambda z: loss(net, z), x)
    assert relative_error(mine, transformed(lambda z: plain(net, z), x)) < 1e-12
    loss(net, x)
    again = transformed(lambda z: loss(net, z), x)
    assert torch.equal(mine, again)


def test_under_a_dual_level() -> None:
    """Forward mode of the caller's goes through the loss."""
    net, x = make(), points().requires_grad_()
    loss = optimize_nested(on_input, backend="eager")
    loss(net, x)

    def tangent(f: Callable[..., Tensor]) -> Tensor:
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(f(net, forward_ad.make_dual(x, x.detach().sin())))
            assert moved.tangent is not None
            return moved.tangent.detach()

    assert relative_error(tangent(loss), tangent(on_input)) < 1e-12


def test_batch_sizes_and_numbers() -> None:
    """A second batch size costs one specialisation, the third none; another number none."""

    def weighted(net: nn.Module, x: Tensor, weight: float) -> Tensor:
        return weight * penalty(net, x)

    net, loss = make(), optimize_nested(weighted, backend="eager")
    counts = []
    for size, weight in ((4, 0.5), (4, 0.25), (7, 0.25), (9, 0.125), (12, 2.0), (4, 3.0)):
        x = torch.randn(size, 3, dtype=torch.float64)
        mine = gradients(lambda net, x, w=weight: loss(net, x, w), net, x)
        assert_equal(mine, gradients(lambda net, x, w=weight: weighted(net, x, w), net, x))
        counts.append(len(loss.steps))
    assert counts[-1] == counts[2] <= 3


def test_gradients_switched_on_and_off() -> None:
    net, loss, x = make(), optimize_nested(on_input, backend="eager"), points().requires_grad_()
    expected = gradients(on_input, net, x)
    for _ in range(2):
        with torch.no_grad():
            assert not loss(net, x).requires_grad
        assert_equal(gradients(loss, net, x), expected)
        with torch.inference_mode():
            loss(net, x)
    assert len(loss.steps) == 1


def test_parameters_frozen_and_freed() -> None:
    net, loss = make(), optimize_nested(penalty, backend="eager")
    first = net[0].weight
    for frozen in (False, True, False, True):
        first.requires_grad_(not frozen)
        net.zero_grad()
        loss(net, points()).backward()
        mine = [p.grad for p in net.parameters()]
        net.zero_grad()
        penalty(net, points()).backward()
        assert_equal(mine, [p.grad for p in net.parameters()])
    assert len(loss.steps) == 2


def test_parameter_replaced() -> None:
    net, loss = make(), optimize_nested(penalty, backend="eager")
    for _ in range(3):
        assert_equal(gradients(loss, net, points()), gradients(penalty, net, points()))
        net[0].weight = nn.Parameter(net[0].weight.detach() * 1.5)
    net[1] = nn.SiLU()
    assert_equal(gradients(loss, net, points()), gradients(penalty, net, points()))


def test_loaded_state() -> None:
    net, loss = make(), optimize_nested(penalty, backend="eager")
    loss(net, points())
    net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()})
    assert_equal(gradients(loss, net, points()), gradients(penalty, net, points()))
    net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}, assign=True)
    net.requires_grad_()
    assert_equal(gradients(loss, net, points()), gradients(penalty, net, points()))


@optimize_nested(backend="eager")
def by_name(net: nn.Module, x: Tensor) -> Tensor:
    """A decorated loss that a module holds under its own name."""
    return net(x).square().sum()


def plain(net: nn.Module, x: Tensor) -> Tensor:
    """A loss that is decorated under another name."""
    return net(x).square().sum()


def test_a_decorated_loss_is_copied_and_pickled_like_a_function() -> None:
    assert copy.deepcopy(by_name) is by_name and copy.copy(by_name) is by_name
    assert pickle.loads(pickle.dumps(by_name)) is by_name
    other = pickle.loads(pickle.dumps(optimize_nested(plain, backend="eager", strict=True)))
    assert other.as_written is plain and other.options.strict
    net, x = nn.Linear(2, 1), torch.ones(3, 2)
    assert torch.equal(other(net, x), plain(net, x))
