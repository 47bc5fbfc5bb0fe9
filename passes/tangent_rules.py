"""The tangent of every operator, by family.

``out = op(x, …)`` moves with ``ẋ`` as ``op'(x) ẋ``. Families first: operators whose derivative is
zero, those linear in the tensors that move, those linear in each of two tensors, elementwise ones
(``ẋ`` times a derivative); a rule of its own is the last resort. An operator without a row gets
PyTorch's own forward-mode rule for that operator.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from passes.custom_rules import CUSTOM
from passes.everywhere import select_scatter
from passes.tangent_tables import BILINEAR, ELEMENTWISE, FROM_BACKWARD, LINEAR, ZERO
from passes.versions import CLAMP_MOVES_AT_A_BOUND

aten = torch.ops.aten
_functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


class NoRule(Exception):
    """An operator that can not be differentiated in forward mode."""

    def __init__(self, target: Any, reason: str) -> None:
        super().__init__(f"{target}: {reason}")
        self.target = target


def _plus(a: Any, b: Any) -> Any:
    """Add two tangents, either of which may be a zero that costs nothing."""
    if a is None:
        return b
    return a if b is None else a + b


def _grown(tangent: Tensor | None, like: Tensor) -> Tensor | None:
    """Broadcast a tangent to its result's shape and type, where an operator broadcast its
    argument."""
    if tangent is None:
        return None
    if tangent.dtype != like.dtype:
        tangent = tangent.to(like.dtype)
    return tangent if tangent.shape == like.shape else tangent.expand(like.shape)


def _linear(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
    moved = list(args)
    for position in LINEAR[target]:
        if position < len(args):
            moved[position] = pytree.tree_map(
                lambda primal, tangent: _or_zeros(primal, tangent),
                args[position],
                _like_structure(args[position], along[position]),
            )
    if target is aten.select_scatter.default and _functorch.peek_interpreter_stack() is not None:
        target = select_scatter
    return target(*moved, **kwargs)


def _like_structure(primal: Any, tangent: Any) -> Any:
    if isinstance(primal, (list, tuple)) and tangent is None:
        return [None] * len(primal)
    return tangent


def _or_zeros(primal: Any, tangent: Any) -> Any:
    if tangent is not None:
        return tangent
    return torch.zeros_like(primal) if isinstance(primal, Tensor) else 0


def _add(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Tensor | None:
    """``a ± αb``, without the zero of the side that does not move."""
    scale = kwargs.get("alpha", 1) * (-1 if target is aten.sub.Tensor else 1)
    left, right = along[0], along[1]
    if right is not None and scale != 1:
        right = -right if scale == -1 else right * scale
    return _grown(_plus(left, right), out)


def _where(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Tensor:
    condition, *_ = args
    _, on_true, on_false = along
    zero = torch.zeros((), dtype=out.dtype, device=out.device)
    moved = torch.where(
        condition, zero if on_true is None else on_true, zero if on_false is None else on_false
    )
    grown = _grown(moved, out)
    assert grown is not None
    return grown


def _scalar_shift(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
    return _grown(along[0], out)


def _reversed_difference(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
    """``b − αx``: what ``1 - x`` is."""
    alpha = args[2] if len(args) > 2 else kwargs.get("alpha", 1)
    return _grown(-along[0] if alpha == 1 else along[0] * -alpha, out)


def _bilinear(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
    total = None
    for position in BILINEAR[target]:
        if along[position] is None:
            continue
        moved = list(args)
        moved[position] = along[position]
        total = _plus(total, target(*moved, **kwargs))
    return _grown(total, out) if isinstance(out, Tensor) else total


def _div(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return None
    _, b = args
    above, below = along
    top = None if above is None else above / b
    bottom = None if below is None else -(below / b) * out
    return _grown(_plus(top, bottom), out)


def _pow_scalar(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
    x, n = args
    if n == 0:
        return None
    factor = 2 * x if n == 2 else n * aten.pow.Tensor_Scalar(x, n - 1)
    return along[0] if n == 1 else along[0] * factor


def _addmm(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
    """``β·input + α·a@b``."""
    product = aten.mm if target is aten.addmm.default else aten.bmm
    _, a, b = args
    beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
    left = None if along[1] is None else product(along[1], b)
    right = None if along[2] is None else product(a, along[2])
    total = _plus(left, right)
    if total is not None and alpha != 1:
        total = total * alpha
    shift = along[0]
    if shift is not None and beta != 1:
        shift = shift * beta
    return _grown(_plus(shift, total), out)


def _convolution(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
    x, weight, _, *options = args
    dx, dweight, dbias, *_ = along
    total = None
    if dx is not None:
        total = target(dx, weight, None, *options)
    if dweight is not None:
        total = _plus(total, target(x, dweight, None, *options))
    if dbias is not None:
        shape = [1, -1] + [1] * (out.dim() - 2)
        total = _plus(total, dbias.view(shape))
    return _grown(total, out)


def _convolution_backward(
    target: Any, out: Any, args: tuple, kwargs: dict, along: tuple
) -> tuple[Any, Any, Any]:
    """Bilinear per result: the input's gradient in (grad, weight), the weight's in (grad, input),
    the bias' in grad alone.

    One call per result that is wanted, so that no call computes two gradients where one is used.
    """
    grad, x, weight, *options, mask = args
    dgrad, dx, dweight, *_ = along
    total: list[Any] = [None, None, None]

    def call(result: int, g: Tensor, i: Tensor, w: Tensor) -> None:
        only = [result == k for k in range(3)]
        total[result] = _plus(total[result], target(g, i, w, *options, only)[result])

    if mask[0]:
        if dgrad is not None:
            call(0, dgrad, x, weight)
        if dweight is not None:
            call(0, grad, x, dweight)
    if mask[1]:
        if dgrad is not None:
            call(1, dgrad, x, weight)
        if dx is not None:
            call(1, grad, dx, weight)
    if mask[2] and dgrad is not None:
        total[2] = dgrad.sum([0, *range(2, dgrad.dim())])
    return total[0], total[1], total[2]


def _softmax(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Tensor:
    scaled = out * along[0]
    return scaled - out * scaled.sum(args[1], keepdim=True)


def _log_softmax(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Tensor:
    return along[0] - (out.exp() * along[0]).sum(args[1], keepdim=True)


def _logcumsumexp(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Tensor:
    """``ẏ = e^(−y) Σ e^x ẋ`` over what comes before, as the difference of two sums of logarithms.

    PyTorch's own rule shifts the sum by 1e-13.
    """
    x, dim = args
    lowest = torch.finfo(x.dtype).min

    def part(sign: int) -> Tensor:
        given = sign * along[0]
        logarithm = torch.where(given > 0, torch.where(given > 0, given, 1).log(), lowest)
        return (aten.logcumsumexp.default(x + logarithm, dim) - out).exp()

    return part(1) - part(-1)


def _max_pool(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> tuple[Any, None]:
    """The tangent is read where the maximum was found."""
    pooled, indices = out
    flat = along[0].flatten(-2).gather(-1, indices.flatten(-2))
    return flat.view(pooled.shape), None


def _lu_unpack(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> tuple:
    """The two triangles move as the matrix does that held them; a permutation does not."""
    rank = min(args[0].shape[-2:])
    lower, upper = along[0][..., :, :rank].tril(-1), along[0][..., :rank, :].triu()
    return None, lower, upper


def _along_indices(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> tuple:
    """``max``, ``min``, ``sort``, ``topk``, ``cummax`` along a dimension: the tangent follows the
    indices."""
    dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
    if target is aten.topk.default:
        dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    keep = args[2] if target in (aten.max.dim, aten.min.dim) and len(args) > 2 else None
    indices = out[1]
    if target in (aten.max.dim, aten.min.dim) and not keep and along[0].dim():
        return along[0].gather(dim, indices.unsqueeze(dim)).squeeze(dim), None
    return (along[0].gather(dim, indices) if along[0].dim() else along[0]), None


def _extremum(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Tensor:
    """``amax``/``amin``: equal extrema share the derivative evenly, as in reverse mode."""
    x = args[0]
    dims = list(args[1]) if len(args) > 1 and args[1] else list(range(x.dim()))
    keep = bool(args[2]) if len(args) > 2 else False
    full = out if keep else target(x, dims, True)
    at = (x == full).to(x.dtype)
    share = at / at.sum(dims, keepdim=True)
    return (along[0] * share).sum(dims, keepdim=keep)


def _larger(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
    """``maximum``/``minimum``: equal arguments take half each, as in reverse mode."""
    a, b = args
    first = a > b if target is aten.maximum.default else a < b
    weight = torch.where(first, 1.0, torch.where(a == b, 0.5, 0.0)).to(out.dtype)
    left = None if along[0] is None else along[0] * weight
    right = None if along[1] is None else along[1] * (1 - weight)
    return _grown(_plus(left, right), out)


def _clamp(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
    """``clamp`` to numbers: on a bound as in reverse mode."""
    x = args[0]
    names = {aten.clamp_min.default: ("min",), aten.clamp_max.default: ("max",)}
    bounds = dict(zip(names.get(target, ("min", "max")), args[1:], strict=False)) | kwargs
    above, below = (torch.ge, torch.le) if CLAMP_MOVES_AT_A_BOUND else (torch.gt, torch.lt)
    inside = torch.ones_like(x, dtype=torch.bool)
    if bounds.get("min") is not None:
        inside = inside & above(x, bounds["min"])
    if bounds.get("max") is not None:
        inside = inside & below(x, bounds["max"])
    return torch.where(inside, along[0], 0)


def _eigh(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
    """``λ̇ᵢ = (Vᵀ Ȧ V)ᵢᵢ``, ``V̇ = V (Vᵀ Ȧ V / E)`` with ``Eᵢⱼ = λⱼ − λᵢ`` and nothing on the
    diagonal.

    PyTorch's own rule divides by the zeros of that diagonal before it puts zeros there, so that
    the derivative of the rule is not a number.
    """
    values, vectors = out
    inner = vectors.mT @ along[0] @ vectors
    on_diagonal = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    gaps = torch.where(on_diagonal, 1, values.unsqueeze(-2) - values.unsqueeze(-1))
    turned = torch.where(on_diagonal, 0, inner) / gaps
    return inner.diagonal(0, -2, -1), vectors @ turned


# Operators that read one triangle of a symmetric matrix. PyTorch's gradient of them is symmetric:
# that of the function of ``(A + Aᵀ)/2``, and so has to be what moves along any direction.
SYMMETRIC = {aten._linalg_eigh.default, aten.linalg_cholesky_ex.default}


def _symmetric(x: Tensor | None) -> Tensor | None:
    return None if x is None else (x + x.mH) / 2


# Rules that hold for complex tensors too; the formulas of all others are those of real numbers.
REAL_LINEAR = {
    *LINEAR,
    *BILINEAR,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.add.Scalar,
    operator.getitem,
}

RULES: dict[Any, Callable[[Any, Any, tuple, dict, tuple], Any]] = {
    **dict.fromkeys(LINEAR, _linear),
    **dict.fromkeys(BILINEAR, _bilinear),
    aten.add.Tensor: _add,
    aten.sub.Tensor: _add,
    aten.add.Scalar: _scalar_shift,
    aten.sub.Scalar: _scalar_shift,
    aten.rsub.Scalar: _reversed_difference,
    aten.where.self: _where,
    aten.div.Tensor: _div,
    aten.pow.Tensor_Scalar: _pow_scalar,
    aten.addmm.default: _addmm,
    aten.baddbmm.default: _addmm,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
    aten._softmax.default: _softmax,
    aten._log_softmax.default: _log_softmax,
    aten.logcumsumexp.default: _logcumsumexp,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.lu_unpack.default: _lu_unpack,
    aten.amax.default: _extremum,
    aten.amin.default: _extremum,
    aten.maximum.default: _larger,
    aten.minimum.default: _larger,
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    **dict.fromkeys(
        (aten.max.dim, aten.min.dim, aten.sort.default, aten.topk.default), _along_indices
    ),
}


def tangent_of(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
    """Return the tangent of ``out = target(*args, **kwargs)``.

    Args:
        target: The operator.
        out: Its result, already computed.
        args: Values of the arguments.
        kwargs: Values of the keyword arguments (none of which moves).
        along: Tangents of ``args``, None where an argument does not move.

    Returns:
        A tangent, a tuple of tangents for an operator with several results, or None for zero.

    Raises:
        NoRule: There is no rule for the operator, here or in PyTorch.
    """
    if target is operator.getitem:
        tangent = along[0][args[1]]
        if isinstance(tangent, NotDifferentiable):
            raise NoRule(tangent.target, f"its result {args[1]} has no derivative")
        return tangent
    if not _can_move(out) or (target in ZERO and not _is_complex(out)):
        return None
    if target in SYMMETRIC:
        along = (_symmetric(along[0]), *along[1:])
    if target not in REAL_LINEAR and _is_complex([out, args]):
        return _pytorch_rule(target, out, args, kwargs, along)
    if target in CUSTOM:
        return CUSTOM[target].tangent(target, out, args, kwargs, along)
    if target is aten._linalg_eigh.default and out[1].numel():  # vectors may be left out
        return _eigh(target, out, args, kwargs, along)
    if target in RULES:
        return RULES[target](target, out, args, kwargs, along)
    if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
        raise NoRule(target, "a random draw is not repeated for a tangent")
    if target in FROM_BACKWARD:
        return FROM_BACKWARD[target](along[0], out, *args, **kwargs)
    if target in ELEMENTWISE:
        return along[0] * ELEMENTWISE[target](out, args[0])
    return _pytorch_rule(target, out, args, kwargs, along)


def _is_complex(values: Any) -> bool:
    return any(isinstance(x, Tensor) and x.dtype.is_complex for x in pytree.tree_leaves(values))


def _can_move(out: Any) -> bool:
    leaves = out if isinstance(out, (tuple, list)) else [out]
    return any(
        isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex) for x in leaves
    )


class NotDifferentiable:
    """In place of the tangent of a result that has none in PyTorch, though it is not constant."""

    def __init__(self, target: Any) -> None:
        self.target = target


def _pytorch_rule(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
    """Apply PyTorch's own forward-mode rule for one operator."""
    if _functorch.peek_interpreter_stack() is not None and isinstance(out, Tensor):
        return _pytorch_rule_inside_transform(target, args, kwargs, along)
    try:
        with forward_ad.dual_level():
            dual = pytree.tree_map(
                lambda primal, tangent: (
                    primal
                    if tangent is None
                    else forward_ad.make_dual(primal, tangent.expand_as(primal))
                ),
                list(args),
                [_like_structure(a, t) for a, t in zip(args, along, strict=True)],
                is_leaf=lambda x: x is None,
            )
            moved = target(*dual, **kwargs)
            tangents = pytree.tree_map_only(
                Tensor, lambda x: forward_ad.unpack_dual(x).tangent, moved
            )
    except (RuntimeError, NotImplementedError) as error:
        raise NoRule(target, str(error).splitlines()[0]) from error
    if not isinstance(out, (tuple, list)):
        if tangents is None:
            raise NoRule(target, "PyTorch gives its result no tangent")
        return tangents
    # A factorisation kept for the backward pass is not differentiated; it is not constant either.
    return tuple(
        NotDifferentiable(target) if t is None and _can_move(value) else t
        for value, t in zip(out, tangents, strict=True)
    )


def _pytorch_rule_inside_transform(target: Any, args: tuple, kwargs: dict, along: tuple) -> Tensor:
    """Apply PyTorch's rule where directions are a batch, which dual tensors cannot hold."""
    flat, spec = pytree.tree_flatten(list(args))
    directions, _ = pytree.tree_flatten(
        [_like_structure(a, t) for a, t in zip(args, along, strict=True)],
        is_leaf=lambda x: x is None,
    )
    assert len(flat) == len(directions), f"{target}: tangents do not fit its arguments"
    moving = {i: v for i, v in enumerate(directions) if v is not None}

    def apply(*primals: Tensor) -> Tensor:
        given = dict(zip(moving, primals, strict=True))
        values = [given.get(i, value) for i, value in enumerate(flat)]
        return target(*pytree.tree_unflatten(values, spec), **kwargs)

    primals = tuple(flat[i] for i in moving)
    tangents = tuple(v.expand_as(x) for v, x in zip(moving.values(), primals, strict=True))
    try:
        return torch.func.jvp(apply, primals, tangents, strict=True)[1]
    except (RuntimeError, NotImplementedError) as error:
        raise NoRule(target, str(error).splitlines()[0]) from error
