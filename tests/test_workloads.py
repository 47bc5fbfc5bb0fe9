"""The benchmark: both forms of a workload are one loss, figures are reached, tables are right."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from examples import benchmark
from examples.workloads import WORKLOADS, Case
from rewriter import optimize_nested
from rewriter.bench import Contender
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


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if n.startswith("gp_")])
def test_figures(name: str) -> None:
    case = CASES[name]
    assert case.forward is not None and case.flops_over_f is not None
    with FlopCounterMode(display=False) as counter:
        case.forward()
    report = optimize_nested(case.loss, backend="eager").explain(*case.args)
    assert report.flops / counter.get_total_flops() <= case.flops_over_f


def test_table_and_chart(tmp_path: Path) -> None:
    contenders = {name: Contender(name, torch.sum, []) for name in ("E", "C", "F", "O")}
    for name, seconds in {"E": 4.0, "C": 2.0, "O": 1.0}.items():
        contenders[name].seconds = [seconds * 1e-3, seconds * 2e-3, seconds * 3e-3]
        contenders[name].first_seconds = seconds
    contenders["F"].refusal = "RuntimeError: no"
    workload = WORKLOADS[1]
    case = next(case for name, case in CASES.items() if name.startswith(workload.name))
    row = benchmark.Row(workload, case, contenders, {"E": 6.0, "O": 5.5})
    text = benchmark.page([row], 3)
    assert "| 8.00 | 4.00 | refused | 2.00 | 4.00 × | 2.00 × | 6.00 | 5.50 | 6.05 |" in text
    assert "F: RuntimeError: no" in text and "4.00 ×." in text
    benchmark.draw([row], tmp_path / "chart.svg")
    assert (tmp_path / "chart.svg").read_text().startswith("<?xml")
