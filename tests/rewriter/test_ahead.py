"""A training step as a file: compiled ahead of time, loaded where its Python is not.

Most of these use the portable form run op by op; what is compiled is in `test_ahead_native`.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

import passes.tangent_tables
from passes.graph import placeholders, value_of
from rewriter import (
    ArtifactError,
    CaptureError,
    CheckFailed,
    OptimizeNestedError,
    load,
    optimize_nested,
)
from rewriter.ahead import compile as compiling
from rewriter.ahead.dynamic import declared_sizes
from rewriter.ahead.loaded import Loaded
from rewriter.ahead.observe import graphs_of, observe
from rewriter.ahead.signature import take_apart
from rewriter.options import Options
from tests.oracle import assert_same, outcome

ROOT = Path(__file__).resolve().parents[2]
Pair = namedtuple("Pair", ["whole", "parts"])


@dataclass
class Batch:
    points: Tensor
    weight: float


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


def points(n: int = 16) -> Tensor:
    return torch.randn(n, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(n))


def penalty(net: nn.Module, x: Tensor, scale: float = 2.0) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = grad(net(p).sum(), p, create_graph=True)
    return scale * g.square().sum()


def stateful(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Statistics, a draw, and a data loss beside the penalty."""
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = grad(u.sum(), p, create_graph=True)
    return g.square().sum() + (u - y).square().mean()


def several(net: nn.Module, x: Tensor) -> Any:
    p = x.detach().requires_grad_()
    (g,) = grad(net(p).sum(), p, create_graph=True)
    return Pair(g.square().sum(), {"rows": g.square().sum(1), "x": x}), [None, "text", 0.5]


def structured(net: nn.Module, batch: Batch, pair: tuple[Tensor, list[Tensor]]) -> Tensor:
    a, (b,) = pair
    return (net(batch.points) * batch.weight * a).sum() * b


def promoting(net: nn.Module, x: Tensor, counter: Tensor) -> Tensor:
    x.requires_grad_()
    counter.add_(1)
    (g,) = grad(net(x).sum(), x, create_graph=True)
    return (g * counter).square().sum()


class Tied(nn.Module):
    """One weight under two names, a buffer that `state_dict` leaves out, one that is written."""

    scale: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((3,), 2.0), persistent=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.second(self.first(x).tanh()) * self.scale


def made(path: Path, loss: Any, *args: Any, **options: Any) -> Loaded:
    """Compile to the portable form and load that."""
    decorated = optimize_nested(loss, backend="eager")
    digest = decorated.compile_ahead(path, *args, portable=True, **options)
    return load(path, sha256=digest, backend="eager")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ahead") / "penalty"
    made(path, penalty, net(), points(), dynamic={"x": {0: ("batch", 2, 40)}})
    return path


@pytest.fixture
def loaded(file: Path) -> Loaded:
    return load(file, backend="eager")


def test_value_and_grad(loaded: Loaded) -> None:
    model = net()
    for n in (2, 7, 40):
        value, grads = loaded.value_and_grad(model.state_dict(), x=points(n))
        decorated = optimize_nested(penalty, backend="eager")
        expected, expected_grads = decorated.value_and_grad(model, points(n))
        torch.testing.assert_close(value, expected.detach())
        assert list(grads) == list(expected_grads)
        torch.testing.assert_close(grads, expected_grads)
        assert not value.requires_grad


def test_used_like_the_loss(loaded: Loaded) -> None:
    """Bound or called with the module, under an optimizer, in any mode: the same training."""
    mine, theirs, called = net(), net(), net()
    bound = loaded.bind(mine)
    steps = [
        (mine, lambda x: bound(x)),
        (theirs, lambda x: penalty(theirs, x)),
        (called, lambda x: loaded(called, x, scale=2.0)),
    ]
    for model, step in steps:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for n in (5, 9, 5):
            optimizer.zero_grad()
            step(points(n)).backward()
            optimizer.step()
        model.eval()
        step(points()).backward()
    for model in (mine, called):
        for p, q in zip(model.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q)
            torch.testing.assert_close(p.grad, q.grad)
    with torch.no_grad():
        assert not bound(points()).requires_grad
    value, grads = bound.value_and_grad(points())
    torch.testing.assert_close(value, penalty(theirs, points()).detach())
    assert list(grads) == ["net.0.weight", "net.0.bias", "net.2.weight"]


def test_frozen_parameters(loaded: Loaded) -> None:
    model = net()
    model[0].requires_grad_(False)  # pyright: ignore[reportIndexIssue]
    loaded.bind(model)(points()).backward()
    there = [name for name, p in model.named_parameters() if p.grad is not None]
    assert there == ["2.weight"]
    model.requires_grad_(False)
    assert not loaded.bind(model)(points()).requires_grad


def test_modes_state_and_generator(tmp_path: Path) -> None:
    """BatchNorm and dropout: two programs, statistics and draws as in the loss as written."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 1))
    model = model.double()
    batch = {"x": {0: "batch"}, "y": {0: "batch"}}
    x, y = points(), points()[:, :1].contiguous()
    both = made(tmp_path / "both", stateful, model, x, y, modes=["train", "eval"], dynamic=batch)
    assert [slot.name for slot in both.manifest.slots] == ["train", "eval"]
    assert len(both.manifest.programs) == 2
    x, y = points(9), points(9)[:, :1].contiguous()
    # One derivative of BatchNorm's backward is right in PyTorch, as the tests of the loss show.
    for training in (True, False):
        own = model.train(training)
        mine = outcome(lambda m, *args: both.bind(m)(*args), [own], (x, y), {})
        assert_same(mine, outcome(stateful, [own], (x, y), {}))
    state = copy.deepcopy(model.state_dict())
    both.eval().value_and_grad(state, x, y)
    torch.testing.assert_close(state, model.state_dict())
    both.train().value_and_grad(state, x, y)
    assert state["1.num_batches_tracked"] == model.state_dict()["1.num_batches_tracked"] + 1

    one = made(tmp_path / "one", stateful, model.train(), *[points(), points()[:, :1].contiguous()])
    with pytest.raises(ValueError, match="compiled for train, and the modules are in another mode"):
        one.bind(model.eval())(points(), points()[:, :1].contiguous())
    with pytest.raises(ValueError, match="eval: compiled for train"):
        one.eval()


def test_new_process_without_the_source(tmp_path: Path) -> None:
    code = """
        import torch
        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = torch.nn.Linear(2, 3)
            def forward(self, x):
                return self.inner(x).tanh().sum()
        def loss(net, x):
            (g,) = torch.autograd.grad(net(x), x, create_graph=True)
            return g.square().sum()
        """
    space: dict[str, Any] = {"__name__": "user_code"}
    lines = [line[8:] for line in code.splitlines()]
    (tmp_path / "user_code.py").write_text("\n".join(lines))
    exec(compile("\n".join(lines), str(tmp_path / "user_code.py"), "exec"), space)
    torch.manual_seed(0)
    model, x = space["Net"](), torch.randn(4, 2, requires_grad=True)
    digest = optimize_nested(space["loss"]).compile_ahead(
        tmp_path / "file", model, x, portable=True, modes=["train"]
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    torch.save({"state": model.state_dict(), "x": x.detach()}, elsewhere / "tensors.pt")
    (tmp_path / "user_code.py").unlink()
    child = """
        import json, sys, torch
        from rewriter import load
        tensors = torch.load("tensors.pt", weights_only=True)
        loaded = load(sys.argv[1], sha256=sys.argv[2], backend="eager")
        value, grads = loaded.value_and_grad(tensors["state"], tensors["x"].requires_grad_())
        print(json.dumps([value.item(), {name: g.tolist() for name, g in grads.items()}]))
        """
    run = subprocess.run(
        [
            sys.executable,
            "-c",
            "\n".join(line[8:] for line in child.splitlines()),
            str(tmp_path / "file"),
            digest,
        ],
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    value, grads = json.loads(run.stdout)
    expected, expected_grads = optimize_nested(space["loss"], backend="eager").value_and_grad(
        model, x
    )
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert grads.keys() == expected_grads.keys() == {"net.inner.weight", "net.inner.bias", "x"}
    for name, found in grads.items():
        torch.testing.assert_close(torch.tensor(found), expected_grads[name])


def test_several_outputs(tmp_path: Path) -> None:
    """A structure with two differentiable outputs: a graph for the step and one for its pullback,
    of any size."""
    loaded = made(tmp_path / "file", several, net(), points(), dynamic={"x": {0: "batch"}})
    grads = []
    x = points(6)
    for model, loss in ((mine := net(), loaded.bind(mine)), (theirs := net(), None)):
        found, rest = loss(x) if loss else several(theirs, x)
        assert rest == [None, "text", 0.5] and found._fields == ("whole", "parts")
        assert found.parts["x"] is x
        (found.whole + found.parts["rows"].sum()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*grads)
    with pytest.raises(TypeError, match="must return one scalar tensor"):
        loaded.value_and_grad(net().state_dict(), x)


def test_convolutions(tmp_path: Path) -> None:
    """Weights in another memory order, a batch that no choice of kernel fixes; what the pullback is
    compiled for is what it is given."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 1))
    model = body.to(memory_format=torch.channels_last)

    def rows(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        (g,) = grad(net(p).sum(), p, create_graph=True)
        return g.flatten(1).square().sum(1)

    x = torch.randn(8, 2, 5, 5)
    loaded = made(tmp_path / "file", rows, model, x, modes=["train"], dynamic={"x": {0: "batch"}})
    orders = {i.name: i.kind.order for i in loaded.manifest.programs[0].inputs}
    assert orders["net.0.weight"] == (0, 2, 3, 1)
    for n in (20, 3):
        x, weight = torch.randn(n, 2, 5, 5), torch.rand(n)
        grads = []
        for loss in (loaded.bind(model), lambda x: rows(model, x)):
            model.zero_grad()
            loss(x).backward(weight)
            grads.append({k: p.grad for k, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*grads)
    call = take_apart(rows, (model, x), {})
    pullback = graphs_of(observe(rows, Options(backend="eager"), call.args, call.kwargs).rewritten)[
        "pullback"
    ]
    given = [value_of(node) for node in placeholders(pullback.graph)]
    assert len(given) > 3 and all(value.is_contiguous() for value in given)
    contiguous = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 1))
    with pytest.raises(
        ValueError, match=r"net.0.weight: expected memory in the order .*0, 2, 3, 1"
    ):
        loaded.bind(contiguous)(x)


def test_structures_of_arguments(tmp_path: Path) -> None:
    args = (Batch(points(), 0.5), (torch.ones(16, 1).double(), [torch.tensor(2.0).double()]))
    loaded = made(tmp_path / "file", structured, net(), *args, modes=["train"])
    value, _ = loaded.value_and_grad(net().state_dict(), *args)
    torch.testing.assert_close(value, structured(net(), *args).detach())
    state = net().state_dict()
    for bad, error, match in (
        ((Batch(points(), 0.7), args[1]), ValueError, r"batch.weight: compiled for 0.5, got 0.7"),
        ((points(), args[1]), TypeError, r"batch: expected an object with attributes \['points'"),
        ((args[0], (points(), [])), TypeError, "pair.1: expected a list of 1, got a list of 0"),
        ((args[0], [points()]), TypeError, "pair: expected a tuple of 2, got a list of 1"),
    ):
        with pytest.raises(error, match=match):
            loaded.value_and_grad(state, *bad)


def test_arguments_that_the_loss_changes(tmp_path: Path) -> None:
    x, counter = points(), torch.zeros((), dtype=torch.float64)
    loaded = made(tmp_path / "file", promoting, net(), x, counter, modes=["train"])
    assert not x.requires_grad and counter == 0  # compiling runs nothing
    value, grads = loaded.value_and_grad(net().state_dict(), x, counter)
    assert x.requires_grad and counter == 1
    torch.testing.assert_close(value, promoting(net(), x, torch.zeros_like(counter)).detach())
    loaded.bind(net())(x, counter).backward()
    assert counter == 2
    torch.testing.assert_close(x.grad, 4 * grads["x"])


def test_state_dict_that_is_not_the_whole_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    loaded = made(tmp_path / "file", penalty, model, points().float(), modes=["train"])
    state = model.state_dict()
    value, grads = loaded.value_and_grad(state, points().float())
    assert model.calls == 1
    torch.testing.assert_close(value, penalty(model, points().float()).detach())
    assert set(grads) == {"net.first.weight", "net.first.bias"}
    apart = {key: x.clone() for key, x in state.items()}
    with pytest.raises(ValueError, match=r"first.weight and second.weight were one tensor"):
        loaded.value_and_grad(apart, points().float())
    loaded.bind(model)(points().float()).backward()
    assert model.calls == 3
    torch.testing.assert_close(model.first.weight.grad, grads["net.first.weight"])


def test_method_and_closed_over(tmp_path: Path) -> None:
    """Modules and tensors that are no arguments: the module by its path, the tensor in the file."""

    class Trainer:
        def __init__(self) -> None:
            self.net, self.weight = net(), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

        @optimize_nested(backend="eager")
        def residual(self, x: Tensor) -> Tensor:
            (g,) = grad(self.net(x).sum(), x, create_graph=True)
            return (g * self.weight).square().sum()

    trainer, x = Trainer(), points().requires_grad_()
    trainer.residual.compile_ahead(tmp_path / "file", x, portable=True, modes=["train"])
    loaded = load(tmp_path / "file", backend="eager")
    assert [root.name for root in loaded.manifest.roots] == ["self.net"]
    found = loaded.value_and_grad(trainer.net.state_dict(), x)
    value, grads = trainer.residual.value_and_grad(x)
    torch.testing.assert_close(found, (value.detach(), grads))
    with pytest.raises(TypeError, match=r"self.net is no argument of the loss; call bind"):
        loaded(x)


BAD_CALLS: dict[str, tuple[Callable[[Loaded, dict[str, Tensor]], Any], Any, str]] = {
    "no tensor": (lambda f, s: f.value_and_grad(s), TypeError, "penalty: missing x; got nothing"),
    "too many": (
        lambda f, s: f.value_and_grad(s, points(), 2.0, 3),
        TypeError,
        r"expected at most 2 arguments by position \(x, scale\), got 3",
    ),
    "unknown name": (
        lambda f, s: f.value_and_grad(s, points(), z=1),
        TypeError,
        "unexpected argument 'z'; expected scale, x",
    ),
    "twice": (lambda f, s: f.value_and_grad(s, points(), x=points()), TypeError, "'x' is given tw"),
    "a number": (lambda f, s: f.value_and_grad(s, 3), TypeError, "x: expected a tensor, got int"),
    "dtype": (
        lambda f, s: f.value_and_grad(s, points().float()),
        ValueError,
        "x: expected float64, got float32",
    ),
    "device": (
        lambda f, s: f.value_and_grad(s, points().to("meta")),
        ValueError,
        "x: expected a tensor on cpu, got meta",
    ),
    "shape": (
        lambda f, s: f.value_and_grad(s, torch.ones(5, 4).double()),
        ValueError,
        r"x: expected shape \(batch, 3\), which is \(5, 3\) here, got \(5, 4\)",
    ),
    "dimensions": (
        lambda f, s: f.value_and_grad(s, torch.ones(3).double()),
        ValueError,
        "x: expected 2 dimensions, got 1",
    ),
    "range": (
        lambda f, s: f.value_and_grad(s, points(41)),
        ValueError,
        r"x: size 41 in dimension 0 \(batch\) is outside of the range compiled for, 2 to 40",
    ),
    "layout": (
        lambda f, s: f.value_and_grad(s, torch.ones(3, 5).double().t()),
        ValueError,
        r"x: expected memory in the order of dimensions \(0, 1\), got strides \(1, 5\)",
    ),
    "value": (
        lambda f, s: f.value_and_grad(s, points(), 3.0),
        ValueError,
        "scale: compiled for 2.0, got 3.0",
    ),
    "missing key": (
        lambda f, s: f.value_and_grad({k: x for k, x in s.items() if k != "0.bias"}, points()),
        ValueError,
        "the state of net: missing 0.bias",
    ),
    "unknown key": (
        lambda f, s: f.value_and_grad({**s, "3.bias": points()}, points()),
        ValueError,
        "the state of net: unexpected 3.bias",
    ),
    "state of another shape": (
        lambda f, s: f.value_and_grad({**s, "0.bias": torch.ones(4).double()}, points()),
        ValueError,
        r"net.0.bias: expected float64 of shape \(8,\), got float64 of shape \(4,\)",
    ),
    "no state": (lambda f, s: f.value_and_grad([], points()), TypeError, "expected a state_dict"),  # pyright: ignore[reportArgumentType]
    "another module": (
        lambda f, s: f.bind(nn.Linear(3, 3)),
        ValueError,
        "the state of net: missing 0.bias, 0.weight, 2.bias, 2.weight; unexpected weight, bias",
    ),
    "modules by name": (lambda f, s: f.bind({"f": net()}), ValueError, "expected the modules net"),
    "requires grad": (
        lambda f, s: f.bind(net())(points().requires_grad_()),
        ValueError,
        "x requires grad, and did not when the loss was compiled",
    ),
    "twice differentiated": (
        lambda f, s: grad(f.bind(m := net())(points()), m[0].weight, create_graph=True),  # pyright: ignore[reportIndexIssue]
        OptimizeNestedError,
        "create_graph=True: an artifact holds the loss and its first derivative",
    ),
    "in a transform": (
        lambda f, s: torch.func.vmap(f.bind(net()))(points()[None]),
        OptimizeNestedError,
        "inside of a torch.func transform",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls(loaded: Loaded, name: str) -> None:
    call, error, match = BAD_CALLS[name]
    state = net().state_dict()
    before = copy.deepcopy(state)
    with pytest.raises(error, match=match):
        call(loaded, state)
    torch.testing.assert_close(state, before)


TENSOR = torch.ones(1, dtype=torch.float64, requires_grad=True)
LOG: list[int] = []


def closes_over_a_parameter(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) * TENSOR).sum()


def appends(net: nn.Module, x: Tensor) -> Tensor:
    LOG.append(1)
    return net(x).sum()


def branches(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).sum() if x.shape[0] > 10 else net(x).mean()


def pairs(net: nn.Module, x: Tensor) -> Tensor:
    return net(x).reshape(-1, 2).sum(1).square().sum()


def reads(net: nn.Module, x: Tensor) -> Tensor:
    total = net(x).sum()
    for _ in range(int(x.abs().sum())):
        total = total.sin()
    return total


def returns_a_class(net: nn.Module, x: Tensor) -> Any:
    return Batch(net(x).sum(), 1.0)


NOT_COMPILED: dict[str, tuple[Any, dict[str, Any], Any, str]] = {
    "closed-over parameter": (closes_over_a_parameter, {}, CaptureError, "pass it as an argument"),
    "side effect": (appends, {}, CaptureError, r"side effects.*LOG"),
    "branch on a size": (branches, {"dynamic": {"x": {0: "n"}}}, CaptureError, r"\(n > 10\)"),
    "even sizes": (pairs, {"dynamic": {"x": {0: (2, 99)}}}, CaptureError, r"\(\(x.0 % 2\) == 0\)"),
    "fixed size": (penalty, {"dynamic": {"x": {1: "n"}}}, CaptureError, "fixes this size to 3"),
    "value": (reads, {}, CaptureError, r"number of steps is read from a tensor.*test_ahead.py"),
    "class": (returns_a_class, {}, CaptureError, "returns a Batch"),
    "unknown tensor": (penalty, {"dynamic": {"z": {0: "n"}}}, ValueError, "no tensor 'z'.*are x"),
    "dimension": (penalty, {"dynamic": {"x": {2: "n"}}}, ValueError, "x has 2 dimensions"),
    "size one": (penalty, {"dynamic": {"x": {0: (1, 4)}}}, ValueError, "2 or above.* got 1 to 4"),
    "range": (penalty, {"dynamic": {"x": {0: (20, 30)}}}, ValueError, "size 16, not 20 to 30"),
    "spec": (penalty, {"dynamic": {"x": {0: 3}}}, TypeError, r"dynamic\['x'\]\[0\]: expected a n"),
    "modes": (penalty, {"modes": "train"}, ValueError, 'modes: expected a list of "train"'),
}


@pytest.mark.parametrize("name", NOT_COMPILED)
def test_not_compiled(tmp_path: Path, name: str) -> None:
    loss, options, error, match = NOT_COMPILED[name]
    file = tmp_path / "file"
    file.write_bytes(b"what was there before")
    with pytest.raises(error, match=match):
        optimize_nested(loss, backend="eager").compile_ahead(
            file, net(), points(), portable=True, **options
        )
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_bytes() == b"what was there before"
    assert not LOG


def test_written_whole_or_not_at_all(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_bytes(file.read_bytes())

    def fail(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("rewriter.ahead.archive.os.replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        made(target, penalty, net(), points(), modes=["train"])
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert load(target, backend="eager").sha256 == load(file, backend="eager").sha256
    with pytest.raises(ValueError, match=r"path: the folder .* does not exist"):
        made(tmp_path / "none" / "file", penalty, net(), points())


def test_declared_sizes() -> None:
    x = points(5)
    for spec, name, least, most in (
        ("n", "n", 2, None),
        ((3, 9), "x.0", 3, 9),
        (("n", 3, None), "n", 3, None),
        (torch.export.Dim("n", min=3, max=9), "n", 3, 9),
        (torch.export.Dim("n"), "n", 2, None),
    ):
        (one,) = declared_sizes({"x": {-2: spec}}, {"x": x})
        assert (one.dim, one.name, one.least, one.most) == (0, name, least, most)
    with pytest.raises(
        ValueError, match=r"dynamic\['x'\]\[0\] and dynamic\['y'\]\[0\] are both 'n'"
    ):
        declared_sizes({"x": {0: "n"}, "y": {0: "n"}}, {"x": x, "y": points(6)})


def test_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``check=True``: what differs from the loss as written is not shipped."""
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path / "dump"))
    rules = passes.tangent_tables.FROM_BACKWARD
    tanh = torch.ops.aten.tanh.default
    right = rules[tanh]
    checked = optimize_nested(penalty, backend="eager", check=True)
    options: dict[str, Any] = {"portable": True, "modes": ["train"]}
    checked.compile_ahead(tmp_path / "right", net(), points(), **options)
    monkeypatch.setitem(rules, tanh, lambda v, out, *rest: right(v, out, *rest) * 1.1)
    with pytest.raises(CheckFailed, match="the gradient of"):
        checked.compile_ahead(tmp_path / "wrong", net(), points(), **options)
    assert not (tmp_path / "wrong").exists()


def test_recorded_loss(tmp_path: Path) -> None:
    """``capture="trace"``: what is recorded is compiled."""
    recorded = optimize_nested(penalty, capture="trace", backend="eager")
    recorded.compile_ahead(tmp_path / "file", net(), points(), portable=True, modes=["train"])
    value, _ = load(tmp_path / "file", backend="eager").value_and_grad(net().state_dict(), points())
    torch.testing.assert_close(value, penalty(net(), points()).detach())
    with pytest.raises(ValueError, match="dynamic: a recording"):
        recorded.compile_ahead(tmp_path / "file", net(), points(), dynamic={"x": {0: "n"}})


def test_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loss is compiled once; another size, and a damaged file, once more."""
    made_of: list[int] = []
    packed = compiling._packed
    monkeypatch.setattr(compiling, "_packed", lambda *args: (made_of.append(1), packed(*args))[1])
    cache, model = tmp_path / "cache", net()
    options: dict[str, Any] = {"cache": cache, "modes": ["train"]}
    one = made(tmp_path / "1", penalty, model, points(), **options)
    two = made(tmp_path / "2", penalty, model, points(), **options)
    assert len(made_of) == 1 and one.sha256 == two.sha256
    made(tmp_path / "3", penalty, model, points(5), **options)
    assert len(made_of) == 2 and len(list(cache.iterdir())) == 2
    for entry in cache.iterdir():
        entry.write_bytes(entry.read_bytes()[:-70] + b"x" * 70)
    three = made(tmp_path / "1", penalty, model, points(), **options)
    assert len(made_of) == 3 and three.sha256 == one.sha256


def test_two_processes_race(tmp_path: Path) -> None:
    child = """
        import sys, torch
        from rewriter import load, optimize_nested
        torch.manual_seed(0)
        def loss(net, x):
            (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
            return g.square().sum()
        net, x = torch.nn.Linear(2, 1), torch.ones(3, 2, requires_grad=True)
        path = sys.argv[1]
        for _ in range(2):
            digest = optimize_nested(loss).compile_ahead(
                path, net, x, portable=True, modes=["train"], cache=sys.argv[2]
            )
        load(path, sha256=digest, backend="eager").bind(net)(x).backward()
        print(digest)
        """
    code = "\n".join(line[8:] for line in child.splitlines())
    # One file and one cache for both.
    (tmp_path / "child.py").write_text(code)
    args = [
        sys.executable,
        str(tmp_path / "child.py"),
        *(str(tmp_path / n) for n in ("f", "cache")),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [run.communicate() for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert len({out for out, _ in said}) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1  # each process finds the other's
    load(tmp_path / "f", backend="eager")


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read: No such file"):
        load(tmp_path / "none")
    with pytest.raises(ValueError, match="backend: expected one of"):
        load(tmp_path / "none", backend="cuda")
