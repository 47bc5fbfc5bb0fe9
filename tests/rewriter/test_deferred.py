"""`start="tiered"` where the cheapest form takes long to find: another process searches."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import sympy
import torch
import torch.utils.checkpoint
from hypothesis import given, note, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.graph import print_graph
from rewriter import OptimizedLoss, deferred, optimize_nested, wait_until_compiled
from rewriter.background import Job
from rewriter.background_worker import done
from rewriter.capture import guards_unmoved
from rewriter.codegen import compile_graph
from rewriter.deferred import MOST_PRODUCTS, Deferred, products_in
from rewriter.errors import NestedGradientWarning
from rewriter.forms import AS_WRITTEN, Form
from rewriter.options import Options
from rewriter.rewrite import Prepared, Rewritten, prepare, rewrite
from rewriter.start import waiting
from rewriter.step import Step
from tests.cases import mlp, with_written_norms
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

    def fail(self) -> None:
        """Be killed in the midst of it."""
        self.jobs[-1].end("the compiling process ended, code -9")

    def submit(self, job: Job) -> None:
        self.jobs.append(job)

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
    monkeypatch.setattr(deferred, "CUSTOM", {})  # other tests have registered rules
    monkeypatch.setattr("rewriter.start.queue", made)
    monkeypatch.setattr("rewriter.deferred.queue", made)
    monkeypatch.setattr("rewriter.start.compile_graph", compiled)
    yield made
    waiting.clear()


class Answered(Background):
    """The other process's answer is there at once, for the second call."""

    def submit(self, job: Job) -> None:
        super().submit(job)
        job.end(*done(job.task, job.data))
        assert job.error.partition(":")[0] in ("", "CaptureError", "NeedsNumber")


def example(dim: int = 6) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mlp(nn.Tanh, 4, 6, dim), torch.randn(5, dim, dtype=torch.float64)


def same_as_written(loss: Any, net: nn.Module, x: Tensor) -> None:
    torch.manual_seed(1)
    ours = outcome(loss, [net], (x,), {})
    torch.manual_seed(1)
    reference = with_written_norms(copy.deepcopy(net))  # from 2.14 on PyTorch's own raise
    assert_same(ours, outcome(loss.as_written, [reference], (x,), {}))


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
    loss = optimize_nested(residual, start="tiered", verify=False)
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
    assert report.sites[0].strategy == "taylor" and background.tasks == ["find"]
    same_as_written(loss, net, x)
    (step,) = loss.steps
    assert isinstance(step, Step) and background.tasks == ["find", "fill_cache"]


def test_stages_of_a_form_from_elsewhere(background: Background) -> None:
    """They are made here."""
    loss, net, x = found_elsewhere(background)
    stages = loss.stages(net, x)
    assert list(stages) == ["flatten", "share", "nest", "choose", "joint"]
    torch.manual_seed(1)
    value, *_ = stages["joint"](*loss.inputs_of(net, x))
    torch.manual_seed(1)
    torch.testing.assert_close(value, residual(net, x), rtol=1e-9, atol=1e-12)


def test_search_that_fails_is_done_here(background: Background) -> None:
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    loss(net, x)
    background.fail()
    assert wait_until_compiled(timeout=0) and background.tasks == ["find"]
    same_as_written(loss, net, x)
    (step,) = loss.steps
    assert isinstance(step, Step) and background.tasks == ["find", "fill_cache"]
    assert {*step.rewritten.choice.taken.strategies.values()} == {"taylor"}


def test_search_that_fails_without_gradients(background: Background) -> None:
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    loss(net, x)
    background.fail()
    with torch.inference_mode():
        loss(net, x)
    assert isinstance(loss.steps[0], Step)


def stopping_one_mode(net: nn.Module, x: Tensor) -> Tensor:
    """What cannot be rewritten: a constant to one mode of differentiation, and not to the other."""

    def body(z: Tensor) -> Tensor:
        with torch.no_grad():
            weight = net(z)
        return net(z) * weight

    moved = torch.func.jvp(body, (x,), (torch.ones_like(x),))[1]
    return moved.square().sum() + residual(net, x)


def test_loss_that_cannot_be_rewritten(background: Background) -> None:
    """That is found out in the other process; then it is said, and done, here."""
    net, x = example()
    x.requires_grad_()
    loss = optimize_nested(stopping_one_mode, start="tiered")
    same_as_written(loss, net, x)
    background.search()
    assert background.jobs[0].error.startswith("CaptureError: no_grad inside of forward")
    with pytest.warns(NestedGradientWarning, match="stopping_one_mode runs as written: no_grad"):
        loss(net, x)
    loss(net, x)
    assert not loss.steps and len(loss.refusals) == 1


def promoted(net: nn.Module, x: Tensor) -> Tensor:
    """The input is used before it requires grad, and after."""
    before = net(x).sum()
    x.requires_grad_()
    return residual(net, x) + before * net(x).sum() + gradient_of(net, x).square().sum()


def gradient_of(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g


def test_input_that_is_made_to_require_grad(background: Background) -> None:
    net, x = example()
    loss, grads = optimize_nested(promoted, start="tiered"), []
    for function in (loss, loss, promoted):
        own = x.clone()
        net.zero_grad()
        torch.manual_seed(1)
        value = function(net, own)
        value.backward()
        grads.append([value, own.grad, *(p.grad for p in net.parameters())])
        if len(grads) == 1:
            background.search()
    assert loss.steps[0].tiers[0].startswith("promoted (joint graph): op by op")
    for ours in grads[:2]:
        torch.testing.assert_close(ours, grads[2], rtol=1e-9, atol=1e-12)


def several(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    g = gradient_of(net, x)
    return g.square().sum(1), residual(net, x)


def test_losses_that_are_no_scalar(background: Background) -> None:
    """Their joint graph takes cotangents."""
    net, x = example()
    x.requires_grad_()
    loss, grads = optimize_nested(several, start="tiered"), []
    for function in (loss, loss, several):
        torch.manual_seed(1)
        rows, total = function(net, x)
        ends = (rows * torch.arange(5)).sum() + 3 * total
        grads.append(torch.autograd.grad(ends, [x, *net.parameters()], allow_unused=True))
        if len(grads) == 1:
            background.search()
    assert "forward graph" in loss.steps[0].tiers[0]
    for ours in grads[:2]:
        torch.testing.assert_close(ours, grads[2], rtol=1e-9, atol=1e-12)


def test_loss_that_is_cheapest_as_written(
    background: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_price(*args: Any) -> Prepared:
        prepared = prepare(*args)
        as_written = replace(prepared.as_written, flops=sympy.Integer(0))
        return replace(prepared, as_written=as_written)

    def dear(form: Form) -> bool:
        return AS_WRITTEN not in form.candidate.strategies.values()

    monkeypatch.setattr(deferred, "prepare", without_price)
    monkeypatch.setattr("rewriter.choose.preference", dear)
    net, x = example()
    loss = optimize_nested(residual, start="tiered")
    loss(net, x)
    background.search()
    assert not background.jobs[0].error
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
    monkeypatch.setattr(deferred, "CUSTOM", {torch.ops.aten.erf.default: None})
    optimize_nested(residual, start="tiered")(*example())
    assert background.tasks == ["fill_cache"]


def test_autocast_is_not_known_there(background: Background) -> None:
    net, x = example()
    with torch.autocast("cpu", torch.bfloat16):
        optimize_nested(residual, start="tiered")(net.float(), x.float())
    assert "find" not in background.tasks


def test_default_dtype_is_known_there(background: Background) -> None:
    """The process that searches has begun with another one."""
    net, x = example()
    torch.set_default_dtype(torch.float64)
    try:
        loss = optimize_nested(residual, start="tiered")
        loss(net, x)
        torch.set_default_dtype(torch.float32)
        background.search()
        assert torch.get_default_dtype() is torch.float64
        same_as_written(loss, net, x)
    finally:
        torch.set_default_dtype(torch.float32)


def checkpointed(net: nn.Module, x: Tensor) -> Tensor:
    value = torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    return g.square().sum() + residual(net, x)


def test_graphs_inside_of_graphs_are_rewritten_at_once(background: Background) -> None:
    net, x = example()
    optimize_nested(checkpointed, start="tiered")(net, x.requires_grad_())
    assert background.tasks == ["fill_cache"]


class Distances(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, x.flip(0) + 1).sum(1, keepdim=True)


@pytest.mark.parametrize("layer", [nn.Hardsigmoid(), Distances()])
def test_loss_that_pytorch_refuses(layer: nn.Module, background: Background) -> None:
    """It cannot run as written: the first step is rewritten."""
    net, x = example()
    net = nn.Sequential(net, nn.Linear(1, 3, dtype=torch.float64), layer)
    with pytest.raises(RuntimeError, match="not implemented"):
        first_only(net, x).backward()
    loss = optimize_nested(first_only, start="tiered")
    loss(net, x).backward()
    assert products_in(loss.steps[0].rewritten.captured) > MOST_PRODUCTS
    assert isinstance(loss.steps[0], Step) and background.tasks == ["fill_cache"]


def test_small_losses_are_rewritten_at_once(background: Background) -> None:
    x = torch.randn(8, 3)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    loss = optimize_nested(first_only, start="tiered")
    loss(net, x)
    (step,) = loss.steps
    assert 0 < products_in(step.rewritten.captured) <= MOST_PRODUCTS
    assert isinstance(step, Step) and background.tasks == ["fill_cache"]


def test_products_are_counted(background: Background) -> None:
    """Not fewer than there are, for each of the ways to write a derivative."""
    net, x = example()

    def hessian(net: nn.Module, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.hessian(lambda v: net(v).sum()))(x).square().sum()

    for function in (residual, hessian):
        found = rewritten_here(function, net, x)
        assert products_in(found.captured) >= found.as_written.matmuls > 0
    assert products_in(rewritten_here(lambda net, x: net(x).sum(), net, x).captured) == 0


def rewritten_here(function: Any, net: nn.Module, x: Tensor) -> Rewritten:
    loss = optimize_nested(function, backend="eager")
    loss(net, x)
    return loss.steps[0].rewritten


def test_choice_is_kept(background: Background, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next search takes it."""
    _, net, x = found_elsewhere(background)
    monkeypatch.setattr("rewriter.choose._searched", None)
    background.jobs.clear()
    again = optimize_nested(residual, start="tiered")
    same_as_written(again, net, x)
    background.search()
    assert not background.jobs[0].error
    same_as_written(again, net, x)
    assert {*again.steps[0].rewritten.choice.taken.strategies.values()} == {"taylor"}


def third_order(net: nn.Module, x: Tensor) -> Tensor:
    """The gradient of this one takes a third derivative of LayerNorm."""
    x = g = x.detach().requires_grad_()
    for _ in range(2):
        (g,) = torch.autograd.grad(net(x).sum() + g.square().sum(), x, create_graph=True)
    return g.square().sum()


def hessian_norm(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.hessian(lambda v: net(v).sum()))(x).square().sum()


def test_captured_once(background: Background) -> None:
    """Dynamo's guards hold through the search, the switch and the compilation."""
    net, x = example()
    loss = optimize_nested(hessian_norm, start="tiered")
    same_as_written(loss, net, x)
    background.search()
    for _ in range(2):
        same_as_written(loss, net, x)
    background.jobs[-1].end("")
    assert wait_until_compiled(timeout=0)
    same_as_written(loss, net, x)
    with torch.no_grad():
        loss(net, x)
    same_as_written(loss, net, x)
    assert len(loss.steps) == 1 and loss.steps[0].tiers[0].split(", ")[0].endswith("compiled")


class Registered:
    """A type that pytree gets to know."""


def test_types_that_are_registered_for_good() -> None:
    pytree: Any = torch.utils._pytree
    table, before = pytree.SUPPORTED_NODES, set(pytree.SUPPORTED_NODES)
    try:
        with guards_unmoved():
            pytree._private_register_pytree_node(
                Registered, lambda x: ([], None), lambda *_: None, serialized_type_name="Registered"
            )
            pytree._private_register_pytree_node(slice, lambda x: ([], None), lambda *_: None)
            pytree._deregister_pytree_node(slice)
        assert pytree.SUPPORTED_NODES is table and set(table) == before | {Registered}
    finally:
        pytree._deregister_pytree_node(Registered)


def test_steps_as_written_are_right_where_pytorch_is_not(background: Background) -> None:
    net, x = example()
    net = nn.Sequential(nn.LayerNorm(6, dtype=torch.float64), net)
    first = outcome(optimize_nested(third_order, start="tiered"), [net], (x,), {})
    assert background.tasks == ["find"]
    assert_same(first, outcome(optimize_nested(third_order, backend="eager"), [net], (x,), {}))


@pytest.mark.parametrize(
    "family",
    ["autograd", *(pytest.param(f, marks=pytest.mark.slow) for f in ("batched", "functional"))],
)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_random_programs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step as written, one in a form that has come from elsewhere."""
    answered, tally = Answered(), Tally(family)

    def can_be(captured: GraphModule, options: Options) -> bool:
        return products_in(captured) > 0 and all(map(deferred._is_plain, captured.graph.nodes))

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
