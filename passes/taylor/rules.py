"""The Taylor series of every operator's result, by family.

First the operators whose derivative is piecewise constant: each coefficient moves as a tangent
does, by `passes.tangent_rules`. Then the bilinear ones, by convolution; elementwise functions by
the series of a composition; and those that are put together from these. An operator without a row
is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from passes.custom_rules import CUSTOM
from passes.tangent_rules import tangent_of
from passes.tangent_tables import BILINEAR, LINEAR, ZERO
from passes.taylor.elementwise import derivatives, function_of
from passes.taylor.jets import Jets, Series, plus

aten = torch.ops.aten


class NoSeries(Exception):
    """An operator whose result's Taylor series is not known."""


# Linear in all that moves, near almost every point: coefficients move as tangents do.
PIECEWISE_LINEAR = {
    *LINEAR, aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar, aten.rsub.Scalar,
    aten.where.self,
    aten.relu.default, aten.leaky_relu.default, aten.hardtanh.default,
    aten.abs.default, aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default,
    aten.maximum.default, aten.minimum.default, aten.amax.default, aten.amin.default,
    aten.max.dim, aten.min.dim, aten.sort.default, aten.topk.default,
    aten.max_pool2d_with_indices.default, operator.getitem,
} - {aten.as_strided.default, aten.as_strided_scatter.default}  # fmt: skip


def series_of(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Series:
    """Return the coefficients of ``out = target(*args, **kwargs)`` after the first.

    Args:
        jets: The arithmetic.
        target: The operator.
        out: Its result at the point.
        args: Values of the arguments at the point.
        kwargs: Values of the keyword arguments (none of which moves).
        along: Coefficients of ``args``; None where an argument does not move.

    Raises:
        NoSeries: There is no rule for the operator.
    """
    if target in ZERO or not _can_move(out):
        return jets.zero
    if any(isinstance(x, Tensor) and x.is_complex() for x in pytree.tree_leaves((out, args))):
        raise NoSeries(f"{target}: complex numbers")
    if target in CUSTOM:
        return CUSTOM[target].series(jets, target, out, args, kwargs, along)
    if target in PIECEWISE_LINEAR:
        return _linear(jets, target, out, args, kwargs, along)
    if target in RULES_OF_SERIES:
        return RULES_OF_SERIES[target](jets, target, out, args, kwargs, along)
    if function_of(target, kwargs) is not None:
        return _elementwise(jets, target, out, args, kwargs, along)
    name = target.name() if isinstance(target, torch._ops.OpOverload) else str(target)
    raise NoSeries(f"{name}: no Taylor rule")


def _can_move(out: Any) -> bool:
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in pytree.tree_leaves(out))


def _linear(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Series:
    return linear_series(jets, along, lambda t: tangent_of(target, out, args, kwargs, t))


def linear_series(jets: Jets, along: tuple, tangent: Callable[[tuple], Any]) -> Series:
    """Move each coefficient as a tangent: the operator is linear in what moves.

    Args:
        jets: The arithmetic.
        along: Coefficients of the arguments.
        tangent: Tangents of the arguments → tangent of the result.
    """
    leaves, spec = pytree.tree_flatten(along, is_leaf=_is_leaf)
    found: list[Any] = []
    for n in range(jets.order):
        terms = [None if leaf is None else leaf.terms[n] for leaf in leaves]
        moving, inner = pytree.tree_flatten(terms, is_leaf=lambda x: x is None)
        there = [term for term in moving if term is not None]

        def move(*given: Any, moving: Any = moving, inner: Any = inner) -> Any:
            rest = iter(given)
            tangents = [None if term is None else next(rest) for term in moving]
            return tangent(pytree.tree_unflatten(pytree.tree_unflatten(tangents, inner), spec))

        found.append(jets.each(n + 1, move, *there) if there else None)
    return Series(tuple(found))


def _is_leaf(item: Any) -> bool:
    return item is None or isinstance(item, Series)


def _full(primal: Any, series: Series | None) -> list[Any]:
    """Return all coefficients of an argument."""
    return [primal] if series is None else [primal, *series.terms]


def _bilinear(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Series:
    first, second = BILINEAR[target]
    return jets.product(
        lambda a, b: target(a, b, **kwargs),
        _full(args[first], along[first]),
        _full(args[second], along[second]),
    )


def _addmm(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Series:
    """``β·input + α·a@b``."""
    product = aten.mm if target is aten.addmm.default else aten.bmm
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    found = jets.product(
        lambda a, b: product(a, b) * alpha if alpha != 1 else product(a, b),
        _full(args[1], along[1]),
        _full(args[2], along[2]),
    )
    return _sum(jets, [(found, out), (along[0], out)], [1, beta])


def _convolution(
    jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple
) -> Series:
    x, weight, _, *options = args
    found = jets.product(
        lambda a, b: target(a, b, None, *options), _full(x, along[0]), _full(weight, along[1])
    )
    if along[2] is None:
        return found
    shape = [1, -1] + [1] * (out.dim() - 2)
    bias = _mapped(jets, lambda term: term.view(shape), along[2])
    return _sum(jets, [(found, out), (bias, out)], [1, 1])


def _sum(jets: Jets, parts: list[tuple[Series | None, Tensor]], factors: list[Any]) -> Series:
    """Return ``Σ factor · part``, broadcast to the shape beside each."""
    total: list[Any] = [None] * jets.order
    for (series, like), factor in zip(parts, factors, strict=True):
        for n, term in enumerate(series.terms if series is not None else ()):
            if term is not None:
                grown = jets.each(n + 1, lambda t, f=factor, u=like: (t * f).expand(u.shape), term)
                total[n] = plus(total[n], grown)
    return Series(tuple(total))


def _mapped(jets: Jets, function: Callable[[Any], Any], series: Series) -> Series:
    """Apply a linear function to each coefficient."""
    terms = enumerate(series.terms)
    return Series(tuple(None if t is None else jets.each(n + 1, function, t) for n, t in terms))


def _div(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Series:
    """``q b = a``: ``qₙ = (aₙ − Σⱼ₌₁ⁿ qₙ₋ⱼ bⱼ) / b₀``."""
    if kwargs.get("rounding_mode") is not None:
        return jets.zero
    a, b = _full(args[0], along[0]), _full(args[1], along[1])
    found: list[Any] = [out]
    for n in range(1, jets.order + 1):
        top = a[n] if n < len(a) else None
        if top is not None:
            top = jets.each(n, lambda t: t.expand(out.shape), top)
        below = jets.convolved(torch.mul, n, found, [None, *b[1:]])
        total = plus(top, None if below is None else -below)
        found.append(None if total is None else jets.each(n, lambda t: t / args[1], total))
    return Series(tuple(found[1:]))


def _pow(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Series:
    x, power = args
    factors: list[Any] = []
    scale = 1.0
    for k in range(1, jets.order + 1):
        scale *= (power - k + 1) / k
        rest = power - k
        if scale == 0:
            factors.append(None)
        elif rest == 0:
            factors.append(torch.full_like(x, scale))
        else:
            factors.append(scale * (x if rest == 1 else aten.pow.Tensor_Scalar(x, rest)))
    return composed(jets, factors, along[0])


def _elementwise(
    jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple
) -> Series:
    function = function_of(target, kwargs)
    assert function is not None
    return composed(jets, derivatives(function, jets.order, out, *args), along[0])


def composed(jets: Jets, factors: list[Any], inner: Series) -> Series:
    """Return the series of ``f(x(t))``: ``Σₖ f⁽ᵏ⁾(x₀)/k! (x(t) − x₀)ᵏ``.

    Args:
        jets: The arithmetic.
        factors: ``f⁽ᵏ⁾(x₀)/k!`` from k = 1; None for zero.
        inner: ``x₁, x₂, …``.
    """
    total: list[Any] = [None] * jets.order
    power: list[Any] = [None, *inner.terms]  # (x(t) − x₀)ᵏ, its first term is of grade k
    for k, factor in enumerate(factors, start=1):
        if k > 1:
            power = [None, *jets.product(torch.mul, power, [None, *inner.terms]).terms]
        if factor is None:
            continue
        for n in range(k, jets.order + 1):
            if power[n] is not None:
                term = jets.each(n, lambda t, f=factor: t * f, power[n])
                total[n - 1] = plus(total[n - 1], term)
    return Series(tuple(total))


def _by_parts(
    parts: Callable[..., Any],
) -> Callable[[Jets, Any, Any, tuple, dict, tuple], Series]:
    """Return the rule of an operator that is a few others."""

    def rule(jets: Jets, target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Series:
        run = _Running(jets)
        result = parts(run, (args[0], along[0]), *args[1:], **kwargs)
        return result[1]

    return rule


class _Running:
    """Call operators on (value, series) pairs."""

    def __init__(self, jets: Jets) -> None:
        self.jets = jets

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> tuple[Any, Series]:
        """Return value and series of an operator's result."""
        primal = tuple(a[0] if isinstance(a, tuple) else a for a in args)
        along = tuple(a[1] if isinstance(a, tuple) else None for a in args)
        out = target(*primal, **kwargs)
        return out, series_of(self.jets, target, out, primal, kwargs, along)


def _exponentials(call: _Running, x: Any, dim: Any) -> tuple[Any, Any]:
    """Return the exponentials of x less its maximum, and their sum."""
    shift = x[0].amax(dim, keepdim=True).detach()
    powers = call(aten.exp.default, call(aten.sub.Tensor, x, shift))
    dims = [dim] if isinstance(dim, int) else list(dim)
    return powers, call(aten.sum.dim_IntList, powers, dims, True)


def _softmax(call: _Running, x: Any, dim: int, half_to_float: bool = False) -> Any:
    powers, total = _exponentials(call, x, dim)
    return call(aten.div.Tensor, powers, total)


def _log_softmax(call: _Running, x: Any, dim: int, half_to_float: bool = False) -> Any:
    shifted = call(aten.sub.Tensor, x, x[0].amax(dim, keepdim=True).detach())
    _, total = _exponentials(call, x, dim)
    return call(aten.sub.Tensor, shifted, call(aten.log.default, total))


def _logsumexp(call: _Running, x: Any, dim: Any, keepdim: bool = False) -> Any:
    _, total = _exponentials(call, x, dim)
    found = call(aten.log.default, total)
    dims = [dim] if isinstance(dim, int) else list(dim)
    return found if keepdim else call(aten.squeeze.dims, found, dims)


def _vector_norm(
    call: _Running,
    x: Any,
    order: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: Any = None,
) -> Any:
    if order != 2 or dtype is not None:
        raise NoSeries(f"linalg_vector_norm of order {order}")
    dims = list(range(x[0].dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    squares = call(aten.mul.Tensor, x, x)
    return call(aten.sqrt.default, call(aten.sum.dim_IntList, squares, dims, keepdim))


def _mish(call: _Running, x: Any) -> Any:
    soft = call(aten.softplus.default, x)
    return call(aten.mul.Tensor, x, call(aten.tanh.default, soft))


def _log_sigmoid(call: _Running, x: Any) -> Any:
    soft = call(aten.softplus.default, call(aten.neg.default, x))
    value, series = call(aten.neg.default, soft)
    return value, Series(tuple(None if term is None else (term, None) for term in series.terms))


RULES_OF_SERIES: dict[Any, Callable[[Jets, Any, Any, tuple, dict, tuple], Series]] = {
    **dict.fromkeys(BILINEAR, _bilinear),
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.div.Tensor: _div,
    aten.pow.Tensor_Scalar: _pow,
    aten._softmax.default: _by_parts(_softmax),
    aten._log_softmax.default: _by_parts(_log_softmax),
    aten.logsumexp.default: _by_parts(_logsumexp),
    aten.linalg_vector_norm.default: _by_parts(_vector_norm),
    aten.mish.default: _by_parts(_mish),
    aten.log_sigmoid_forward.default: _by_parts(_log_sigmoid),
}
