"""Teach optimize_nested the derivatives of operators that users define with `torch.library`.

Such an operator has a gradient (`torch.library.register_autograd`), and that is enough for reverse
mode. Forward and Taylor modes need more; it is said here, in the shortest way that fits, and
compared with nested gradients before it is believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from passes.custom_rules import CUSTOM, CustomRule
from passes.taylor.checking import ORDER, RuleFails, check_rows, check_rule
from passes.taylor.custom import elementwise_rule, linear_rule, series_rule
from passes.taylor.elementwise import TORCH_FUNCTIONS, Function, X, taylor_coefficients
from rewriter.errors import RuleError

_OWN = ("aten", "prims", "optimize_nested")


def register_elementwise(
    operator: Any, expression: Callable[..., Any], *, example: Sequence[Any]
) -> None:
    """Say what an operator computes elementwise: ``y = f(x, *numbers)`` for each element.

    Its derivatives are taken by sympy: ``ẏ = f′(x) ẋ`` in forward mode, and in Taylor mode the
    series of the composition to any order. Rows of a batch stay apart in it. Register before a loss
    is first called; once more replaces what was registered.

    Args:
        operator: ``torch.ops.mine.swish.default``, or what `torch.library.custom_op` returned. Its
            first argument is a tensor of any shape, the others are numbers; the result has the
            tensor's shape. It has a gradient that PyTorch can differentiate three times more.
        expression: f, given a sympy symbol for each argument; cases as a `sympy.Piecewise`.
        example: Arguments to compare at, tensors of few elements; they are taken in float64, and
            should have values in every case.

    Raises:
        RuleError: f is not what the operator computes, one of its four first derivatives differs
            from nested gradients by more than 1e-9 relative, or it cannot be compared.
        TypeError: An argument is of another kind.

    Source: Griewank, Walther (2008), "Evaluating derivatives", section 13.2.

    Example:
        >>> import sympy, torch
        >>> from rewriter import register_elementwise
        >>> @torch.library.custom_op("docs::bump", mutates_args=())
        ... def bump(x: torch.Tensor) -> torch.Tensor:
        ...     return torch.exp(-x.square())
        >>> _ = bump.register_fake(torch.empty_like)
        >>> bump.register_autograd(
        ...     lambda ctx, g: -2 * ctx.saved_tensors[0] * bump(ctx.saved_tensors[0]) * g,
        ...     setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        ... )
        >>> register_elementwise(bump, lambda x: sympy.exp(-(x**2)), example=[torch.randn(5)])
    """
    target, args = _checked(operator, example)
    arguments = target._schema.arguments
    others = [a for a in arguments[1:] if isinstance(args[arguments.index(a)], Tensor)]
    if not isinstance(args[0], Tensor) or others:
        raise RuleError(
            f"{target}: the first argument of an elementwise operator is a tensor, and the only "
            f"one; use register_taylor_rule"
        )
    symbols = [sympy.Symbol(a.name, real=True) for a in arguments[1:]]
    found = sympy.piecewise_fold(sympy.sympify(expression(X, *symbols)))
    pieces = _pieces(target, found)
    given = {a.name: value for a, value in zip(arguments[1:], args[1:], strict=True)}
    function = Function(pieces, parameters=tuple((s, given[s.name]) for s in symbols))
    computed = _evaluated(pieces, symbols, args)
    if not torch.allclose(computed, target(*args), rtol=1e-9, atol=1e-9):
        raise RuleError(f"{target} does not compute {found} at the example")
    _register(target, elementwise_rule(function), args, moving=[[0]], rows=())


def register_linear(
    operator: Any,
    arguments: Sequence[str] = (),
    *,
    example: Sequence[Any],
    rows: Sequence[str] = (),
) -> None:
    """Say that an operator is linear in some of its arguments, taken together.

    Its tangent, and each coefficient of its Taylor series, is the operator itself:
    ``ẏ = L(ẋ)``, with zeros in place of those that do not move. A derivative in which another
    argument moves is left as written. Directions are a batch for `torch.vmap`: with
    `torch.library.register_vmap` they take one call, and one call each without.

    Args:
        operator: As in `register_elementwise`; its result is one tensor.
        arguments: Names of the tensors; by default the first argument.
        example: Arguments to compare at, as in `register_elementwise`.
        rows: Names of the arguments whose row n, along the first dimension, is all of them that row
            n of the result depends on; other arguments must not move then. The example needs two
            rows, and in it each row is compared while the others change.

    Raises:
        RuleError: It is not linear in the example, its gradient is not that of a linear operator,
            or rows mix.
        TypeError: An argument is of another kind.

    Example:
        >>> import torch
        >>> from rewriter import register_linear
        >>> @torch.library.custom_op("docs::twice", mutates_args=())
        ... def twice(x: torch.Tensor) -> torch.Tensor:
        ...     return 2 * x
        >>> _ = twice.register_fake(torch.empty_like)
        >>> twice.register_autograd(lambda ctx, g: twice(g))
        >>> register_linear(twice, example=[torch.randn(3, 2)], rows=["x"])
    """
    target, args = _checked(operator, example)
    positions = _positions(target, "arguments", arguments or [target._schema.arguments[0].name])
    kept = _positions(target, "rows", rows)
    _refuse_constants(target, args, [*positions, *kept])
    rule = linear_rule(frozenset(positions), frozenset(kept))
    _register(target, rule, args, moving=[positions], rows=kept, is_linear=True)


def register_taylor_rule(
    operator: Any,
    rule: Callable[..., Sequence[Tensor]],
    *,
    example: Sequence[Any],
    rows: Sequence[str] = (),
) -> None:
    """Give an operator a rule for Taylor series: what it computes along a polynomial curve.

    With arguments ``x(t) = x₀ + x₁t + … + xₘtᵐ`` the result is ``y₀ + y₁t + … + yₘtᵐ + …``; the
    rule returns ``y₁ … yₘ``, for any m ≥ 1. Its first coefficient serves as the tangent. It is
    called for one direction at a time, under `torch.vmap`.

    Args:
        operator: As in `register_elementwise`; its result is one tensor.
        rule: ``rule(args, series, **keywords)``: the values x₀ of the arguments, and for each
            either its coefficients ``(x₁, …, xₘ)``, of the argument's shape, or None if it does not
            move. Written in differentiable operators; coefficients have the shape of the result.
        example: Arguments to compare at, as in `register_elementwise`. Every tensor of floating
            point moves there, all together and each alone.
        rows: As in `register_linear`.

    Raises:
        RuleError: A coefficient of order 1 to 4 differs from nested gradients by more than 1e-9
            relative, alone or summed over directions, or rows mix.
        TypeError: An argument is of another kind.

    Example:
        >>> import torch
        >>> from rewriter import register_taylor_rule
        >>> @torch.library.custom_op("docs::halve_square", mutates_args=())
        ... def halve_square(x: torch.Tensor) -> torch.Tensor:
        ...     return x * x / 2
        >>> _ = halve_square.register_fake(torch.empty_like)
        >>> halve_square.register_autograd(
        ...     lambda ctx, g: ctx.saved_tensors[0] * g,
        ...     setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        ... )
        >>> def rule(args, series):
        ...     x = [args[0], *series[0]]
        ...     return [sum(x[i] * x[n - i] for i in range(n + 1)) / 2 for n in range(1, len(x))]
        >>> register_taylor_rule(halve_square, rule, example=[torch.randn(3, 2)], rows=["x"])
    """
    target, args = _checked(operator, example)
    if not callable(rule):
        raise TypeError(f"rule is a {type(rule).__name__}; expected a function of (args, series)")
    kept = _positions(target, "rows", rows)
    _refuse_constants(target, args, kept)
    tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor) and x.is_floating_point()]
    moving = [tensors, *([i] for i in tensors)] if len(tensors) > 1 else [tensors]
    _register(target, series_rule(rule, frozenset(kept)), args, moving=moving, rows=kept)


def _checked(operator: Any, example: Sequence[Any]) -> tuple[OpOverload, list[Any]]:
    """Return the operator proper, and all of its arguments, those of floating point in float64."""
    found = getattr(operator, "_opoverload", operator)  # what torch.library.custom_op returns
    if isinstance(found, OpOverloadPacket) and found.overloads() == ["default"]:
        found = found.default
    if not isinstance(found, OpOverload):
        raise TypeError(
            f"operator is a {type(operator).__name__}; expected an operator, such as "
            f"torch.ops.mine.swish.default"
        )
    if found.namespace in _OWN:
        raise RuleError(f"{found}: the rules of PyTorch's own operators are fixed")
    schema = found._schema
    if len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor" or schema.is_mutable:
        raise RuleError(f"{found}: a rule is for an operator that returns one tensor, a new one")
    if isinstance(example, Tensor) or not isinstance(example, Sequence):
        raise TypeError(f"example is a {type(example).__name__}; expected a list of arguments")
    missing = schema.arguments[len(example) :]
    without = [a.name for a in missing if not a.has_default_value()]
    if without or len(example) > len(schema.arguments) or any(a.kwarg_only for a in missing):
        names = ", ".join(a.name for a in schema.arguments)
        raise TypeError(f"example has {len(example)} arguments; {found} takes {names}")
    values = [*example, *(a.default_value for a in missing)]
    return found, [_in_float64(value) for value in values]


def _in_float64(value: Any) -> Any:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().to(torch.float64) if is_real else value


def _positions(target: OpOverload, which: str, names: Sequence[str]) -> list[int]:
    if isinstance(names, str):
        raise TypeError(f"{which} is a string; expected a list of names")
    known = [a.name for a in target._schema.arguments]
    for name in names:
        if name not in known:
            raise RuleError(f"{which}: {target} has no argument {name!r}, only {', '.join(known)}")
    return [known.index(name) for name in names]


def _refuse_constants(target: OpOverload, args: list[Any], positions: Sequence[int]) -> None:
    for i in positions:
        if not isinstance(args[i], Tensor) or not args[i].is_floating_point():
            name = target._schema.arguments[i].name
            raise RuleError(f"example: {name} of {target} is no tensor of floating point numbers")


def _pieces(target: OpOverload, found: Any) -> tuple[tuple[Any, Any], ...]:
    """Return (condition, expression) of each case, all computable by functions of torch to the
    highest derivative."""
    if not isinstance(found, sympy.Piecewise):
        pieces: list[tuple[Any, Any]] = [(sympy.true, found)]
    else:
        cases: Any = found.args
        pieces = [(condition, expression) for expression, condition in cases]
    if pieces[-1][0] is not sympy.true:
        raise RuleError(f"{target}: no case of {found} holds everywhere else; end it with True")
    for _, expression in pieces:
        for part in (expression, *taylor_coefficients(expression, None, ORDER)):
            used = part.atoms(sympy.Function, sympy.Derivative)
            unknown = {type(u).__name__ for u in used} - set(TORCH_FUNCTIONS)
            if unknown or not all(u.has(X) for u in used if not u.is_number):
                raise RuleError(
                    f"{target}: the derivatives of {expression} need {part}; write it with "
                    f"functions of x among {', '.join(TORCH_FUNCTIONS)}, cases as a sympy.Piecewise"
                )
    return tuple(pieces)


def _evaluated(
    pieces: Sequence[tuple[Any, Any]], symbols: Sequence[Any], args: Sequence[Any]
) -> Tensor:
    """Compute what the cases say, the first that holds."""
    total = args[0]
    for condition, expression in reversed(pieces):
        compute = sympy.lambdify([X, *symbols], [expression, condition], modules=[TORCH_FUNCTIONS])
        value, holds = compute(*args)
        value = torch.as_tensor(value).to(args[0])
        total = torch.where(torch.as_tensor(holds, device=value.device), value, total)
    return total


def _register(
    target: OpOverload,
    rule: CustomRule,
    args: Sequence[Any],
    *,
    moving: Sequence[Sequence[int]],
    rows: Sequence[int],
    is_linear: bool = False,
) -> None:
    """Check a rule, and only then put it in its place."""
    try:
        with torch.enable_grad():
            for together in moving:
                check_rule(target, rule, args, together, is_linear=is_linear)
        if rows:
            check_rows(target, args, rows)
    except RuleFails as error:
        raise RuleError(str(error)) from error
    CUSTOM[target] = rule
