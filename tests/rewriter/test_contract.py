"""The decorator behaves like the function it decorates."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.price import FlopCounter
from rewriter import NestedGradientWarning, OptimizedLoss, disabled, optimize_nested
from rewriter.options import is_disabled
from tests.cases import mlp
from tests.oracle import relative_error


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum() + net(x).square().mean()


def on_input(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum() + x.square().sum()


@pytest.fixture
def net() -> nn.Module:
    return mlp(nn.Tanh, 3, 6, 2)


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(5, 2, dtype=torch.float64)


def eager(loss: Any, **options: Any) -> OptimizedLoss:
    return optimize_nested(loss, backend="eager", **options)


def grads(net: nn.Module) -> list[Tensor]:
    found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    return found


def same(mine: list[Tensor], reference: list[Tensor]) -> bool:
    pairs = zip(mine, reference, strict=True)
    return all(relative_error(a, b) < 1e-9 for a, b in pairs)


def test_backward_accumulates(net: nn.Module, x: Tensor) -> None:
    loss = eager(penalty)
    loss(net, x).backward()
    loss(net, x).backward()
    mine = grads(net)
    penalty(net, x).backward()
    penalty(net, x).backward()
    assert same(mine, grads(net))


def test_gradient_scales_with_what_follows(net: nn.Module, x: Tensor) -> None:
    loss = eager(penalty)
    (3 * loss(net, x) ** 2 + net(x).sum()).backward()
    mine = grads(net)
    (3 * penalty(net, x) ** 2 + net(x).sum()).backward()
    assert same(mine, grads(net))
    loss(net, x).backward(torch.tensor(0.25, dtype=torch.float64))
    mine = grads(net)
    penalty(net, x).backward(torch.tensor(0.25, dtype=torch.float64))
    assert same(mine, grads(net))


def test_gradients_belong_to_the_caller(net: nn.Module, x: Tensor) -> None:
    value = eager(penalty)(net, x)
    value.backward(retain_graph=True)
    first = [p.grad for p in net.parameters()]
    kept = [g.clone() for g in first if g is not None]
    for g in first:
        if g is not None:
            g.zero_()
    net.zero_grad()
    value.backward()
    assert same(grads(net), kept)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        value.backward()


def test_hooks_fire(net: nn.Module, x: Tensor) -> None:
    seen: list[int] = []
    first = next(net.parameters())
    first.register_hook(lambda g: seen.append(1) or g * 2)
    first.register_post_accumulate_grad_hook(lambda p: seen.append(2))
    eager(penalty)(net, x).backward()
    assert seen == [1, 2]
    mine = first.grad.clone()
    net.zero_grad()
    penalty(net, x).backward()
    assert relative_error(mine, first.grad) < 1e-9


def test_input_with_a_history(net: nn.Module, x: Tensor) -> None:
    w = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    eager(on_input)(net, (x @ w).tanh()).backward()
    mine, w.grad = w.grad, None
    on_input(net, (x @ w).tanh()).backward()
    assert relative_error(mine, w.grad) < 1e-9


def test_parameter_gradient_through_an_input_with_a_history(net: nn.Module, x: Tensor) -> None:
    """Stock Dynamo refuses an inner gradient that would walk past a graph input."""

    def loss(net: nn.Module, h: Tensor) -> Tensor:
        parameters = list(net.parameters())
        inner = torch.autograd.grad(net(h).square().sum(), parameters, create_graph=True)
        return sum(g.square().sum() for g in inner)

    w = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    eager(loss)(net, x @ w).backward()
    mine, w.grad = [w.grad, *grads(net)], None
    loss(net, x @ w).backward()
    assert same(mine, [w.grad, *grads(net)])


def test_no_grad_computes_the_value(net: nn.Module, x: Tensor) -> None:
    loss = eager(penalty)
    reference = penalty(net, x).detach()
    with torch.no_grad():
        value = loss(net, x)
    assert not value.requires_grad
    assert relative_error(value, reference) < 1e-12
    with torch.inference_mode():
        assert relative_error(loss(net, x).clone(), reference) < 1e-12


def of_nothing(net: nn.Module, x: Tensor) -> Tensor:
    """A Hessian of a linear function, which is zero."""
    points = x.detach().requires_grad_()
    _, h = torch.autograd.functional.hvp(lambda z: (x * z).sum(), points, x, create_graph=True)
    return (net(x) * h).sum()


@pytest.mark.parametrize("strategy", ["auto", "reverse", "taylor"])
def test_gradients_are_zeros_where_eager_has_zeros(
    net: nn.Module, x: Tensor, strategy: str
) -> None:
    """Not None, of which an optimizer makes something else."""
    loss = optimize_nested(of_nothing, backend="eager", strategy=strategy)
    x.requires_grad_()
    loss(net, x).backward()
    mine = [None if leaf.grad is None else leaf.grad.abs().sum() for leaf in (x, *net.parameters())]
    assert mine == [0.0] * len(mine)


def test_frozen_parameters(net: nn.Module, x: Tensor) -> None:
    loss = eager(penalty)
    loss(net, x).backward()
    net.zero_grad()
    next(net.parameters()).requires_grad_(False)
    loss(net, x).backward()
    mine = [p.grad is None for p in net.parameters()], grads(net)
    penalty(net, x).backward()
    assert mine[0] == [p.grad is None for p in net.parameters()]
    assert same(mine[1], grads(net))
    for p in net.parameters():
        p.requires_grad_(False)
    value = loss(net, x)
    assert value.requires_grad == penalty(net, x).requires_grad
    value.backward()
    assert not grads(net)


def test_value_and_grad(net: nn.Module, x: Tensor) -> None:
    x.requires_grad_()
    value, found = eager(on_input).value_and_grad(net, x)
    reference = on_input(net, x)
    assert relative_error(value.detach(), reference.detach()) < 1e-12
    reference.backward()
    expected = {f"net.{n}": p.grad for n, p in net.named_parameters() if p.grad is not None}
    expected["x"] = x.grad
    assert set(found) == set(expected)
    assert all(relative_error(found[n], g) < 1e-9 for n, g in expected.items())


def test_value_and_grad_touches_no_grad(net: nn.Module, x: Tensor) -> None:
    eager(penalty).value_and_grad(net, x)
    assert all(p.grad is None for p in net.parameters())


@dataclasses.dataclass
class Batch:
    points: Tensor
    weight: float


def test_structures(net: nn.Module, x: Tensor) -> None:
    def loss(nets: dict, batch: Batch, pair: tuple, *, scale: float, kind: str = "a") -> dict:
        p = batch.points.detach().requires_grad_()
        (g,) = torch.autograd.grad(nets["u"](p).sum(), p, create_graph=True)
        total = batch.weight * g.square().sum() + scale * (pair[0] * pair[1][0]).sum()
        return {"loss": total, "kind": kind, "largest": g.detach().abs().max(), "list": [1, 2]}

    y = torch.randn(5, dtype=torch.float64, requires_grad=True)
    args = ({"u": net}, Batch(x, 0.5), (y, [2 * x[:, 0]]))
    decorated = eager(loss)
    mine = decorated(*args, scale=3.0)
    expected = loss(*args, scale=3.0)
    assert mine["kind"] == "a" and mine["list"] == [1, 2]
    assert not mine["largest"].requires_grad
    assert torch.equal(mine["largest"], expected["largest"])
    mine["loss"].backward()
    found, y.grad = [y.grad, *grads(net)], None
    expected["loss"].backward()
    assert same(found, [y.grad, *grads(net)])
    assert decorated(*args, scale=3.0, kind="b")["kind"] == "b"
    again = decorated(*args, scale=1.5)["loss"]
    assert relative_error(again.detach(), loss(*args, scale=1.5)["loss"].detach()) < 1e-12


def test_several_losses(net: nn.Module, x: Tensor) -> None:
    def loss(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        p = x.detach().requires_grad_()
        u = net(p)
        (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
        return g.square().sum(), u.square().mean(), g

    decorated = eager(loss)
    for weights in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 2, 3)]:

        def end(results: tuple[Tensor, ...], weights: tuple = weights) -> Tensor:
            used = [w * (r.sin().sum()) for w, r in zip(weights, results, strict=True) if w]
            return sum(used[1:], used[0])

        end(decorated(net, x)).backward()
        mine = {n: p.grad for n, p in net.named_parameters()}
        net.zero_grad()
        end(loss(net, x)).backward()
        for name, p in net.named_parameters():
            assert relative_error(mine[name], p.grad) < 1e-9, (weights, name)
        net.zero_grad()


def test_non_scalar_needs_a_gradient(net: nn.Module, x: Tensor) -> None:
    def per_sample(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
        return g.square().sum(1)

    value = eager(per_sample)(net, x)
    with pytest.raises(RuntimeError, match="grad can be implicitly created only for scalar"):
        value.backward()
    weights = torch.arange(5.0, dtype=torch.float64)
    value.backward(weights)
    mine = grads(net)
    per_sample(net, x).backward(weights)
    assert same(mine, grads(net))


class Trainer:
    def __init__(self, net: nn.Module) -> None:
        self.net = net

    @optimize_nested(backend="eager")
    def loss(self, x: Tensor) -> Tensor:
        """Say what it does."""
        return penalty(self.net, x)


def test_method(net: nn.Module, x: Tensor) -> None:
    trainer = Trainer(net)
    trainer.loss(x).backward()
    mine = grads(net)
    trainer.loss.as_written(x).backward()
    assert same(mine, grads(net))
    assert trainer.loss.__doc__ == "Say what it does."
    assert "self.net.0.weight" in trainer.loss.value_and_grad(x)[1]
    assert trainer.loss.explain(x).sites[0].strategy == "jvp_over_gradient"


def test_closed_over_module(net: nn.Module, x: Tensor) -> None:
    @optimize_nested(backend="eager")
    def loss(x: Tensor) -> Tensor:
        return penalty(net, x)

    loss(x).backward()
    mine = grads(net)
    loss.as_written(x).backward()
    assert same(mine, grads(net))
    assert "net.0.weight" in loss.value_and_grad(x)[1]


def test_new_batch_sizes_cost_one_recompile(net: nn.Module) -> None:
    loss = eager(penalty)
    for size in (5, 7, 9, 12):
        x = torch.randn(size, 2, dtype=torch.float64)
        loss(net, x).backward()
        mine = grads(net)
        penalty(net, x).backward()
        assert same(mine, grads(net))
    assert len(loss.steps) == 2


def test_differentiated_from_outside(net: nn.Module, x: Tensor) -> None:
    def twice(loss: Any) -> tuple[Tensor, ...]:
        parameters = list(net.parameters())[:-1]
        first = torch.autograd.grad(loss(net, x), parameters, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), parameters)

    assert same(list(twice(eager(penalty))), list(twice(penalty)))


def test_differentiated_from_outside_after_a_change(net: nn.Module, x: Tensor) -> None:
    value = eager(penalty)(net, x)
    with torch.no_grad():
        next(net.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="changed in place after the loss was computed"):
        torch.autograd.grad(value, list(net.parameters()), create_graph=True)


def test_changing_numbers(net: nn.Module, x: Tensor) -> None:
    """Floats do not cost a recompile each; where only a Python number will do, they cost one each
    and stay right."""

    def weighted(net: nn.Module, x: Tensor, weight: float) -> Tensor:
        return weight**2 * penalty(net, x)

    def sloped(net: nn.Module, x: Tensor, slope: float) -> Tensor:
        return penalty(net, nn.functional.leaky_relu(x, slope))

    for plain in (weighted, sloped):
        loss = eager(plain)
        for number in (0.5, 0.25, 0.125, 0.1):
            value = loss(net, x, number)
            assert relative_error(value.detach(), plain(net, x, number).detach()) < 1e-12
        assert len(loss.steps) == (2 if plain is weighted else 4)


@pytest.mark.parametrize("form", ["method", "attribute"])
def test_requires_grad_on_the_callers_tensor(net: nn.Module, x: Tensor, form: str) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        before = x * 2
        if form == "method":
            x.requires_grad_()
        else:
            x.requires_grad = True
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return (g * before).sum() + x.square().sum()

    decorated = eager(loss)
    for _ in range(2):
        mine, reference = x.clone(), x.clone()
        decorated(net, mine).backward()
        loss(net, reference).backward()
        assert mine.requires_grad
        assert relative_error(mine.grad, reference.grad) < 1e-9


def test_off_switches(net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = eager(penalty)
    assert loss.as_written is penalty
    with disabled():
        loss(net, x)
    monkeypatch.setenv("OPTIMIZE_NESTED", "0")
    loss(net, x)
    monkeypatch.delenv("OPTIMIZE_NESTED")
    assert not loss.steps
    assert not eager(penalty, enabled=False)(net, x).grad_fn.name().startswith("_Step")
    loss(net, x)
    assert len(loss.steps) == 1


@pytest.mark.parametrize("word", ["0", "false", "OFF", " No "])
def test_words_that_switch_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED", word)
    assert is_disabled()


@pytest.mark.parametrize("word", ["", "1", "True", "on", "yes"])
def test_words_that_do_not(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED", word)
    assert not is_disabled()


def test_a_word_that_means_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said once, and changes nothing."""
    monkeypatch.setenv("OPTIMIZE_NESTED", "disable")
    with pytest.warns(NestedGradientWarning, match="OPTIMIZE_NESTED=disable: expected one of 0"):
        assert not is_disabled()
    assert not is_disabled()


def test_explain_runs_nothing(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1)).double()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    report = eager(penalty).explain(net, x)
    assert all(torch.equal(state[n], v) for n, v in net.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None for p in net.parameters())
    text = str(report)
    assert "test_contract.py" in text and "torch.autograd.grad" in text
    assert len(text.splitlines()) < 40


def test_explain_does_not_fill_the_cache(net: nn.Module, x: Tensor) -> None:
    """Explaining as often as one likes, and twice decorating a function, leaves room to run."""
    loss, other = eager(penalty), eager(penalty, strategy="reverse")
    for _ in range(70):
        loss.explain(net, x)
    assert len(loss.steps) == 1
    loss(net, x).backward()
    other(net, x).backward()
    assert loss.explain(net, x).sites[0].strategy == "jvp_over_gradient"
    assert other.explain(net, x).sites[0].strategy == "reverse"
    assert (len(loss.steps), len(other.steps)) == (1, 1)


def test_report_graph_runs(x: Tensor) -> None:
    net = nn.Sequential(
        nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)
    ).double()
    report = eager(penalty).explain(net, x)
    inputs = [n.meta["val"] for n in report.graph.graph.find_nodes(op="placeholder")]
    by_shape = {tuple(p.shape): p for p in [x, *net.parameters()]}
    value, *_ = report.graph(*(by_shape[tuple(i.shape)].detach() for i in inputs))
    assert relative_error(value, penalty(net, x).detach()) < 1e-12


def test_inside_torch_compile(net: nn.Module, x: Tensor) -> None:
    loss = eager(on_input)
    x.requires_grad_()
    compiled = torch.compile(lambda net, x: 2 * loss(net, x), backend="eager")
    value = compiled(net, x)
    assert relative_error(value.detach(), 2 * on_input(net, x).detach()) < 1e-12


def test_under_a_dispatch_mode(net: nn.Module, x: Tensor) -> None:
    loss = eager(penalty)
    loss(net, x)
    with FlopCounter() as counter:
        value = loss(net, x)
    assert counter.flops > 0
    assert relative_error(value.detach(), penalty(net, x).detach()) < 1e-12


def test_under_a_transform(net: nn.Module, x: Tensor) -> None:
    """Differentiated by `torch.func` from outside."""
    loss = eager(on_input)
    mine = torch.func.grad(lambda z: loss(net, z))(x)
    assert relative_error(mine, torch.func.grad(lambda z: on_input(net, z))(x)) < 1e-12


def test_check_passes_and_leaves_no_trace(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))
    loss = eager(penalty, check=True)
    reference = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 1))
    reference.load_state_dict(net.state_dict())
    torch.manual_seed(1)
    loss(net, x.float()).backward()
    torch.manual_seed(1)
    penalty(reference, x.float()).backward()
    for mine, other in zip(net.state_dict().values(), reference.state_dict().values(), strict=True):
        assert torch.allclose(mine, other)


def test_import_needs_no_main_guard() -> None:
    """A script that only imports the package starts no compiler and prints nothing."""
    done = subprocess.run(
        [sys.executable, "-c", "import rewriter, passes"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        check=True,
    )
    assert done.stdout == ""
