"""Bodies that are linearised once: what is reused is what would have been made."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes import tracking
from passes.bodies import Linearizations, kind_of
from passes.graph import copy_graph, placeholders, print_graph
from passes.linearize import Linearization
from passes.nest import active_nodes
from passes.origin import mark_of
from passes.strategies import put_in_form
from rewriter import optimize_nested
from rewriter.forms import Forms
from rewriter.rewrite import Rewritten


class Energy(nn.Module):
    """Two scalar networks of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.potential, self.kinetic = (
            nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1)).double() for _ in range(2)
        )


def leapfrog(energy: Energy, q: Tensor, steps: int) -> Tensor:
    """Two derivatives of networks a step, each at the point the other one moves."""
    q = q.detach().requires_grad_()
    p = torch.zeros_like(q).requires_grad_()
    for _ in range(steps):
        p = p - torch.autograd.grad(energy.potential(q).sum(), q, create_graph=True)[0] / steps
        q = q + torch.autograd.grad(energy.kinetic(p).sum(), p, create_graph=True)[0] / steps
    return (q.square() + p.square()).mean()


def second_order(energy: Energy, q: Tensor, steps: int) -> Tensor:
    """A derivative inside of another one's body, at several places."""
    total = torch.zeros((), dtype=q.dtype)
    for step in range(steps):
        x = (q + step).requires_grad_()
        (g,) = torch.autograd.grad(energy.potential(x).sin().sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
        total = total + h.square().sum()
    return total


def penalties(energy: Energy, q: Tensor, steps: int) -> Tensor:
    """Values and derivatives of one network, written in two lines."""
    x, y = q.detach().requires_grad_(), (2 * q).detach().requires_grad_()
    u, v = energy.kinetic(x), energy.kinetic(y)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(v.sum(), y, create_graph=True)
    return (u + v).mean() + g.square().sum() * h.square().sum()


LOSSES = [leapfrog, second_order, penalties]


@functools.cache
def rewritten(loss: Callable[..., Tensor], steps: int) -> Rewritten:
    torch.manual_seed(0)
    wrapped = optimize_nested(loss, backend="eager", strategy="jvp_over_gradient")
    q = torch.randn(5, 2, dtype=torch.float64)
    return wrapped._explained((Energy(), q, steps), {}).rewritten


class Anew(Linearizations):
    """Makes every linearisation."""

    def get(self, body: Any, about: Any, node: Any, make: Callable[[], Linearization]) -> Any:
        self.made += 1
        return make()


def in_form(found: Rewritten, known: Linearizations) -> GraphModule:
    module = copy_graph(found.derivative)
    inputs = placeholders(module.graph)
    active = active_nodes(module, {inputs[i] for i in found.roles.wanted})
    put_in_form(module, active, {site.name: "jvp_over_gradient" for site in found.sites}, {}, known)
    return module


def described(module: GraphModule) -> list[Any]:
    """Everything about a graph, and those inside it, but the names of its nodes."""
    parts = [part for part in module.modules() if isinstance(part, GraphModule)]
    return [
        (
            mark_of(node),
            node.meta.get("stack_trace"),
            str(node.meta.get("nn_module_stack")),
            node.op,
            str(node.target),
            kind_of(node.meta.get("val")),
        )
        for part in parts
        for node in part.graph.nodes
    ]


@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_reused_is_what_would_be_made(loss: Callable[..., Tensor]) -> None:
    """Operators, sites, lines, modules and what computations are called."""
    found = rewritten(loss, 2)
    shared, anew = Linearizations(), Anew()
    ours, expected = in_form(found, shared), in_form(found, anew)
    assert shared.found and shared.made + shared.found == anew.made
    assert described(ours) == described(expected)
    assert print_graph(ours) == print_graph(expected)


def test_equal_bodies_are_linearised_once_however_many_there_are() -> None:
    """The first step's point carries no gradient, the last step's gradient is used once."""
    made = []
    for steps in (3, 4):
        known = Linearizations()
        in_form(rewritten(leapfrog, steps), known)
        made.append((known.made, known.made + known.found))
    (few, six), (more, eight) = made
    assert (six, eight) == (6, 8) and few == more <= 3


@pytest.mark.parametrize("loss", LOSSES)
def test_a_call_that_is_recorded_is_the_graph_run(
    loss: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The joint graph is the same, node by node, but for names."""
    found = rewritten(loss, 2)
    wish = {site.name: "jvp_over_gradient" for site in found.sites}
    forms = []
    calls = list[GraphModule]()
    record = tracking.record_call

    def counted(module: GraphModule, inputs: Any) -> Any:
        calls.append(module)
        return record(module, inputs)

    monkeypatch.setattr(tracking, "record_call", counted)
    for can_record in (tracking.can_record, lambda module, inputs: False):
        monkeypatch.setattr(tracking, "can_record", can_record)
        forms.append(Forms(found.derivative, found.roles, seeded=found.seeded).build(wish))
    ours, expected = (form.joint.graph for form in forms)
    assert len(calls) >= 4  # the value and the pullback of each site

    def kinds(graph: Any) -> list[Any]:
        return [(n.op, str(n.target), kind_of(n.meta.get("val")), mark_of(n).role, mark_of(n).site)
                for n in graph.nodes if n.op != "placeholder"]  # fmt: skip

    assert kinds(ours) == kinds(expected)
