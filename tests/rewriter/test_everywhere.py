"""Derivatives where PyTorch's own are wrong or not a number, against plain formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from tests.degenerate import FORMS, RIGHT, Case, run_case, truth


def gradient_of(loss: Callable[..., Tensor], *points: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in points]
    loss(*leaves).backward()
    return [x.grad for x in leaves]


X = torch.tensor([0.7, -1.2, 0.4], dtype=torch.float64)


def test_third_derivative_through_an_index() -> None:
    """The batch of directions of a Hessian goes through ``select``'s pullback: PyTorch's batching
    rule for `select_scatter` makes its gradient as many times too large as the tensor is wide."""

    def loss(x: Tensor) -> Tensor:
        return torch.func.hessian(lambda p: p[0] ** 3 + p[0] * p[1] * p[2])(x).square().sum()

    a = X[0]
    expected = torch.stack([72 * a, torch.zeros_like(a), torch.zeros_like(a)]) + 4 * X
    (found,) = gradient_of(optimize_nested(loss, backend="eager", strict=True, verify=False), X)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("as_method", [True, False])
def test_select_scatter_under_vmap(as_method: bool) -> None:
    """Right where `torch.vmap` of it is wrong."""
    scatter = Tensor.select_scatter if as_method else torch.select_scatter
    rows = torch.arange(6, dtype=torch.float64).reshape(2, 3).cos()

    def loss(x: Tensor, values: Tensor) -> Tensor:
        def one(row: Tensor, value: Tensor) -> Tensor:
            return scatter(row, value.exp(), 0, -1).square().sum()

        (g,) = torch.autograd.grad(torch.vmap(one)(x, values).sum(), values, create_graph=True)
        return g.square().sum()

    at = X[:2]
    _, to_values = gradient_of(
        optimize_nested(loss, backend="eager", strict=True, verify=False), rows, at
    )
    torch.testing.assert_close(to_values, 16 * (4 * at).exp(), rtol=1e-12, atol=0)


class Scattering(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.select_scatter(x.sin(), x[1] ** 2, 0, 0)


def test_select_scatter_in_a_module_under_vmap() -> None:
    net = optimize_nested(Scattering(), backend="eager", verify=False)
    points = torch.stack([X, 2 * X]).requires_grad_()
    torch.vmap(net)(points).square().sum().backward()
    x = points.detach()
    expected = (2 * x).sin()
    expected[:, 0] = 0
    expected[:, 1] += 4 * x[:, 1] ** 3
    torch.testing.assert_close(points.grad, expected, rtol=1e-12, atol=0)


_EYE = torch.eye(3, dtype=torch.float64)
_RANK = {
    "equal": _EYE,
    "nearly equal": torch.diag(torch.tensor([1.0, 1.0 + 1e-9, 2.0], dtype=torch.float64)),
    "rank 1": torch.ones(3, 3, dtype=torch.float64),
    "zero": torch.zeros(3, 3, dtype=torch.float64),
    "6 rows of rank 3": torch.diag(torch.tensor([3.0, 1, 1, 0, 0, 0], dtype=torch.float64)),
    "two matrices": torch.stack([_EYE, torch.zeros_like(_EYE)]),
}


QUICK = (("equal", "grad, grad"),)


@pytest.mark.parametrize(
    ("point", "form"),
    [
        pytest.param(point, form, marks=[] if (point, form) in QUICK else [pytest.mark.slow])
        for point in _RANK
        for form in FORMS
    ],
)
def test_determinant(point: str, form: str) -> None:
    ours, _ = run_case(Case("det", torch.linalg.det, _RANK[point]), form)
    assert ours == RIGHT


def test_stress_at_rest() -> None:
    """A stress from ``det F`` at ``F = 1``, the gradient of a scale in front of it: 2088."""

    def loss(scale: Tensor, f: Tensor) -> Tensor:
        def energy(f: Tensor) -> Tensor:
            return scale * (torch.linalg.det(f) - 1) ** 2 + torch.linalg.det(f).log() ** 2

        return torch.func.hessian(energy)(f).square().sum()

    found = gradient_of(
        optimize_nested(loss, backend="eager", strict=True, verify=False),
        3 * torch.ones(()).double(),
        _EYE,
    )
    # H = 2 (scale + 1) tr ⊗ tr, of which nine entries are not zero
    torch.testing.assert_close(found[0], torch.tensor(72 * 4.0).double(), rtol=1e-12, atol=0)
    assert found[1].isfinite().all()


def _stacked(x: Tensor) -> Tensor:
    return torch.stack([x, 1 + x, x.sin(), x - 1, x.exp()])


# A function of numbers, each by itself, where it is 0/0, has factors that are zero, or overflows.
OF_NUMBERS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "sinc": (torch.sinc, [0.0, 1e-9, 1e-4, 0.5, 2.0]),
    "log_sigmoid": (torch.nn.functional.logsigmoid, [0.0, 30.0, -30.0, 800.0, -800.0]),
    "mish": (torch.nn.functional.mish, [0.0, 30.0, -40.0, 800.0]),
    "softplus": (torch.nn.functional.softplus, [0.0, -40.0, 100.0, 800.0]),
    "prod": (lambda x: _stacked(x).prod(0), [0.0, 1.0, -1.0, 2.0]),
    "prod_of_all": (lambda x: torch.stack([_stacked(v).prod() for v in x.unbind()]), [0.0, 1.0]),
    "cumprod": (lambda x: _stacked(x).cumprod(0).sum(0), [0.0, 1.0, -1.0, 2.0]),
    "logcumsumexp": (lambda x: _stacked(x).logcumsumexp(0).sum(0), [0.0, 1.0, -1.0]),
    "logcumsumexp_of_nothing": (
        lambda x: torch.stack([torch.full_like(x, -math.inf), x, x * x]).logcumsumexp(0)[1:].sum(0),
        [0.0, 1.0],
    ),
    "powers": (lambda x: x**2 + torch.pow(x, torch.tensor(3.0)) + 2.0**x, [0.0, 1.0]),
    "norm": (lambda x: torch.stack([x, 1 + x, x * x]).norm(dim=0), [0.0, -1.0]),
}  # fmt: skip


def second_by_gradients(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x, create_graph=True)
    return h


def second_by_both(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    def slope(y: Tensor) -> Tensor:
        return torch.func.grad(lambda z: f(z).sum())(y)

    return torch.func.jvp(slope, (x,), (torch.ones_like(x),))[1]


def second_by_tangents(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    def slope(y: Tensor) -> Tensor:
        return torch.func.jvp(f, (y,), (torch.ones_like(y),))[1]

    return torch.func.jvp(slope, (x,), (torch.ones_like(x),))[1]


@pytest.mark.parametrize("name", OF_NUMBERS)
@pytest.mark.parametrize(
    "second",
    [
        second_by_gradients,
        pytest.param(second_by_both, marks=pytest.mark.slow),
        pytest.param(second_by_tangents, marks=pytest.mark.slow),
    ],
)
def test_function_of_numbers(name: str, second: Callable[..., Tensor]) -> None:
    function, points = OF_NUMBERS[name]
    expected = [truth(Case(name, function, torch.tensor([p]).double(), _ONE)) for p in points]

    def loss(x: Tensor) -> Tensor:
        return second(function, x)

    x = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    found = optimize_nested(loss, backend="eager", strict=True, verify=False)(x)
    found.sum().backward()
    for at, right in enumerate(expected):
        assert right is not None
        first, *higher = (d / 2.5 for d in right)  # the weight of the first result
        size = 1e-4 * max(1.0, abs(first), *map(abs, higher))
        assert abs(found[at].item() - higher[0]) < size
        assert abs(x.grad[at].item() - higher[1]) < size


_ONE = torch.ones(1, dtype=torch.float64)


def test_norm_of_a_hessian_by_rows() -> None:
    """The seeds of the outer Jacobian are asked for with the inner one's type; that does not make
    them depend on it."""

    def loss(x: Tensor) -> Tensor:
        hessian = torch.func.jacrev(torch.func.jacrev(lambda p: (p**3).sum()))
        return hessian(x).square().sum()

    (found,) = gradient_of(optimize_nested(loss, backend="eager", verify=False), X)
    torch.testing.assert_close(found, 72 * X, rtol=1e-12, atol=0)


def test_forward_mode_twice_through_eigenvalues() -> None:
    """The third derivative is not a number as written, at any matrix."""

    def trace_of_exponential(a: Tensor) -> Tensor:
        return torch.linalg.eigvalsh((a + a.mT) / 2).exp().sum()

    matrix = torch.tensor([[1.0, 0.3, 0.1], [0.2, 2.0, 0.5], [0.4, 0.1, 4.0]], dtype=torch.float64)
    ours, _ = run_case(Case("eigvalsh", trace_of_exponential, matrix), "jvp, jvp")
    assert ours == RIGHT
