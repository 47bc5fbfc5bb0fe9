"""The operators that a portable graph may call: they compute, and do nothing else."""

from __future__ import annotations

import functools

import torch
from torch._ops import OpOverload

# Beside those that PyTorch itself calls the core of ATen.
_MORE = frozenset({
    "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d",
    "_adaptive_avg_pool3d_backward", "_cdist_backward", "_conj", "_conj_physical",
    "_embedding_bag", "_embedding_bag_dense_backward", "_euclidean_dist", "_fft_c2c", "_fft_c2r",
    "_fft_r2c", "_linalg_det", "_linalg_eigh", "_linalg_slogdet", "_linalg_solve_ex",
    "_linalg_svd", "_log_softmax", "_log_softmax_backward_data", "_softmax",
    "_softmax_backward_data", "_to_copy", "_trilinear", "_unsafe_index", "_unsafe_index_put",
    "_unsafe_view",
    "addbmm", "addcdiv", "addcmul", "addmm", "addmv", "addr", "alias", "angle",
    "as_strided_scatter", "atan2", "avg_pool2d", "avg_pool2d_backward", "avg_pool3d",
    "avg_pool3d_backward", "baddbmm", "bernoulli", "binary_cross_entropy",
    "binary_cross_entropy_backward", "bincount", "block_diag", "bmm", "broadcast_tensors",
    "bucketize", "cat", "cauchy", "celu", "cholesky", "cholesky_inverse", "cholesky_solve",
    "clamp_max", "clamp_min", "clone", "col2im", "complex", "constant_pad_nd",
    "convolution_backward", "copysign", "count_nonzero", "cross", "cummax", "cummin", "cumprod",
    "cumsum", "deg2rad", "detach", "diag_embed", "diagonal", "diagonal_backward", "diagonal_copy",
    "diagonal_scatter", "digamma", "dist", "dot", "elu_backward", "embedding_dense_backward",
    "empty_strided", "erf", "erfc", "erfinv", "exp2", "expand_as", "exponential", "eye",
    "fft_fft", "fft_ifft", "fft_irfft", "fft_rfft", "flip", "fmax", "fmin", "frac", "frexp",
    "full", "full_like", "gelu_backward", "geometric", "glu", "glu_backward", "grid_sampler_2d",
    "grid_sampler_2d_backward", "grid_sampler_3d", "grid_sampler_3d_backward", "hardsigmoid",
    "hardsigmoid_backward", "hardswish", "hardswish_backward", "hardtanh_backward", "heaviside",
    "histc", "huber_loss", "huber_loss_backward", "hypot", "i0", "igamma", "igammac", "im2col",
    "imag", "index_add", "index_copy", "index_fill", "index_reduce", "inverse", "isfinite",
    "isin", "isinf", "isnan", "isneginf", "isposinf", "kthvalue", "leaky_relu_backward", "lerp",
    "lgamma", "lift_fresh_copy", "linalg_cholesky_ex", "linalg_cross", "linalg_eig",
    "linalg_eigh", "linalg_householder_product", "linalg_inv_ex", "linalg_lu",
    "linalg_lu_factor_ex", "linalg_lu_solve", "linalg_matrix_exp", "linalg_pinv", "linalg_qr",
    "linalg_solve", "linalg_solve_triangular", "linalg_svd", "linalg_vector_norm", "linspace",
    "log2", "log_sigmoid_backward", "log_sigmoid_forward", "logaddexp", "logaddexp2",
    "logcumsumexp", "logit", "logspace", "logsumexp", "lu_unpack", "masked_fill",
    "masked_scatter", "masked_scatter_backward", "masked_select", "matmul", "max",
    "max_pool2d_with_indices_backward",
    "max_pool3d_with_indices_backward", "max_unpool2d", "max_unpool3d", "maximum", "median",
    "min", "minimum", "mode", "movedim", "mse_loss", "mse_loss_backward", "multinomial", "mv",
    "mvlgamma", "nan_to_num", "nanmedian", "nansum", "narrow", "native_batch_norm",
    "native_dropout", "native_dropout_backward", "native_group_norm", "native_layer_norm",
    "new_empty", "new_full", "new_ones", "new_zeros", "nextafter", "nll_loss2d_backward",
    "nll_loss2d_forward", "nll_loss_backward", "nll_loss_forward", "norm", "normal",
    "normal_functional", "ones", "ones_like", "outer", "permute_copy", "pixel_shuffle",
    "pixel_unshuffle", "polar", "polygamma", "prelu", "prod", "rad2deg", "rand", "rand_like",
    "randint", "randint_like", "randn", "randn_like", "randperm", "real",
    "reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward",
    "relu6", "renorm", "repeat_interleave", "replication_pad1d_backward",
    "replication_pad2d_backward", "replication_pad3d_backward", "reshape", "reshape_as", "rot90",
    "rrelu_with_noise", "rrelu_with_noise_functional", "scatter", "scatter_add", "scatter_reduce",
    "searchsorted", "select_backward", "select_scatter", "sgn", "sigmoid_backward", "silu",
    "silu_backward", "sinc", "slice_backward", "slice_scatter", "smooth_l1_loss",
    "smooth_l1_loss_backward", "softplus", "softplus_backward", "softshrink",
    "softshrink_backward", "sort", "special_bessel_j0", "special_bessel_j1", "special_entr",
    "special_erfcx", "special_i0e", "special_i1", "special_i1e", "special_log_ndtr",
    "special_modified_bessel_i0", "special_modified_bessel_i1", "special_ndtri",
    "special_xlog1py", "special_zeta", "split", "split_with_sizes", "square", "squeeze", "stack",
    "std", "std_mean", "sum", "sym_numel", "sym_size", "sym_stride", "t", "take", "tanh_backward",
    "tensor_split", "tensordot", "threshold", "threshold_backward", "tile", "trace", "transpose",
    "trapezoid", "triangular_solve", "tril", "triu", "trunc", "unbind", "unfold",
    "unfold_backward", "unsafe_split", "unsqueeze", "unsqueeze_copy", "upsample_bicubic2d",
    "upsample_bicubic2d_backward", "upsample_bilinear2d", "upsample_bilinear2d_backward",
    "upsample_linear1d", "upsample_linear1d_backward", "upsample_nearest1d",
    "upsample_nearest1d_backward", "upsample_nearest2d", "upsample_nearest2d_backward",
    "upsample_trilinear3d", "upsample_trilinear3d_backward", "vander", "var", "var_mean", "vdot",
    "view_as", "view_as_complex", "view_as_real", "where", "xlogy", "zeros", "zeros_like",
})  # fmt: skip

# Whatever PyTorch calls them: files, memory of others, and indices that nothing checks.
_NEVER = frozenset({"from_file", "empty_quantized", "set_data", "_sparse_coo_tensor_unsafe"})


@functools.cache
def operator_named(name: str) -> OpOverload | None:
    """Return an operator of the list by its full name, ``aten.mm.default``; None if it is none."""
    parts = name.split(".")
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        return None
    space, packet, overload = parts
    if space not in ("aten", "prims") or packet in _NEVER:
        return None
    found = getattr(getattr(torch.ops, space), packet, None)
    found = getattr(found, overload, None)
    if not isinstance(found, OpOverload) or found._schema.is_mutable:
        return None
    core = torch.Tag.core in found.tags
    return found if core or (space == "aten" and packet in _MORE) else None
