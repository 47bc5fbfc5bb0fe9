"""What `backward()` hands out is the caller's own, and is not copied for it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import optimize_nested
from rewriter.gradients import Ownership, owned
from rewriter.step import Step
from tests.cases import mlp

X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = grad(net(x).sum(), x, create_graph=True)
    return g.square().sum() + net(x).square().mean()


@pytest.fixture
def net() -> nn.Module:
    return mlp(nn.Tanh, 3, 6, 2)


@pytest.fixture
def x() -> Tensor:
    return X.clone().requires_grad_()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The addresses of the gradients that steps keep."""
    found: set[int] = set()

    forward = Step.forward

    def noted(step: Step, inputs: Any) -> Any:
        outputs, kept = forward(step, inputs)
        found.update(g.data_ptr() for g in kept if g is not None)
        return outputs, kept

    monkeypatch.setattr(Step, "forward", noted)
    return found


def test_nothing_is_copied(net: nn.Module, x: Tensor, computed: set[int]) -> None:
    loss = optimize_nested(penalty, backend="eager", verify=False)
    loss(net, x).backward()
    wanted = [*net.parameters(), x]
    assert {p.grad.data_ptr() for p in wanted if p.grad is not None} == computed
    value = loss(net, x)
    with torch.autograd.profiler.profile() as profile:
        value.backward(inputs=[x])
    calls = Counter(event.name for event in profile.function_events)
    done = {name for name in calls if name.startswith("aten::")}
    assert done <= {
        *("aten::ones_like", "aten::empty_like", "aten::empty_strided", "aten::fill_"),
        *("aten::item", "aten::_local_scalar_dense", "aten::detach", "aten::add_"),
    }
    assert calls["aten::add_"] == 1  # accumulated on what x.grad was


@pytest.mark.parametrize("cotangent", [1.0, 0.5])
def test_gradients_kept_for_another_pass(net: nn.Module, x: Tensor, cotangent: float) -> None:
    value = optimize_nested(penalty, backend="eager")(net, x)
    seed = torch.tensor(cotangent, dtype=torch.float64)
    first = grad(value, x, seed, retain_graph=True)[0]
    expected = first.clone()
    first.zero_()
    (second,) = grad(value, x, seed)
    torch.testing.assert_close(second, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_gradients_are_freed_with_the_pass(net: nn.Module, x: Tensor) -> None:
    value = optimize_nested(penalty, backend="eager")(net, x)
    kept = weakref.ref(next(g for g in value.grad_fn.gradients if g is not None))
    value.backward()
    for p in (*net.parameters(), x):
        p.grad = None
    gc.collect()
    assert kept() is None


def constant(x: Tensor, y: Tensor) -> Tensor:
    return (x * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum() + y.square().sum()


ALIASES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "one gradient for two inputs": lambda x, y: (x + y).square().sum(),
    "a view of another's": lambda x, y: (x + y.T.reshape(3, 2)).square().sum(),
    "an input": lambda x, y: (x * y).sum(),
    "a part of an input": lambda x, y: (x[:1] * y[:1]).sum() + x.sum(),
    "one number in many places": lambda x, y: x.sum() + (2 * y).sum(),
    "a constant of the graph": constant,
    "an output": lambda x, y: ((x.square() + x * y).sum(), (2 * x + y).detach(), x.detach()),
    "the loss itself": lambda x, y: (x[0, 0] * y[0, 0]).exp(),
}


@pytest.mark.parametrize("name", ALIASES)
@pytest.mark.parametrize("accumulated", [True, False])
def test_gradients_share_no_memory(name: str, accumulated: bool) -> None:
    loss = ALIASES[name]
    ours, reference = optimize_nested(loss, backend="eager"), loss
    found = []
    for f in (ours, ours, reference):  # what is copied is found at the first call
        x, y = X.clone().requires_grad_(), X.flip(0).clone().requires_grad_()
        outputs = f(x, y)
        value, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        if accumulated:
            value.backward()
            x_grad, y_grad = x.grad, y.grad
        else:
            x_grad, y_grad = grad(value, [x, y])
        assert x_grad is not None and y_grad is not None
        found.append([t.detach().clone() for t in (value, *others, x_grad, y_grad)])
        if f is reference:
            continue
        before = [t.detach().clone() for t in (value, *others, x, y, y_grad)]
        x_grad.mul_(7)
        after = [value, *others, x, y, y_grad]
        assert all(map(torch.equal, before, after))
        y_grad.mul_(5)
        assert torch.equal(x_grad, 7 * found[0][-2])
        assert all(map(torch.equal, before[:-1], after[:-1]))
        assert len(ours.steps) == 1 and not ours.refusals
        again = f(x, y)
        again = again[0] if isinstance(again, tuple) else again
        assert torch.equal(grad(again, x)[0], found[0][-2])
    for first, second, expected in zip(*found, strict=True):
        torch.testing.assert_close(first, expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(second, expected, rtol=1e-9, atol=0)


def test_what_is_copied_is_found_once_the_code_is_settled() -> None:
    held = torch.ones(2)

    def copied(ownership: Ownership, results: list[Any], *, is_settled: bool) -> list[bool]:
        found = ownership.taken(results, [held], is_settled=is_settled)
        return [mine is not result for mine, result in zip(found, results, strict=True)]

    ownership = Ownership(1, 1)
    shares = lambda: [held, torch.ones(1), held]  # noqa: E731
    shares_nothing = lambda: [torch.ones(()), torch.ones(1), torch.ones(2)]  # noqa: E731
    assert copied(ownership, shares_nothing(), is_settled=False) == [False, False, False]
    assert copied(ownership, shares(), is_settled=True) == [True, False, True]
    assert copied(ownership, shares_nothing(), is_settled=True) == [True, False, True]
    assert copied(ownership, shares_nothing(), is_settled=False) == [False, False, False]
    assert copied(Ownership(1, None), shares(), is_settled=True) == [True, False, False]


def test_owned_copies_what_others_hold() -> None:
    base, held = torch.ones(4), torch.ones(2)
    values: list[Any] = [torch.ones(3), None, held, base[1:], torch.ones(1).expand(3)]
    new = values[0]
    del new
    result = owned(values)
    assert [a is b for a, b in zip(values, result, strict=True)] == [True, True, *[False] * 3]
    assert result[4].stride() == (1,)
    alone = [torch.ones(3), None, torch.empty_strided((2, 3), (1, 2))]
    assert owned(alone) is alone


def python_calls(run: Callable[[], object]) -> int:
    """Count the calls of Python functions."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return count


@pytest.mark.parametrize("layers", [2, 5])
def test_a_call_is_thin(layers: int) -> None:
    """The calls of Python beyond those of the graph and of PyTorch, however many parameters there
    are. Through Dynamo's own wrapper, and with gradients that are scaled, it was 87 and 20."""
    net, x = mlp(nn.Tanh, layers, 6, 2), X.clone().requires_grad_()
    loss = optimize_nested(penalty, backend="eager")
    loss(net, x).backward()
    (made,) = loss.steps
    run = made._forward
    inputs = loss.inputs_of(net, x)
    in_graph = python_calls(lambda: run(*inputs))
    values = []
    assert python_calls(lambda: values.append(loss(net, x))) - in_graph <= 22
    least = torch.ones((), requires_grad=True).square()
    # Two of them ask whether Dynamo traces the pass, one is what it would not trace.
    assert python_calls(values[0].backward) - python_calls(least.backward) <= 8
