"""The forms in which a case runs, ready to take turns."""

import importlib
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch

from examples.workloads import WORKLOADS, Case
from rewriter import OptimizedLoss, optimize_nested
from rewriter.bench import Contender, compiled_as_written
from rewriter.naming import named_tensors

# Column → what it is; E comes first, it is what the others are compared with.
FORMS = {
    "E": "as written, eager",
    "C": "as written, under torch.compile",
    "F": "in torch.func, under torch.compile",
    "J": "in JAX, under jit",
    "O": "optimize_nested",
}
# Those of which only the first step is of interest.
FIRST_STEPS = {"T": 'optimize_nested(start="tiered")'}


def find_case(workload: str, case: str, *, full: bool, device: str) -> tuple[Case, tuple[Any, ...]]:
    """Return a case by its names, and its arguments on a device.

    Raises:
        LookupError: There is no such workload, or it has no such case at these sizes.
    """
    torch.manual_seed(0)
    for known in WORKLOADS:
        for found in known.cases(full) if known.name == workload else ():
            if found.name == case:
                return found, tuple(moved(value, device) for value in found.args)
    raise LookupError(f"there is no case {case!r} of {workload!r}")


def moved(value: Any, device: str) -> Any:
    """Return an argument on a device; a leaf stays a leaf, and a module is moved itself."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach().to(device).requires_grad_()
    return value.to(device) if isinstance(value, (torch.Tensor, torch.nn.Module)) else value


def columns_of(case: Case) -> list[str]:
    """Return the columns that a case fills here."""
    in_jax = _in_jax()
    absent = {
        "F": case.func_form is None,
        "J": in_jax is None or case.loss not in in_jax.FORMS,
    }
    return [name for name in FORMS if not absent.get(name, False)]


def contenders_of(
    case: Case, args: tuple[Any, ...], columns: Iterable[str]
) -> dict[str, Contender]:
    """Return forms of a case by column; E is the first."""
    make: dict[str, Callable[[], Any]] = {
        "E": lambda: case.loss,
        "C": lambda: compiled_as_written(case.loss),
        "F": lambda: compiled_as_written(case.func_form),
        "J": lambda: _in_jax().InJax(case.loss, args, backward=case.backward),
        "O": lambda: optimized(case),
        "T": lambda: optimize_nested(case.loss, **case.options, start="tiered"),
    }
    tensors = named_tensors(case.loss, args, {}).values()
    wanted = [x for x in tensors if x.requires_grad]
    return {
        name: Contender(name, make[name](), wanted, backward=case.backward)
        for name in make
        if name in columns
    }


def optimized(case: Case) -> OptimizedLoss:
    """Return the case's loss, decorated."""
    return optimize_nested(case.loss, **case.options)


def _in_jax() -> Any:
    """Return the module of the forms in JAX, or None: JAX is an optional extra."""
    name = "examples.workloads.in_jax"
    return None if find_spec("jax") is None else importlib.import_module(name)
