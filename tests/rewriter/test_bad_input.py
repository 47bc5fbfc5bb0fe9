"""Mistakes give PyTorch's own behaviour or an error that names the argument, and change nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.simplify import common
from rewriter import (
    CaptureError,
    CheckFailed,
    NestedGradientWarning,
    NotRewritten,
    codegen,
    optimize_nested,
)
from rewriter.errors import OptionError
from tests.cases import mlp


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum()


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)
    ).double()


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 2, dtype=torch.float64)


class Untouched:
    """Everything a failed call must leave alone."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        self.before = self.record()

    def record(self) -> list[Tensor]:
        parameters = list(self.net.parameters())
        state = [*parameters, *(p.grad for p in parameters), *self.net.buffers()]
        return [t.detach().clone() for t in state] + [torch.get_rng_state()]

    def verify(self) -> None:
        pairs = zip(self.before, self.record(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_unknown_option() -> None:
    with pytest.raises(TypeError, match="no option 'bakend'; the options are backend, mode"):
        optimize_nested(penalty, bakend="eager")


@pytest.mark.parametrize(
    ("option", "value"),
    [("backend", "xla"), ("mode", "fast"), ("strategy", "magic"), ("dynamic", "yes"),
     ("dynamic", 1), ("check", 1), ("strategy", {"gradient": "magic"})],
)  # fmt: skip
def test_wrong_value(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{option}.*: expected .* got"):
        optimize_nested(penalty, **{option: value})


@pytest.mark.parametrize("thing", [3, "loss", Tensor])
def test_not_a_function(thing: Any) -> None:
    with pytest.raises(TypeError, match="expected a loss function"):
        optimize_nested(thing)


def test_unknown_site(net: nn.Module, x: Tensor) -> None:
    loss = optimize_nested(penalty, backend="eager", strategy={"gradient_7": "reverse"})
    state = Untouched(net)
    with pytest.raises(OptionError, match="no site 'gradient_7'; the sites are gradient"):
        loss(net, x)
    state.verify()


def test_strategy_that_a_site_does_not_accept(x: Tensor) -> None:
    def jacobian(net: nn.Module, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.jacrev(net))(x).square().sum()

    net = mlp(nn.Tanh, 3, 4, 2)
    loss = optimize_nested(jacobian, backend="eager", strategy="jvp_over_gradient")
    with pytest.raises(
        OptionError, match=r"does not accept 'jvp_over_gradient'.*It accepts reverse"
    ):
        loss(net, x)
    with pytest.raises(NotRewritten, match="would stay as written"):
        optimize_nested(jacobian, backend="eager", strict=True)(net, x)


def test_no_tensor(net: nn.Module, x: Tensor) -> None:
    loss = optimize_nested(lambda net, x: 3.0, backend="eager")
    assert loss(net, x) == 3.0
    with pytest.raises(TypeError, match="must return one scalar tensor"):
        loss.value_and_grad(net, x)


def test_nothing_differentiable(net: nn.Module, x: Tensor) -> None:
    loss = optimize_nested(lambda net, x: x.square().sum(), backend="eager")
    value = loss(net, x)
    assert torch.equal(value, x.square().sum())
    with pytest.raises(RuntimeError, match="does not require grad"):
        value.backward()


def test_unused_input(net: nn.Module, x: Tensor) -> None:
    def unused(net: nn.Module, x: Tensor) -> Tensor:
        net(x)
        other = torch.zeros(3, dtype=x.dtype).requires_grad_()
        return torch.autograd.grad(net(x).sum(), other, create_graph=True)[0].sum()

    state = Untouched(net)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        optimize_nested(unused, backend="eager")(net, x)
    state.verify()


def test_error_in_the_loss(net: nn.Module, x: Tensor) -> None:
    def broken(net: nn.Module, x: Tensor) -> Tensor:
        u = net(x)
        torch.rand(3)
        if u.shape[0] == 5:
            raise KeyError("five")
        return u.sum()

    state = Untouched(net)
    with pytest.raises(KeyError, match="five"):
        optimize_nested(broken, backend="eager")(net, x)
    state.verify()


def test_wrong_shapes(net: nn.Module) -> None:
    wide = torch.randn(5, 3, dtype=torch.float64)
    state = Untouched(net)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        optimize_nested(penalty, backend="eager")(net, wide)
    state.verify()


def test_wrong_arguments(net: nn.Module) -> None:
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        optimize_nested(penalty, backend="eager")(net)


def host_code(net: nn.Module, x: Tensor) -> Tensor:
    with open(__file__):  # leaves the graph
        return penalty(net, x) * 2


def test_not_capturable(x: Tensor) -> None:
    net = mlp(nn.Tanh, 3, 4, 2)
    loss = optimize_nested(host_code, backend="eager")
    with pytest.warns(
        NestedGradientWarning, match=r"host_code runs as written: .*test_bad_input.py:\d+"
    ):
        value = loss(net, x)
    assert torch.allclose(value.detach(), host_code(net, x).detach(), rtol=1e-12)
    loss(net, x)  # a second warning would be an error
    assert not loss.explain(net, x).captured
    with pytest.raises(CaptureError, match=r"test_bad_input.py:\d+"):
        optimize_nested(host_code, backend="eager", strict=True)(net, x)


def test_write_to_a_parameter(x: Tensor) -> None:
    """A write under no_grad to a leaf: another value of the same leaf."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p in net.parameters():
                p.mul_(0.9)
        return penalty(net, x)

    net, other = mlp(nn.Tanh, 3, 4, 2), mlp(nn.Tanh, 3, 4, 2)
    optimize_nested(loss, backend="eager", strict=True)(net, x).backward()
    loss(other, x).backward()
    for mine, reference in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, reference)
        assert mine.grad is reference.grad or torch.allclose(mine.grad, reference.grad, rtol=1e-12)


def test_no_compiler(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise codegen.InvalidCxxCompiler

    monkeypatch.setattr(codegen, "get_cpp_compiler", missing)
    net = mlp(nn.Tanh, 3, 4, 2)
    with pytest.warns(NestedGradientWarning, match="no C\\+\\+ compiler .* Install one"):
        value = optimize_nested(penalty)(net, x)
    assert torch.allclose(value, penalty(net, x))


def test_check_catches_a_planted_bug(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subtraction taken for commutative merges a - b with b - a."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = net(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return ((g - x) * (x - g).exp()).sum()

    net = mlp(nn.Tanh, 3, 4, 2)
    monkeypatch.setattr(common, "COMMUTATIVE", {torch.ops.aten.sub.Tensor})
    with pytest.raises(CheckFailed, match="differs from the loss as written"):
        optimize_nested(loss, backend="eager", check=True)(net, x)
