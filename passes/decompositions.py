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


def _draw_like(name: str) -> Callable[..., Tensor]:
    """Make ``rand_like(x)`` a draw of a shape, so that it does not seem to depend on the value of ``x``."""

    def draw(x: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
        make = getattr(torch, name)
        return make(x.shape, dtype=dtype or x.dtype, device=device or x.device)

    return draw


def _dropout(x: Tensor, p: float, train: bool | None) -> tuple[Tensor, Tensor]:
    """Draw the mask as eager's composite dropout does."""
    if not train or p == 0:
        return x.clone(), torch.ones(x.shape, dtype=torch.bool, device=x.device)
    if p == 1:
        return torch.zeros_like(x), torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    kept = torch.bernoulli(torch.empty(x.shape, dtype=x.dtype, device=x.device), 1 - p)
    return x * (kept / (1 - p)), kept.to(torch.bool)


@functools.cache
def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Return the table used by every trace."""
    table: dict[Any, Any] = dict(core_aten_decompositions())
    table.update(get_decompositions(_NORMS))
    table.pop(aten.max_pool2d_with_indices_backward.default, None)
    table[aten.rand_like.default] = _draw_like("rand")
    table[aten.randn_like.default] = _draw_like("randn")
    table[aten.native_dropout.default] = _dropout
    return table
