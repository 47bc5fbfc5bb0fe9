"""Second and third derivatives of single functions at their degenerate points.

For a function ``f`` at a point ``A`` and a direction ``B`` the scalar ``φ(t) = ⟨w, f(A + tB)⟩`` is
what decides: a polynomial through its values gives ``φ″(0)`` and ``φ‴(0)``, without any derivative
formula. Each form of a nested derivative must give ``φ″`` as the loss's value and ``φ‴`` as the
gradient of the loss along ``B``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewriter import NestedGradientWarning, optimize_nested

NODES, RADIUS = 17, 0.2
TOLERANCE = 1e-4  # of what a polynomial tells of a third derivative

RIGHT, WRONG, NAN, REFUSED, UNKNOWN = "right", "WRONG", "nan", "refused", "not smooth"


@dataclass(frozen=True)
class Case:
    """A function of one tensor, and a point of it.

    Attributes:
        name: What it is.
        function: Takes a float64 tensor and returns a tensor.
        point: Where.
        along: Which direction; None draws one.
        radius: How far φ is smooth and defined.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    point: Tensor
    along: Tensor | None = None
    radius: float = RADIUS


def direction(case: Case) -> Tensor:
    """Return the direction along which a case is differentiated."""
    if case.along is not None:
        return case.along
    generator = torch.Generator().manual_seed(5)
    drawn = torch.randn(case.point.shape, generator=generator, dtype=torch.float64)
    return drawn.to(case.point.dtype)


def weighted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``A ↦ ⟨w, f(A)⟩`` for fixed weights that are all different."""

    def scalar(x: Tensor) -> Tensor:
        y = function(x)
        if y.is_complex():
            y = torch.view_as_real(y)
        w = 1.5 + torch.arange(y.numel(), dtype=y.dtype).reshape(y.shape).cos()
        return (w * y).sum()

    return scalar


def truth(case: Case) -> tuple[float, float, float] | None:
    """Return ``φ′, φ″, φ‴`` at 0 from values alone; None where no polynomial fits."""
    scalar, b = weighted(case.function), direction(case)
    fits = []
    for radius in (case.radius, case.radius / 2):
        angle = math.pi * (torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES
        t = angle.cos()
        with torch.no_grad():
            values = torch.stack([scalar(case.point + radius * s * b) for s in t])
        if not values.isfinite().all():
            return None
        size = values.abs().max().clamp_min(1e-300)
        # Chebyshev coefficients, then those of powers, by the recurrence of the polynomials
        k = torch.arange(NODES, dtype=torch.float64)
        c = 2 / NODES * (k[:, None] * angle).cos() @ values
        c[0] /= 2
        if c[-3:].abs().max() > 1e-9 * size:
            return None
        c[c.abs() < 1e-14 * size] = 0  # of nothing but rounding, which a derivative would enlarge
        d = [0.0, 0.0, 0.0]
        for n in range(1, NODES):
            at = n * math.pi / 2
            d[0] += c[n].item() * n * math.sin(at)
            d[1] += c[n].item() * -n * n * math.cos(at)
            d[2] += c[n].item() * n * (1 - n * n) * math.sin(at)
        fits.append(tuple(d[i] / radius ** (i + 1) for i in range(3)))
    one, other = fits
    scale = max(map(abs, one))
    for a, b in zip(one, other, strict=True):
        if abs(a - b) > TOLERANCE / 3 * (abs(a) + 0.1 * scale):
            return None
    return one


def _grad_twice(f: Any, x: Tensor, b: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    (h,) = torch.autograd.grad((g * b).sum(), x, create_graph=True)
    return (h * b).sum()


def _hessian(f: Any, x: Tensor, b: Tensor) -> Tensor:
    b = b.flatten()
    h = torch.func.hessian(lambda y: f(y.reshape(x.shape)))(x.flatten())
    return b @ h @ b


def _jacrev_twice(f: Any, x: Tensor, b: Tensor) -> Tensor:
    b = b.flatten()
    h = torch.func.jacrev(torch.func.jacrev(lambda y: f(y.reshape(x.shape))))(x.flatten())
    return b @ h @ b


def _jvp_twice(f: Any, x: Tensor, b: Tensor) -> Tensor:
    def slope(y: Tensor) -> Tensor:
        return torch.func.jvp(f, (y,), (b,))[1]

    return torch.func.jvp(slope, (x,), (b,))[1]


FORMS = {
    "grad, grad": _grad_twice,
    "hessian": _hessian,
    "jacrev, jacrev": _jacrev_twice,
    "jvp, jvp": _jvp_twice,
}


def _measured(loss: Any, x: Tensor, b: Tensor) -> tuple[float, float]:
    x = x.clone().requires_grad_()
    value = loss(x, b)
    if not value.requires_grad:
        return value.item(), 0.0
    value.backward()
    return value.item(), 0.0 if x.grad is None else (x.grad * b).sum().item()


def _verdict(loss: Any, case: Case, expected: tuple[float, float, float]) -> str:
    b = direction(case)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", NestedGradientWarning)
            found = _measured(loss, case.point, b)
    except NestedGradientWarning as warning:
        return "as written: " + str(warning)[:300]
    except Exception as error:  # whatever it raises is what is reported
        return (
            f"{REFUSED}: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}"
        )
    scale = max(map(abs, expected))
    words = []
    for order, (mine, right) in enumerate(zip(found, expected[1:], strict=True), 2):
        if not math.isfinite(mine):
            words.append(f"{NAN} {order}")
        elif abs(mine - right) > TOLERANCE * (abs(right) + 1e-2 * scale):
            words.append(f"{WRONG} {order}: {mine:.6g} for {right:.6g}")
    return "; ".join(words) or RIGHT


def run_case(case: Case, form: str) -> tuple[str, str]:
    """Return what is to be said of the rewritten loss, and of the loss as written."""
    expected = truth(case)
    if expected is None:
        return UNKNOWN, UNKNOWN
    f = weighted(case.function)
    make = FORMS[form]

    def loss(x: Tensor, b: Tensor) -> Tensor:
        return make(f, x, b)

    torch._dynamo.reset()
    ours = _verdict(optimize_nested(loss, backend="eager"), case, expected)
    return ours, _verdict(loss, case, expected)
