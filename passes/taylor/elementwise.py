"""Taylor rules of elementwise functions, derived by sympy from what they compute."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Expr, Symbol, cosh, exp, log, sqrt, tanh
from torch import Tensor

aten = torch.ops.aten
X, Y = Symbol("x", real=True), Symbol("y", real=True)
_POSITIVE = Symbol("y", positive=True)
ALPHA, BETA, SCALE, LIMIT = sympy.symbols("alpha beta scale limit", real=True)

# What sympy's functions are called in code.
TORCH_FUNCTIONS = {
    **{name: getattr(torch, name) for name in ("exp", "log", "sin", "cos", "tan", "sqrt")},
    **{name: getattr(torch, name) for name in ("sinh", "cosh", "tanh", "erf")},
}


@dataclass(frozen=True)
class Function:
    """An elementwise function ``y = f(x)``.

    Attributes:
        pieces: (condition on `X`, expression in `X` and parameters): the first whose condition
            holds counts.
        inverse: x in `Y` where derivatives are cheaper as functions of the result; else None.
        parameters: Symbols for the operator's further arguments, with their defaults.
    """

    pieces: tuple[tuple[Any, Expr], ...]
    inverse: Expr | None = None
    parameters: tuple[tuple[Symbol, Any], ...] = ()


def _smooth(expression: Any, inverse: Any = None, parameters: Any = ()) -> Function:
    return Function(((sympy.true, expression),), inverse, parameters)


def _logistic(x: Any) -> Any:
    """``1/(1 + e⁻ˣ)``, in a form that does not overflow."""
    return (1 + tanh(x / 2)) / 2


def _softplus(x: Any) -> Any:
    """``log(1 + eˣ)``; its derivative comes out as that of `_logistic`."""
    return x / 2 + log(2 * cosh(x / 2))


_CUBIC = sqrt(2 / sympy.pi) * (X + sympy.Rational("0.044715") * X**3)
_GELU = {
    "none": _smooth(X * (1 + sympy.erf(X / sqrt(2))) / 2),
    "tanh": _smooth(X * (1 + tanh(_CUBIC)) / 2),
}

FUNCTIONS: dict[Any, Function] = {
    aten.exp.default: _smooth(exp(X), log(Y)),
    aten.exp2.default: _smooth(2**X, log(Y) / log(2)),
    aten.expm1.default: _smooth(exp(X) - 1, log(Y + 1)),
    aten.log.default: _smooth(log(X)),
    aten.log2.default: _smooth(log(X) / log(2)),
    aten.log10.default: _smooth(log(X) / log(10)),
    aten.log1p.default: _smooth(log(1 + X)),
    aten.sin.default: _smooth(sympy.sin(X)),
    aten.cos.default: _smooth(sympy.cos(X)),
    aten.tan.default: _smooth(sympy.tan(X), sympy.atan(Y)),
    aten.sinh.default: _smooth(sympy.sinh(X)),
    aten.cosh.default: _smooth(cosh(X)),
    aten.tanh.default: _smooth(tanh(X), sympy.atanh(Y)),
    aten.asin.default: _smooth(sympy.asin(X)),
    aten.acos.default: _smooth(sympy.acos(X)),
    aten.atan.default: _smooth(sympy.atan(X)),
    aten.asinh.default: _smooth(sympy.asinh(X)),
    aten.acosh.default: _smooth(sympy.acosh(X)),
    aten.atanh.default: _smooth(sympy.atanh(X)),
    aten.sqrt.default: _smooth(sqrt(X), _POSITIVE**2),
    aten.rsqrt.default: _smooth(1 / sqrt(X), _POSITIVE**-2),
    aten.reciprocal.default: _smooth(1 / X, 1 / Y),
    aten.square.default: _smooth(X**2),
    aten.erf.default: _smooth(sympy.erf(X)),
    aten.erfc.default: _smooth(1 - sympy.erf(X)),
    aten.sigmoid.default: _smooth(_logistic(X), log(Y / (1 - Y))),
    aten.silu.default: _smooth(X * _logistic(X)),
    aten.softplus.default: Function(
        ((BETA * X > LIMIT, X), (sympy.true, _softplus(BETA * X) / BETA)),
        parameters=((BETA, 1), (LIMIT, 20)),
    ),
    aten.elu.default: Function(
        ((X > 0, SCALE * X), (sympy.true, SCALE * ALPHA * (exp(BETA * X) - 1))),
        parameters=((ALPHA, 1), (SCALE, 1), (BETA, 1)),
    ),
    aten.hardswish.default: Function(
        ((X <= -3, sympy.S.Zero), (X >= 3, X), (sympy.true, X * (X + 3) / 6))
    ),
}  # fmt: skip


def function_of(target: Any, kwargs: dict[str, Any]) -> Function | None:
    """Return what an operator computes elementwise; None if it has no row."""
    if target is aten.gelu.default:
        return _GELU[kwargs.get("approximate", "none")]
    return FUNCTIONS.get(target)


def derivatives(function: Function, order: int, y: Tensor, x: Tensor, *given: Any) -> list[Any]:
    """Return ``f⁽ᵏ⁾(x)/k!`` for k = 1 … order; None for one that is zero everywhere.

    Args:
        function: f.
        order: The last k.
        y: ``f(x)``.
        x: Where.
        *given: Values of its parameters; those left out have their defaults.
    """
    defaults = [default for _, default in function.parameters]
    numbers = [*given, *defaults[len(given) :]]
    total: list[Any] = [None] * order
    rest = None
    for holds, code in _compiled(function, order):
        inside = None if holds is None else holds(x, *numbers)
        if rest is not None:
            inside = rest if inside is None else rest & inside
        # Outside of its piece an expression may overflow, and its gradient with it.
        at = x if inside is None else torch.where(inside, x, 0)
        found = code(at, y, *numbers)
        for k, value in enumerate(found):
            total[k] = _joined(total[k], value, inside, x)
        if inside is not None:
            rest = ~inside if rest is None else rest & ~inside
    return total


def _joined(before: Any, value: Any, inside: Tensor | None, like: Tensor) -> Any:
    if value is None:
        return before
    if inside is None:
        return value if isinstance(value, Tensor) else torch.full_like(like, value)
    return torch.where(inside, value, 0 if before is None else before).to(like.dtype)


@functools.cache
def _compiled(function: Function, order: int) -> list[tuple[Any, Callable[..., list[Any]]]]:
    """Return (condition or None, code of the derivatives) for each piece."""
    parameters = [symbol for symbol, _ in function.parameters]
    pieces: list[tuple[Any, Callable[..., list[Any]]]] = []
    for condition, expression in function.pieces:
        found = taylor_coefficients(expression, function.inverse, order)
        holds = None
        if condition is not sympy.true:
            holds = sympy.lambdify([X, *parameters], condition, modules=[TORCH_FUNCTIONS])
        code = sympy.lambdify(
            [X, Y, *parameters], [_in_floats(f) for f in found], modules=[TORCH_FUNCTIONS], cse=True
        )
        pieces.append((holds, functools.partial(_values, code, [f == 0 for f in found])))
    return pieces


def _values(code: Callable[..., list[Any]], is_zero: list[bool], *given: Any) -> list[Any]:
    return [None if zero else v for v, zero in zip(code(*given), is_zero, strict=True)]


def taylor_coefficients(expression: Any, inverse: Any, order: int) -> list[Any]:
    """Return ``f⁽ᵏ⁾/k!`` for k = 1 … order as expressions in `X`, or in `Y` given the inverse.

    With ``f' = p(f)``, ``f⁽ᵏ⁺¹⁾ = p(y) d/dy f⁽ᵏ⁾``.
    """
    first = sympy.diff(expression, X)
    if inverse is not None:
        first = first.subs(X, inverse)
    first = sympy.simplify(first).xreplace({_POSITIVE: Y})
    found: list[Any] = []
    last = first if inverse is None else sympy.factor(first)
    for k in range(1, order + 1):
        found.append(last / sympy.factorial(k))
        last = sympy.diff(last, X) if inverse is None else sympy.factor(first * sympy.diff(last, Y))
    return found


def _in_floats(expression: Any) -> Any:
    """Evaluate constants such as ``√(2/π)``; integer powers stay."""
    constants = [
        part
        for part in sympy.preorder_traversal(expression)
        if part.is_number and not part.is_Integer and not part.is_Float
    ]
    return expression.xreplace({part: sympy.N(part, 17) for part in constants})
