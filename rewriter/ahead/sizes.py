"""Sizes that change from call to call: expressions in their names, as JSON.

A size is a number, a name, or ``[operator, operand, …]``; so is a condition.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from rewriter.errors import ArtifactError, CaptureError

MAX_DEPTH = 50
_MAX_NUMBER = 2**62


def _product(*factors: int) -> int:
    result = 1
    for factor in factors:
        result *= factor
    return result


def _power(base: int, exponent: int) -> int:
    if type(exponent) is not int or not 0 <= exponent <= 64:
        raise ValueError("a power of sizes beyond 64")
    return base**exponent


# Operator → what it computes, and how many operands it takes (None: any number).
OPERATORS: dict[str, tuple[Callable[..., Any], int | None]] = {
    "+": (lambda *terms: sum(terms), None),
    "*": (_product, None),
    "//": (operator.floordiv, 2),
    "%": (operator.mod, 2),
    "**": (_power, 2),
    "max": (max, None),
    "min": (min, None),
    "==": (operator.eq, 2),
    "!=": (operator.ne, 2),
    "<": (operator.lt, 2),
    "<=": (operator.le, 2),
    ">": (operator.gt, 2),
    ">=": (operator.ge, 2),
    "and": (lambda *terms: all(terms), None),
    "or": (lambda *terms: any(terms), None),
    "not": (operator.not_, 1),
}
_NAMES = {
    "Add": "+", "Mul": "*", "FloorDiv": "//", "CleanDiv": "//",
    "Mod": "%", "PythonMod": "%", "Pow": "**", "PowByNatural": "**",
    "Max": "max", "Min": "min", "Equality": "==", "Unequality": "!=", "StrictLessThan": "<",
    "LessThan": "<=", "StrictGreaterThan": ">", "GreaterThan": ">=", "And": "and", "Or": "or",
    "Not": "not",
}  # fmt: skip


def size_of(expression: Any, names: Mapping[sympy.Symbol, str]) -> Any:
    """Write a sympy expression as JSON.

    Args:
        expression: In the symbols of ``names``.
        names: What each is called.

    Raises:
        CaptureError: It holds something that has no such form.
    """
    if isinstance(expression, (int, bool)):
        return expression
    if expression in names:
        return names[expression]
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if expression in (sympy.true, sympy.false):
        return bool(expression)
    name = _NAMES.get(type(expression).__name__)
    if not name:
        raise CaptureError(f"a size that is {expression} cannot be written to an artifact")
    return [name, *(size_of(argument, names) for argument in expression.args)]


def evaluated(size: Any, values: Mapping[str, int]) -> Any:
    """Return the number that a size is, or whether a condition holds.

    Raises:
        ArtifactError: It is no size.
    """
    try:
        return _evaluated(size, values, 0)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as error:
        raise ArtifactError(f"{shown(size)} is not a size: {error}") from error


def _evaluated(size: Any, values: Mapping[str, int], depth: int) -> Any:
    if isinstance(size, (bool, int)) and abs(size) <= _MAX_NUMBER:
        return size
    if isinstance(size, str) and size in values:
        return values[size]
    if depth > MAX_DEPTH or not isinstance(size, (list, tuple)) or not size:
        raise ValueError("neither a number nor a known name nor an operation")
    if not isinstance(size[0], str) or size[0] not in OPERATORS:
        raise ValueError(f"unknown operator {size[0]!r}")
    function, arity = OPERATORS[size[0]]
    operands = [_evaluated(item, values, depth + 1) for item in size[1:]]
    if not operands or arity not in (None, len(operands)):
        raise ValueError(f"{size[0]} takes another number of operands")
    result = function(*operands)
    # A symbolic size, while a graph's shapes are traced, would be fixed by the question.
    if type(result) is int and abs(result) > _MAX_NUMBER:
        raise ValueError("too large")
    return result


def shown(size: Any) -> str:
    """Print a size as a formula."""
    if not isinstance(size, (list, tuple)) or not size:
        return str(size)
    name, *operands = size
    parts = [shown(operand) for operand in operands]
    if str(name).isalpha() and name not in ("and", "or"):
        return f"{name}({', '.join(parts)})"
    return f"({f' {name} '.join(parts)})" if len(parts) > 1 else f"{name} {''.join(parts)}"
