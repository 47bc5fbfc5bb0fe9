"""How the numbers of `tests.wrong_in_pytorch` are measured: by PyTorch, by the rewritten loss (op
by op), and by finite differences in float64, or in eager where that is not in question."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from rewriter import optimize_nested

# A number is wrong if it is further from the judge than this, relative to it, and right if nearer
# than the other.
WRONG, RIGHT = 1e-3, 1e-6


@dataclass(frozen=True)
class Numbers:
    """What PyTorch, the rewritten loss and the judge find; a refusal is its message."""

    theirs: float | str
    ours: float | str
    right: float
    judge: str = "finite difference"

    @property
    def is_theirs_wrong(self) -> bool:
        return relative_error(self.theirs, self.right) > WRONG

    @property
    def is_ours_right(self) -> bool:
        return relative_error(self.ours, self.right) < RIGHT


def relative_error(number: float | str, right: float) -> float:
    """The relative error; infinite where there is no number."""
    if isinstance(number, str) or math.isnan(number):
        return math.inf
    return abs(number - right) / max(abs(right), 1e-9)


def gradient(code: Callable[[], Any]) -> Numbers:
    """The derivative of a loss along a direction of one of its tensors: by `backward`, and by
    differences of the loss as written, whose own value needs one derivative less."""

    def slope(decorate: Callable[..., Any]) -> Tensor:
        loss, args, leaf = code()
        decorate(loss)(*args).backward()
        return (leaf.grad * _direction(leaf)).sum()

    theirs, ours = _attempt(lambda: slope(_as_it_is)), _attempt(lambda: slope(_optimized))
    loss, args, leaf = code()
    start, direction = leaf.detach().clone(), _direction(leaf)

    def moved(step: float) -> float:
        with torch.no_grad():
            leaf.copy_(start + step * direction)
        return _written_value(loss, args)

    return Numbers(theirs, ours, _slope(moved))


def second(code: Callable[[], Any]) -> Numbers:
    """A second derivative at 0.5, and differences of the plain function."""
    point = torch.tensor(0.5)
    derivative, plain = code()
    theirs = _attempt(lambda: derivative(point))
    ours = _attempt(lambda: _optimized(derivative)(point))
    return Numbers(theirs, ours, _curvature(lambda step: plain(point + step).item()))


def compiled(backend: str) -> Callable[[Callable[[], Any]], Numbers]:
    """A function's value when it is compiled, and in eager."""

    def measure(code: Callable[[], Any]) -> Numbers:
        f = code()
        theirs = _attempt(torch.compile(f, backend=backend))
        return Numbers(theirs, _attempt(_optimized(f)), f().item(), "eager")

    return measure


def dual(code: Callable[[], Any]) -> Numbers:
    """The tangent of a function that is called under a dual level."""
    f, directional = code()
    theirs, ours = (_attempt(lambda g=g: directional(g)) for g in (torch.compile(f), _optimized(f)))
    return Numbers(theirs, ours, directional(f).item(), "eager")


def parallel(code: Callable[[], Any]) -> Numbers:
    """The value of a loss that a module under `DistributedDataParallel` calls: one process."""
    loss, step = code()
    with _process_group(), torch._dynamo.config.patch(trace_autograd_ops=True):
        theirs = _attempt(lambda: step(torch.compile(loss, backend="aot_eager")))
    with _process_group():
        return Numbers(theirs, _attempt(lambda: step(_optimized(loss))), step(loss).item(), "eager")


def _as_it_is(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


def _optimized(f: Callable[..., Any]) -> Callable[..., Any]:
    return optimize_nested(f, backend="eager")


def _attempt(compute: Callable[[], Any]) -> float | str:
    """The number, or the first line of the error in place of it."""
    torch._dynamo.reset()
    try:
        number = compute()
    except Exception as error:  # a refusal is what is measured
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "no number (`None`)" if number is None else float(number)


def _direction(leaf: Tensor) -> Tensor:
    return torch.randn(leaf.shape, generator=torch.Generator().manual_seed(5)) / math.sqrt(
        leaf.numel()
    )


def _written_value(loss: Callable[..., Tensor], args: Any) -> float:
    """The value of a loss as written, which PyTorch gets right, or of a form that it can compute:
    fused attention and distances have no second derivative."""
    try:
        return loss(*args).item()
    except RuntimeError:
        return _optimized(loss)(*args).item()


def _slope(f: Callable[[float], float]) -> float:
    """f'(0) from central differences of sixth order."""
    h, weights = 4e-3, (3 / 4, -3 / 20, 1 / 60)
    return sum(w * (f(k * h) - f(-k * h)) for k, w in enumerate(weights, 1)) / h


def _curvature(f: Callable[[float], float]) -> float:
    """f''(0) from central differences of sixth order."""
    h, weights = 1e-2, (3 / 2, -3 / 20, 1 / 90)
    outer = sum(w * (f(k * h) + f(-k * h)) for k, w in enumerate(weights, 1))
    return (outer - 49 / 18 * f(0.0)) / h**2


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def measured(measure: Callable[[Callable[[], Any]], Numbers], make: Callable[[], Any]) -> Numbers:
    """Measure a case in float64, from the page's seed."""

    def code() -> Any:
        torch.manual_seed(0)
        return make()

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return measure(code)
    finally:
        torch.set_default_dtype(before)
