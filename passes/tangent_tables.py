"""Families of operators by what their derivative is: the tables behind `passes.tangent_rules`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions

from passes.markers import STOP, stop

aten = torch.ops.aten

# Piecewise constant, boolean, integer or independent of the values: no tangent.
ZERO = {
    STOP, stop, aten.sign.default, aten.floor.default, aten.ceil.default, aten.round.default,
    aten.trunc.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.empty_like.default, aten.new_zeros.default, aten.new_full.default, aten.new_ones.default,
    aten.new_empty.default, aten.bernoulli.p, aten.bernoulli.default, aten.rand_like.default,
    aten.randn_like.default, aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int,
    aten.floor_divide.default, aten.heaviside.default, aten.sgn.default,
}  # fmt: skip

# Linear in all tensors that move, taken together: the same operator on the tangents, zeros where
# nothing moves. Position of the tensors that may move; all other arguments are repeated.
LINEAR: dict[Any, tuple[int, ...]] = {
    op: (0,)
    for op in (
        aten.alias.default, aten.as_strided.default, aten.clone.default,
        aten.constant_pad_nd.default, aten.cumsum.default, aten.detach.default,
        aten.diag_embed.default, aten.diagonal.default, aten.expand.default, aten.flip.default,
        aten.gather.default, aten.index.Tensor, aten.index_select.default,
        aten.lift_fresh_copy.default, aten.mean.default, aten.mean.dim, aten.neg.default,
        aten.permute.default, aten.roll.default, aten.repeat.default, aten.select.int,
        aten.slice.Tensor, aten.slice_backward.default, aten.select_backward.default,
        aten.embedding.default, aten.split.Tensor, aten.split_with_sizes.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.sum.default,
        aten.sum.dim_IntList, aten.t.default, aten.transpose.int, aten.tril.default,
        aten.triu.default, aten.unbind.int, aten.unfold.default, aten.unsqueeze.default,
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._to_copy.default,
        aten.mul.Scalar, aten.div.Scalar, aten.avg_pool2d.default, aten.avg_pool2d_backward.default,
        aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default,
        aten.avg_pool3d.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
        aten.embedding_dense_backward.default, aten.max_pool2d_with_indices_backward.default,
        aten.reflection_pad1d.default, aten.reflection_pad2d.default,
        aten.replication_pad2d.default, aten.col2im.default, aten.im2col.default, aten.real.default,
        aten.imag.default, aten.view_as_real.default, aten.view_as_complex.default,
        aten._conj.default, aten._unsafe_index.Tensor, aten.pixel_shuffle.default,
        aten.pixel_unshuffle.default,
    )
}  # fmt: skip
LINEAR |= {
    aten.where.self: (1, 2),
    aten.add.Tensor: (0, 1),
    aten.sub.Tensor: (0, 1),
    aten.slice_scatter.default: (0, 1),
    aten.select_scatter.default: (0, 1),
    aten.diagonal_scatter.default: (0, 1),
    aten.as_strided_scatter.default: (0, 1),
    aten.scatter_add.default: (0, 3),
    aten.scatter.src: (0, 3),
    aten.index_put.default: (0, 2),
    aten._unsafe_index_put.default: (0, 2),
    aten.index_add.default: (0, 3),
    aten.cat.default: (0,),
    aten.stack.default: (0,),
}

# Linear in each of two tensors: (position, position); every other argument is repeated.
BILINEAR = {
    aten.mul.Tensor: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.mv.default: (0, 1),
    aten.dot.default: (0, 1),
}

# ẋ times a derivative that is a formula in the result ``y`` and the argument ``x``.
ELEMENTWISE: dict[Any, Callable[[Tensor, Tensor], Any]] = {
    aten.exp.default: lambda y, x: y,
    aten.exp2.default: lambda y, x: y * 0.6931471805599453,
    aten.expm1.default: lambda y, x: y + 1,
    aten.log.default: lambda y, x: x.reciprocal(),
    aten.log2.default: lambda y, x: (x * 0.6931471805599453).reciprocal(),
    aten.log10.default: lambda y, x: (x * 2.302585092994046).reciprocal(),
    aten.log1p.default: lambda y, x: (x + 1).reciprocal(),
    aten.sin.default: lambda y, x: x.cos(),
    aten.cos.default: lambda y, x: -x.sin(),
    aten.tan.default: lambda y, x: 1 + y * y,
    aten.sinh.default: lambda y, x: x.cosh(),
    aten.cosh.default: lambda y, x: x.sinh(),
    aten.asin.default: lambda y, x: (1 - x * x).rsqrt(),
    aten.acos.default: lambda y, x: -(1 - x * x).rsqrt(),
    aten.atan.default: lambda y, x: (x * x + 1).reciprocal(),
    aten.asinh.default: lambda y, x: (x * x + 1).rsqrt(),
    aten.sqrt.default: lambda y, x: 0.5 / y,
    aten.rsqrt.default: lambda y, x: -0.5 * (y * y * y),
    aten.reciprocal.default: lambda y, x: -(y * y),
    aten.abs.default: lambda y, x: x.sgn(),
    aten.square.default: lambda y, x: 2 * x,
    aten.erf.default: lambda y, x: 1.1283791670955126 * (-(x * x)).exp(),
    aten.erfc.default: lambda y, x: -1.1283791670955126 * (-(x * x)).exp(),
}


def _in_parts(backward: Any) -> Callable[..., Tensor]:
    """Return what a backward operator is made of: PyTorch cannot differentiate this one."""
    return get_decompositions([backward])[backward]


# The derivative as PyTorch's own backward operator, applied to ẋ: rule(ẋ, y, x, *other arguments).
FROM_BACKWARD: dict[Any, Callable[..., Tensor]] = {
    aten.tanh.default: lambda t, y, x: aten.tanh_backward(t, y),
    aten.sigmoid.default: lambda t, y, x: aten.sigmoid_backward(t, y),
    aten.relu.default: lambda t, y, x: aten.threshold_backward(t, y, 0),
    aten.gelu.default: lambda t, y, x, **k: aten.gelu_backward(t, x, **k),
    aten.silu.default: lambda t, y, x: _in_parts(aten.silu_backward.default)(t, x),
    aten.softplus.default: lambda t, y, x, beta=1, threshold=20: aten.softplus_backward(
        t, x, beta, threshold
    ),
    aten.elu.default: lambda t, y, x, alpha=1, scale=1, input_scale=1: aten.elu_backward(
        t, alpha, scale, input_scale, False, x
    ),
    aten.leaky_relu.default: lambda t, y, x, slope=0.01: aten.leaky_relu_backward(
        t, x, slope, False
    ),
    aten.hardtanh.default: lambda t, y, x, low=-1, high=1: aten.hardtanh_backward(t, x, low, high),
    aten.hardswish.default: lambda t, y, x: aten.hardswish_backward(t, x),
    aten.hardsigmoid.default: lambda t, y, x: aten.hardsigmoid_backward(t, x),
    aten.mish.default: lambda t, y, x: _in_parts(aten.mish_backward.default)(t, x),
}
