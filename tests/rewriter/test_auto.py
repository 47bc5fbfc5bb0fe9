"""``capture="auto"``: whichever way is taken, numbers and state of the host are those of eager."""

from __future__ import annotations

import collections
import copy
import datetime
import functools
import itertools
import logging
import os
import random
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from rewriter import NestedGradientWarning, auto, optimize_nested, recorder
from tests.oracle import relative_error

DTYPE = torch.float64
SCALE = torch.tensor(0.7, dtype=DTYPE)


def slope(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g


def host(x: Tensor = SCALE) -> float:
    """Host code that Dynamo refuses, and a recording does not."""
    return float(numpy.asarray(x.numpy()).item())


def penalty(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * host()


def make_net(*extra: nn.Module) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), *extra, nn.Linear(6, 1)).to(DTYPE)


class Case:
    """A loss with its state: made twice, once decorated."""

    state: Any = None

    def __init__(self) -> None:
        self.net = make_net()

    def loss(self, net: nn.Module, x: Tensor) -> Any:
        return penalty(net, x)

    def change(self, call: int) -> None:
        """Do what training does between two calls."""
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(0.9).add_(0.01 * call)

    def seen(self) -> Any:
        return copy.deepcopy(self.state)


class Pure(Case):
    pass


class Counter(Case):
    def __init__(self) -> None:
        super().__init__()
        self.state = {"calls": 0}

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        self.state["calls"] += 1
        return penalty(net, x) * self.state["calls"]


class CounterWithoutUse(Counter):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        self.state["calls"] += 1
        return penalty(net, x)


class Nonlocal(Case):
    def __init__(self) -> None:
        super().__init__()
        calls = 0

        def count() -> int:
            nonlocal calls
            calls += 1
            return calls

        self.count, self.now = count, lambda: calls

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        self.count()
        return penalty(net, x)

    def seen(self) -> Any:
        return self.now()


class Attribute(Case):
    last = 0

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        type(self).last += 1
        return penalty(net, x)

    def seen(self) -> Any:
        return None


class OfRandom(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * (1 + random.gauss(0.0, 1.0))


class BranchOnRandom(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * (1 if random.choice([True, False]) else 2)


class OfNumpy(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return (slope(net, x) * torch.from_numpy(numpy.random.rand(3))).square().sum() * host()


class OfOwnGenerator(Case):
    def __init__(self) -> None:
        super().__init__()
        self.generator = numpy.random.default_rng(3)

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * float(self.generator.random())

    def seen(self) -> Any:
        return self.generator.bit_generator.state


class Clock(Case):
    now = 1000.0

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        start = time.perf_counter()
        value = penalty(net, x)
        return value + (0.0 if time.perf_counter() >= start else 1.0)


class Date(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * (1 if datetime.datetime.now().year > 1990 else 2)


class Global(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * CONFIG["weight"]

    def change(self, call: int) -> None:
        CONFIG["weight"] = 1.0 + call // 2


CONFIG = {"weight": 1.0}


class Environment(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * float(os.environ.get("WEIGHT_OF_A_TEST", "1"))

    def change(self, call: int) -> None:
        os.environ["WEIGHT_OF_A_TEST"] = str(call)


class Append(Case):
    def __init__(self) -> None:
        super().__init__()
        self.state = []

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        value = penalty(net, x)
        self.state.append(value.item())
        return value


class AppendPlain(Append):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        self.state.append(len(self.state))
        return penalty(net, x)


class AppendAtThird(Append):
    """No effect at first, one at the third call."""

    calls = 0

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        if self.calls == 2:
            self.state.append("third")
        return penalty(net, x)

    def change(self, call: int) -> None:
        super().change(call)
        self.calls += 1


class Deque(Append):
    def __init__(self) -> None:
        super().__init__()
        self.state = collections.deque([1.0], maxlen=2)

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        self.state.append(2.0 * self.state[-1])
        return penalty(net, x) * self.state[-1]


class Replay(Case):
    """A tensor is taken from what the trainer fills."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = collections.deque([torch.ones(3, dtype=DTYPE)])

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x + self.buffer[-1])

    def change(self, call: int) -> None:
        super().change(call)
        self.buffer.append(torch.full((3,), 0.1 * call, dtype=DTYPE))


class Metrics(Case):
    def __init__(self) -> None:
        super().__init__()
        self.state = {}

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        value = penalty(net, x)
        self.state["loss"] = value.item()
        return value


class BranchAtThird(Case):
    """A branch on a value, which flips."""

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        value = penalty(net, x)
        return value.sqrt() if value.item() > 0.1 else value

    def change(self, call: int) -> None:
        with torch.no_grad():
            for p in self.net.parameters():
                p.mul_(0.2 if call == 1 else 1.0)


class Threshold(Case):
    """A number that is compared at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.step = torch.tensor(0)

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        value = penalty(net, x)
        return value * 3 if int(self.step) >= 2 else value

    def change(self, call: int) -> None:
        super().change(call)
        self.step += 1


class Cache(Case):
    """Filled by the first call, as the trainer could have done."""

    state: dict[Any, Any]

    def __init__(self) -> None:
        super().__init__()
        self.state = {}

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        n = x.shape[1]
        if n not in self.state:
            self.state[n] = torch.linspace(0, 1, n, dtype=DTYPE)
        return (slope(net, x) * self.state[n]).square().sum() * host()


class CacheById(Cache):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        g = slope(net, x)
        self.state[len(self.state)] = g.detach()
        return g.square().sum() * host()


class LazyAttribute(Case):
    weights: Tensor | None = None

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        if self.weights is None:
            self.weights = torch.from_numpy(numpy.linspace(0.5, 1.5, x.shape[1]))
        return (slope(net, x) * self.weights).square().sum() * host()


class Schedule(Case):
    weight = 1.0

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * self.weight

    def change(self, call: int) -> None:
        super().change(call)
        self.weight *= 0.5


class ScheduleInside(Schedule):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        self.weight = self.weight * 0.5
        return penalty(net, x) * self.weight

    def seen(self) -> Any:
        return self.weight

    change = Case.change


class MovingAverage(Case):
    """A tensor that is replaced at each call."""

    mean = torch.zeros((), dtype=DTYPE)

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        value = penalty(net, x)
        self.mean = 0.9 * self.mean + 0.1 * value.detach()
        return value / (1 + self.mean)

    def seen(self) -> Any:
        return self.mean.item()


class InPlaceAverage(Case):
    """A tensor that is written to at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros((), dtype=DTYPE)

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        value = penalty(net, x)
        self.mean.mul_(0.9).add_(0.1 * value.detach())
        return value / (1 + self.mean)

    def seen(self) -> Any:
        return self.mean.item()


class ArrayState(Case):
    def __init__(self) -> None:
        super().__init__()
        self.state = numpy.zeros(2)

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        self.state[0] += 1
        return penalty(net, x)


class Iterated(Case):
    """Batches from an iterator."""

    def __init__(self) -> None:
        super().__init__()
        self.batches = iter([torch.full((3,), float(i), dtype=DTYPE) for i in range(8)])

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x + next(self.batches))


class Counted(Case):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * next(self.numbers)


class File(Case):
    def __init__(self) -> None:
        super().__init__()
        self.path = Path(str(TMP[0])) / type(self).__name__ / str(id(self))
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("1.0")

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * float(self.path.read_text())

    def change(self, call: int) -> None:
        super().change(call)
        self.path.write_text(str(2.0 + call))


class Journal(File):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        with self.path.open("a") as file:
            file.write("called\n")
        return penalty(net, x)

    change = Case.change

    def seen(self) -> Any:
        return self.path.read_text()


TMP: list[Any] = []


class Printed(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        print("called")
        return penalty(net, x)


class Logged(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        logging.getLogger(__name__).debug("called")
        return penalty(net, x)


class ForwardHook(Case):
    def __init__(self) -> None:
        super().__init__()
        self.state = []
        self.net[0].register_forward_hook(lambda *_: self.state.append(1))


class Registry(Case):
    """A helper that counts in a module-level dictionary."""

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        record(id(self))
        return penalty(net, x)

    def seen(self) -> Any:
        return CALLS[id(self)]


CALLS: dict[int, int] = collections.defaultdict(int)


def record(key: int) -> None:
    CALLS[key] += 1


class Loop(Case):
    steps = 1

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        value = penalty(net, x)
        for step in range(self.steps):
            value = value + slope(net, x + step).sum()
        return value

    def change(self, call: int) -> None:
        super().change(call)
        self.steps += 1


class Detector(Case):
    """A draw of PyTorch's, and a number of it."""

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * torch.rand(()).item()


class Dropped(Case):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net(nn.Dropout(0.3), nn.BatchNorm1d(6))

    def change(self, call: int) -> None:
        super().change(call)
        self.net.train(call != 1)

    def seen(self) -> Any:
        return [b.tolist() for b in self.net.buffers()]


class Flags(Case):
    """``requires_grad`` is switched outside."""

    def change(self, call: int) -> None:
        super().change(call)
        self.net[0].weight.requires_grad_(call % 2 == 1)


class Replaced(Case):
    """Parameters are replaced."""

    def change(self, call: int) -> None:
        self.net[0] = nn.Linear(3, 6).to(DTYPE)


class Data(Case):
    """What is in a parameter is replaced."""

    def change(self, call: int) -> None:
        self.net[0].weight.data = torch.full((6, 3), 0.1 * (call + 1), dtype=DTYPE)


class Results(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Any:
        g = slope(net, x)
        return {"loss": g.square().sum() * host(), "parts": (g.detach().mean(), host())}


class OwnFlag(Case):
    """The loss itself makes its argument require grad."""

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        x.requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return g.square().sum() * host()


class NewStream(Case):
    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return penalty(net, x + torch.randn_like(x))


class Cell(Case):
    """A tensor that a function keeps where nothing leads to it."""

    def __init__(self) -> None:
        super().__init__()

        @functools.lru_cache
        def last(_: int) -> list[Tensor]:
            return [torch.ones(3, dtype=DTYPE)]

        self.last = last

    def loss(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x + self.last(0)[-1])

    def change(self, call: int) -> None:
        super().change(call)
        self.last(0).append(torch.full((3,), 0.1 * call, dtype=DTYPE))


CASES = [v for v in list(globals().values()) if isinstance(v, type) and issubclass(v, Case)][1:]

# How the last of four calls is made; what is not here is no matter of this table.
WAYS: dict[type[Case], str] = dict.fromkeys(
    [Pure, Cache, LazyAttribute, Threshold, Logged, Loop, Dropped, Flags, Replaced, Data, Results,
     Global, Schedule, Replay, InPlaceAverage, AppendAtThird],
    "trace",
)  # fmt: skip


def run(case: Case, function: Callable[..., Any], x: Tensor) -> list[Any]:
    """Make four calls; return the numbers of each and the state after it."""
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    found: list[Any] = []
    for call in range(4):
        case.net.zero_grad()
        value = function(case.net, x.clone())
        end = value["loss"] if isinstance(value, dict) else value
        end.backward()
        grads = [None if p.grad is None else p.grad.clone() for p in case.net.parameters()]
        streams = random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state()
        found.append((end.detach(), grads, case.seen(), streams[:2], streams[2].tolist()))
        case.change(call)
    return found


def compare(mine: list[Any], plain: list[Any]) -> None:
    for call, (a, b) in enumerate(zip(mine, plain, strict=True)):
        assert relative_error(a[0], b[0]) < 1e-9, f"the value of call {call}"
        for g, h in zip(a[1], b[1], strict=True):
            assert (g is None) == (h is None) and (g is None or relative_error(g, h) < 1e-9), call
        if isinstance(b[2], numpy.ndarray):
            assert numpy.array_equal(a[2], b[2]), f"the state after call {call}"
        else:
            assert_state(a[2], b[2])
        assert a[3:] == b[3:], f"the random streams after call {call}"


def assert_state(mine: Any, plain: Any) -> None:
    if isinstance(plain, Tensor):
        assert relative_error(mine, plain) < 1e-9
    elif isinstance(plain, float):
        assert mine == pytest.approx(plain, rel=1e-9)
    elif isinstance(plain, (list, tuple, collections.deque)):
        assert len(mine) == len(plain)
        for a, b in zip(mine, plain, strict=True):
            assert_state(a, b)
    elif isinstance(plain, dict):
        assert mine.keys() == plain.keys()
        for key in plain:
            assert_state(mine[key], plain[key])
    else:
        assert mine == plain


@pytest.mark.parametrize("kind", CASES, ids=lambda kind: kind.__name__)
def test_numbers_and_state(
    kind: type[Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TMP[:] = [tmp_path]
    x = torch.randn(5, 3, dtype=DTYPE, generator=torch.Generator().manual_seed(2))
    outside = copy.deepcopy(CONFIG), dict(os.environ)
    plain = kind()
    expected = run(plain, plain.loss, x)
    said = capsys.readouterr().out
    CONFIG.update(outside[0])
    os.environ.pop("WEIGHT_OF_A_TEST", None)
    case = kind()
    loss = optimize_nested(case.loss, backend="eager", dynamic=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NestedGradientWarning)
        found = run(case, loss, x)
    CONFIG.update(outside[0])
    os.environ.pop("WEIGHT_OF_A_TEST", None)
    compare(found, expected)
    assert capsys.readouterr().out == said
    if kind in WAYS:
        assert loss.way == WAYS[kind], loss.refusals[0].said
        assert loss.steps


@pytest.fixture
def net() -> Any:
    return make_net()


def test_one_recording_for_all_sizes(net: nn.Module) -> None:
    loss = optimize_nested(penalty, backend="eager")
    for rows in (5, 7, 9, 5):
        x = torch.randn(rows, 3, dtype=DTYPE)
        assert relative_error(loss(net, x), penalty(net, x)) < 1e-9
    assert len(loss.steps) == 2 and loss.way == "trace"


def test_how_often_the_loss_is_run(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as written, and three times to be recorded: at the first call, and never again."""
    runs: list[str] = []
    for module, name in ((auto, "watched"), (recorder, "record")):
        run = getattr(module, name)
        counted = functools.partial(lambda run, *a, **k: runs.append("run") or run(*a, **k), run)
        monkeypatch.setattr(module, name, counted)
    loss, x = optimize_nested(penalty, backend="eager"), torch.randn(5, 3, dtype=DTYPE)
    loss(net, x)
    assert len(runs) == 4
    loss(net, x).backward()
    loss(net, x + 1).backward()
    assert len(runs) == 4 and loss.way == "trace"


def test_later_calls_walk_nothing(net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guards of the hot path are comparisons by identity; a change has them walk again."""
    walks: list[int] = []
    walk = recorder.reached
    loss, x = optimize_nested(penalty, backend="eager"), torch.randn(5, 3, dtype=DTYPE)
    monkeypatch.setattr(recorder, "reached", lambda *given: walks.append(1) or walk(*given))
    for _ in range(2):
        loss(net, x)
    walks.clear()
    for _ in range(3):
        loss(net, x + 1)
    assert not walks
    net.eval()
    assert relative_error(loss(net, x), penalty(net, x)) < 1e-9 and walks


CHANGES: dict[str, Callable[[Any], object]] = {
    "flag": lambda net: net[0].weight.requires_grad_(False),
    "parameter": lambda net: setattr(net[0], "weight", nn.Parameter(torch.ones(6, 3, dtype=DTYPE))),
    "layer": lambda net: net.append(nn.Softplus()),
    "replaced layer": lambda net: net.__setitem__(1, nn.Sigmoid()),
    "mode": lambda net: net.eval(),
    "hook": lambda net: net[0].register_forward_hook(lambda m, i, o: 2 * o),
    "data": lambda net: setattr(net[0].weight, "data", torch.ones(6, 3, dtype=DTYPE)),
    "type": lambda net: net.float() and net.double(),
    "attribute": lambda net: setattr(net, "forward", lambda z: z.sum(1) ** 2),
    "number": lambda net: SCALE.fill_(0.3),
    "global": lambda net: globals().update(host=lambda: 2.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_seen(name: str, net: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the quick guards have compared by identity."""
    monkeypatch.setitem(globals(), "SCALE", SCALE.clone())
    monkeypatch.setattr(host, "__defaults__", (SCALE,))
    monkeypatch.setitem(globals(), "host", host)
    loss = optimize_nested(penalty, backend="eager", dynamic=False)
    x = torch.randn(5, 3, dtype=DTYPE)
    for _ in range(3):
        loss(net, x)
    assert loss.way == "trace"
    CHANGES[name](net)
    for _ in range(2):
        assert relative_error(loss(net, x), penalty(net, x)) < 1e-9


def test_report_says_which_way(net: nn.Module) -> None:
    x = torch.randn(5, 3, dtype=DTYPE)
    loss = optimize_nested(penalty, backend="eager")
    for _ in range(2):  # before the first call, and after it
        report = loss.explain(net, x)
        assert report.way == "trace" and "test_auto.py" in report.refused_before
        assert "by a recording; Dynamo refuses: " in str(report)
        loss(net, x)
    assert optimize_nested(slope_of, backend="eager").explain(net, x).way == "dynamo"


def slope_of(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum()


def test_both_refusals_are_said(net: nn.Module) -> None:
    case = Metrics()
    loss, x = optimize_nested(case.loss, backend="eager"), torch.randn(5, 3, dtype=DTYPE)
    with pytest.warns(NestedGradientWarning, match=r"runs as written: .*; recorded: .*"):
        loss(net, x)
        loss(net, x)
    report = loss.explain(net, x)
    assert not report.captured and "recorded: " in report.reason


def test_forced(net: nn.Module) -> None:
    x = torch.randn(5, 3, dtype=DTYPE)
    with pytest.warns(NestedGradientWarning, match="runs as written"):
        by_dynamo = optimize_nested(penalty, backend="eager", capture="dynamo")
        by_dynamo(net, x)
    assert not by_dynamo.steps
    by_layer = optimize_nested(slope_of, backend="eager", capture="layers")
    assert relative_error(by_layer(net, x), slope_of(net, x)) < 1e-9
    assert not by_layer.steps and by_layer.layers.reports()


def test_under_no_grad_and_by_name(net: nn.Module) -> None:
    loss, x = optimize_nested(penalty, backend="eager"), torch.randn(5, 3, dtype=DTYPE)
    value = penalty(net, x)
    for _ in range(3):
        value, grads = loss.value_and_grad(net, x=x)
        assert relative_error(value, penalty(net, x)) < 1e-9 and "net.0.weight" in grads
    with torch.no_grad():
        assert torch.equal(loss(net, x=x), value) and not loss(net, x=x).requires_grad


class Labelled(Tensor):
    """A tensor of columns that have names, as solvers of differential equations have them."""

    labels: list[str]

    @staticmethod
    def __new__(cls, x: Tensor, labels: list[str], *args: Any, **kwargs: Any) -> Labelled:
        return super().__new__(cls, x, *args, **kwargs)

    def __init__(self, x: Tensor, labels: list[str]) -> None:
        super().__init__()
        self.labels = labels

    def extract(self, label: str) -> Tensor:
        return self.as_subclass(Tensor)[:, [self.labels.index(label)]]


@pytest.mark.filterwarnings("ignore::rewriter.NestedGradientWarning")
def test_memory_shared_without_notice() -> None:
    """PyTorch gives no notice of the constructor: the tensor is no constant of the loss."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        labelled, p = Labelled(x, ["x", "y"]), x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
        return (g.square() * labelled.extract("y")).mean()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    decorated = optimize_nested(loss, backend="eager")
    for _ in range(3):
        x = torch.randn(5, 2, dtype=torch.float64)
        torch.testing.assert_close(decorated(net, x), loss(net, x), rtol=1e-9, atol=0)
