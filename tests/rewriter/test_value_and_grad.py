"""`value_and_grad` has an entry for whatever `backward()` would give a gradient, wherever it is."""

import functools
import types

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.holders import reached
from rewriter.leaves import leaves_of
from rewriter.naming import modules_in


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


NET = network()
NAMES = {name for name, _ in NET.named_parameters()}
SPACE = types.SimpleNamespace(net=NET)


def penalty(net, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum() + net(x).square().sum()


def helper(x: Tensor) -> Tensor:
    return NET(x)


def helper_of_helper(x: Tensor) -> Tensor:
    return (lambda y: helper(y))(x)


def through_a_helper(x: Tensor) -> Tensor:
    return penalty(helper_of_helper, x)


def in_a_namespace(x: Tensor) -> Tensor:
    return penalty(SPACE.net, x)


class Holder:
    def __init__(self) -> None:
        self.nets = [{"u": NET}]

    def __call__(self, x: Tensor) -> Tensor:
        return penalty(self.nets[0]["u"], x)

    def method(self, x: Tensor) -> Tensor:
        return penalty(self.nets[0]["u"], x)


class Shared:
    net = NET

    @classmethod
    def of_class(cls, x: Tensor) -> Tensor:
        return penalty(cls.net, x)


class Slotted:
    __slots__ = ("__net", "other")

    def __init__(self) -> None:
        self.__net = NET

    def __call__(self, x: Tensor) -> Tensor:
        return self.__net(x)


class Wrapper(nn.Module):
    """Holds a network without registering it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = [NET]

    def forward(self, x: Tensor) -> Tensor:
        return self.held[0](x)


def closure():
    net = NET
    return lambda x: penalty(lambda y: net(y), x)


def wrapped():
    @functools.wraps(through_a_helper)
    def call(*args):
        return through_a_helper(*args)

    return call


CASES = {
    "helper": (through_a_helper, (), "helper_of_helper.helper.NET."),
    "namespace": (in_a_namespace, (), "SPACE.net."),
    "partial": (functools.partial(penalty, NET), (), "net."),
    "partial by name": (functools.partial(lambda x, *, net: penalty(net, x), net=NET), (), "net."),
    "callable object": (Holder(), (), "self.nets.0.u."),
    "bound method": (Holder().method, (), "self.nets.0.u."),
    "class method": (Shared.of_class, (), "self.net."),
    "forward": (penalty, (NET.forward,), "net.self."),
    "lambda": (penalty, (lambda x: NET(x),), "net.NET."),
    "slots": (penalty, (Slotted(),), "net._Slotted__net."),
    "unregistered": (penalty, (Wrapper(),), "net.held.0."),
    "closure": (closure(), (), None),
    "wraps": (wrapped(), (), None),
}


@pytest.mark.parametrize("how", CASES)
@pytest.mark.parametrize("capture", ["dynamo", "as written"])
def test_every_holder(how: str, capture: str) -> None:
    function, args, start = CASES[how]
    if capture == "as written" and how not in ("helper", "partial", "slots"):
        pytest.skip("the search is the same")
    loss = optimize_nested(function, backend="eager", enabled=capture == "dynamo")
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    NET.zero_grad()
    function(*args, x).backward()
    expected = [p.grad for p in NET.parameters()]
    value, grads = loss.value_and_grad(*args, x)
    torch.testing.assert_close(value, function(*args, x))
    torch.testing.assert_close(list(grads.values()), expected, rtol=1e-9, atol=1e-12)
    if start is not None:
        assert set(grads) == {start + name for name in NAMES}
    assert NET in modules_in(function, (*args, x), {})


def test_a_leaf_without_a_path() -> None:
    """What only an iterator leads to has a number for a name."""
    hidden = iter([weight := torch.ones(2, dtype=torch.float64, requires_grad=True)])

    def loss(x: Tensor) -> Tensor:
        return (next(hidden) * x).square().sum()

    x = torch.ones(3, 2, dtype=torch.float64)
    value, grads = optimize_nested(loss, enabled=False).value_and_grad(x)
    assert value == 6 and set(grads) == {"leaf.0"}
    torch.testing.assert_close(grads["leaf.0"], 6 * torch.ones_like(weight).detach())


def test_leaves_made_on_the_way_have_no_entry() -> None:
    """Nobody can read their gradients."""
    x = torch.ones(3, 2, dtype=torch.float64)
    for enabled in (True, False):
        loss = optimize_nested(penalty, backend="eager", enabled=enabled)
        _, grads = loss.value_and_grad(NET, x)
        assert set(grads) == {f"net.{name}" for name in NAMES}


def test_the_search_ends_at_named_tensors() -> None:
    """A tensor among the arguments that has a history keeps it."""
    start = torch.ones(3, 2, dtype=torch.float64, requires_grad=True)
    x = start * 2
    _, grads = optimize_nested(lambda x: x.square().sum(), enabled=False).value_and_grad(x)
    assert set(grads) == {"x"}
    x.sum().backward()
    assert start.grad is not None
    assert leaves_of(x.sum(), []) == [start] and leaves_of(x.sum(), [x]) == []


def test_the_search_is_bounded() -> None:
    """Cycles and long lists end; Python's and PyTorch's own modules are left alone."""
    ring: list = [list(range(10**6)), torch]
    ring += [ring, NET]
    assert [path for path, _ in reached([("ring", ring)])] == ["ring.3"]
