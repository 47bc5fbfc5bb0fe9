"""What a loss prints and warns of is neither lost nor changed."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import NestedGradientWarning, optimize_nested

DTYPE = torch.float64


def _penalty(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum()


def _show(value: Tensor, *, name: str = "loss") -> None:
    print(f"{name} {value.item():.4f}")


def in_a_helper(net: nn.Module, x: Tensor) -> Tensor:
    loss = _penalty(net, x)
    _show(loss, name="helper")
    print("own")
    return loss


def with_numbers(net: nn.Module, x: Tensor) -> Tensor:
    loss = _penalty(net, x)
    print("step", 3, "of", len(x), loss.item())
    return loss


def with_keywords(net: nn.Module, x: Tensor) -> Tensor:
    loss = _penalty(net, x)
    print("a", "b", sep="-", end="\r", flush=True)
    print(f"{loss.item():.3f}", end="")
    return loss


def formatted(net: nn.Module, x: Tensor) -> Tensor:
    loss = _penalty(net, x)
    value = loss.item()
    print("{:.3f} {}".format(value, "a"))
    print(f"{value!r:<5} {value}")
    if value > 0:
        print(f"{value:.2e}")
    return loss


class _Trainer:
    """A print each second call, by a counter of the object's."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        loss = _penalty(net, x)
        self.count += 1
        if self.count % 2 == 0:
            print(f"Iter {self.count}, loss {loss.item():.4e}")
        return loss


def every_second_call() -> Callable[..., Tensor]:
    trainer = _Trainer()
    return lambda net, x: trainer(net, x)


class _Printing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 1, dtype=DTYPE)

    def forward(self, x: Tensor) -> Tensor:
        print("forward", x.shape[0])
        return self.inner(x).tanh()


def _printed(loss: Any, net: nn.Module, capsys: Any) -> str:
    for call in range(3):
        loss(net, torch.full((3, 2), 1.0 + call, dtype=DTYPE, requires_grad=True)).backward()
        with torch.no_grad():
            next(net.parameters()).mul_(0.9 + 0.2 * call)
    return re.sub(r"\d+\.\d{10,}", _rounded, capsys.readouterr().out)


def _rounded(number: re.Match[str]) -> str:
    """Return a number without the digits that rounding may change."""
    return f"{float(number[0]):.9f}"


@pytest.mark.parametrize(
    "make",
    [
        lambda: in_a_helper,
        lambda: with_numbers,
        lambda: with_keywords,
        lambda: formatted,
        every_second_call,
    ],
    ids=["helper", "numbers", "keywords", "formatted", "counter"],
)
def test_prints_are_those_of_the_loss_as_written(make: Callable[[], Any], capsys: Any) -> None:
    torch.manual_seed(0)
    net = _mlp()
    expected = _printed(make(), copy.deepcopy(net), capsys)
    decorated = optimize_nested(make(), backend="eager")
    assert expected and _printed(decorated, net, capsys) == expected
    assert decorated.steps and not decorated.refusals


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def test_prints_of_a_module_are_kept(capsys: Any) -> None:
    net = _Printing()
    expected = _printed(_penalty, copy.deepcopy(net), capsys)
    decorated = optimize_nested(_penalty, backend="eager")
    assert "forward 3" in expected and _printed(decorated, net, capsys) == expected
    assert decorated.steps


def test_warnings_of_helpers_are_kept() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        warnings.warn("of its own", stacklevel=1)
        _warn_plainly()
        return _penalty(net, x)

    decorated = optimize_nested(loss, backend="eager")
    with pytest.warns(UserWarning) as caught:
        decorated(_mlp(), torch.ones(3, 2, dtype=DTYPE, requires_grad=True)).backward()
    assert [str(w.message) for w in caught] == ["of its own", "from a helper"]
    assert decorated.steps


def _warn_plainly() -> None:
    warnings.warn("from a helper", stacklevel=2)


def test_what_cannot_be_put_off_is_printed_as_written(capsys: Any) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        value = _penalty(net, x)
        print({"loss": value.item()})
        return value

    net = _mlp()
    expected = _printed(loss, copy.deepcopy(net), capsys)
    decorated = optimize_nested(loss, backend="eager")
    with pytest.warns(NestedGradientWarning, match=r"print\(\) of other things"):
        assert _printed(decorated, net, capsys) == expected
