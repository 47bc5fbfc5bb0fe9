"""Choosing site by site, refusals, wishes, prices at other sizes, and choosing by the clock."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from examples.workloads.networks import Velocity
from examples.workloads.operators import likelihood
from rewriter import choose, optimize_nested
from rewriter.errors import OptionError
from rewriter.forms import Candidate, Forms
from rewriter.generators import generators_restored
from rewriter.report import Report
from rewriter.rewrite import Rewritten
from rewriter.step import Step
from tests.cases import mlp
from tests.oracle import assert_same, check, outcome

J, R = "jvp_over_gradient", "reverse"


def points(rows: int = 3, columns: int = 2) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(rows, columns, dtype=torch.float64, requires_grad=True)


def network() -> nn.Module:
    return mlp(nn.Tanh, 2, 4, 2)


def convolutions() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv1d(1, 4, 3), nn.LeakyReLU(), nn.Conv1d(4, 4, 3, stride=2), nn.LeakyReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(24, 1)).double()


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = grad(net(x).sum(), x, create_graph=True)
    return g.square().sum()


def laplacian(net: nn.Module, x: Tensor) -> Tensor:
    """Two derivatives that contain a third."""
    u = net(x)
    g = grad(u.sum(), x, create_graph=True)[0]
    xx = grad(g[:, 0].sum(), x, create_graph=True)[0][:, 0]
    yy = grad(g[:, 1].sum(), x, create_graph=True)[0][:, 1]
    return (xx + yy + u[:, 0]).square().sum()


def both(net: nn.Module, critic: nn.Module, x: Tensor, image: Tensor) -> Tensor:
    return laplacian(net, x) + penalty(critic, image[:, None])


def test_sites_are_chosen_apart() -> None:
    """Each strategy is the best at one site: the form with both is cheaper than one for all."""
    modules = [mlp(nn.Tanh, 3, 12, 2), convolutions()]
    args = points(), points(3, 16)
    report = check(both, modules, *args).explain(*modules, *args)
    by_form = {frozenset(c.strategies.values()): c for c in report.candidates}
    taken = report.taken
    assert taken is not None and len(set(taken.strategies.values())) > 1
    assert taken.flops < min(by_form[frozenset({J})].flops, by_form[frozenset({R})].flops)
    assert taken.flops <= report.flops_as_written


def test_large_forms_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """One form is traced, and the loss as written if that costs less: no strategy alone."""
    monkeypatch.setattr(choose, "MOST_OPERATORS", 1)
    modules = [mlp(nn.Tanh, 3, 12, 2), convolutions()]
    report = optimize_nested(both, backend="eager").explain(*modules, points(), points(3, 16))
    first, *others = [set(c.strategies.values()) for c in report.candidates]
    assert first == {J, "taylor"} and others in ([], [{"as written"}])
    assert report.untried >= 2
    assert report.flops <= report.flops_as_written


@functools.cache
def steps_of_a_flow(steps: int) -> Rewritten:
    torch.manual_seed(0)
    net = Velocity(2, [6]).double()
    found = optimize_nested(likelihood, backend="eager", strategy=R)
    return found._explained((net, points(), points(), steps), {}).rewritten


@pytest.mark.parametrize("steps", [3, 5])
def test_sites_are_alike_at_every_step(steps: int) -> None:
    """Three derivatives a step, of bodies that are equal; those of one step share their point, and
    so are told apart where their bodies are equal too."""
    found = steps_of_a_flow(steps)
    forms = Forms(found.derivative, found.roles, seeded=found.seeded)
    alike = forms.alike()
    assert len(forms.parts()) == 3 * steps == sum(map(len, alike))
    assert [len(parts) for parts in alike] == [steps] * 3
    by_name = {site.name: site.where for site in forms.sites}
    for parts in alike:
        assert len({by_name[name] for part in parts for name in part}) == 1


class Doubled(torch.autograd.Function):
    """A function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Tensor:
        return 2 * cotangents[0]


def one_refused(net: nn.Module, x: Tensor) -> Tensor:
    return penalty(net, x) + penalty(lambda z: Doubled.apply(net(z.sin())), x)  # pyright: ignore


def test_refusals_are_a_sites_own() -> None:
    net, x = network(), points()
    accepting, refusing = optimize_nested(one_refused, backend="eager").explain(net, x).sites
    assert all(c.accepted and c.candidate for c in accepting.candidates)
    (refused,) = [c for c in refusing.candidates if not c.accepted]
    assert (refused.strategy, refused.candidate) == (J, None)
    assert "user-defined autograd.Function" in refused.reason
    assert accepting.strategy == J and refusing.strategy == R
    # Together they are one form beside reverse mode everywhere.
    wish = {accepting.name: R, refusing.name: J}
    with pytest.raises(OptionError, match=f"{refusing.name} at .*It accepts reverse, as written"):
        optimize_nested(one_refused, backend="eager", strategy=wish).explain(net, x)


def second(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x).sum(), x, create_graph=True)[0]
    return grad(g[:, 0].sum(), x, create_graph=True)[0].square().sum()


@pytest.mark.parametrize("wish", [{"gradient": R}, {"gradient": J}, {"gradient_1": R}])
def test_a_wish_for_one_site_is_obeyed(wish: dict[str, str]) -> None:
    """The other site is free; the loss as written, which is no form with it, is no candidate."""
    net, x = network(), points()
    report = optimize_nested(second, backend="eager", strategy=wish).explain(net, x)
    assert {c.strategies[name] for c in report.candidates for name in wish} == {*wish.values()}
    found = {site.name: site for site in report.sites}
    for name, strategy in wish.items():
        assert (found[name].strategy, found[name].reason) == (strategy, "asked for")


def test_inside_of_reverse_mode_there_is_only_reverse_mode() -> None:
    wish = {"gradient": J, "gradient_1": R}
    with pytest.raises(OptionError, match=r"gradient at .*the derivative around it is in"):
        optimize_nested(second, backend="eager", strategy=wish).explain(network(), points())


def curved(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x).sum(), x, create_graph=True)[0]
    return grad(g.sin().sum(), x, create_graph=True)[0].square().sum()


def numbers(candidate: Candidate, sizes: dict[Any, int]) -> tuple[Any, ...]:
    at_sizes = {name: flops.subs(sizes) for name, flops in candidate.site_flops.items()}
    return candidate.strategies, at_sizes, candidate.price.at(sizes)


def test_formulas_hold_at_other_sizes() -> None:
    net = network()
    formulas = optimize_nested(curved, backend="eager", dynamic=True).explain(net, points(5))
    other = optimize_nested(curved, backend="eager", dynamic=True).explain(net, points(70))
    (batch,), (size,) = formulas.flops_formula.free_symbols, other.flops_formula.free_symbols
    assert len(formulas.candidates) == len(other.candidates)
    for candidate, expected in zip(formulas.candidates, other.candidates, strict=True):
        assert candidate.price.bytes_kept.free_symbols
        assert numbers(candidate, {batch: 70}) == numbers(expected, {size: 70})


def test_kept_as_written_is_eagers() -> None:
    """Three matrices of 80 bytes: the sine, its derivative, and the cotangent on its way back."""

    def cubed(x: Tensor) -> Tensor:
        return grad(x.sin().sum(), x, create_graph=True)[0].sum()

    report = optimize_nested(cubed, backend="eager", dynamic=False).explain(points(5))
    assert 2 * 80 <= report.bytes_kept_as_written <= 5 * 80
    assert report.to_dict()["totals"]["bytes_kept_as_written"] == report.bytes_kept_as_written


# By the clock


def with_state(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = grad(net(x).sum(), x, create_graph=True)
    return (g + torch.rand_like(g)).square().sum()


def two_outputs(net: nn.Module, x: Tensor) -> Tensor:
    return penalty(net, x) * torch.ones(2, dtype=x.dtype)


def normed() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(), nn.Linear(4, 1)
    return nn.Sequential(*layers).double()


def measured(loss: Callable[..., Tensor], net: nn.Module, x: Tensor) -> Report:
    decorated = check(loss, [net], x, mode="max-autotune")
    return decorated.explain(net, x)


def test_measuring_changes_nothing() -> None:
    net, x = normed(), points()
    report = measured(with_state, net, x)
    assert sum(c.seconds is not None for c in report.candidates) >= 2
    assert report.taken is not None and report.taken.seconds
    assert " ms" in str(report) or " µs" in str(report)
    (site,) = report.sites
    assert "fastest" in site.reason
    record = report.to_dict()["candidates"]
    assert [c["seconds"] for c in record] == [c.seconds for c in report.candidates]


def test_measuring_leaves_gradients_alone() -> None:
    net, x = network(), points()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = copy.deepcopy(net.state_dict())
    value = optimize_nested(penalty, backend="eager", mode="max-autotune")(net, x)
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert grads and all(torch.equal(g, torch.ones_like(g)) for g in grads)
    assert all(torch.equal(before[name], now) for name, now in net.state_dict().items())
    assert x.grad is None and value.requires_grad


@pytest.mark.parametrize("loss", [with_state, penalty])
def test_the_fastest_is_kept(loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says that reverse mode is the fastest; measured once."""
    races: list[int] = []

    def clock(contenders: Any, inputs: Any) -> list[float]:
        with generators_restored():
            for run in contenders:
                run()
        races.append(len(contenders))
        return [2.0, 1.0, 1.5][: len(contenders)]

    monkeypatch.setattr("rewriter.step.race", clock)
    net, x = network(), points()
    expected = outcome(loss, [net], (x,), {})
    decorated = optimize_nested(loss, backend="eager", mode="max-autotune")
    assert decorated.explain(net, x).sites[0].strategy == J
    for _ in range(2):
        assert_same(outcome(decorated, [net], (x,), {}), expected)
    assert len(races) == 1
    report = decorated.explain(net, x)
    assert [c.seconds for c in report.candidates if c.seconds] == [2.0, 1.0, 1.5][: races[0]]
    assert report.taken is report.candidates[1] and report.sites[0].strategy == R
    assert report.sites[0].candidates[0].reason == "2.00 times as long"
    value, *_ = decorated.stages(net, x)["joint"](*decorated.inputs_of(net, x))
    assert loss is with_state or value == decorated(net, x)


def test_two_graphs_are_timed_as_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsed: list[Step] = []
    whole = Step.rehearse

    def rehearse(step: Step, inputs: Any) -> None:
        whole(step, inputs)
        rehearsed.append(step)
        assert step._forward is not None and step._backward is not None

    monkeypatch.setattr(Step, "rehearse", rehearse)
    net, x = network(), points()
    decorated = optimize_nested(two_outputs, backend="eager", mode="max-autotune")
    decorated(net, x).sum().backward()
    assert len({id(step) for step in rehearsed}) >= 2


def test_a_named_strategy_is_not_raced() -> None:
    net, x = network(), points()
    decorated = optimize_nested(penalty, backend="eager", mode="max-autotune", strategy=R)
    decorated(net, x)
    report = decorated.explain(net, x)
    assert report.sites[0].strategy == R and all(c.seconds is None for c in report.candidates)


def test_what_is_compiled_ahead_is_not_raced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is checked as it is written to the file."""

    def clock(*_: Any) -> list[float]:
        raise AssertionError("raced")

    monkeypatch.setattr("rewriter.step.race", clock)
    decorated = optimize_nested(penalty, backend="eager", mode="max-autotune", check=True)
    decorated.compile_ahead(tmp_path / "penalty", network(), points(), portable=True)
    assert (tmp_path / "penalty").exists()
    with pytest.raises(AssertionError, match="raced"):
        decorated(network(), points())
