"""Faults of ours: the loss runs as written, with one warning and a folder to report it with."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

import passes.levels
import passes.simplify.fixpoint
import rewriter.api
import rewriter.choose
import rewriter.layer
import rewriter.recorder
import rewriter.rewrite
import rewriter.specialising
import rewriter.step
import rewriter.tower
from rewriter import CaptureError, NestedGradientWarning, optimize_nested

X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)


def fail(*args: Any, **kwargs: Any) -> Any:
    raise KeyError("a fault of ours")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = grad(net(x).sum(), x, create_graph=True)
    return g.square().sum()


def two(net: nn.Module, x: Tensor) -> Tensor:
    """A loss that is no scalar: its gradients are a second graph."""
    return torch.stack([penalty(net, x), net(x).sum()])


def gradients(loss: Callable[..., Any], net: nn.Module, x: Tensor) -> tuple[Any, ...]:
    value = loss(net, x)
    return value, *grad(value.sin().sum(), list(net.parameters()), allow_unused=True)


def in_three_steps(ours: Callable[[Tensor], Any], as_written: Callable[[Tensor], Any]) -> str:
    """Compare three steps, of two sizes; return the one warning that there has to be."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for x in (X, X, X[:2]):
            torch.testing.assert_close(ours(x), as_written(x), rtol=1e-9, atol=1e-12)
    (said,) = (str(w.message) for w in given if w.category is NestedGradientWarning)
    return said


def both(
    loss: Any, as_written: Callable[..., Any], net: nn.Module, caplog: pytest.LogCaptureFixture
) -> str:
    """Make three steps, of two sizes; return the one warning that there has to be."""
    caplog.set_level(logging.WARNING, "optimize_nested")
    said = in_three_steps(
        lambda x: gradients(loss, net, x), lambda x: gradients(as_written, net, x)
    )
    assert "a fault of ours" in said
    (record,) = (r.getMessage() for r in caplog.records)
    folder = re.search(r"with (\S+?)[;,.]?(\s|$)", record)
    assert folder and folder[1] in said
    assert "a fault of ours" in (Path(folder[1]) / "error.txt").read_text()
    assert "def forward" in (Path(folder[1]) / "00_captured.py").read_text()
    return said


@pytest.fixture(autouse=True)
def dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))


BUILDING = {
    "flatten": (rewriter.rewrite, "flatten"),
    "nest": (rewriter.rewrite, "nest"),
    "choose": (rewriter.rewrite, "choose"),
    "simplify": (passes.simplify.fixpoint, "RULES"),
    "codegen": (rewriter.step, "code_for"),
}


@pytest.mark.parametrize("stage", BUILDING)
def test_a_fault_while_a_loss_is_built(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, name = BUILDING[stage]
    monkeypatch.setattr(owner, name, (fail,) if name == "RULES" else fail)
    net = nn.Linear(2, 1, dtype=torch.float64)  # not compiled by layer, where it would fail too
    said = both(optimize_nested(penalty, backend="eager"), penalty, net, caplog)
    assert said.startswith("penalty runs as written: internal error in optimize_nested")
    with pytest.raises(CaptureError, match="a fault of ours"):
        optimize_nested(penalty, backend="eager", strict=True)(net, X)


@pytest.mark.parametrize("verify", [False, True])
def test_a_fault_in_the_first_call(
    verify: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rewriter.step.Step, "forward", fail)
    net, loss = network(), optimize_nested(penalty, backend="eager", verify=verify)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(3):
            ours, expected = gradients(loss, net, X), gradients(penalty, net, X)
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    (said,) = (str(w.message) for w in given if w.category is NestedGradientWarning)
    assert "a fault of ours" in said and "runs as written from now on" in said
    with pytest.raises(Exception, match="a fault of ours"):
        optimize_nested(penalty, backend="eager", strict=True, verify=verify)(net, X)


def test_a_fault_in_the_graph_that_is_built_in_backward(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    compile_one = rewriter.step.Step._compile

    def compile_but_backward(self: Any, module: Any, part: str, *rest: Any) -> Any:
        return fail() if part == "backward graph" else compile_one(self, module, part, *rest)

    monkeypatch.setattr(rewriter.step.Step, "_compile", compile_but_backward)
    net = network()
    loss = optimize_nested(two, backend="eager", dynamic=True)
    assert "runs as written from now on" in both(loss, two, net, caplog)
    value = optimize_nested(two, backend="eager", strict=True)(net, X)
    with pytest.raises(KeyError, match="a fault of ours"):
        grad(value.sum(), list(net.parameters()))


def test_what_the_user_does_wrong_in_backward_is_his_error() -> None:
    net = network()
    value = optimize_nested(two, backend="eager")(net, X)
    grad(value.sum(), list(net.parameters()))
    with pytest.raises(RuntimeError, match="second time"):
        grad(value.sum(), list(net.parameters()))


TOWER = {
    "pullback": (passes.levels.Level, "pullback"),
    "the code of a derivative": (rewriter.tower.CompiledLevel, "_compile"),
    "the first call": (rewriter.tower.CompiledLevel, "primal"),
}


@pytest.mark.parametrize("stage", TOWER)
def test_a_fault_in_a_module(
    stage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, name = TOWER[stage]
    plain, net = network(), network()
    if stage == "the code of a derivative":
        made = rewriter.tower.CompiledLevel._compile

        def compile_one(self: Any, make: Any) -> Any:
            is_base = not self.level.residual_inputs
            return made(self, make) if is_base else fail()

        monkeypatch.setattr(owner, name, compile_one)
    else:
        monkeypatch.setattr(owner, name, fail)
    optimize_nested(net, backend="eager", dynamic=True)
    caplog.set_level(logging.WARNING, "optimize_nested")
    said = in_three_steps(
        lambda x: gradients(penalty, net, x), lambda x: gradients(penalty, plain, x)
    )
    assert "a fault of ours" in said and "runs as written from now on" in said
    assert len(caplog.records) == 1


def test_a_fault_while_a_tower_is_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rewriter.layer, "base_of", fail)
    plain, net = network(), network()
    optimize_nested(net, backend="eager")
    said = both(lambda m, x: penalty(net, x), penalty, net, caplog)
    assert "internal error" in said
    torch.testing.assert_close(gradients(penalty, net, X), gradients(penalty, plain, X))


def test_a_fault_while_a_recording_is_built(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(rewriter.rewrite, "flatten", fail)
    net = network()
    loss = optimize_nested(penalty, backend="eager", capture="trace")
    assert "internal error" in both(loss, penalty, net, caplog)


def test_a_folder_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(rewriter.rewrite, "flatten", fail)
    net = network()
    with pytest.warns(NestedGradientWarning, match="a fault of ours"):
        ours = gradients(optimize_nested(penalty, backend="eager"), net, X)
    torch.testing.assert_close(ours, gradients(penalty, net, X), rtol=1e-9, atol=1e-12)
