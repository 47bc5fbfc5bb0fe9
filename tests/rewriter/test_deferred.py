"""`start="tiered"` where the cheapest form takes long to find: another process searches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from passes.graph import print_graph
from passes.price import size_hints
from rewriter import OptimizedLoss, optimize_nested, wait_until_compiled
from rewriter.background import Job, Task
from rewriter.background_worker import done
from rewriter.codegen import compile_graph
from rewriter.deferred import MOST_MATMULS, Deferred
from rewriter.options import Options
from rewriter.rewrite import Prepared, Rewritten, rewrite
from rewriter.start import waiting
from rewriter.step import Step
from tests.cases import mlp
from tests.oracle import assert_same, outcome
from tests.programs import programs
from tests.test_fuzz import PROFILE, Tally, check


def residual(net: nn.Module, x: Tensor) -> Tensor:
    """Second derivatives in six dimensions, with a draw."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    total = torch.zeros_like(x[:, 0])
    for d in range(x.shape[1]):
        (second,) = torch.autograd.grad(g[:, d].sum(), x, create_graph=True)
        total = total + second[:, d]
    return nn.functional.dropout(total).square().mean()


def first_only(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum()


class Background:
    """Tasks that wait until a test says so, and code that is the graph itself."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, task: Task, data: bytes) -> Job:
        self.jobs.append(Job(task, data))
        return self.jobs[-1]

    @property
    def tasks(self) -> list[str]:
        return [job.task.__name__ for job in self.jobs]

    def search(self) -> None:
        """Do what the other process does."""
        (job,) = (job for job in self.jobs if job.task.__name__ == "find")
        job.end(*done(job.task, job.data))


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Background]:
    made = Background()

    def compiled(module: Any, backend: str, mode: str, *, strict: bool, **_: Any) -> Any:
        return compile_graph(module, "eager", mode, strict=strict)

    monkeypatch.setattr("rewriter.recall.cache_folder", lambda: tmp_path)  # nothing is recalled
    monkeypatch.setattr("rewriter.start.queue", made)
    monkeypatch.setattr("rewriter.deferred.queue", made)
    monkeypatch.setattr("rewriter.start.compile_graph", compiled)
    yield made
    waiting.clear()


class AfterOneCall(threading.Event):
    """What is done by the second time that it is asked for."""

    asked = 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.asked > 1


class Answered(Background):
    """The other process's answer is there after one call."""

    def submit(self, task: Task, data: bytes) -> Job:
        job = super().submit(task, data)
        job.end(*done(task, data))
        assert not job.error
        job.done = AfterOneCall()
        return job


def example(dim: int = 6) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mlp(nn.Tanh, 4, 6, dim), torch.randn(5, dim, dtype=torch.float64)


def same_as_written(loss: Any, net: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    ours = outcome(loss, [net], (x,), {})
    torch.manual_seed(1)
    assert_same(ours, outcome(loss.as_written, [net], (x,), {}))


def found_elsewhere(background: Background) -> tuple[OptimizedLoss, nn.Module, Tensor]:
    """Return a loss after two calls, the second in the form that was found, and its arguments."""
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    loss(net, x)
    background.search()
    loss(net, x)
    return loss, net, x


def test_first_steps_are_as_written(background: Background) -> None:
    """Then the form that is found runs op by op, and is compiled."""
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    same_as_written(loss, net, x)
    same_as_written(loss, net, x)
    (step,) = loss.steps
    assert isinstance(step, Deferred) and background.tasks == ["find"]
    assert step.tiers[0].startswith("residual: as written, 2 calls so far; the cheapest form is")
    assert not wait_until_compiled(timeout=0)
    background.search()
    same_as_written(loss, net, x)
    assert background.tasks == ["find", "fill_cache"]
    assert step.tiers[0].startswith("residual (joint graph): op by op, 1 calls so far")
    background.jobs[1].end("")
    assert wait_until_compiled(timeout=0)
    same_as_written(loss, net, x)
    assert step.tiers[0].startswith("residual (joint graph): compiled, after 1 calls op by op")


def test_form_is_what_would_be_chosen_here(background: Background) -> None:
    """Its graphs have come through another process and back."""
    loss, net, x = found_elsewhere(background)
    (step,) = loss.steps
    found: Rewritten = step.rewritten
    ours = rewrite(found.captured, loss.options, "residual")
    assert found.choice.taken.strategies == ours.choice.taken.strategies
    assert found.choice.taken.flops == ours.choice.taken.flops
    assert print_graph(found.joint) == print_graph(ours.joint)
    assert print_graph(found.choice.form) == print_graph(ours.choice.form)
    report = loss.explain(net, x)
    assert len(report.candidates) == len(ours.choice.candidates)
    assert report.sites[0].strategy == "taylor"


def test_earlier_calls_are_pulled_back(background: Background) -> None:
    """A call before the switch, its backward pass after it."""
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    torch.manual_seed(1)
    value = loss(net, x)
    background.search()
    loss(net, x)
    value.backward()
    mine = [p.grad for p in net.parameters()]
    net.zero_grad()
    torch.manual_seed(1)
    residual(net, x).backward()
    for ours, p in zip(mine, net.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-9, atol=1e-12)


def test_state_is_updated(background: Background) -> None:
    """BatchNorm's statistics, by steps as written and by those of the form that is found."""
    net, x = example()
    net = nn.Sequential(nn.BatchNorm1d(6, dtype=torch.float64), net)
    loss = optimize_nested(residual, start="tiered")
    same_as_written(loss, net, x)
    (step,) = loss.steps
    assert isinstance(step, Deferred) and step.tiers[0].startswith("residual: as written")
    background.search()
    same_as_written(loss, net, x)
    assert step.tiers[0].startswith("residual (joint graph): op by op")
    before = [b.clone() for b in net.buffers()]
    with torch.no_grad():
        loss(net, x)
    assert not any(map(torch.equal, before, net.buffers()))


def test_value_alone(background: Background) -> None:
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    with torch.no_grad():
        torch.manual_seed(1)
        mine = loss(net, x)
    torch.manual_seed(1)
    assert torch.allclose(mine, residual(net, x), rtol=1e-12) and not mine.requires_grad
    assert background.tasks == ["find"]


def test_twice_differentiable(background: Background) -> None:
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    parameters = list(net.parameters())

    def squared(function: Any) -> list[Tensor | None]:
        torch.manual_seed(1)
        grads = torch.autograd.grad(
            function(net, x), parameters, create_graph=True, allow_unused=True
        )
        total = sum((g.square().sum() for g in grads if g is not None), torch.zeros(()))
        return list(torch.autograd.grad(total, parameters, allow_unused=True))

    for mine, right in zip(squared(loss), squared(residual), strict=True):
        assert (mine is None) == (right is None)
        if right is not None:
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-12)
    assert background.tasks == ["find"]


def test_explaining_does_not_wait(background: Background) -> None:
    """A report has all candidates, so it is searched here."""
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    loss(net, x)
    report = loss.explain(net, x)
    assert report.sites[0].strategy == "taylor"
    assert background.tasks == ["find", "fill_cache"] and loss.steps[0].tiers


def test_search_that_fails_is_done_here(background: Background) -> None:
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    loss(net, x)
    background.jobs[0].end("the compiling process ended, code -9")
    with torch.inference_mode():
        assert not wait_until_compiled(timeout=0) and background.tasks == ["find", "fill_cache"]
    same_as_written(loss, net, x)
    assert {*loss.steps[0].rewritten.choice.taken.strategies.values()} == {"taylor"}


def test_loss_that_is_cheapest_as_written(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rewriter.deferred.cheapest", lambda *_: None)
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    loss(net, x)
    background.search()
    same_as_written(loss, net, x)
    assert {*loss.steps[0].rewritten.choice.taken.strategies.values()} == {"as written"}


@pytest.mark.parametrize(
    "options", [{"strategy": "reverse"}, {"strict": True}, {"mode": "max-autotune"}]
)
def test_what_the_user_asks_for_is_done_at_once(
    options: dict[str, Any], background: Background
) -> None:
    net, x = example()
    loss = optimize_nested(residual, start="tiered", **options)
    loss(net, x)
    assert isinstance(loss.steps[0], Step) and "find" not in background.tasks


def test_rules_of_the_user_are_not_known_there(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of other operators do not count."""
    net, x = example()
    other, used = torch.ops.aten.erf.default, torch.ops.aten.tanh.default
    for operator, task in [(other, "find"), (used, "fill_cache")]:
        monkeypatch.setattr("rewriter.deferred.CUSTOM", {operator: None})
        optimize_nested(residual, start="tiered")(net, x)
        assert background.tasks[-1] == task


def test_small_losses_are_rewritten_at_once(background: Background) -> None:
    x = torch.randn(8, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    loss = optimize_nested(first_only, start="tiered")
    loss(net, x)
    assert loss.steps[0].rewritten.as_written.matmuls <= MOST_MATMULS
    assert isinstance(loss.steps[0], Step) and background.tasks == ["fill_cache"]


def test_choice_is_kept(background: Background) -> None:
    """The next process need not search."""
    _, net, x = found_elsewhere(background)
    again = optimize_nested(residual, start="tiered")
    same_as_written(again, net, x)
    assert isinstance(again.steps[0], Step) and again.steps[0].rewritten.choice.is_recalled


@pytest.mark.parametrize(
    "family",
    ["autograd", *(pytest.param(f, marks=pytest.mark.slow) for f in ("batched", "functional"))],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_random_programs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step as written, one in a form that has come from elsewhere."""
    answered, tally = Answered(), Tally(family)

    def can_be(prepared: Prepared, options: Options) -> bool:
        is_late = prepared.seeded and prepared.roles.differentiable
        return bool(prepared.sites) and not (size_hints(prepared.derivative) or is_late)

    monkeypatch.setattr("rewriter.deferred.queue", answered)
    monkeypatch.setattr("rewriter.deferred._takes_long", can_be)
    monkeypatch.setattr("rewriter.recall.Recollection.keep", lambda *_: None)

    @given(st.data())
    def each(data: st.DataObject) -> None:
        program = data.draw(programs(family))
        note(repr(program))
        check(program, tally)

    settings(PROFILE, max_examples=6)(each)()
    assert len(answered.jobs) >= 3, tally
