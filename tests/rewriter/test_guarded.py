"""What was compiled is called past Dynamo's wrapper, and only while Dynamo's guards hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.guards
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import NestedGradientWarning, OptimizedLoss, guarded, optimize_nested
from rewriter.guarded import Guarded, _binder
from tests.cases import mlp

FACTOR = 2.0
X = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)


def penalty(
    net: nn.Module, x: Tensor, kind: str = "square", *rest: float, bias: float = 1.0
) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = grad(net(p).sum(), p, create_graph=True)
    return getattr(g, kind)().sum() * FACTOR + sum(rest) + bias


class Watched:
    """A loss, and how often its calls went through Dynamo's wrapper."""

    def __init__(self, loss: Callable[..., Any]) -> None:
        self.loss = optimize_nested(loss, backend="eager")
        guarded: Any = self.loss._compiled
        assert isinstance(guarded, Guarded)
        self.slow, through = 0, guarded._compiled

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.slow += 1
            return through(*args, **kwargs)

        guarded._compiled = counted

    def check(self, *args: Any, slow: int, **kwargs: Any) -> None:
        """Compare a call with the loss as written; ``slow``: calls of the wrapper there may be."""
        before = self.slow
        ours, expected = self.loss(*args, **kwargs), self.loss.as_written(*args, **kwargs)
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=0)
        assert ours.requires_grad == expected.requires_grad
        modules = [a for a in args if isinstance(a, nn.Module)]
        wanted = [p for m in modules for p in m.parameters() if p.requires_grad]
        if ours.requires_grad and wanted:
            pairs = zip(
                *(grad(u, wanted, allow_unused=True) for u in (ours, expected)), strict=True
            )
            for mine, reference in pairs:
                torch.testing.assert_close(mine, reference, rtol=1e-9, atol=0)
        assert (self.slow > before) == bool(slow)


@pytest.fixture
def net() -> nn.Module:
    return mlp(nn.Tanh, 3, 4, 2)


@pytest.fixture
def watched(net: nn.Module) -> Watched:
    found = Watched(penalty)
    found.check(net, X, slow=1)
    found.check(net, X, slow=0)
    return found


def freeze(net: nn.Module) -> None:
    next(net.parameters()).requires_grad_(False)


def hook(net: nn.Module) -> None:
    net[1].register_forward_hook(lambda module, inputs, output: 3 * output)


def replace_module(net: nn.Module) -> None:
    net[1] = nn.SiLU()


def replace_parameter(net: nn.Module) -> None:
    net[2].weight = nn.Parameter(torch.ones(2, 4, dtype=torch.float64))
    net[2].bias = nn.Parameter(torch.ones(2, dtype=torch.float64))
    net[4] = nn.Linear(2, 1).double()


def override_forward(net: nn.Module) -> None:
    net[1].forward = torch.sin


@pytest.mark.parametrize(
    "change", [freeze, hook, replace_module, replace_parameter, override_forward]
)
def test_changes_of_the_network_are_noticed(
    watched: Watched, net: nn.Module, change: Callable[[nn.Module], None]
) -> None:
    change(net)
    watched.check(net, X, slow=1)
    watched.check(net, X, slow=0)
    watched.check(mlp(nn.Tanh, 3, 4, 2), X, slow=0)
    assert len(watched.loss.steps) == 2


def test_values_are_no_change(watched: Watched, net: nn.Module) -> None:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.5)
    watched.check(net, X + 1, slow=0)
    watched.check(mlp(nn.Tanh, 3, 4, 2), X, slow=0)
    assert len(watched.loss.steps) == 1


def test_arguments_in_every_way(watched: Watched, net: nn.Module) -> None:
    watched.check(net, X, "square", slow=0)
    watched.check(net=net, x=X, slow=0)
    watched.check(x=X, net=net, bias=1.0, kind="square", slow=0)
    watched.check(net, X, "exp", slow=1)
    watched.check(net, X, kind="exp", slow=0)
    watched.check(net, X, "square", 0.5, 0.25, slow=1)
    watched.check(net, X, "square", 0.5, 0.25, slow=0)
    for wrong in ((net,), (net, X, "exp")):
        with pytest.raises(TypeError):
            watched.loss(*wrong, nothing=1)


def test_globals_and_modes(
    watched: Watched, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(penalty.__globals__, "FACTOR", 3.0)
    watched.check(net, X, slow=1)
    watched.check(net, X, slow=0)
    monkeypatch.undo()
    watched.check(net, X, slow=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        watched.loss(net, X)
    assert len(watched.loss.steps) == 3
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        watched.check(net, X, slow=0)


def test_names_around_the_loss(net: nn.Module) -> None:
    factor: Any = 2.0

    def closed(net: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        u = (lambda: net(x).square())()  # both are names of the inner function too
        return grad(u.sum(), x, create_graph=True)[0].square().sum() * factor

    watched = Watched(closed)
    watched.check(net, X, slow=1)
    watched.check(net, X, slow=0)
    factor = torch.tensor(3.0, dtype=torch.float64)
    watched.check(net, X, slow=1)
    watched.check(net, X, slow=0)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (torch._C._dynamo.eval_frame, "_debug_get_cache_entry_list"),
        (torch._dynamo.guards.GuardManagerWrapper, "check"),
    ],
)
def test_a_version_without_a_name(
    net: nn.Module, owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dynamo's own way is taken, which is said once in a process."""
    monkeypatch.setattr(guarded, "_said", set())
    with monkeypatch.context() as patched:
        patched.delattr(owner, name)
        with pytest.warns(NestedGradientWarning, match=rf"has no torch\.\S*{name}, so") as told:
            losses = [optimize_nested(penalty, backend="eager") for _ in range(2)]
    assert [Path(warning.filename).name for warning in told] == [Path(__file__).name]
    for loss in losses:
        assert not isinstance(loss._compiled, Guarded)
        for _ in range(2):
            torch.testing.assert_close(loss(net, X), penalty(net, X), rtol=1e-9, atol=0)
        assert len(loss.steps) == 1
    Watched(penalty).check(net, X, slow=1)


class Scaled:
    """Losses that are no plain functions."""

    factor = 2.0

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x) * self.factor


def test_callables(net: nn.Module) -> None:
    scaled = Scaled()
    watched = Watched(scaled)
    watched.check(net, X, slow=1)
    watched.check(net, X, slow=0)
    scaled.factor = 5.0
    watched.check(net, X, slow=1)


def test_dynamo_is_asked_where_it_may_object(watched: Watched, net: nn.Module) -> None:
    with torch.compiler.set_stance("force_eager"):
        watched.check(net, X, slow=1)
    watched.check(net, X, slow=0)
    torch._dynamo.reset()
    watched.check(net, X, slow=1)
    watched.check(net, X, slow=0)


def test_inside_of_another_function_of_dynamos(watched: Watched, net: nn.Module) -> None:
    """After a graph break its hook into the interpreter would take our call for its own."""

    @torch.compile(backend="eager")
    def outer(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return called(x) + 1

    @torch._dynamo.disable(recursive=False)
    def called(x: Tensor) -> Tensor:
        return watched.loss(net, x)

    torch.testing.assert_close(outer(X), penalty(net, X + 1) + 1, rtol=1e-9, atol=0)
    watched.check(net, X, slow=0)


def every_kind(a: Any, b: int = 2, /, c: int = 3, *d: Any, e: Any, g: int = 5, **h: Any) -> None:
    """Have an argument of each kind."""


def test_arguments_by_name() -> None:
    bind = _binder(every_kind)
    assert bind(1, e=0) == {"a": 1, "b": 2, "c": 3, "d": (), "e": 0, "g": 5, "h": {}}
    expected = {"a": 1, "b": 2, "c": 3, "d": (4, 5), "e": 6, "g": 7, "h": {"z": 8}}
    assert bind(1, 2, 3, 4, 5, e=6, g=7, z=8) == expected
    for wrong in ({}, {"a": 1, "e": 0}):
        with pytest.raises(TypeError):
            bind(**wrong)


def test_nothing_is_kept_of_dropped_specialisations(watched: Watched, net: nn.Module) -> None:
    loss: OptimizedLoss = watched.loss
    torch._dynamo.reset()
    loss(net, X)
    loss(net, X)
    assert len(loss._compiled._runnable) == 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.fixture(autouse=True)
def no_leftovers() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_names_go_with_the_code(net: nn.Module) -> None:
    """Dynamo's code finds graphs by global names, as does ours that calls them directly."""

    def names() -> set[str]:
        return {name for name in globals() if name.startswith("__compiled_fn")}

    before = names()
    loss = optimize_nested(penalty, backend="eager")
    for _ in range(2):
        loss(net, X)
    made = names() - before
    assert len(made) == 2 and sum(name.endswith("_direct") for name in made) == 1
    torch._dynamo.reset()
    del loss
    gc.collect()
    assert not made & names()
