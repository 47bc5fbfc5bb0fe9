"""What may be decorated: each works as what it was made of, or one sentence says what to write."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from tests.oracle import relative_error

eager = functools.partial(optimize_nested, backend="eager", strict=True)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


NET, X = network(), torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)


def penalty(net: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().mean()


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)

    return call


class Above:
    """Decorated above the built-in decorators."""

    @eager
    @staticmethod
    def static(net: Any, x: Tensor) -> Tensor:
        return penalty(net, x)

    @eager
    @classmethod
    def of_class(cls, net: Any, x: Tensor) -> Tensor:
        assert cls is Above
        return penalty(net, x)

    @eager
    @property
    def value(self) -> Tensor:
        return penalty(NET, X)


class Below:
    @staticmethod
    @eager
    def static(net: Any, x: Tensor) -> Tensor:
        return penalty(net, x)

    @classmethod
    @eager
    def of_class(cls, net: Any, x: Tensor) -> Tensor:
        return penalty(net, x)

    def plain(self, net: Any, x: Tensor) -> Tensor:
        return penalty(net, x)

    @eager
    def method(self, net: Any, x: Tensor) -> Tensor:
        return penalty(net, x)

    def __call__(self, net: Any, x: Tensor) -> Tensor:
        return penalty(net, x)


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "torch.compile": lambda: eager(torch.compile(penalty, backend="eager")),
    "inside of torch.compile": lambda: torch.compile(eager(penalty), backend="eager"),
    "above static": lambda: Above.static,
    "above static of an object": lambda: Above().static,
    "above class": lambda: Above.of_class,
    "above class of an object": lambda: Above().of_class,
    "below static": lambda: Below().static,
    "below class": lambda: Below.of_class,
    "partial": lambda: eager(functools.partial(penalty)),
    "partial of a decorated": lambda: functools.partial(eager(penalty)),
    "wraps": lambda: eager(wrapped(penalty)),
    "wraps a decorated": lambda: wrapped(eager(penalty)),
    "callable object": lambda: eager(Below()),
    "bound method": lambda: eager(Below().plain),
    "decorated bound method": lambda: eager(Below().method),
    "twice": lambda: eager(eager(penalty)),
    "lambda": lambda: eager(lambda net, x: penalty(net, x)),
    "under enable_grad": lambda: eager(torch.enable_grad()(penalty)),
}


def gradients(loss: Callable[[], Tensor], net: nn.Module) -> list[Tensor]:
    net.zero_grad()
    loss().backward()
    return [p.grad for p in net.parameters() if p.grad is not None]


def assert_right(loss: Callable[[], Tensor], net: nn.Module) -> None:
    expected = gradients(lambda: penalty(NET, X), NET)
    found = gradients(loss, net)
    assert len(found) == len(expected)
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("how", LOSSES)
def test_losses(how: str) -> None:
    loss = LOSSES[how]()
    assert_right(lambda: loss(NET, X), NET)
    assert_right(lambda: loss(NET, X), NET)


@pytest.mark.parametrize("how", ["above static", "above class", "twice"])
def test_they_have_the_methods_of_a_loss(how: str) -> None:
    loss: Any = LOSSES[how]()
    _, grads = loss.value_and_grad(NET, X)
    assert set(grads) == {"net.0.weight", "net.0.bias", "net.2.weight"}
    assert loss.explain(NET, X).captured


def test_property() -> None:
    assert_right(lambda: Above().value, NET)


def compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="aot_eager")
    return net


MODULES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda net: torch.compile(net, backend="aot_eager"),  # pyright: ignore
    "compiled in place": compiled_in_place,
    "twice": lambda net: optimize_nested(net, backend="eager"),
}


@pytest.mark.parametrize("how", MODULES)
def test_modules(how: str) -> None:
    """What `torch.compile` has made refuses a second derivative; the module inside does not."""
    net = network()
    decorated = eager(MODULES[how](net))
    assert decorated is net
    assert_right(lambda: penalty(decorated, X), net)


async def asynchronous(net: Any, x: Tensor) -> Tensor:
    return penalty(net, x)


async def asynchronous_generator(net: Any, x: Tensor) -> Any:
    yield penalty(net, x)


def generator(net: Any, x: Tensor) -> Any:
    yield penalty(net, x)


REFUSED = {
    "async": (lambda: asynchronous, "asynchronous is asynchronous; decorate a plain function"),
    "async generator": (lambda: asynchronous_generator, "asynchronous; decorate a plain function"),
    "async partial": (lambda: functools.partial(asynchronous, NET), "is asynchronous"),
    "generator": (lambda: generator, "is a generator; decorate a function that returns"),
    "class": (lambda: Below, "got the class Below; decorate a method of it, or an instance"),
    "cached property": (lambda: functools.cached_property(penalty), "decorate the function"),
    "partial method": (lambda: functools.partialmethod(penalty), "decorate the function"),
    "property": (lambda: property(None), "a property that cannot be read"),
    "number": (lambda: 3, "expected a loss function, a module or a class of modules, got int"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    make, match = REFUSED[what]
    with pytest.raises(TypeError, match=match):
        optimize_nested(make())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript() -> None:
    module = torch.jit.trace(NET, X)
    for given in (module, torch.jit.trace(lambda x: x * 2, X)):
        with pytest.raises(TypeError, match="TorchScript, which cannot be captured; decorate"):
            optimize_nested(given)


def test_functions_without_a_signature() -> None:
    """Of C; and losses that are modules."""
    x = X.clone().requires_grad_()
    for loss in (eager(torch.sum), optimize_nested(nn.MSELoss(), backend="eager")):
        args = (x,) if not isinstance(loss, nn.Module) else (x, torch.zeros_like(X))
        loss(*args).backward()
    torch.testing.assert_close(x.grad, 1 + 2 * X / X.numel())
    assert set(eager(torch.sum).value_and_grad(x)[1]) == {"argument 0"}


def test_traced_graph() -> None:
    """A network that `torch.fx` has written, called by a loss."""
    traced = torch.fx.symbolic_trace(NET)
    assert_right(lambda: optimize_nested(penalty, backend="eager")(traced, X), traced)
