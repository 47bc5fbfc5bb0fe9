"""Which operators are taken apart while a graph is traced.

Backward operators become plain arithmetic, because most of them have no forward-mode rule; norms become sums, because their
backward operators hide what can be shared. Operators that `passes.tangent_rules` differentiates as they are stay whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._ops import OpOverload

aten = torch.ops.aten

_NORMS = (
    aten.native_layer_norm,
    aten.native_group_norm,
    aten.native_batch_norm,
    aten._native_batch_norm_legit,
    aten._native_batch_norm_legit_functional,
    aten._native_batch_norm_legit_no_training,
    aten._batch_norm_with_update_functional,
    aten._batch_norm_no_update,
    aten.batch_norm_backward,
    aten.linalg_vector_norm,
    aten.max_pool2d_with_indices_backward,
)


def _is_dense(x: Tensor) -> bool:
    """Whether a tensor made like ``x`` has the strides of ``x``."""
    return torch._prims_common.is_non_overlapping_and_dense(x)


def _draw_like(name: str) -> Callable[..., Any]:
    """Make ``rand_like(x)`` a draw of a shape, so that it does not seem to depend on the value of ``x``.

    The generator fills memory in order, so this is the same draw for contiguous tensors only; others keep the operator.
    """

    def draw(x: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        if not x.is_contiguous():
            return NotImplemented
        make = getattr(torch, name)
        return make(x.shape, dtype=dtype or x.dtype, device=device or x.device)

    return draw


def _full_like(
    x: Tensor, value: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Make a constant of a shape, so that it does not seem to depend on the value of ``x``."""
    return torch.full(x.shape, value, dtype=dtype or x.dtype, device=device or x.device)


def _empty_like(x: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """Make an empty tensor of a shape; strides are kept because a draw fills memory in order."""
    dtype, device = dtype or x.dtype, device or x.device
    if x.is_contiguous() or not _is_dense(x):
        return torch.empty(x.shape, dtype=dtype, device=device)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device)


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Draw the mask as eager's composite dropout does."""
    if not train or p == 0:
        return x.clone(), torch.ones(x.shape, dtype=torch.bool, device=x.device)
    if p == 1:
        return torch.zeros_like(x), torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    kept = torch.bernoulli(_empty_like(x), 1 - p)
    return x * (kept / (1 - p)), kept.to(torch.bool)


@functools.cache
def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Return the table used by every trace."""
    table: dict[Any, Any] = dict(core_aten_decompositions())
    table.update(get_decompositions(_NORMS))
    table.pop(aten.max_pool2d_with_indices_backward.default, None)
    # As an alias it would be lost; in what a user wrote it stops gradients.
    table.pop(aten.detach.default, None)
    table[aten.rand_like.default] = _draw_like("rand")
    table[aten.randn_like.default] = _draw_like("randn")
    table[aten.full_like.default] = _full_like
    table[aten.zeros_like.default] = lambda x, **k: _full_like(x, 0, **k)
    table[aten.ones_like.default] = lambda x, **k: _full_like(x, 1, **k)
    table[aten.empty_like.default] = _empty_like
    table[aten.native_dropout.default] = _dropout
    return table
