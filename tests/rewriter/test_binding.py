"""Modules that are copied, re-bound or changed: a call computes with the module that is called."""

from __future__ import annotations

import copy
import functools
import pickle
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize, stateless
from torch.optim.swa_utils import AveragedModel

from rewriter import NestedGradientWarning, optimize_nested
from rewriter.errors import CaptureError
from rewriter.layer import MOST_CLASSES, OptimizedForward
from tests.oracle import relative_error

D = torch.float64
Way = Callable[[Any], tuple[Any, list[Tensor]]]


class Net(nn.Module):
    """A parameter of its own beside a layer's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(3, 4, dtype=D)
        self.weight = nn.Parameter(torch.randn(4, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        return (self.inner(x).tanh() * self.weight).sin().sum(1)


class Around(nn.Module):
    """A network among the children of a module."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * 2


def new(cls: type[nn.Module]) -> Any:
    return cls()


def decorated(cls: type[nn.Module] = Net) -> Any:
    return optimize_nested(cls(), backend="eager")


def steps(net: Any) -> list[Any]:
    return net.forward.steps


def penalty(net: Any, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
    return g.square().sum() + u.square().sum()


def picky(net: Any, x: Tensor) -> Tensor:
    """A penalty that is not captured as one graph."""
    value = penalty(net, x)
    if value.requires_grad:
        value.register_hook(torch.clone)
    return value


def other(x: Tensor) -> Tensor:
    """Return a leaf with other values."""
    return (x.detach() * 1.7 + 0.3).requires_grad_()


def copied(net: Any) -> Any:
    twin = copy.copy(net)
    twin._parameters = {"weight": nn.Parameter(other(net.weight))}
    return twin, list(twin.parameters())


def deep_copied(net: Any) -> Any:
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.weight.mul_(-2)
    return twin, list(twin.parameters())


def pickled(net: Any) -> Any:
    twin = pickle.loads(pickle.dumps(net))
    with torch.no_grad():
        twin.weight.mul_(-2)
    assert type(twin) is type(net)
    return twin, list(twin.parameters())


def cloned(net: Any) -> Any:
    """The functional clones of meta-learning libraries."""
    twin: Any = object.__new__(type("Clone", (type(net),), {}))
    twin.__dict__.update(net.__dict__)
    twin._parameters = {}
    twin.__dict__["weight"] = fast = other(net.weight)
    return twin, [fast, *net.inner.parameters()]


def cloned_of_its_class(net: Any) -> Any:
    twin: Any = object.__new__(type(net))
    twin.__dict__ = net.__dict__.copy()
    twin._parameters = {"weight": nn.Parameter(other(net.weight))}
    return twin, list(twin.parameters())


def with_fast_weights(net: Any) -> Any:
    fast = other(net.weight)
    del net.weight
    net.weight = fast * 2
    return net, [fast, *net.inner.parameters()]


def called_functionally(net: Any) -> Any:
    fast = {name: other(p) for name, p in net.named_parameters()}
    return lambda x: functional_call(net, fast, (x,)), list(fast.values())


def reparametrized(net: Any) -> Any:
    fast = {name: other(p) for name, p in net.named_parameters()}

    def call(x: Tensor) -> Tensor:
        with stateless._reparametrize_module(net, fast):
            return net(x)

    return call, list(fast.values())


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def parametrized(net: Any) -> Any:
    parametrize.register_parametrization(net, "weight", Doubled())
    return net, list(net.parameters())


def parametrization_removed(net: Any) -> Any:
    parametrize.register_parametrization(net, "weight", Doubled())
    net(points())
    parametrize.remove_parametrizations(net, "weight")
    return net, list(net.parameters())


def swapped(net: Any) -> Any:
    with torch.no_grad():
        new = nn.Parameter(other(net.weight))
    net.weight = new
    net.inner = nn.Linear(3, 4, dtype=D)
    net.add_module("inner", nn.Linear(3, 4, dtype=D))
    return net, list(net.parameters())


def swapped_for_another(net: Any) -> Any:
    net.zero_grad()
    torch.utils.swap_tensors(net.weight, nn.Parameter(other(net.weight).detach()))
    return net, list(net.parameters())


def averaged(net: Any) -> Any:
    average = AveragedModel(net)
    with torch.no_grad():
        net.weight.mul_(-2)
    average.update_parameters(net)
    with torch.no_grad():
        net.weight.mul_(3)
    average.update_parameters(net)
    return average, list(average.module.parameters())


def of_another_class(net: Any) -> Any:
    class Other(type(net)):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2) + 1

    net.__class__ = Other
    return net, list(net.parameters())


def of_an_unrelated_class(net: Any) -> Any:
    class Other(nn.Module):
        inner: nn.Linear

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).square().sum(1)

    net.__class__ = Other
    return net, list(net.inner.parameters())


def wrapped(net: Any) -> Any:
    net.forward = functools.partial(lambda forward, x: forward(x * 2), net.forward)
    return net, list(net.parameters())


def wrapped_function(net: Any) -> Any:
    """As Accelerate does it; the copy has the same wrapper around a function of any module."""
    function: Any = net.forward.__func__
    net.forward = types.MethodType(lambda self, x: function(self, x * 2), net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.weight.mul_(-2)
    return twin, list(twin.parameters())


def redirected(net: Any) -> Any:
    """As Lightning does it: what is put back stands among the module's own attributes."""
    original = net.forward
    net.forward = lambda x: original(x)
    net(points())
    net.forward = original
    return net, list(net.parameters())


def replicated(net: Any) -> Any:
    replica = net._replicate_for_data_parallel()
    replica.inner = net.inner._replicate_for_data_parallel()
    for module, source in ((replica, net), (replica.inner, net.inner)):
        for name, p in source.named_parameters(recurse=False):
            setattr(module, name, p * 2)
    return replica, list(net.parameters())


WAYS: list[Way] = [
    copied, deep_copied, pickled, cloned, cloned_of_its_class, with_fast_weights,
    called_functionally, reparametrized, parametrized, parametrization_removed, swapped,
    swapped_for_another, averaged,
    of_another_class, of_an_unrelated_class, wrapped, wrapped_function, redirected, replicated,
]  # fmt: skip


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(5, 3, dtype=D)


def results(way: Way, net: Any, loss: Callable[..., Tensor]) -> list[Tensor]:
    """Return a loss before and after, and its gradients after, twice."""
    torch.manual_seed(2)
    found = [loss(net, points()).detach()]
    module, leaves = way(net)
    for _ in range(2):
        value = loss(module, points())
        found += [value.detach(), *torch.autograd.grad(value, leaves, retain_graph=True)]
    return found


def assert_equal(mine: list[Tensor], reference: list[Tensor]) -> None:
    for ours, theirs in zip(mine, reference, strict=True):
        assert relative_error(ours, theirs) < 1e-9


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_decorated(way: Way) -> None:
    net = decorated()
    assert_equal(results(way, net, penalty), results(way, Net(), penalty))


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore:picky runs as written")
def test_by_layer(way: Way) -> None:
    """The same inside a loss that runs as written; afterwards the class is as it was."""
    forward = vars(Net)["forward"]
    loss = optimize_nested(picky, backend="eager")
    net = Net()  # its towers go with it
    assert_equal(results(way, net, loss), results(way, Net(), picky))
    assert "captured by layer" in loss.layers.said
    assert vars(Net)["forward"] is forward


@pytest.mark.filterwarnings("ignore:inside runs as written")
@pytest.mark.parametrize(
    "way", [copied, cloned, cloned_of_its_class, with_fast_weights], ids=lambda f: f.__name__
)
def test_copied_inside(way: Way) -> None:
    """The copy is made while the forward of the original is a tower."""

    def inside(net: Any, x: Tensor) -> Tensor:
        before = picky(net, x)
        module, leaves = way(net)
        value = picky(module, x)
        grads = torch.autograd.grad(value, leaves, create_graph=True)
        return before + value + sum(g.square().sum() for g in grads)

    mine, plain = Net(), Net()
    value = optimize_nested(inside, backend="eager")(mine, points())
    reference = inside(plain, points())
    value.backward()
    reference.backward()
    for ours, theirs in zip(mine.parameters(), plain.parameters(), strict=True):
        assert relative_error(ours.grad, theirs.grad) < 1e-9
    assert relative_error(value, reference) < 1e-9


def test_copies_have_one_tower() -> None:
    """Clones that are made for each step are captured once; of classes that are made for each
    clone, the first few."""
    net = decorated()
    penalty(net, points())
    for _ in range(3):
        for way in (copied, deep_copied, cloned_of_its_class):
            penalty(way(net)[0], points())
    assert len(steps(net)) == 1
    for _ in range(6):
        assert_equal([penalty(cloned(net)[0], points())], [penalty(cloned(Net())[0], points())])
    assert len(steps(net)) == MOST_CLASSES


@pytest.mark.filterwarnings("ignore:picky runs as written")
def test_clones_have_one_tower_by_layer() -> None:
    loss, net = optimize_nested(picky, backend="eager"), Net()
    for _ in range(4):
        loss(net, points())
        loss(deep_copied(net)[0], points())
        loss(cloned_of_its_class(net)[0], points())
    assert set(loss.layers.reports()) == {"Net: captured, 1"}


def test_it_is_its_class() -> None:
    """What is asked of a decorated module's class."""
    net = decorated()
    assert isinstance(net, Net) and isinstance(net.forward, types.MethodType)
    assert (type(net).__name__, type(net).__module__) == ("Net", Net.__module__)
    assert type(net).forward is Net.forward and type(net) is type(copy.copy(net))
    assert list(net.state_dict()) == list(Net().state_dict())
    assert net.forward.__name__ == "forward"
    assert isinstance(net.forward.__func__, OptimizedForward)
    assert optimize_nested(net, backend="eager") is net
    assert type(net).__mro__[1] is Net


def test_its_class_is_not_told() -> None:
    """A class that keeps a register of its subclasses hears of none."""

    class Registered(Net):
        names: list[str] = []  # noqa: RUF012

        def __init_subclass__(cls, name: str) -> None:
            cls.names.append(name)

    net = decorated(Registered)
    assert net.names == [] and isinstance(net, Registered)
    assert_equal([penalty(net, points())], [penalty(Net(), points())])


@optimize_nested(backend="eager")
class Decorated(Net):
    """A class that is decorated as a whole."""


class Derived(cast(Any, Decorated)):
    """Its own forward around that of a decorated class."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2) + 1


class Written(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * 2) + 1


def test_class_decorator() -> None:
    assert_equal([penalty(Decorated(), points())], [penalty(Net(), points())])
    net = new(Derived)
    assert isinstance(Decorated(), Net) and isinstance(net, Derived)
    assert_equal(results(deep_copied, net, penalty), results(deep_copied, Written(), penalty))
    assert len(steps(net)) == 1
    assert_equal(results(pickled, Decorated(), penalty), results(pickled, Net(), penalty))
    for way in (copied, cloned, with_fast_weights):
        assert_equal(results(way, Decorated(), penalty), results(way, Net(), penalty))
    loss = optimize_nested(penalty, backend="eager")
    assert_equal([loss(Derived(), points())], [penalty(Written(), points())])


def test_parametrized_before() -> None:
    """Its class was made for it alone, and is taken off again."""
    net = new(Net)
    plain = Net()
    for module in (net, plain):
        parametrize.register_parametrization(module, "weight", Doubled())
    optimize_nested(net, backend="eager")
    assert_equal([penalty(net, points())], [penalty(plain, points())])
    assert net.forward.steps
    for module in (net, plain):
        parametrize.register_parametrization(module, "weight", Doubled())
    assert_equal([penalty(net, points())], [penalty(plain, points())])
    for module in (net, plain):
        parametrize.remove_parametrizations(module, "weight")
    assert type(net) is Net
    assert_equal([penalty(net, points())], [penalty(plain, points())])


def test_replaced_before() -> None:
    """A forward of the module's own is left alone, and said."""
    net = new(Net)
    net.forward = functools.partial(lambda forward, x: forward(x * 2), net.forward)
    with pytest.warns(NestedGradientWarning, match="Net runs as written: its forward was replaced"):
        optimize_nested(net, backend="eager")
    assert_equal([net(points())], [Net()(points() * 2)])
    with pytest.raises(CaptureError, match="decorate it before"):
        optimize_nested(net, backend="eager", strict=True)
    net.forward = types.MethodType(Net.forward, net)  # what Lightning leaves there
    mine = optimize_nested(net, backend="eager")
    mine(points())
    assert "forward" not in vars(mine) and steps(mine)


@pytest.mark.filterwarnings("ignore:outer runs as written")
def test_decorated_inside_a_loss_as_written() -> None:
    """It goes on with its own towers."""
    net: Any = Around(decorated())

    def outer(net: Any, x: Tensor) -> Tensor:
        return picky(net.net, x)

    loss = optimize_nested(outer, backend="eager")
    penalty(net.net, points())
    assert_equal([loss(net, points())], [picky(Net(), points())])
    assert len(net.net.forward.steps) == 1 and not loss.layers.reports()


@pytest.mark.filterwarnings("ignore:picky runs as written")
def test_threads() -> None:
    """A class is changed for as long as one thread needs it; other threads' modules run as
    written."""
    first, seen, go, done = Net(), [], threading.Event(), threading.Event()

    def waiting(net: Any, x: Tensor) -> Tensor:
        go.set()
        assert done.wait(60)
        return picky(net, x)

    def run() -> None:
        seen.append(optimize_nested(waiting, backend="eager")(first, points()))

    forward = vars(Net)["forward"]
    thread = threading.Thread(target=run)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        thread.start()
        assert go.wait(60)
        loss = optimize_nested(picky, backend="eager")
        assert_equal([loss(Net(), points())], [picky(Net(), points())])
        done.set()
        thread.join(60)
    assert_equal(seen, [picky(Net(), points())])
    assert vars(Net)["forward"] is forward
