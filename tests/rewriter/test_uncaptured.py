"""What a loss costs that is not captured: one look-up; and what is asked before it."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import compiled_autograd

from rewriter import NestedGradientWarning, optimize_nested, step, turns
from rewriter.step import Step
from rewriter.turns import Turns
from tests.cases import mlp
from tests.rewriter.test_handing_out import python_calls

# Not recorded: what no recording would mind is in the way.
DYNAMO: Any = {"backend": "eager", "capture": "dynamo"}
X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NestedGradientWarning)
        warnings.filterwarnings("ignore", message="Anomaly Detection")
        yield


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    open("/dev/null").close()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum()


def plain(x: Any, y: Any) -> Any:
    open("/dev/null").close()
    return x, y


@pytest.mark.parametrize(
    "arguments",
    [
        lambda: (X.clone().requires_grad_(), X),
        lambda: (nn.Linear(2, 1), X),
        lambda: ([X, X], {"a": X, "b": 1}),
        lambda: (True, None),
    ],
)
def test_a_call_is_a_look_up(arguments: Callable[[], tuple[Any, Any]]) -> None:
    loss = optimize_nested(plain, **DYNAMO)
    x, y = arguments()
    for _ in range(2):
        loss(x, y)
    as_written = python_calls(lambda: plain(x, y))
    # The wrapper, whether Dynamo traces it, the look-up, its key, the modes; lists and dicts.
    assert python_calls(lambda: loss(x, y)) - as_written <= 6 + 7 * isinstance(x, list)


def test_so_it_is_for_all_sizes_after_a_second_one() -> None:
    loss = optimize_nested(plain, **DYNAMO)
    for n in (1, 2, 3):
        loss(X[:n], X)
    assert len(loss.refusals) == 2
    as_written = python_calls(lambda: plain(X, X))
    for x in (X, X.reshape(2, 3), X[:1]):
        assert python_calls(lambda x=x: loss(x, X)) - as_written <= 6
    assert len(loss.refusals) == 2


class Chatty(nn.Module):
    """Opens a file in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.Tanh, 2, 6, 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            open("/dev/null").close()
        return self.net(x)


def test_other_modes_are_other_calls() -> None:
    net, x = Chatty(), X.clone().requires_grad_()

    def square(x: Tensor) -> Tensor:
        return net(x).square().sum()

    for loss, arguments in (
        (optimize_nested(square, **DYNAMO), (x,)),
        (optimize_nested(lambda net, x: net(x).square().sum(), **DYNAMO), (net, x)),
    ):
        net.train()
        for _ in range(4):
            loss(*arguments)
        assert loss.ways.of(arguments, {}) is not None and not loss.steps
        with torch.no_grad():
            assert loss.ways.of(arguments, {}) is None
        with torch.autograd.detect_anomaly(check_nan=False):
            assert loss.ways.of(arguments, {}) is None
        with torch.autocast("cpu"):
            assert loss.ways.of(arguments, {}) is None
        net.eval()
        assert loss.ways.of(arguments, {}) is None
        loss(*arguments)
        assert len(loss.steps) == 1
        net.train()
        assert loss.ways.of(arguments, {}) is not None


def test_flags_are_told_apart() -> None:
    def loss(x: Tensor, verbose: bool) -> Tensor:
        if verbose:
            open("/dev/null").close()
        return x.square().sum()

    decorated = optimize_nested(loss, **DYNAMO)
    x = X.clone().requires_grad_()
    for _ in range(3):
        decorated(x, True)
    assert not decorated.steps
    decorated(x, False)
    assert len(decorated.steps) == 1


def test_what_no_specialisation_holds_for_is_not_asked_for_at_each_call() -> None:
    talks = False

    def loss(x: Tensor) -> Tensor:
        if talks:
            open("/dev/null").close()
        return x.square().sum()

    decorated = optimize_nested(loss, **DYNAMO)
    x = X.clone().requires_grad_()
    decorated(x)
    talks = True
    for _ in range(7):
        decorated(x)
    talks = False
    decorated(x)  # not in a row
    talks = True
    for _ in range(8):
        assert decorated.ways.of((x,), {}) is None
        decorated(x)
    assert python_calls(lambda: decorated(x)) - python_calls(lambda: loss(x)) <= 7
    for _ in range(999):
        assert decorated.ways.of((x,), {}) is not None
        decorated(x)
    talks = False
    assert decorated.ways.of((x,), {}) is None
    calls = python_calls(lambda: decorated(x))
    assert calls > 20 and len(decorated.steps) == 1


def test_networks_are_not_kept() -> None:
    loss = optimize_nested(penalty, **DYNAMO, race=True)
    net = mlp(nn.Tanh, 2, 6, 2)
    gone = weakref.ref(net)
    for _ in range(4):
        loss(net, X.clone().requires_grad_()).backward()
    del net
    gc.collect()
    assert gone() is None


# Turns


class Clock:
    """Seconds that pass when a form says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(turns, "clock", made)
    return made


class Slow(torch.autograd.Function):
    """The identity; forward and backward take the time that they are told."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, clock: Clock, forward: float, backward: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, backward
        clock.now += forward
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        ctx.clock.now += ctx.seconds
        return *cotangents, None, None, None


@pytest.mark.parametrize(
    ("times", "winner"),
    [
        (((3, 5), (1, 2)), 1),
        (((1, 2), (3, 5)), 0),
        (((1, 5), (3, 1)), 1),  # the pass back counts
        (((2, 2), (2, 1.95)), 0),  # noise
    ],
)
def test_the_clock_decides(clock: Clock, times: Any, winner: int) -> None:
    race = Turns(("one", "other"))
    order = []
    while not race.is_over:
        order.append(race.turn)
        x = X.clone().requires_grad_()
        value = race.run(lambda x, k: Slow.apply(x, clock, *times[k]), (x, race.turn), {})
        clock.now += 100  # of the user's own
        value.sum().backward()
    assert order == [0, 1, 1, 0, 0, 1, 1, 0, 0, 1]
    assert race.seconds == pytest.approx([sum(time) for time in times])
    assert race.winner == winner
    assert f"{('one', 'other')[winner]} is kept" in str(race)


@pytest.mark.parametrize("is_quicker", [True, False])
def test_layers_stay_where_they_are_quicker(clock: Clock, is_quicker: bool) -> None:
    forwards: list[str] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(nn.Tanh, 2, 6, 2)
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return nn.functional.dropout(self.net(x), 0.5)

    net, reference = Net(), Net()
    reference.load_state_dict(net.state_dict())

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        open("/dev/null").close()
        is_tower = type(net).forward is not Net.__dict__.get("own", original)
        forwards.append("layer" if is_tower else "written")
        clock.now += 1 if is_tower is is_quicker else 2
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return g.square().sum()

    original = Net.forward
    decorated = optimize_nested(loss, **DYNAMO, race=True)
    found = []
    for function, own in ((decorated, net), (loss, reference)):
        torch.manual_seed(0)
        values = []
        for _ in range(15):
            x = X.clone().requires_grad_()
            value = function(own, x)
            value.backward()
            values.append(value.detach())
        grads = [p.grad for p in own.parameters()]
        found.append([*values, *(g for g in grads if g is not None), *own.buffers()])
        found[-1].append(torch.get_rng_state())
    for ours, right in zip(*found, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=0)
    ours = forwards[:15]
    assert ours[:2] == ["layer", "layer"] and ours[2:12].count("layer") == 5
    assert ours[12:] == ["layer" if is_quicker else "written"] * 3
    (race,) = decorated.ways.races
    kept = "by layer" if is_quicker else "as written"
    assert f"{kept} is kept" in str(race)
    assert f"{kept} is kept" in str(decorated.explain(net, X.clone().requires_grad_()))
    if not is_quicker:
        x = X.clone().requires_grad_()
        assert python_calls(lambda: decorated(net, x)) - python_calls(lambda: loss(net, x)) <= 6


@pytest.mark.parametrize(
    ("options", "is_raced"),
    [
        ({}, True),
        ({"backend": "eager"}, False),
        ({"strict": True}, False),
        ({"check": True}, False),
        ({"strategy": "reverse"}, False),
        ({"race": False}, False),
        ({"race": True, "strict": True, "backend": "eager"}, True),
    ],
)
def test_what_is_raced(options: dict[str, Any], is_raced: bool) -> None:
    assert optimize_nested(penalty, **options).options.is_raced is is_raced


def test_race_is_checked() -> None:
    with pytest.raises(ValueError, match="race: expected None, True or False"):
        optimize_nested(penalty, race="yes")


def test_compiled_autograd_around_a_raced_pass() -> None:
    race = Turns(("one", "other"))
    x = X.clone().requires_grad_()
    value = race.run(lambda x: x.square().sum(), (x,), {})
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        value.backward()
    torch.testing.assert_close(x.grad, 2 * X)


# One graph


def with_state(net: nn.Module, counter: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    counter += 1
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return nn.functional.dropout(g, 0.5).square().sum(), net(x).mean()


@pytest.mark.parametrize(
    ("ours", "written", "leaner", "kept", "timed"),
    [
        (1, 2, False, "one graph", 1),  # plainly quicker: one call as written
        (2, 1, False, "as written", 5),
        (1, 1.05, False, "one graph", 5),
        (1, 1.05, True, "as written", 5),  # within a tenth the memory decides
        (1, 1.2, True, "one graph", 5),
    ],
)
def test_one_graph_stays_where_it_is_quicker(
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    ours: float,
    written: float,
    leaner: bool,
    kept: str,
    timed: int,
) -> None:
    runs: list[str] = []

    def taking(seconds: float, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            clock.now += seconds
            runs.append(name)
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(Step, "forward", taking(ours, "one graph", Step.forward))
    in_place = taking(written, "as written", step.run_in_place)
    monkeypatch.setattr(step, "run_in_place", in_place)
    monkeypatch.setattr(step, "bytes_kept", lambda *_: 0 if leaner else 10**9)
    loss = optimize_nested(with_state, **DYNAMO, race=True, verify=False)
    found = []
    for function in (loss, with_state):
        torch.manual_seed(0)
        net, counter = mlp(nn.Tanh, 2, 6, 2), torch.zeros(())
        values: list[Tensor] = []
        for _ in range(14):
            x = X.clone().requires_grad_()
            one, other = function(net, counter, x)
            (one + other).backward()
            values += [one.detach(), other.detach()]
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        found.append([*values, *grads, counter, torch.get_rng_state()])
    for mine, right in zip(*found, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-9, atol=0)
    assert runs[:2] == ["one graph", "one graph"]
    assert runs[12:] == [kept] * 2
    assert runs[:12].count("as written") == timed + (kept == "as written")
    (made,) = loss.steps
    assert f"{kept} is kept" in str(made.race)
    report = loss.explain(net, counter, X.clone().requires_grad_())
    assert f"{kept} is kept" in str(report)


def test_a_price_that_is_plain_ends_the_race_before_it_begins() -> None:
    def loss(x: Tensor) -> Tensor:
        return x.sin().cos().exp().tanh().sum()  # no product: few kernels for many

    decorated = optimize_nested(loss, **DYNAMO, race=True)
    decorated(X.clone().requires_grad_())
    assert decorated.steps[0].race is None
    decorated = optimize_nested(penalty, backend="eager")
    assert not decorated.options.is_raced


def test_a_module_is_not_raced() -> None:
    net, x = Chatty(), X.clone().requires_grad_()
    optimize_nested(net, **DYNAMO, race=True)
    for _ in range(4):
        net(x).sum().backward()
    forward: Any = net.forward
    assert forward.refusals and not forward.ways.races
