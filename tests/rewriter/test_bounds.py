"""Each body is linearised once, and forms that cannot win are not traced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from passes.linearize import linearize
from passes.strategies import NAMES, TAYLOR
from rewriter import optimize_nested
from rewriter.bounds import bound_of
from tests.cases import mlp
from tests.oracle import check


def laplacian(net: nn.Module, x: Tensor) -> Tensor:
    """One derivative inside of as many others as there are dimensions."""
    (g,) = grad(net(x).sum(), x, create_graph=True)
    rows = [grad(g[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(x.shape[1])]
    return (torch.stack(rows).sum(0) - 1).square().mean()


def at_a_leaf(net: nn.Module, x: Tensor) -> Tensor:
    return laplacian(net, x.detach().requires_grad_())


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    (g,) = grad(u.sum(), x, create_graph=True)
    return g.square().sum() + u.square().sum()


def partly_stopped(net: nn.Module, x: Tensor) -> Tensor:
    """Half of the value is a target: no gradient comes back through it."""
    (g,) = grad(net(x).sum(), x, create_graph=True)
    return (g - net(2 * x).detach()).square().sum()


def apart(net: nn.Module, other: nn.Module, x: Tensor) -> Tensor:
    return laplacian(net, x) + penalty(other, x)


def points(dim: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(6, dim, dtype=torch.float64, requires_grad=True)


@pytest.fixture
def linearized(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was linearised."""
    made: list[Any] = []

    def count(module: Any, **roles: Any) -> Any:
        made.append(module)
        return linearize(module, **roles)

    monkeypatch.setattr("passes.strategies.jvp_over_gradient.linearize", count)
    return made


def test_equal_bodies_are_linearised_once(linearized: list[Any]) -> None:
    """The gradient inside of each row is the same one; the rows differ."""
    net, x = mlp(nn.Tanh, 2, 5, 3), points(3)
    check(laplacian, [net], x, strategy="jvp_over_gradient")
    assert len(linearized) == 1 + 3


def test_forms_share_linearisations(linearized: list[Any]) -> None:
    """The forms that are compared have the site in the same strategy again."""
    net, x = mlp(nn.Tanh, 2, 5, 2), points(2)
    report = optimize_nested(penalty, backend="eager").explain(net, x)
    assert [c.strategies["gradient"] for c in report.candidates] == list(NAMES[:2])
    assert len(linearized) == 1


def test_bodies_that_differ_in_a_constant(linearized: list[Any]) -> None:
    """Equal code at one line, but for a number: each is linearised."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        total = x.new_zeros(())
        for scale in (1.0, 1.5):
            (g,) = grad((net(x) * scale).sin().sum(), x, create_graph=True)
            total = total + g.square().sum()
        return total

    check(loss, [mlp(nn.Tanh, 2, 5, 2)], points(2), strategy="jvp_over_gradient")
    assert len(linearized) == 2


def test_others_are_not_traced() -> None:
    """Taylor mode costs less than what the others cost at least: one form, and the report says
    so."""
    net, x = mlp(nn.Tanh, 3, 16, 4), points(4)
    report = check(at_a_leaf, [net], x).explain(net, x)
    (only,) = report.candidates
    assert set(only.strategies.values()) == {TAYLOR}
    ((sites, least),) = report.not_traced.items()
    assert len(sites) == 5 and least > only.flops
    assert report.sites[0].reason == "fewest FLOPs: no other strategy can cost less"
    reasons = {c.strategy: c.reason for c in report.sites[0].candidates}
    assert reasons == dict.fromkeys(NAMES[:2], f"not traced: at least {least} FLOPs here") | {
        TAYLOR: "taken"
    }
    assert "no other strategy at gradient and 4 more traced: at least" in str(report)
    assert report.to_dict()["not_traced"][0]["flops_at_least"] == least
    # Asked for, it is traced, and costs that much.
    other = optimize_nested(at_a_leaf, backend="eager", strategy="reverse").explain(net, x)
    assert other.flops >= least and not other.not_traced


def test_what_is_left_is_chosen_as_before() -> None:
    """Beside what is settled, the strategies of the other derivatives are compared."""
    modules, x = [mlp(nn.Tanh, 3, 16, 5), mlp(nn.Tanh, 2, 4, 5)], points(5)
    report = check(apart, modules, x).explain(*modules, x)
    (part,) = report.not_traced
    taken = [{c.strategies[name] for name in part} for c in report.candidates]
    assert taken == [{TAYLOR}] * 2
    (left,) = {site.name for site in report.sites} - part
    assert [c.strategies[left] for c in report.candidates] == list(NAMES[:2])


def _mostly_straight() -> nn.Module:
    """A network most of whose reverse passes are multiples of one another."""
    return nn.Sequential(
        nn.Linear(2, 8), nn.LeakyReLU(), nn.Linear(8, 8), nn.LeakyReLU(), nn.Linear(8, 1), nn.Tanh()
    ).double()


BOUNDED: dict[str, tuple[Callable[..., Tensor], nn.Module, int]] = {
    "second derivatives": (laplacian, mlp(nn.Tanh, 2, 8, 2), 2),
    "of straight pieces but for one layer": (laplacian, _mostly_straight(), 2),
    "a penalty without second derivatives": (penalty, mlp(nn.LeakyReLU, 3, 8, 2), 2),
    "a target": (partly_stopped, mlp(nn.LeakyReLU, 3, 8, 2), 2),
    "a frozen network": (laplacian, mlp(nn.Tanh, 2, 8, 2).requires_grad_(False), 2),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_bound_is_one(name: str) -> None:
    """No form without Taylor mode costs less than the bound, which is more than the value alone
    costs."""
    loss, net, dim = BOUNDED[name]
    x = points(dim)
    for strategy in NAMES[:2]:
        ours = optimize_nested(loss, backend="eager", strategy=strategy)
        ours(net, x)
        found = ours.steps[0].rewritten
        names = [site.name for site in found.sites]
        bound = bound_of(found.derivative, found.roles, names)
        total = found.choice.taken.flops
        assert total / 3 <= bound.flops <= total
        assert 0 < sum(bound.site_costs.values()) <= bound.flops
