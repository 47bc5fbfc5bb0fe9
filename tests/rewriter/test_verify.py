"""Each new specialisation is compared with the loss as written at its first call."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.func import hessian, jvp, vmap

import passes.derivative
import rewriter.tower
from rewriter import CheckFailed, NestedGradientWarning, judge, optimize_nested
from rewriter.comparing import Run, from_plain, worst
from tests.oracle import assert_same, outcome
from tests.rewriter.test_check import (
    net,
    penalty,
    points,
    two_losses,
    wrong_hand_over,
    wrong_rule,
    wrong_simplification,
)

PLANTS = [wrong_rule, wrong_simplification, wrong_hand_over]


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.__name__)
def test_what_differs_runs_as_written(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One warning with the tensor, both numbers and the folder; every call has eager's numbers."""
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    plant(monkeypatch)
    loss = optimize_nested(penalty, backend="eager", strategy="jvp_over_gradient")
    expected = outcome(penalty, [net()], (points(),), {})
    module = net()
    torch.manual_seed(11)
    with pytest.warns(NestedGradientWarning, match="differs from the loss as written") as said:
        value = loss(module, points())
    assert len(said) == 1
    assert str(tmp_path) in str(said[0].message)
    assert "runs as written" in str(said[0].message)
    value.backward()
    for _ in range(2):
        grads = {f"0.{n}": p.grad for n, p in module.named_parameters()}
        assert value.item() == pytest.approx(expected.value.item(), rel=1e-12)
        for name, grad in grads.items():
            assert grad is None or torch.allclose(grad, expected.grads[name], rtol=1e-12)
        module.zero_grad()
        value = loss(module, points())  # a warning would be an error
        value.backward()
    assert "differs" in str(loss.explain(module, points()))
    assert len(loss.steps) == 1


def test_strict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    wrong_simplification(monkeypatch)
    module, x = net(), points()
    generator = torch.get_rng_state()
    loss = optimize_nested(penalty, backend="eager", strict=True)
    for _ in range(2):
        with pytest.raises(CheckFailed, match=r"strict=True.*differs"):
            loss(module, x)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("how", ["option", "environment"])
def test_switched_off(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_simplification(monkeypatch)
    if how == "environment":
        monkeypatch.setenv("OPTIMIZE_NESTED_VERIFY", "off")
    loss = optimize_nested(penalty, backend="eager", verify=how != "option")
    assert loss(net(), points()).item() != pytest.approx(penalty(net(), points()).item())


def test_value_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under `no_grad` another graph runs: it is compared when it first does."""
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    wrong_simplification(monkeypatch)
    loss = optimize_nested(penalty, backend="eager")
    with torch.no_grad(), pytest.warns(NestedGradientWarning, match="output 0 differs"):
        value = loss(net(), points())
    assert not value.requires_grad
    assert value.item() == pytest.approx(penalty(net(), points()).item(), rel=1e-12)


def test_several_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    wrong_simplification(monkeypatch)
    loss = optimize_nested(two_losses, backend="eager")
    with pytest.warns(NestedGradientWarning, match="differs"):
        rows, value = loss(net(), points())
    expected, plain = two_losses(net(), points())
    assert torch.allclose(rows, expected, rtol=1e-12)
    assert value.item() == pytest.approx(plain.item(), rel=1e-12)


def test_error_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What our code raises at its first run is no error of the user's."""
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))

    def broken(*_: object) -> list[Tensor | None]:
        raise KeyError("lost")

    monkeypatch.setattr("rewriter.step.hand_out", broken)
    loss = optimize_nested(penalty, backend="eager")
    with pytest.warns(NestedGradientWarning, match="KeyError: 'lost' where the loss as written"):
        value = loss(net(), points())
    value.backward()


def test_nothing_is_left_changed() -> None:
    """State is updated once, hooks fire once, draws are eager's."""
    layers = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)
    module = nn.Sequential(*layers).double()
    fired: list[int] = []
    module[0].weight.register_hook(lambda grad: fired.append(1))
    loss = optimize_nested(penalty, backend="eager")
    expected = outcome(penalty, [module], (points(),), {})
    fired.clear()
    x = points()
    torch.manual_seed(11)
    value = loss(module, x)
    value.backward()
    assert len(fired) == 1
    assert module[1].num_batches_tracked == 1
    assert torch.equal(torch.get_rng_state(), expected.generator)
    assert "the same as the loss as written" in str(loss.explain(module, points()))


def kinked(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).relu().sum(), p, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(8, 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.Tanh(),
                           nn.Linear(64, 1)).to(dtype)  # fmt: skip
    for loss in (penalty, kinked):
        optimize_nested(loss, backend="eager")(module, torch.randn(200, 8, dtype=dtype))


def score_matching(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (s,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    trace = sum(
        torch.autograd.grad(s[:, i].sum(), p, create_graph=True)[0][:, i] for i in range(x.shape[1])
    )
    return (trace + 0.5 * s.square().sum(1)).mean()


def direction_penalty(layer: nn.Module, x: Tensor) -> Tensor:
    v, size = layer.weight, layer.bias[:, None]
    (g,) = torch.autograd.grad((x @ torch._weight_norm(v, size)).sin().sum(), v, create_graph=True)
    return (g * torch.arange(9).view(3, 3)).sum().square()


@pytest.mark.parametrize("loss", [score_matching, direction_penalty])
def test_where_pytorch_is_wrong(
    loss: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Finite differences decide, and the user is told where to read about it."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 1)
    module: nn.Module = nn.Linear(3, 3)
    if loss is score_matching:
        module = nn.Sequential(*layers)
    decorated = optimize_nested(loss, backend="eager")
    with caplog.at_level(logging.WARNING, logger="optimize_nested"):
        decorated(module.double(), points()).backward()
    assert "it is PyTorch's that is wrong" in caplog.text
    assert "wrong_in_pytorch" in caplog.text
    assert not decorated.steps[0].verdict.is_wrong
    optimize_nested(loss, backend="eager", check=True)(module, points())


def test_the_judge_draws_what_was_drawn(caplog: pytest.LogCaptureFixture) -> None:
    """It judges two runs that have begun at the same numbers, with dropout too."""
    torch.manual_seed(0)
    layers = nn.Linear(3, 6), nn.LayerNorm(6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 1)
    loss = optimize_nested(score_matching, backend="eager")
    with caplog.at_level(logging.WARNING, logger="optimize_nested"):
        loss(nn.Sequential(*layers).double(), points())
    assert "it is PyTorch's that is wrong" in caplog.text
    assert not loss.steps[0].verdict.is_wrong


def reflectors(scale: nn.Module, x: Tensor) -> Tensor:
    def of(a: Tensor) -> Tensor:
        return torch.linalg.householder_product(a, a[0]).sum()

    a, v = x.tril(-1) * scale.weight, torch.arange(9).view(3, 3).to(x)
    return jvp(lambda p: jvp(of, (p,), (torch.ones_like(p),))[1], (a,), (v,))[1]


def test_where_a_value_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    """Differences inside of the flat graph decide; the value is that of differences outside."""
    scale, x = nn.Linear(1, 1).double(), points()[:3]
    loss = optimize_nested(reflectors, backend="eager")
    with caplog.at_level(logging.WARNING, logger="optimize_nested"):
        value = loss(scale, x).item()
    assert "it is PyTorch's that is wrong" in caplog.text

    def moved(step: Tensor) -> list[Tensor]:
        a = x.tril(-1) * scale.weight.detach() + step * torch.arange(9).view(3, 3)

        def of(h: Tensor) -> Tensor:
            b = a + h
            return torch.linalg.householder_product(b, b[0]).sum()

        zero = torch.zeros((), dtype=torch.float64)
        return judge.along(lambda h: [of(h[0])], [zero], [torch.ones_like(zero)])

    zero = torch.zeros((), dtype=torch.float64)
    (right,) = judge.along(lambda h: moved(h[0]), [zero], [torch.ones_like(zero)])
    assert value == pytest.approx(right.item(), rel=1e-4)
    assert reflectors(scale, x).item() != pytest.approx(value, rel=1e-2)


def test_finite_differences() -> None:
    """A directional derivative to eight digits; a kink is no case for them."""
    x = torch.tensor([0.3, -0.7], dtype=torch.float64)
    v = torch.tensor([1.0, 2.0], dtype=torch.float64)
    (found,) = judge.along(lambda p: [p[0].sin() * p[0]], [x], [v])
    assert torch.allclose(found, (x.cos() * x + x.sin()) * v, rtol=1e-8)
    with pytest.raises(judge.Undecided):
        judge.along(lambda p: [p[0].relu()], [x - 0.2998], [v])


def test_what_is_a_difference() -> None:
    one, other = Run([torch.ones(2)], [None], []), Run([torch.ones(2)], [torch.zeros(2)], [])
    found = worst(from_plain(["output 0", "the gradient of x"], one, other))
    assert found is not None and found.name == "the gradient of x"
    wider = Run([torch.ones(2).double()], [None], [])
    found = worst(from_plain(["output 0", "g"], wider, one))
    assert found is not None and found.name == "the dtype of output 0"
    nan = Run([torch.tensor([1.0, torch.nan])], [None], [])
    assert worst(from_plain(["output 0", "g"], nan, one)) is not None
    assert worst(from_plain(["output 0", "g"], one, nan)) is None
    inf = Run([torch.tensor([1.0, torch.inf])], [None], [])
    assert worst(from_plain(["output 0", "g"], one, inf)) is not None
    assert worst(from_plain(["output 0", "g"], inf, inf)) is None


def per_sample(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(hessian(lambda z: net(z).sum()))(x).square().sum()


def test_first_call_with_transforms() -> None:
    expected = outcome(per_sample, [net()], (points(),), {})
    assert_same(
        outcome(optimize_nested(per_sample, backend="eager"), [net()], (points(),), {}), expected
    )


@pytest.mark.parametrize("number", range(4))
def test_towers(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of a tower's graphs is wrong, value or pullback of any order: the module's own
    numbers, and one warning."""
    made: list[int] = []
    right = rewriter.tower.code_for

    def sometimes_wrong(*args: Any) -> Any:
        code = right(*args)
        made.append(len(made))
        if made[-1] != number:
            return code
        return lambda *inputs: [
            x * 1.01 if isinstance(x, Tensor) and x.is_floating_point() else x
            for x in code(*inputs)
        ]

    monkeypatch.setattr("rewriter.tower.code_for", sometimes_wrong)

    def step(module: nn.Module) -> list[Tensor]:
        p = points().requires_grad_()
        u = module(p)
        (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
        (((g - 1) ** 2).sum() + u.square().sum()).backward()
        found = [x.grad for x in (*module.parameters(), p) if x.grad is not None]
        module.zero_grad()
        return [*found, u.detach(), g.detach()]

    expected = step(net())
    module = optimize_nested(net(), backend="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", NestedGradientWarning)
        for _ in range(3):
            for mine, reference in zip(step(module), expected, strict=True):
                assert torch.allclose(mine, reference, rtol=1e-11)
    assert len(made) > number, "the graph that should be wrong was never made"
    ours = [w for w in said if issubclass(w.category, NestedGradientWarning)]
    assert len(ours) == 1 and "differs from the loss as written" in str(ours[0].message)


def averaged(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    value = g.square().sum()
    return value * funcol.all_reduce(value.detach(), "sum", dist.group.WORLD)


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_no_process_waits_for_another(tmp_path: Path) -> None:
    """A comparison runs a loss more than once: not one that waits for other processes."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        loss = optimize_nested(averaged, backend="eager")
        loss(net(), points()).backward()
        (step,) = loss.steps
        assert step.verdict is not None and "other processes" in step.verdict.said
    finally:
        dist.destroy_process_group()


def partly_detached(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
    return (g.square().sum(1) * u.detach().sum(1)).sum()


def test_differences_do_not_see_what_is_detached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The derivative of the value is not what the user asks for: it is no judge."""
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    monkeypatch.setattr(passes.derivative, "stop", lambda x: x.clone())
    loss = optimize_nested(partly_detached, backend="eager", strategy="jvp_over_gradient")
    with pytest.warns(NestedGradientWarning, match="differs from the loss as written"):
        loss(net(), points())
    assert loss.steps[0].verdict.is_wrong
