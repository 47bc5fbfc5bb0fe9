"""Which operators are taken apart while a graph is traced: next to none before autograd has seen
them, most after.

Backward operators become plain arithmetic, because most of them have no forward-mode rule; norms
become sums, because their backward operators hide what can be shared. Operators that
`passes.tangent_rules` differentiates as they are stay whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._ops import OpOverload

from passes import everywhere, factorised

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
)


def _is_dense(x: Tensor) -> bool:
    """Whether a tensor made like ``x`` has the strides of ``x``."""
    expected = 1
    for dim in sorted(range(x.dim()), key=x.stride):
        if x.shape[dim] != 1 and x.stride(dim) != expected:
            return False
        expected *= x.shape[dim]
    return True


def _draw_like(name: str) -> Callable[..., Any]:
    """Make ``rand_like(x)`` a draw of a shape, so that it does not seem to depend on the value of
    ``x``.

    The generator fills memory in order, so this is the same draw for contiguous tensors only;
    others keep the operator.
    """

    def draw(x: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Any:
        if not x.is_contiguous():
            return NotImplemented
        make = getattr(torch, name)
        return make(x.shape, dtype=dtype or x.dtype, device=device or x.device)

    return draw


def _full_like(x: Tensor, value: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """Make a constant of a shape, so that it does not seem to depend on the value of ``x``."""
    return torch.full(x.shape, value, dtype=dtype or x.dtype, device=device or x.device)


def _new_full(
    x: Tensor, size: Any, value: Any, *, dtype: Any = None, device: Any = None, **_: Any
) -> Tensor:
    """Make a constant of a shape, so that it does not seem to depend on ``x``: a derivative that is
    only asked for its type would be part of what it is a seed of."""
    return torch.full(size, value, dtype=dtype or x.dtype, device=device or x.device)


def _empty_like(x: Tensor, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """Make an empty tensor of a shape; strides are kept because a draw fills memory in order."""
    dtype, device = dtype or x.dtype, device or x.device
    if x.is_contiguous() or not _is_dense(x):
        return torch.empty(x.shape, dtype=dtype, device=device)
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device)


def scaled_mask(x: Tensor, p: float, *, in_memory_order: bool = True) -> Tensor:
    """Draw dropout's mask for ``x``, already divided by ``1 - p``, as eager draws it.

    The generator hands out one number per element: in the order of memory, or inside of a
    `torch.func` transform in the order of indices.
    """
    order = list(range(x.dim()))
    if in_memory_order and not x.is_contiguous() and _is_dense(x):
        order.sort(key=lambda d: -x.stride(d))
    shape = [x.shape[d] for d in order]
    if x.device.type == "cpu":
        kept = torch.bernoulli(torch.empty(shape, dtype=x.dtype, device=x.device), 1 - p)
        mask = kept / (1 - p)
    else:
        mask, _ = torch.native_dropout(torch.ones(shape, dtype=x.dtype, device=x.device), p, True)
    back = [order.index(d) for d in range(x.dim())]
    return mask.permute(back)


def _native_dropout(x: Tensor, p: float, train: bool | None) -> Any:
    if x.device.type != "cpu" or not train or p in (0, 1):
        return NotImplemented
    mask = scaled_mask(x, p)
    return x * mask, mask != 0


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Give what ``target`` holds after ``target.copy_(source)``: the functional form has no
    derivative in PyTorch."""
    return source.to(target.dtype).expand(target.shape).clone()


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> tuple[Tensor, Tensor]:
    return weight_norm(v, g, dim), torch.norm_except_dim(v, 2, dim)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """Do what `torch._weight_norm` does."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _scatter(name: str) -> Callable[..., Any]:
    """Write into a complex tensor by its real and imaginary parts: PyTorch's operator has no
    derivative there."""

    def scatter(x: Tensor, source: Tensor, dim: int = 0, *place: Any) -> Any:
        if not x.is_complex():
            return NotImplemented
        parts = [torch.view_as_real(part.resolve_conj()) for part in (x, source)]
        return torch.view_as_complex(getattr(torch, name)(*parts, dim % x.dim(), *place))

    return scatter


_SCATTERED = {
    aten.slice_scatter.default: _scatter("slice_scatter"),
    # By its parts, as PyTorch has them, it is a choice by an index that is compared; that all else
    # is zero is lost.
    aten.select_scatter.default: _scatter("select_scatter"),
}

_PLAIN: dict[Any, Callable[..., Any]] = {
    **_SCATTERED,
    aten.rand_like.default: _draw_like("rand"),
    aten.randn_like.default: _draw_like("randn"),
    aten.full_like.default: _full_like,
    aten.zeros_like.default: lambda x, **options: _full_like(x, 0, **options),
    aten.ones_like.default: lambda x, **options: _full_like(x, 1, **options),
    aten.empty_like.default: _empty_like,
    aten.new_full.default: _new_full,
    aten.new_zeros.default: lambda x, size, **options: _new_full(x, size, 0, **options),
    aten.new_ones.default: lambda x, size, **options: _new_full(x, size, 1, **options),
    aten.copy.default: _copy,
    aten._efficientzerotensor.default: torch.zeros,
    aten.native_dropout.default: _native_dropout,
    # PyTorch's own decomposition reads an index of shape () as a number.
    aten.take.default: lambda x, index: x.reshape(-1)[index.reshape(-1)].reshape(index.shape),
    aten.trace.default: lambda x: x.diagonal().sum(),  # its backward reads an index as a number
}


@functools.cache
def before_autograd() -> dict[OpOverload, Callable[..., Any]]:
    """Return the table for graphs that autograd still has to differentiate.

    Other operators stay whole: one that was taken apart would be differentiated by its parts, and
    at the points where it has no derivative (the norm of zero) their convention is not the
    operator's. Normalisation is smooth, and taken apart because PyTorch's own third derivative of
    `layer_norm` and `batch_norm` is wrong: their double backward formulas are differentiated with
    the saved mean and deviation as constants. So is the second derivative of `weight_norm`, and
    what differentiates forward mode through `solve` and `slogdet`.
    """
    table: dict[Any, Any] = dict(get_decompositions(_NORMS))
    written_out = {
        aten._weight_norm_interface.default: _weight_norm,
        aten._linalg_det.default: everywhere.determinant,
        aten.prod.default: everywhere.product,
        aten.prod.dim_int: everywhere.product,
        aten.cumprod.default: everywhere.cumulative_product,
        aten.logcumsumexp.default: everywhere.logarithmic_sum,
        aten.sinc.default: everywhere.sinc,
        aten.mish.default: everywhere.mish,
        aten._linalg_solve_ex.default: factorised.solve,
        aten._linalg_slogdet.default: factorised.slogdet,
    }
    return table | _PLAIN | written_out


@functools.cache
def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """Return the table for what autograd has recorded."""
    table: dict[Any, Any] = dict(core_aten_decompositions())
    table.update(get_decompositions(_NORMS))
    # By its parts a draw would hand out other numbers.
    drawn = [op for op in table if torch.Tag.nondeterministic_seeded in getattr(op, "tags", ())]
    for op in drawn:
        del table[op]
    table.update(_PLAIN)
    table[aten.log_sigmoid_backward.default] = everywhere.log_sigmoid_backward
    table[aten.softplus.default] = everywhere.softplus
    table[aten.softplus_backward.default] = everywhere.softplus_backward
    for kept in (
        aten.max_pool2d_with_indices_backward.default,
        aten.linalg_vector_norm.default,
        # As an alias it would be lost; in what a user wrote it stops gradients.
        aten.detach.default,
    ):
        table.pop(kept, None)
    return table
