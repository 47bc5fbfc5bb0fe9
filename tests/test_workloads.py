"""The workloads: every form of one is one loss, and figures are reached."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from examples.workloads import (
    WORKLOADS,
    Case,
    Workload,
    directions,
    jacobians,
    operators,
    physics,
)
from examples.workloads.networks import DeepONet, Velocity, mlp
from rewriter import optimize_nested
from rewriter.bench import Contender
from rewriter.naming import named_tensors
from tests.oracle import check, relative_error
from tests.rewriter.test_parameter_jacobians import most_elements


def points(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


# One case of each workload that is quick to capture.
CASES: dict[str, Case] = {}
torch.manual_seed(0)
for workload in WORKLOADS:
    if workload.name not in ("weighted_laplacian", "biharmonic", "parameter_hvp"):
        CASES |= {f"{workload.name}, {case.name}": case for case in workload.cases(False)[:4]}


def in_float64(value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).double()
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def fewer(value: Any, batch: int, count: int) -> Any:
    """Keep the first points only, along the first dimension that is as long as the batch."""
    if not isinstance(value, torch.Tensor) or batch not in value.shape:
        return value
    return value.narrow(value.shape.index(batch), 0, count)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.func_form])
def test_forms_are_one_loss(name: str) -> None:
    case = CASES[name]
    assert case.func_form is not None
    small = [x[:8] if isinstance(x, torch.Tensor) and len(x) >= 16 else x for x in case.args]
    args = [in_float64(value) for value in small]
    assert relative_error(case.func_form(*args).detach(), case.loss(*args).detach()) < 1e-9


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_losses_run_as_written(workload: Workload) -> None:
    case = workload.cases(False)[0]
    step = Contender("E", case.loss, [], backward=case.backward)
    step.first_step(*case.args)
    assert not step.refusal and step.value.isfinite().all()


# Loss, network, its other arguments; of few entries.
SMALL: dict[Callable[..., Tensor], tuple[nn.Module, tuple[Any, ...]]] = {
    directions.stochastic_laplacian: (mlp([5, 8, 1]), (points(4, 5), torch.randn(2, 4, 5))),
    directions.stochastic_biharmonic: (mlp([2, 8, 1]), (points(4, 2), torch.randn(1, 4, 2))),
    directions.sampled: (mlp([7, 8, 1]), (points(4, 7), torch.tensor([1, 5]))),
    directions.hessian_norm: (mlp([2, 8, 8, 3], nn.ReLU), (torch.randn(5, 2),)),
    jacobians.quadratic_form: (mlp([4, 8, 4]), (torch.randn(5, 4), torch.randn(5, 4))),
    jacobians.quadratic_form_by_rows: (mlp([3, 8, 3]), (points(5, 3), torch.randn(5, 3))),
    jacobians.batch_norm_of_jacobian: (mlp([4, 8, 3]), (torch.randn(5, 4),)),
    jacobians.sensitivity: (mlp([1, 8, 8, 1]), (torch.randn(5, 1),)),
    jacobians.gram: (mlp([1, 8, 8, 1]), (torch.randn(5, 1), torch.randn(5, 5))),
    operators.all_derivatives: (DeepONet(6, 1, 8), (torch.randn(2, 6), points(5, 1), 2)),
    operators.likelihood: (Velocity(2, [8, 8]), (torch.randn(6, 2), torch.randn(6, 2), 1)),
}


SLOW = {operators.all_derivatives, operators.likelihood}
SMALL_TOO = {physics.poisson: (mlp([7, 4, 4, 1]), (points(5, 7), torch.randn(7)))}
# As many tangents, cotangents or coefficients go through the network in one batch; else one.
VECTORS = {physics.poisson: 7, directions.sampled: 2, jacobians.batch_norm_of_jacobian: 3}


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(f, id=f.__name__, marks=[pytest.mark.slow] if f in SLOW else [])
        for f in (*SMALL, *SMALL_TOO)
    ],
)
def test_ours_is_the_loss_as_written(loss: Callable[..., Tensor]) -> None:
    """And no tensor has more elements than the vectors that are needed have in the widest layer, or
    a parameter: no Jacobian, no Hessian, no gradient for each sample."""
    net, args = (SMALL | SMALL_TOO)[loss]
    net, args = in_float64(net), [in_float64(value) for value in args]
    report = check(loss, [net], *args).explain(net, *args)
    widest = max(layer.out_features for layer in net.modules() if isinstance(layer, nn.Linear))
    vectors = VECTORS.get(loss, 1) * len(args[0]) * widest
    assert most_elements(report) <= max(vectors, *(p.numel() for p in net.parameters()))


def test_every_new_loss_has_a_small_form() -> None:
    """A workload that is added is compared with itself as written, too."""
    modules = (directions, jacobians, operators)
    found = {case.loss for m in modules for w in m.WORKLOADS for case in w.cases(False)}
    assert found == set(SMALL)


QUICK = ("gp_", "hutchinson_full, vmap", "block_jacobian", "vmap_hessian_relu")


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith(QUICK)])
def test_figures(name: str) -> None:
    case = CASES[name]
    assert case.forward is not None and case.flops_over_f is not None
    with FlopCounterMode(display=False) as counter:
        case.forward()
    report = optimize_nested(case.loss, backend="eager").explain(*case.args)
    assert report.flops / counter.get_total_flops() <= case.flops_over_f


@pytest.mark.parametrize(
    "name",
    [
        *(n for n in CASES if "float64, 8" in n or "D=2" in n),
        *(n for n in CASES if n.endswith(("1 samples", "2 samples", "16 of 100", "‖J‖²", "rows"))),
        "vmap_hessian_relu, ReLU",
    ],
)
def test_forms_in_jax_are_one_loss(name: str) -> None:
    pytest.importorskip("jax")
    in_jax = importlib.import_module("examples.workloads.in_jax")
    case = CASES[name]
    args = tuple(in_float64(fewer(value, len(case.args[1]), 4)) for value in case.args)
    forms = {"E": case.loss, "J": in_jax.InJax(case.loss, args, backward=case.backward)}
    wanted = [x for x in named_tensors(case.loss, args, {}).values() if x.requires_grad]
    eager, jitted = (Contender(n, f, wanted, backward=case.backward) for n, f in forms.items())
    for contender in (eager, jitted):
        contender.first_step(*args)
        assert not contender.refusal
    assert jitted.distance(eager) < 1e-9
    assert len(jitted.gradients) == sum(x.numel() for x in wanted if case.backward)
