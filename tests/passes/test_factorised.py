"""Solves and log determinants: PyTorch's values, and derivatives that are right in every mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp

from passes import factorised
from rewriter import optimize_nested

aten = torch.ops.aten
RIGHT = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3).cos()


def _gradient_of_jvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    return (grad(lambda y: jvp(f, (y,), (v,))[1])(x) * v).sum()


def _jvp_of_gradient(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    return (jvp(grad(f), (x,), (v,))[1] * v).sum()


def _jvp_of_jvp(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    return jvp(lambda y: jvp(f, (y,), (v,))[1], (x,), (v,))[1]


FUNCTIONS = {
    "solve": lambda x: (torch.linalg.solve(x, RIGHT) * RIGHT).sum(),
    "solve a vector": lambda x: torch.linalg.solve(x, RIGHT[0]).square().sum(),
    "solve from the right": lambda x: (torch.linalg.solve(x, RIGHT, left=False) * RIGHT).sum(),
    "slogdet": lambda x: torch.linalg.slogdet(x)[1],
    "its method": lambda x: x.slogdet()[1],
    "logdet's method": lambda x: (x @ x.mT).logdet(),
}
FORMS = [_gradient_of_jvp, _jvp_of_gradient, _jvp_of_jvp]


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, marks=[pytest.mark.slow] if i in (1, 2, 5) else []) for i in range(6)],
)
def test_derivatives_are_right_in_every_mode(number: int) -> None:
    """PyTorch's are wrong by half and more; the judge is a difference of values."""
    f, form = list(FUNCTIONS.values())[number], FORMS[number % len(FORMS)]
    generator = torch.Generator().manual_seed(number)
    x, v = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    x = (x + 3 * torch.eye(3)).requires_grad_()
    loss = optimize_nested(lambda x, v: form(f, x, v), backend="eager", strict=True)
    value = loss(x, v)
    value.backward()
    assert x.grad is not None
    h = 1e-3
    with torch.no_grad():
        ahead, here, behind = (f(x + step * v) for step in (h, 0, -h))
        far, back = f(x + 2 * h * v), f(x - 2 * h * v)
    second = (-far + 16 * ahead - 30 * here + 16 * behind - back) / (12 * h**2)
    third = (far - 2 * ahead + 2 * behind - back) / (2 * h**3)
    assert value.item() == pytest.approx(second.item(), rel=1e-5)
    assert (x.grad * v).sum().item() == pytest.approx(third.item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_values_are_those_of_pytorch(dtype: torch.dtype) -> None:
    a = torch.randn(2, 4, 4, dtype=dtype)
    cases: list[tuple[Tensor, Any]] = [
        (torch.randn(2, 4, 3, dtype=dtype), {}),
        (torch.randn(2, 4, dtype=dtype), {}),
        (torch.randn(4, dtype=dtype), {}),
        (torch.randn(2, 3, 4, dtype=dtype), {"left": False}),
    ]
    for b, how in cases:
        found, right = factorised.solve(a, b, **how), aten._linalg_solve_ex.default(a, b, **how)
        torch.testing.assert_close(found, tuple(right))
    torch.testing.assert_close(factorised.slogdet(a)[:2], tuple(torch.linalg.slogdet(a)))


def test_log_determinants_of_special_matrices() -> None:
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    for a in (swap, torch.zeros(2, 2), torch.eye(3), -torch.eye(3), torch.empty(0, 0)):
        torch.testing.assert_close(factorised.slogdet(a)[:2], tuple(torch.linalg.slogdet(a)))
    logdet = factorised.FUNCTIONS[torch.logdet]
    torch.testing.assert_close(logdet(swap), torch.logdet(swap), equal_nan=True)
