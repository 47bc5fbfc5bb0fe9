"""The workloads: every form of one is one loss, and figures are reached."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from examples.workloads import WORKLOADS, Case, Workload
from rewriter import optimize_nested
from rewriter.bench import Contender
from rewriter.naming import named_tensors
from tests.oracle import relative_error

# One case of each workload that is quick to capture.
CASES: dict[str, Case] = {}
torch.manual_seed(0)
for workload in WORKLOADS:
    if workload.name not in ("weighted_laplacian", "biharmonic", "parameter_hvp"):
        CASES |= {f"{workload.name}, {case.name}": case for case in workload.cases(False)[:4]}


def in_float64(value: Any) -> Any:
    if isinstance(value, torch.nn.Module):
        return copy.deepcopy(value).double()
    if value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


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


@pytest.mark.parametrize("name", [n for n in CASES if n.startswith("gp_")])
def test_figures(name: str) -> None:
    case = CASES[name]
    assert case.forward is not None and case.flops_over_f is not None
    with FlopCounterMode(display=False) as counter:
        case.forward()
    report = optimize_nested(case.loss, backend="eager").explain(*case.args)
    assert report.flops / counter.get_total_flops() <= case.flops_over_f


@pytest.mark.parametrize("name", [n for n in CASES if "float64, 8" in n or "D=2" in n])
def test_forms_in_jax_are_one_loss(name: str) -> None:
    pytest.importorskip("jax")
    in_jax = importlib.import_module("examples.workloads.in_jax")
    case = CASES[name]
    net, points, *rest = case.args
    args = tuple(in_float64(value) for value in (net, points[:4], *rest))
    forms = {"E": case.loss, "J": in_jax.InJax(case.loss, args, backward=case.backward)}
    wanted = [x for x in named_tensors(case.loss, args, {}).values() if x.requires_grad]
    eager, jitted = (Contender(n, f, wanted, backward=case.backward) for n, f in forms.items())
    for contender in (eager, jitted):
        contender.first_step(*args)
        assert not contender.refusal
    assert jitted.distance(eager) < 1e-9
    assert len(jitted.gradients) == sum(x.numel() for x in wanted if case.backward)
