"""``check=True`` names the tensor that differs and the first stage that departs, and writes all of
it to a folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import passes.joint
import passes.tangent_tables
import rewriter.step
from rewriter import CheckFailed, optimize_nested

aten = torch.ops.aten


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return ((g - 1) ** 2).sum()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=torch.float64)


def wrong_rule(patch: pytest.MonkeyPatch) -> None:
    rules = passes.tangent_tables.FROM_BACKWARD
    right = rules[aten.tanh.default]
    patch.setitem(rules, aten.tanh.default, lambda v, out, *rest: right(v, out, *rest) * 1.1)


def wrong_simplification(patch: pytest.MonkeyPatch) -> None:
    simplify = passes.joint.simplify

    def confused(module: GraphModule) -> object:
        done = simplify(module)
        for node in module.graph.find_nodes(op="call_function", target=aten.sub.Tensor):
            node.target = aten.add.Tensor
        module.recompile()
        return done

    patch.setattr(passes.joint, "simplify", confused)


def wrong_hand_over(patch: pytest.MonkeyPatch) -> None:
    hand_out = rewriter.step.hand_out

    def longer(*given: object) -> list[Tensor | None]:
        return [None if g is None else 1.01 * g for g in hand_out(*given)]

    patch.setattr(rewriter.step, "hand_out", longer)


@pytest.mark.parametrize(
    ("plant", "stage"),
    [(wrong_rule, "choose"), (wrong_simplification, "joint"), (wrong_hand_over, "compiled code")],
    ids=lambda item: getattr(item, "__name__", ""),
)
def test_first_stage_that_departs(
    plant: Callable[[pytest.MonkeyPatch], None],
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path / "reports"))
    plant(monkeypatch)
    loss = optimize_nested(penalty, backend="eager", check=True, strategy="jvp_over_gradient")
    module, x = net(), points()
    generator = torch.get_rng_state()
    with pytest.raises(CheckFailed, match=f"first stage that departs is '{stage}'") as error:
        loss(module, x)
    assert "the gradient of L['net']" in str(error.value)
    assert torch.equal(torch.get_rng_state(), generator)
    (folder,) = (tmp_path / "reports").glob("*penalty_check_failed*")
    assert str(folder) in str(error.value)
    written = {path.name for path in folder.iterdir()}
    stages = ["flatten", "share", "nest", "choose", "joint"]
    numbered = {f"{k:02}_{name}" for k, name in enumerate(stages, start=1)}
    assert {f"{name}.{kind}" for name in numbered for kind in ("txt", "py")} <= written
    assert {"00_captured.py", "report.txt", "report.json", "inputs.pt"} <= written
    assert torch.__version__ in (folder / "report.txt").read_text()
    inputs = torch.load(folder / "inputs.pt")
    assert any(torch.equal(x, points()) for x in inputs if isinstance(x, Tensor))


def two_losses(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return ((g - 1) ** 2).sum(1), net(x).square().mean()


@pytest.mark.parametrize("plant", [wrong_rule, wrong_simplification], ids=lambda f: f.__name__)
def test_several_results(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    options = {"backend": "eager", "check": True, "strategy": "jvp_over_gradient"}
    optimize_nested(two_losses, **options)(net(), points())
    plant(monkeypatch)
    stage = "choose" if plant is wrong_rule else "joint"
    torch._dynamo.reset()
    with pytest.raises(CheckFailed, match=f"first stage that departs is '{stage}'"):
        optimize_nested(two_losses, **options)(net(), points())


def test_state_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed check has changed nothing; a check that passes counts as no step."""
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    module = nn.Sequential(
        nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 2)
    ).double()
    loss = optimize_nested(penalty, backend="eager", check=True)
    loss(module, points()).backward()
    assert module[1].num_batches_tracked == 1
    assert not list(tmp_path.glob("*check_failed*"))
    module.zero_grad()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, generator = points(), torch.get_rng_state()
    wrong_simplification(monkeypatch)
    torch._dynamo.reset()
    with pytest.raises(CheckFailed):
        optimize_nested(penalty, backend="eager", check=True)(module, x)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in module.parameters())


def per_function(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.hessian(lambda z: net(z).sum()))(x).square().sum()


def drawn(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = torch.autograd.grad((u**2 * torch.bernoulli(u.sigmoid())).sum(), p, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize("loss", [penalty, per_function, drawn], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_passes(loss: Callable[..., Tensor], dtype: torch.dtype) -> None:
    optimize_nested(loss, backend="eager", check=True)(net().to(dtype), points().to(dtype))
