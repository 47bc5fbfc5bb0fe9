"""The command line, run as a user runs it, in a folder with a file of theirs."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rewriter.cli import app
from rewriter.version import __version__

LOSS = """
import torch
from torch import nn
from rewriter import optimize_nested

@optimize_nested(backend="eager")
def penalty(net, x):
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum()

def plain(net, x, power=2):
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (g ** power).sum()

def branch(net, x):
    value = net(x).sum()
    value.register_hook(torch.clone)
    return value

def make_args():
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    return net, torch.randn(5, 3, requires_grad=True)

def with_power():
    return make_args(), {"power": 4}

def by_name():
    net, x = make_args()
    return {"net": net, "x": x, "power": 3}

def nothing():
    return None

number = 3
"""

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    (tmp_path / "my_losses.py").write_text(textwrap.dedent(LOSS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def invoke(*words: str) -> Result:
        return CliRunner().invoke(app, words)

    yield invoke
    sys.modules.pop("my_losses", None)


def good(result: Result) -> str:
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


@pytest.mark.parametrize("where", ["my_losses.py", "./my_losses.py", "my_losses"])
def test_explain(run: Run, where: str) -> None:
    text = good(run("explain", f"{where}:penalty"))
    assert "jvp_over_gradient" in text and "my_losses.py" in text and "\x1b" not in text


@pytest.mark.parametrize("args", ["with_power", "by_name"])
def test_arguments(run: Run, args: str) -> None:
    good(run("explain", "my_losses:plain", "--args", f"my_losses:{args}"))


def test_options_go_before_those_of_the_decorator(run: Run) -> None:
    text = good(run("explain", "my_losses:penalty", "--strategy", "gradient=reverse"))
    assert "(reverse)" in text
    result = run("explain", "my_losses:penalty", "--strategy", "gradient")
    assert result.exit_code == 2 and "strategy: expected one of" in result.output
    result = run("explain", "my_losses:penalty", "--strategy", "elsewhere=reverse")
    assert result.exit_code == 1 and "there is no site 'elsewhere'" in result.output


def test_check(run: Run) -> None:
    text = good(run("check", "my_losses:plain", "--backend", "eager"))
    assert "agrees with the loss as written" in text and "net.0.weight" in text


@pytest.mark.parametrize("command", ["explain", "check"])
def test_what_is_not_captured(run: Run, command: str) -> None:
    result = run(command, "my_losses:branch", "--backend", "eager")
    assert result.exit_code == 1 and "the loss was not captured" in result.output
    assert "my_losses.py:" in result.output


def test_bench(run: Run) -> None:
    result = run(
        "bench", "my_losses:penalty", "--rounds", "2", "--warm-cache", "--also", "my_losses:plain"
    )
    text = good(result)
    rows = [line for line in text.splitlines() if "×" in line]
    names = ["as written", "torch.compile", "my_losses:plain", "optimize_nested"]
    assert [row.split("  ")[0].strip() or row.split()[0] for row in rows] and all(
        any(name in row for row in rows) for name in names
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("explain", "penalty"), "expected module:function or file.py:function"),
        (("explain", "elsewhere:penalty"), "there is no module 'elsewhere'"),
        (("explain", "elsewhere.py:penalty"), "there is no file elsewhere.py"),
        (("explain", "my_losses:loss"), "has no 'loss'; it has"),
        (("explain", "my_losses:number"), "is a int; expected a loss function"),
        (("explain", "my_losses:penalty", "--args", "my_losses:nothing"), "returned a NoneType"),
        (("explain", "my_losses:penalty", "--args", "my_losses:number"), "expected a function"),
        (("explain", "my_losses:penalty", "--stage", "last"), "there is no stage 'last'"),
        (("explain", "my_losses:penalty", "--backend", "tpu"), "is not one of"),
        (("explain", "my_losses:penalty", "--strategy", "a", "--strategy", "b"), "SITE=NAME"),
        (("render", "my_losses:penalty", "--out", "report.pdf"), "ends with one of .html"),
    ],
)
def test_usage_errors(run: Run, words: tuple[str, ...], said: str) -> None:
    result = run(*words)
    assert result.exit_code == 2 and said in result.output.replace("\n", " "), result.output


def test_no_arguments_known(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other_losses.py").write_text("def loss(x):\n    return x.sum()\n")
    result = run("explain", "other_losses.py:loss")
    assert result.exit_code == 2 and "define make_args() beside" in result.output
    sys.modules.pop("other_losses", None)


def test_users_own_error_is_shown_as_it_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "bad_losses.py").write_text("def loss(x):\n    return x\nraise KeyError('mine')\n")
    result = run("explain", "bad_losses.py:loss")
    assert isinstance(result.exception, KeyError) and "bad_losses" not in sys.modules


def test_program() -> None:
    """`python -m rewriter` is the same program."""
    command = [sys.executable, "-m", "rewriter", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


def test_completion(run: Run) -> None:
    assert "complete" in good(run("completion", "bash"))


def test_compile_and_run(run: Run, tmp_path: Path) -> None:
    """A file compiled in one process, run with a state_dict in place of the model."""
    words = "--args", "my_losses:make_args", "--portable", "--size", "x:0=batch:2:64"
    digest = good(run("compile", "my_losses:penalty", "--out", "loss.pt2", *words)).strip()
    assert len(digest) == 64 and int(digest, 16)
    (tmp_path / "others.py").write_text(textwrap.dedent(WITHOUT_THE_LOSS))
    given = "--args", "others.py:make_args", "--backend", "eager"
    text = good(run("run", "loss.pt2", *given, "--sha256", digest))
    assert "net.0.weight" in text and "x" in text
    assert digest[:32] not in text
    result = run("run", "loss.pt2", *given, "--sha256", "0" * 64)
    assert result.exit_code == 1 and "loss.pt2" in result.output
    result = run("run", "loss.pt2", "--args", "others.py:too_many", "--backend", "eager")
    assert result.exit_code == 1 and "64" in result.output
    sys.modules.pop("others", None)


WITHOUT_THE_LOSS = """
import torch

def make_args(rows=7):
    shapes = {"0.weight": (8, 3), "0.bias": (8,), "2.weight": (1, 8), "2.bias": (1,)}
    state = {name: torch.randn(shape) for name, shape in shapes.items()}
    return state, torch.randn(rows, 3, requires_grad=True)

def too_many():
    return make_args(65)
"""


@pytest.mark.parametrize("size", ["x", "x:0", "x:0=batch:2", "x:zero=batch"])
def test_sizes_that_are_none(run: Run, size: str) -> None:
    result = run("compile", "my_losses:penalty", "--out", "loss.pt2", "--size", size)
    assert result.exit_code == 2 and "expected ARG:DIM=NAME" in result.output
    assert not Path("loss.pt2").exists()


def test_render(run: Run) -> None:
    good(run("render", "my_losses:penalty", *(w for p in PICTURES for w in ("--out", p))))
    assert json.loads(Path("report.json").read_text())["sites"]
    for path, start in PICTURES.items():
        assert Path(path).read_text().lstrip().startswith(start), path


PICTURES = {
    "report.html": "<!doctype html>",
    "report.svg": "<?xml",
    "report.json": "{",
    "report.txt": "penalty",
}


def test_graphs_and_changes(run: Run) -> None:
    assert "gradient(" in good(run("explain", "my_losses:penalty", "--stage", "nest"))
    assert "added" in good(run("explain", "my_losses:penalty", "--diff", "share", "nest"))
