"""What keeps a loss from one graph: found in turn, past each, and nothing left behind."""

from __future__ import annotations

import json
import linecache
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.cli import app
from rewriter.edits import Edit, edited, host_values, is_left_out, place_of
from rewriter.obstacles import LEFT_OUT, NOT_PASSED, STOOD_IN
from rewriter.remedies import KINDS, UNKNOWN, kind_of
from tests.cases import mlp

# Not recorded: what no recording would mind is in the way.
DYNAMO: Any = {"backend": "eager", "capture": "dynamo"}
METRICS: dict[str, float] = {}


def pulled(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    u = net(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return u, g


def one(net: nn.Module, x: Tensor) -> Tensor:
    u, g = pulled(net, x)
    open("/dev/null").close()
    return g.square().mean() + u.square().mean()


def several(net: nn.Module, x: Tensor) -> Tensor:
    _, g = pulled(net, x)
    open("/dev/null").close()
    scale = 2 + os.stat("/dev/null").st_size
    with open("/dev/null"):
        g = g * scale
    return g.square().mean()


def unpassable(net: nn.Module, x: Tensor) -> Tensor:
    u, g = pulled(net, x)
    file = open("/dev/null")  # noqa: SIM115
    file.close()
    return (u + g).square().mean()


def free(net: nn.Module, x: Tensor) -> Tensor:
    return pulled(net, x)[1].square().mean()


def made() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mlp(nn.Tanh, 3, 6, 2), torch.randn(5, 2, dtype=torch.float64, requires_grad=True)


def test_the_only_obstacle() -> None:
    loss = optimize_nested(one, **DYNAMO)
    found = loss.obstacles(*made())
    (obstacle,) = found.obstacles
    assert obstacle.path == __file__ and obstacle.code == 'open("/dev/null").close()'
    assert obstacle.line == one.__code__.co_firstlineno + 2
    assert obstacle.kind == "a file, the clock or the system" and obstacle.passed == LEFT_OUT
    # Without the line: what the same loss without it is.
    report = optimize_nested(free, **DYNAMO).explain(*made())
    assert found.is_all and 0 < found.flops <= found.flops_as_written
    assert found.kernels_as_written > 2 * found.kernels > report.kernels
    assert f"{found.kernels_as_written / found.kernels:.2g} × fewer kernels" in found.gain
    said = f'`open("/dev/null").close()` at test_obstacles.py:{obstacle.line} keeps this loss'
    assert found.advice.startswith(said) and found.gain in found.advice
    assert f"remedy: {found.advice[:40]}" in str(loss.explain(*made()))
    assert not loss.steps and not loss.refusals


def test_several_in_turn() -> None:
    code = several.__code__
    found = optimize_nested(several, **DYNAMO).obstacles(*made())
    assert several.__code__ is code
    first = several.__code__.co_firstlineno
    passed = {o.line - first: o.passed for o in found.obstacles}
    assert passed == {2: LEFT_OUT, 3: STOOD_IN, 4: LEFT_OUT}
    assert found.is_all and found.gain in str(found)
    assert all(o.remedy for o in found.obstacles)


def test_what_cannot_be_looked_past() -> None:
    found = optimize_nested(unpassable, **DYNAMO).obstacles(*made())
    (obstacle,) = found.obstacles
    assert obstacle.passed == NOT_PASSED and not found.is_all and not found.gain
    assert "and perhaps others" in found.advice
    assert "what comes after it is not known" in str(found)


def test_none() -> None:
    found = optimize_nested(free, **DYNAMO).obstacles(*made())
    assert not found.obstacles and found.is_all and found.advice == ""
    assert str(found).startswith("free is one graph: ")


def closing_over(value: float) -> Callable[[], float]:
    def inner() -> float:
        METRICS["a"] = value
        return 1.0

    return inner


def test_a_closure_keeps_what_it_closes_over() -> None:
    inner = closing_over(3.0)
    where = f"{__file__}:{closing_over.__code__.co_firstlineno + 2}: …"
    place = place_of(where)
    assert place is not None and is_left_out(place)
    METRICS.clear()
    with edited([Edit(place)]):
        assert inner() == 1.0 and not METRICS
        assert closing_over(4.0)() == 1.0 and not METRICS
    assert inner() == 1.0 and METRICS == {"a": 3.0}


def test_what_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "forms.py"
    lines = {
        "print(x)": True,
        "assert x": True,
        "d['a'] = x": True,
        "a.b, d[0] = x": True,
        "x += 1": False,
        "y = float(x)": False,
        "if x: raise E": True,
        "if x: y = 1": False,
        "return x": False,
    }
    for text, expected in lines.items():
        file.write_text(f"def f(x):\n    {text}\n")

        linecache.checkcache()
        place = place_of(f"{file}:2: {text}")
        assert place is not None and is_left_out(place) is expected, text
    file.write_text("def f(x):\n    y = float(x) + x.item() * int(float(x))\n")
    linecache.checkcache()
    place = place_of(f"{file}:2: y")
    assert place is not None and len(host_values(place)) == 3
    assert place_of("?") is None and place_of("nowhere.py:3: x") is None


@pytest.mark.parametrize(
    ("reason", "code", "name"),
    [
        ("Failed to trace builtin operator", "print(loss)", "a write of a log"),
        ("anything", "writer.add_scalar('a', 1)", "a write of a log"),
        ("a branch on the value of a tensor", "if x > 0:", "a branch on values"),
        ("an integer is read from a tensor", "n = int(x)", "a number read from a tensor"),
        ("a draw from NumPy's random generator", "e = np.random.rand()", KINDS[1].name),
        ("a user-defined autograd.Function that is once_differentiable", "", KINDS[10].name),
        ("something that nobody has seen", "x = y", UNKNOWN.name),
    ],
)
def test_kinds(reason: str, code: str, name: str) -> None:
    assert kind_of(reason, code).name == name


def test_unknown_reasons_are_said() -> None:
    assert UNKNOWN.remedy == "" and all(kind.remedy and kind.name for kind in KINDS)


TRAIN = """
import torch

def loss(net, x):
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    open("/dev/null").close()
    return g.square().mean()

def plain(net, x):
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().mean()

def make_args():
    return torch.nn.Linear(2, 1), torch.randn(3, 2, requires_grad=True)
"""


def test_doctor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train_doctor.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["doctor", *arguments])

    ran = run("train_doctor.py:loss", "--capture", "dynamo")
    assert ran.exit_code == 1 and "1 obstacle to one graph" in ran.stdout
    assert 'train_doctor.py:6: open("/dev/null").close()' in ran.stdout
    data = json.loads(run("train_doctor.py:loss", "--json", "--capture", "dynamo").stdout)
    assert data["is_all"] and data["obstacles"][0]["line"] == 6 and data["gain"]
    ran = run("train_doctor.py:plain", "--args", "train_doctor.py:make_args")
    assert ran.exit_code == 0 and "plain is one graph" in ran.stdout
    assert run("train_doctor.py:nothing").exit_code == 2


def needing(net: nn.Module, x: Tensor) -> Tensor:
    _, g = pulled(net, x)
    METRICS["scale"] = os.stat("/dev/null").st_size + 1.0
    return (g * METRICS["scale"]).square().mean()


def test_what_later_lines_need_is_no_error_of_the_probe() -> None:
    METRICS.clear()
    report = optimize_nested(needing, **DYNAMO).explain(*made())
    assert not report.captured and "METRICS" in report.remedy
