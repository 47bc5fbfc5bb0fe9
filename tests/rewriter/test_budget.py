"""A value that keeps changing: an input, or as written after a few captures; never a storm."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import NestedGradientWarning, OptimizedLoss, budget, optimize_nested
from rewriter.errors import CaptureError, KeepsChanging
from rewriter.layer import Layers, OptimizedForward

X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
STEPS = 20
GLOBAL: Any = 0


class Net(nn.Module):
    """A network whose ``forward`` reads what changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1, dtype=torch.float64)
        self.number: Any = 0
        self.names: list[int] = []
        self.log: list[Any] = []

    def value(self, x: Tensor) -> Tensor:
        return self.linear(x).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.value(x)


class Counting(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        return self.value(x)


class CountingAndReading(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        return self.value(x) * (1 + 0.1 * self.number) + self.number / 7


class Scaled(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * self.number


class Named(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.value(x) * len(self.number)


class Listing(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.names.append(len(self.names))
        return self.value(x) * len(self.names)


class Logging(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.value(x)
        self.log.append(y.detach().sum())
        self.log.append(1)
        return y


LOG: list[Any] = []


def logged(net: nn.Module, x: Tensor) -> Tensor:
    loss = penalty(net, x)
    LOG.append(loss.detach())
    return loss


def penalty(net: nn.Module, x: Tensor, factor: Any = 1) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = grad(net(x).sum(), x, create_graph=True)
    return g.square().sum() * factor


def by_layer(net: nn.Module, x: Tensor) -> Tensor:
    loss = penalty(net, x)
    loss.register_hook(torch.clone)
    return loss


def of_text(net: nn.Module, x: Tensor, text: str) -> Tensor:
    return penalty(net, x) * len(text)


def of_numbers(net: nn.Module, x: Tensor, numbers: Any) -> Tensor:
    return penalty(net, x) * sum(numbers)


def of_keys(net: nn.Module, x: Tensor, numbers: dict[str, int]) -> Tensor:
    return penalty(net, x) * sum(numbers.values())


def of_object(net: nn.Module, x: Tensor, options: Any) -> Tensor:
    return penalty(net, x) * options.factor


def of_global(net: nn.Module, x: Tensor) -> Tensor:
    return penalty(net, x) * GLOBAL


def of_global_text(net: nn.Module, x: Tensor) -> Tensor:
    return penalty(net, x) * len(GLOBAL)


def of_number_as_such(net: nn.Module, x: Tensor, factor: float) -> Tensor:
    return penalty(net, x) + nn.functional.leaky_relu(net(x), factor).sum()


def set_global(value: Any) -> None:
    global GLOBAL
    GLOBAL = value


def one_call(loss: Any, net: Net, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    state = dict(net.__dict__, names=list(net.names))
    value = loss(net, *arguments)
    grads = grad(value, list(net.parameters()), allow_unused=True) if value.requires_grad else ()
    after = net.number, list(net.names)
    net.__dict__.update(state)
    return value, grads, *after


def storm(
    loss: OptimizedLoss,
    net: Net,
    call: Callable[[int], tuple[Any, ...]],
    steps: int = STEPS,
) -> list[str]:
    """Call the loss with what ``call`` gives for each step, and compare it with the loss as
    written; return the warnings there were."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for step in range(steps):
            arguments = call(step)
            if not arguments or not isinstance(arguments[0], Tensor):
                arguments = (X, *arguments)
            ours = one_call(loss, net, arguments)
            expected = one_call(loss.as_written, net, arguments)
            torch.testing.assert_close(ours[:2], expected[:2], rtol=1e-9, atol=1e-12)
            assert ours[2:] == expected[2:]
            net.number, net.names = expected[2:]
    return [str(w.message) for w in given if issubclass(w.category, NestedGradientWarning)]


def decorated(loss: Callable[..., Any], **options: Any) -> OptimizedLoss:
    return optimize_nested(loss, backend="eager", **options)


def towers_of(loss: OptimizedLoss) -> list[OptimizedForward]:
    assert isinstance(loss.layers, Layers)
    return loss.layers._called


def nothing(step: int) -> tuple[Any, ...]:
    return ()


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "LIMIT", 2)


@pytest.mark.parametrize("kind", [Counting, CountingAndReading, Scaled])
def test_a_number_on_a_module_becomes_an_input(kind: type[Net]) -> None:
    net, loss = kind(), decorated(penalty)

    def call(step: int) -> tuple[Any, ...]:
        if kind is Scaled:
            net.number = step / 7
        return ()

    assert storm(loss, net, call) == []
    assert len(loss.steps) == 2
    if kind is not Scaled:  # Dynamo does it by itself
        assert loss.budget.spent.inputs == ("net.number",)


def test_a_counter_in_a_module_that_runs_by_layer_becomes_an_input() -> None:
    net, loss = Counting(), decorated(by_layer)
    (said,) = storm(loss, net, nothing)
    assert "captured by layer: Counting" in said
    (forward,) = (f for f in towers_of(loss) if f.steps)
    assert len(forward.steps) == 2


CHANGES: list[tuple[str, Callable[..., Any], Callable[[int], Any], int, str]] = [
    ("int", penalty, lambda i: (i,), 2, ""),
    ("float", penalty, lambda i: (i / 7,), 2, ""),
    ("float as such", of_number_as_such, lambda i: (i / 7,), 3, "`factor` keeps changing"),
    ("str", of_text, lambda i: ("a" * i,), 3, "`text` keeps changing"),
    ("length", of_numbers, lambda i: ([2] * i,), 3, "`numbers` keeps changing"),
    ("tuple", of_numbers, lambda i: ((i, 2 * i),), 3, ""),
    ("keys", of_keys, lambda i: ({f"{j}": j for j in range(i)},), 3, "`numbers` keeps changing"),
    ("object", of_object, lambda i: (SimpleNamespace(factor=i),), 2, ""),
    ("class", of_object, lambda i: (type("C", (), {"factor": i})(),), 3, "`options` keeps"),
    ("size", penalty, lambda i: (X[:1].expand(i + 1, 2),), 2, ""),
    ("dims", penalty, lambda i: (X.reshape(*[1] * (i % 5), 3, 2),), 3, "`x` keeps changing"),
]


@pytest.mark.parametrize(("loss", "call", "most", "said"), [row[1:] for row in CHANGES],
                         ids=[row[0] for row in CHANGES])  # fmt: skip
def test_an_argument_that_keeps_changing(
    loss: Callable[..., Any], call: Callable[[int], Any], most: int, said: str
) -> None:
    made = decorated(loss)
    found = storm(made, Net(), call)
    assert len(made.steps) <= most and made.budget.spent.captures <= most
    assert len(found) == bool(said)
    if said:
        assert said in found[0] and f"{__file__}:" in found[0]
        assert made.budget.spent.given_up == (str(made.budget.given_up[0]),)


def test_a_size_that_keeps_changing_with_dynamic_off() -> None:
    loss = decorated(penalty, dynamic=False)
    (said,) = storm(loss, Net(), lambda i: (X[:1].expand(i + 1, 2),))
    assert "`x` keeps changing" in said and len(loss.steps) == 3


def test_sizes_that_come_again_are_kept() -> None:
    loss = decorated(penalty, dynamic=False)
    sizes = [2, 3, 4, 2, 3, 4, 5, 6, 5, 6, 7]
    assert storm(loss, Net(), lambda i: (X[:1].expand(sizes[i], 2),), len(sizes)) == []
    assert len(loss.steps) == 6


def test_globals() -> None:
    loss = decorated(of_global)
    assert storm(loss, Net(), lambda i: set_global(i) or ()) == []
    assert len(loss.steps) == 2 and loss.budget.spent.inputs == ("GLOBAL",)
    loss = decorated(of_global_text)
    (said,) = storm(loss, Net(), lambda i: set_global("a" * i) or ())
    assert "`GLOBAL` keeps changing" in said and len(loss.steps) == 3


def test_closures() -> None:
    factor: Any = 0

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * factor

    def of_length(net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * len(factor)

    def change(value: Any) -> tuple[()]:
        nonlocal factor
        factor = value
        return ()

    made = decorated(loss)
    assert storm(made, Net(), change) == [] and len(made.steps) == 2
    made = decorated(of_length)
    (said,) = storm(made, Net(), lambda i: change("a" * i))
    assert "`factor` keeps changing" in said and len(made.steps) == 3


@pytest.mark.parametrize("kind", [Named, Listing])
def test_what_is_no_number_on_a_module(kind: type[Net]) -> None:
    net, loss = kind(), decorated(penalty)

    def call(step: int) -> tuple[Any, ...]:
        if kind is Named:
            net.number = "a" * step
        return ()

    (said,) = storm(loss, net, call)
    name = "net.number" if kind is Named else "net.names"
    assert f"`{name}` keeps changing" in said and "captured by layer" in said
    towers = [f for f in towers_of(loss) if f.steps]
    assert len(loss.steps) == 3 and [len(f.steps) for f in towers] == [3]


@pytest.mark.parametrize("kind", ["module", "by layer", "global", "hook"])
def test_a_list_that_is_only_appended_to_is_no_reason(kind: str) -> None:
    """The values are in the list after the call, in their order; two captures are all there are."""
    net = Logging() if kind in ("module", "by layer") else Net()
    net.log = LOG
    if kind == "hook":
        net.linear.register_forward_hook(lambda m, i, out: LOG.append(out.detach()))
    function = {"by layer": by_layer, "global": logged}.get(kind, penalty)
    loss = decorated(function)
    begun: list[list[Any]] = []
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for step in range(STEPS):
            for call in (loss, function):
                LOG.clear()
                LOG.extend(range(step))
                call(net, X).backward()
                begun.append([*LOG])
    for step, (ours, expected) in enumerate(zip(begun[::2], begun[1::2], strict=True)):
        assert len(ours) == len(expected) > step
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    towers = [f for f in towers_of(loss) if f.steps] if kind == "by layer" else []
    made: Any = towers[0] if towers else loss
    assert len(made.steps) == 2 and len(made.budget.spent.logs) == 1
    assert len(given) == (kind == "by layer")


def test_given_up_values_leave_what_there_is() -> None:
    loss, net = decorated(of_text), Net()
    assert len(storm(loss, net, lambda i: ("a" * i,), 5)) == 1
    calls = len(loss.steps)
    counted: list[Any] = []
    inner = loss.steps[0]._run
    loss.steps[0]._run = lambda *inputs: counted.append(1) or inner(*inputs)
    assert storm(loss, net, lambda i: ("",), 2) == []
    assert len(counted) == 2 and len(loss.steps) == calls


def test_the_report_counts_captures() -> None:
    net, loss = Counting(), decorated(penalty)
    assert "captured" not in str(loss.explain(net, X))
    storm(loss, net, nothing, 3)
    report = loss.explain(net, X)
    assert "captured 2 times, " in str(report)
    assert "inputs because they change: net.number" in str(report)
    spent = report.to_dict()["captures"]
    assert (
        spent["captures"] == 2 and spent["seconds"] > 0 and list(spent["inputs"]) == ["net.number"]
    )
    loss = decorated(of_text)
    storm(loss, net, lambda i: ("a" * i,), 5)
    report = loss.explain(net, X, "b")
    assert not report.captured and "`text` keeps changing" in report.reason
    assert len(report.to_dict()["captures"]["given_up"]) == 1


def counted(loss: OptimizedLoss) -> list[Any]:
    """Return a list that grows with each capture that is begun."""
    begun: list[Any] = []
    inner = loss._capture

    def capture(args: Any, kwargs: Any) -> Any:
        begun.append(args)
        return inner(args, kwargs)

    loss._capture = capture  # pyright: ignore[reportAttributeAccessIssue]
    return begun


def test_a_refused_loss_is_not_captured_for_each_size_and_network() -> None:
    loss = decorated(by_layer)
    begun = counted(loss)
    with pytest.warns(NestedGradientWarning) as given:
        for size in range(1, 6):
            loss(net := Net(), X[:1].expand(size, 2))
            torch.testing.assert_close(
                loss(net, X[:1].expand(size, 2)), by_layer(net, X[:1].expand(size, 2))
            )
    assert len(begun) == 2 and len(given) == 1


@pytest.mark.parametrize("mode", [torch.autograd.detect_anomaly, lambda: torch.autocast("cpu")])
def test_a_refusal_under_a_mode_holds_under_it_alone(mode: Callable[[], Any]) -> None:
    """Whether a loss is captured is asked again where PyTorch computes in another mode."""
    refused = True

    class Refused(OptimizedLoss):
        def _capture(self, args: Any, kwargs: Any) -> Any:
            if refused:
                raise CaptureError("refused", "here")
            return super()._capture(args, kwargs)

    net, loss = Net(), decorated(penalty)
    loss = Refused(penalty, loss.options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mode():
            loss(net, X)
    assert [str(reason) for reason in loss.refusals] == ["refused (at here)"]
    refused = False
    assert storm(loss, net, nothing, 2) == [] and len(loss.steps) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with mode():
            torch.testing.assert_close(loss(net, X), penalty(net, X))
    assert len(loss.steps) == 1


@pytest.mark.parametrize("function", [penalty, by_layer])
def test_the_first_call_may_be_under_detect_anomaly(function: Callable[..., Any]) -> None:
    net, loss = Net(), decorated(function)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        anomaly = torch.autograd.detect_anomaly()
    with anomaly:
        given = storm(loss, net, nothing, 1)
        assert torch.is_anomaly_enabled()
    made: Any = [f for f in towers_of(loss) if f.steps] or [loss]
    assert len(given) == (function is by_layer) and len(made[0].steps) == 1
    assert storm(loss, net, nothing, 1) == [] and len(made[0].steps) == 1


def test_a_refused_call_leaves_what_there_is() -> None:
    """A kind of call that was captured stays so, whatever becomes of another with the same
    types."""

    def loss(net: nn.Module, x: Tensor, mode: str) -> Tensor:
        return penalty(net, x) if mode == "plain" else by_layer(net, x)

    made, net = decorated(loss), Net()
    assert storm(made, net, lambda i: ("plain",), 1) == []
    assert len(storm(made, net, lambda i: ("other",), 2)) == 1
    run = made.steps[0]._run
    calls: list[Any] = []
    made.steps[0]._run = lambda *inputs: calls.append(1) or run(*inputs)
    assert storm(made, net, lambda i: ("plain",), 2) == [] and len(calls) == 2


@pytest.mark.parametrize("function", [by_layer, of_text])
def test_nothing_is_kept_of_calls_that_run_as_written(function: Callable[..., Any]) -> None:
    loss, net, kept = decorated(function), Net(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(6):
            x = X.clone()
            kept.append(weakref.ref(x))
            loss(net, x, *(["a" * step] if function is of_text else []))
            del x
    gc.collect()
    assert [ref() for ref in kept] == [None] * 6


def test_strict_raises_when_a_value_is_given_up() -> None:
    loss, net = decorated(of_text, strict=True), Net()
    storm(loss, net, lambda i: ("a" * i,), 3)
    for _ in range(2):
        with pytest.raises(KeepsChanging, match="`text` keeps changing"):
            loss(net, X, "aaaaaa")


def test_a_number_of_which_each_module_has_another_one() -> None:
    """Two modules are no reason to make it an input; three are."""
    loss = decorated(penalty)
    for number in range(1, 6):
        net = Scaled()
        net.number = number
        assert storm(loss, net, nothing, 2) == []
        assert bool(loss.budget.spent.inputs) == (number > 2)
    assert len(loss.steps) == 3


@pytest.mark.parametrize(("loss", "call", "name"), [
    (of_text, lambda i: ("a" * i,), "text"),
    (of_numbers, lambda i: ([2] * i,), "numbers"),
    (penalty, lambda i: (i / 7,), "factor"),
])  # fmt: skip
def test_recordings(loss: Callable[..., Any], call: Callable[[int], Any], name: str) -> None:
    made = decorated(loss, capture="trace")
    (said,) = storm(made, Net(), call)
    assert f"`{name}` keeps changing" in said and len(made.steps) == 3
    assert storm(made, Net(), lambda i: call(0), 2) == []
