"""Formulas whose derivatives of every order are right at every point, where PyTorch's are not.

PyTorch differentiates these functions by a formula that divides by what may be zero, and mends the
first derivative alone. Here a function is written in operators that are smooth at the point, so
that whoever differentiates it, in whatever mode and how often, gets what is true.
"""

from __future__ import annotations

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
