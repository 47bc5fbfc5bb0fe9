"""Linear solves and log determinants through an LU factorisation that carries derivatives.

PyTorch's operators hand the factors that they have computed to their derivative formulas as
constants. The first derivative is right; in forward mode, whatever differentiates the formula once
more (a `jvp` of a `jvp`, the gradient of a `jvp`, the third derivative of a Hessian-vector product)
misses how the factors move. The rules of `linalg_lu_factor_ex` and `linalg_lu_solve` themselves are
right to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from passes import everywhere

aten = torch.ops.aten


def solve(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what ``_linalg_solve_ex`` does: the solution, factors, pivots, and where it failed.

    Args:
        a: Matrices, shape (*batch, n, n).
        b: Right sides, shape (*batch, n, k), or vectors, shape (*batch, n).
        left: Whether ``a x = b``; else ``x a = b``.
        check_errors: Whether a singular matrix is an error.
    """
    lu, pivots, info = aten.linalg_lu_factor_ex.default(a, check_errors=check_errors)
    is_vector = b.ndim == 1 or (a.ndim - 1 == b.ndim and b.shape == a.shape[:-1])
    right = b.unsqueeze(-1) if is_vector else b
    x = aten.linalg_lu_solve.default(lu, pivots, right, left=left)
    return (x.squeeze(-1) if is_vector else x), lu, pivots, info


def slogdet(a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do what ``_linalg_slogdet`` does: the sign, ``log |det a|``, the factors and the pivots.

    Args:
        a: Matrices, shape (*batch, n, n).
    """
    lu, pivots, _ = aten.linalg_lu_factor_ex.default(a)
    diagonal = lu.diagonal(dim1=-2, dim2=-1)
    unmoved = torch.arange(1, a.shape[-1] + 1, device=a.device, dtype=pivots.dtype)
    parity = 1 - 2 * ((pivots != unmoved).sum(-1) % 2)
    return diagonal.sgn().prod(-1) * parity, diagonal.abs().log().sum(-1), lu, pivots


def _solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    return solve(a, b, left=left, check_errors=True)[0]


def _solve_ex(
    a: Tensor, b: Tensor, *, left: bool = True, check_errors: bool = False
) -> tuple[Tensor, Tensor]:
    x, _, _, info = solve(a, b, left=left, check_errors=check_errors)
    return x, info


def _slogdet(a: Tensor) -> tuple[Tensor, Tensor]:
    return slogdet(a)[:2]


def _logdet(a: Tensor) -> Tensor:
    sign, logarithm = _slogdet(a)
    return logarithm if a.is_complex() else torch.where(sign < 0, torch.nan, logarithm)


def _det(a: Tensor) -> Tensor:
    found = everywhere.determinant(a)
    return torch.linalg.det(a) if found is NotImplemented else found[0]


# What a loss calls, in place of which the same number is computed with right derivatives.
FUNCTIONS: dict[Any, Any] = {
    torch.linalg.solve: _solve,
    torch.linalg.solve_ex: _solve_ex,
    torch.linalg.slogdet: _slogdet,
    torch.slogdet: _slogdet,
    torch.logdet: _logdet,
}
METHODS = {"slogdet": _slogdet, "logdet": _logdet}
# By its name: Dynamo sees that it moves, so that it is written out later.
DETERMINANT: dict[Any, Any] = {torch.linalg.det: _det, torch.det: _det, "det": _det}
