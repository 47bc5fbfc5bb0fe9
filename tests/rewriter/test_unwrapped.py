"""Compiled code is called past AOTAutograd's wrapper, where that has nothing to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.output_code import CompiledFxGraph
from torch.autograd import profiler

from passes.versions import IS_BEFORE_2_13
from rewriter import optimize_nested
from rewriter.codegen import Compiled, Unwrapped
from tests.cases import mlp, penalty

X = torch.arange(3.0)


class Wrapper:
    """Counts its calls; ``before`` and ``after`` are what it does to inputs and results."""

    def __init__(
        self,
        before: Callable[[list[Any]], list[Any]] = list,
        after: Callable[[Any], Sequence[Any]] = list,
    ) -> None:
        self.calls = 0
        self.graph = object.__new__(CompiledFxGraph)
        self.graph.current_callable, self.graph.compiled_fn_runner = self.code, None

        def wrapped(*inputs: Any) -> Sequence[Any]:
            self.calls += 1
            return after(self.graph.current_callable(before([*inputs])))

        wrapped.__wrapped__ = self.graph  # type: ignore[attr-defined]
        self.run: Compiled = Unwrapped.of(wrapped)

    @staticmethod
    def code(values: list[Any]) -> tuple[Any, ...]:
        (x, *_), _ = [*values], values.clear()  # as Inductor's code does
        return x + 1, x * 2


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def called_twice(wrapper: Wrapper) -> int:
    """Return how many of two calls went through the wrapper."""
    for _ in range(2):
        assert [found.tolist() for found in wrapper.run(X)] == [[1, 2, 3], [0, 2, 4]]
    assert wrapper.graph.current_callable is wrapper.code
    return wrapper.calls


def test_wrapper_without_a_task() -> None:
    assert called_twice(Wrapper()) == 1


@pytest.mark.parametrize(
    "task",
    [
        {"before": lambda inputs: [*inputs, torch.zeros(())]},  # a seed, a token
        {"before": lambda inputs: [x.clone() for x in inputs]},
        {"after": lambda results: [x.view_as(x) for x in results]},
    ],
)
def test_wrapper_with_a_task(task: dict[str, Any]) -> None:
    assert called_twice(Wrapper(**task)) == 2


def test_results_that_are_dropped() -> None:
    wrapper = Wrapper(after=lambda results: results[:1])
    for _ in range(2):
        assert len(wrapper.run(X)) == 1
    assert wrapper.calls == 2


def test_gradients_are_the_wrappers_task() -> None:
    """It switches them off."""
    wrapper = Wrapper()
    wrapper.run(X)
    with torch.enable_grad():
        wrapper.run(X)
    assert wrapper.calls == 2


def test_profiler_sees_the_graph() -> None:
    wrapper = Wrapper()
    wrapper.run(X)
    with profiler.profile():
        wrapper.run(X)
    assert wrapper.calls == 2


def test_first_call_that_fails() -> None:
    wrapper = Wrapper()
    with pytest.raises(TypeError):
        wrapper.run("no tensor")
    assert called_twice(wrapper) == 3


def test_other_code_is_left_alone() -> None:
    def wrapped(x: Tensor) -> list[Tensor]:
        return [x]

    assert Unwrapped.of(wrapped) is wrapped


@pytest.mark.inductor
@pytest.mark.skipif(IS_BEFORE_2_13, reason="what is wrapped is not known")
def test_inductors_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second call on the wrapper is not called; the gradients are the same."""
    torch.manual_seed(0)
    net: nn.Module = mlp(nn.Tanh, 3, 6, 2)
    x = torch.randn(5, 2, dtype=torch.float64)
    loss = optimize_nested(penalty)
    found = []
    with torch.enable_grad():
        for _ in range(2):
            value, grads = loss.value_and_grad(net, x)
            found.append([value, *grads.values()])
            code = loss.steps[0]._forward._compiled
            assert isinstance(code, Unwrapped)
            monkeypatch.setattr(code, "wrapped", None)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
