"""Formulas whose derivatives of every order are right at every point, where PyTorch's are not.

PyTorch differentiates these functions by a formula that divides by what may be zero, and mends the
first derivative alone. Here a function is written in operators that are smooth at the point, so
that whoever differentiates it, in whatever mode and how often, gets what is true.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from passes.markers import STOP

aten = torch.ops.aten

WRITTEN_OUT = 4  # the largest matrix whose determinant is a sum of products


def determinant(a: Tensor) -> Any:
    """Return the determinant and PyTorch's factors, as ``_linalg_det`` does.

    Up to four rows it is the polynomial that it is by definition. Larger ones are turned by their
    own singular vectors ``A = U S Vᴴ``, taken as constants: ``det A = det U · det M · det Vᴴ`` with
    ``M = S + Uᴴ (A − A₀) V`` and ``A₀`` the value of ``A``. Where the rank is at least ``n − 4``
    the leading block of ``M`` is regular, and what remains is a determinant of four rows; where it
    is less, all derivatives up to the third vanish.

    Args:
        a: Matrices, shape (*batch, n, n).
    """
    n = a.shape[-1]
    if not isinstance(n, int) or n == 0:
        return NotImplemented
    value = _polynomial(a) if n <= WRITTEN_OUT else _turned(a)
    lu, pivots, _ = aten.linalg_lu_factor_ex.default(STOP(a))
    return value, lu, pivots


def _polynomial(a: Tensor) -> Tensor:
    """Return the determinant of up to four rows, by the minors of two of them."""
    n = a.shape[-1]
    if n == 1:
        return a[..., 0, 0].clone()
    if n == 2:
        return _minor(a, 0, 0, 1)
    if n == 3:
        first = a[..., 0, :]
        return (
            first[..., 0] * _minor(a, 1, 1, 2)
            - first[..., 1] * _minor(a, 1, 0, 2)
            + first[..., 2] * _minor(a, 1, 0, 1)
        )
    return (
        _minor(a, 0, 0, 1) * _minor(a, 2, 2, 3)
        - _minor(a, 0, 0, 2) * _minor(a, 2, 1, 3)
        + _minor(a, 0, 0, 3) * _minor(a, 2, 1, 2)
        + _minor(a, 0, 1, 2) * _minor(a, 2, 0, 3)
        - _minor(a, 0, 1, 3) * _minor(a, 2, 0, 2)
        + _minor(a, 0, 2, 3) * _minor(a, 2, 0, 1)
    )


def _minor(a: Tensor, row: int, i: int, j: int) -> Tensor:
    """Return the minor of two neighbouring rows and two columns."""
    upper, lower = a[..., row, :], a[..., row + 1, :]
    return upper[..., i] * lower[..., j] - upper[..., j] * lower[..., i]


def _turned(a: Tensor) -> Tensor:
    """Return the determinant of more than four rows, see `determinant`."""
    k = a.shape[-1] - WRITTEN_OUT
    fixed = STOP(a)
    u, s, vh = torch.linalg.svd(fixed)
    outer = torch.linalg.slogdet(u)[0] * torch.linalg.slogdet(vh)[0]
    moved = u.mH @ (a - fixed) @ vh.mH
    rest = s[..., k:]
    is_regular = s[..., k - 1] > 0
    leading = torch.where(is_regular.unsqueeze(-1), s[..., :k], 1)
    m11 = torch.diag_embed(leading).to(a.dtype) + moved[..., :k, :k]
    m22 = torch.diag_embed(rest).to(a.dtype) + moved[..., k:, k:]
    schur = m22 - moved[..., k:, :k] @ torch.linalg.solve(m11, moved[..., :k, k:])
    sign, logarithm = torch.linalg.slogdet(m11)
    value = outer * sign * logarithm.exp() * _polynomial(schur)
    return torch.where(is_regular, value, 0)


def select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    """Do what `torch.select_scatter` does.

    PyTorch's own batching rule writes ``src`` as often as ``input`` is wide, so that under a
    `torch.vmap` the derivative with respect to ``src`` is as many times too large.
    """
    start = index % input.shape[dim]
    return torch.slice_scatter(input, src.unsqueeze(dim), dim, start, start + 1)


def product(
    x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """Return ``Π x`` by halves: a polynomial, whose derivatives need no quotient by a zero."""
    n = x.numel() if dim is None else _length(x, dim)
    if not isinstance(n, int) or n == 0:
        return NotImplemented
    x = x if dtype is None else x.to(dtype)
    if x.dim() == 0:
        return x.clone()
    along = 0 if dim is None else dim
    x = x.reshape(-1) if dim is None else x
    if n == 1:
        x = x.clone()
    while n > 1:
        half = n // 2
        pairs = x.narrow(along, 0, half) * x.narrow(along, half, half)
        x = torch.cat([pairs, x.narrow(along, n - 1, 1)], along) if n % 2 else pairs
        n = half + n % 2
    return x if keepdim else x.squeeze(along)


def cumulative_product(x: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Any:
    """Return ``yᵢ = Π xⱼ, j ≤ i`` by doubling: a polynomial, as `product` is."""
    x = x if dtype is None else x.to(dtype)
    return _scan(x, dim, torch.mul)


def logarithmic_sum(x: Tensor, dim: int) -> Any:
    """Return ``yᵢ = log Σ exp xⱼ, j ≤ i`` by doubling."""
    return NotImplemented if x.is_complex() else _scan(x, dim, _log_add)


def _length(x: Tensor, dim: int) -> Any:
    return x.shape[dim] if x.dim() else 1


def _scan(x: Tensor, dim: int, join: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """Return ``yᵢ = join(x₀, …, xᵢ)`` along a dimension: after k steps it holds ``2ᵏ`` terms."""
    n = _length(x, dim)
    if not isinstance(n, int) or n == 0:
        return NotImplemented
    if n == 1:
        return x.clone()
    step = 1
    while step < n:
        joined = join(x.narrow(dim, step, n - step), x.narrow(dim, 0, n - step))
        x = torch.cat([x.narrow(dim, 0, step), joined], dim)
        step *= 2
    return x


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    """Return ``log(eᵃ + eᵇ)``; two of −∞ have derivative zero."""
    largest = STOP(torch.maximum(a, b))
    largest = torch.where(largest.isfinite(), largest, 0)
    total = (a - largest).exp() + (b - largest).exp()
    is_empty = total == 0
    logarithm = torch.where(is_empty, 1, total).log()
    return torch.where(is_empty, -math.inf, largest + logarithm)


def sinc(x: Tensor) -> Any:
    """Return ``sin(πx)/(πx)``, near zero ``Σ (−π²x²)ᵏ/(2k + 1)!``."""
    if not x.is_floating_point():
        return NotImplemented
    terms = [(-1) ** k * math.pi ** (2 * k) / math.factorial(2 * k + 1) for k in range(14)]
    near = x.abs() < 0.5
    series = _polynomial_of(torch.where(near, x, 0).square(), terms)
    scaled = torch.where(near, 1, x) * math.pi
    return torch.where(near, series, scaled.sin() / scaled)


def _polynomial_of(x: Tensor, terms: Sequence[float]) -> Tensor:
    """Return ``Σ cₖ xᵏ``."""
    total = torch.full_like(x, terms[-1])
    for term in reversed(terms[:-1]):
        total = total * x + term
    return total


def log_sigmoid_backward(cotangent: Tensor, x: Tensor, buffer: Tensor) -> Tensor:
    """Pull back through ``log σ(x)``, whose derivative is ``σ(−x)``: by ``|x|``, as PyTorch takes
    it apart, it would have a kink at zero. On each side in the form whose derivative keeps its
    digits."""
    return cotangent * torch.where(x < 0, 1 - torch.sigmoid(x), torch.sigmoid(-x))


def softplus(x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    """Return ``log(1 + exp(βx))/β``, whose derivative is finite where the exponential is not."""
    scaled = x * beta
    is_linear = scaled > threshold
    return torch.where(is_linear, x, torch.where(is_linear, 0, scaled).exp().log1p() / beta)


def softplus_backward(cotangent: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """Pull back through ``log(1 + exp(βx))/β``, without an exponential that can overflow."""
    scaled = x * beta
    return torch.where(scaled > threshold, cotangent, cotangent * torch.sigmoid(scaled))


def mish(x: Tensor) -> Tensor:
    """Return ``x tanh(softplus(x))``: by its parts it has derivatives at large numbers too."""
    return x * torch.nn.functional.softplus(x).tanh()
