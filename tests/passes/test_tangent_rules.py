"""Every row of the rule tables against central differences in float64."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from passes import tangent_rules as tables
from passes.linearize import push_forward
from passes.markers import STOP, stop
from passes.tangent_rules import NoRule, tangent_of

aten = torch.ops.aten
STEP = 1e-6
TOLERANCE = 1e-7


@dataclass(frozen=True)
class Case:
    """An operator and arguments at which it is smooth."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def spread(*shape: int) -> Tensor:
    """Distinct values, none within 0.1 of another or of a multiple of 0.5: no kink is near."""
    count = math.prod(shape)
    values = torch.arange(count, dtype=torch.float64) - count // 2
    return (values + 0.27)[torch.randperm(count)].reshape(shape)


def uniform(*shape: int, low: float = 0.2, high: float = 0.9) -> Tensor:
    return low + (high - low) * torch.rand(shape, dtype=torch.float64)


def integers(*values: Any) -> Tensor:
    return torch.tensor(values)


def zero_cases() -> Iterator[Case]:
    x = spread(2, 3)
    yield Case(STOP, (x,))
    yield Case(stop, (x,))
    for op in ("sign", "floor", "ceil", "round", "trunc", "sgn"):
        yield Case(getattr(aten, op).default, (x,))
    for op in ("zeros_like", "ones_like", "empty_like", "rand_like", "randn_like"):
        yield Case(getattr(aten, op).default, (x,))
    for op in ("new_zeros", "new_ones", "new_empty"):
        yield Case(getattr(aten, op).default, (x, [2, 2]))
    yield Case(aten.full_like.default, (x, 2.0))
    yield Case(aten.new_full.default, (x, [2], 2.0))
    yield Case(aten.bernoulli.p, (x, 0.5))
    yield Case(aten.bernoulli.default, (uniform(2, 3),))
    yield Case(aten.sym_size.int, (x, 0))
    yield Case(aten.sym_numel.default, (x,))
    yield Case(aten.sym_stride.int, (x, 0))
    yield Case(aten.floor_divide.default, (x, 2 * spread(2, 3)))
    yield Case(aten.heaviside.default, (x, normal(2, 3)))


def linear_cases() -> Iterator[Case]:
    x, image, volume = normal(3, 4), normal(1, 4, 4, 4), normal(1, 1, 4, 4, 4)
    plane = normal(2, 3, 4)
    for op in ("alias", "clone", "detach", "lift_fresh_copy", "mean", "neg", "sum", "t"):
        yield Case(getattr(aten, op).default, (x,))
    for op in ("tril", "triu", "real", "imag", "_conj", "view_as_real", "diag_embed"):
        complex_only = op in ("imag", "_conj", "view_as_real")
        given = normal(3, 4, dtype=torch.complex128) if complex_only else x
        yield Case(getattr(aten, op).default, (given,))
    yield Case(aten.real.default, (normal(3, dtype=torch.complex128),))
    yield Case(aten.view_as_complex.default, (normal(3, 2),))
    yield Case(aten.as_strided.default, (x, [2, 2], [4, 2], 1))
    yield Case(aten.as_strided_scatter.default, (x, normal(2, 2), [2, 2], [4, 2], 1))
    yield Case(aten.constant_pad_nd.default, (x, [1, 2, 0, 1], 0.0))
    yield Case(aten.cumsum.default, (x, 1))
    yield Case(aten.diagonal.default, (x, 1))
    yield Case(aten.diagonal_scatter.default, (x, normal(3)))
    yield Case(aten.expand.default, (normal(3, 1), [2, 3, 4]))
    yield Case(aten.flip.default, (x, [0, 1]))
    yield Case(aten.gather.default, (x, 1, integers([0, 0], [3, 1], [2, 2])))
    yield Case(aten.index.Tensor, (x, [None, integers(0, 0, 3)]))
    yield Case(aten._unsafe_index.Tensor, (x, [integers(2, 0), integers(1, 3)]))
    yield Case(aten.index_select.default, (x, 0, integers(2, 2, 0)))
    yield Case(aten.index_put.default, (x, [integers(0, 2)], normal(2, 4)))
    yield Case(aten.index_put.default, (x, [integers(0, 0)], normal(4), True))
    yield Case(aten.index_put.default, (x, [None, integers(1, 1)], normal(3, 2), True))
    yield Case(aten._unsafe_index_put.default, (x, [integers(0, 0)], normal(2, 4), True))
    yield Case(aten.index_add.default, (x, 0, integers(2, 2), normal(2, 4)), {"alpha": 2})
    yield Case(aten.scatter.src, (x, 1, integers([0], [3], [2]), normal(3, 1)))
    yield Case(aten.scatter_add.default, (x, 1, integers([0, 0], [3, 1]), normal(2, 2)))
    yield Case(aten.select_scatter.default, (x, normal(4), 0, 1))
    yield Case(aten.slice_scatter.default, (x, normal(3, 2), 1, 0, 4, 2))
    yield Case(aten.mean.dim, (x, [0], True))
    yield Case(aten.sum.dim_IntList, (x, [1]))
    yield Case(
        aten.sum.dim_IntList, (normal(2, dtype=torch.float32), [0]), {"dtype": torch.float64}
    )
    yield Case(aten.permute.default, (plane, [2, 0, 1]))
    yield Case(aten.transpose.int, (plane, 0, 2))
    yield Case(aten.roll.default, (x, [1], [1]))
    yield Case(aten.repeat.default, (x, [2, 1]))
    yield Case(aten.select.int, (x, 0, 1))
    yield Case(aten.slice.Tensor, (x, 1, 0, 4, 2))
    yield Case(aten.slice_backward.default, (normal(3, 2), [3, 4], 1, 0, 4, 2))
    yield Case(aten.select_backward.default, (normal(4), [3, 4], 0, 1))
    yield Case(aten.embedding.default, (x, integers([0, 2], [2, 2])))
    yield Case(aten.embedding_dense_backward.default, (normal(2, 4), integers(0, 0), 3, -1, False))
    yield Case(aten.split.Tensor, (x, 3, 1))
    yield Case(aten.split_with_sizes.default, (x, [1, 3], 1))
    yield Case(aten.unbind.int, (x, 1))
    yield Case(aten.squeeze.default, (normal(1, 3, 1),))
    yield Case(aten.squeeze.dim, (normal(1, 3, 1), 0))
    yield Case(aten.squeeze.dims, (normal(1, 3, 1), [0, 2]))
    yield Case(aten.unsqueeze.default, (x, 1))
    yield Case(aten.unfold.default, (x, 1, 2, 1))
    yield Case(aten.view.default, (x, [12]))
    yield Case(aten.reshape.default, (x, [2, 6]))
    yield Case(aten._unsafe_view.default, (x, [4, 3]))
    yield Case(aten._to_copy.default, (normal(3, dtype=torch.float32),), {"dtype": torch.float64})
    yield Case(aten.mul.Scalar, (x, -3))
    yield Case(aten.div.Scalar, (x, -3))
    yield Case(aten.avg_pool2d.default, (image, [2, 2], [1, 1], [1, 1], False, False))
    yield Case(aten.avg_pool3d.default, (volume, [2, 2, 2]))
    yield Case(
        aten.avg_pool2d_backward.default,
        (normal(1, 4, 2, 2), image, [2, 2], [2, 2], [0, 0], False, True, None),
    )
    yield Case(aten._adaptive_avg_pool2d.default, (image, [2, 3]))
    pivots = torch.tensor([2, 3, 3], dtype=torch.int32)
    yield Case(aten.lu_unpack.default, (normal(3, 3), pivots))
    yield Case(aten._adaptive_avg_pool2d_backward.default, (normal(1, 4, 2, 3), image))
    _, indices = aten.max_pool2d_with_indices(image, [2, 2])
    yield Case(
        aten.max_pool2d_with_indices_backward.default,
        (normal(1, 4, 2, 2), image, [2, 2], [2, 2], [0, 0], [1, 1], False, indices),
    )
    yield Case(aten.upsample_nearest2d.vec, (image, None, [2.0, 2.0]))
    yield Case(aten.upsample_bilinear2d.vec, (image, [6, 6], False, None))
    yield Case(aten.reflection_pad1d.default, (plane, [1, 2]))
    yield Case(aten.reflection_pad2d.default, (image, [1, 2, 0, 1]))
    yield Case(aten.replication_pad2d.default, (image, [1, 2, 0, 1]))
    yield Case(aten.im2col.default, (image, [2, 2], [1, 1], [1, 1], [2, 2]))
    yield Case(aten.col2im.default, (normal(1, 4, 4), [4, 4], [2, 2], [1, 1], [0, 0], [2, 2]))
    yield Case(aten.pixel_shuffle.default, (image, 2))
    yield Case(aten.pixel_unshuffle.default, (image, 2))
    yield Case(aten.cat.default, ([x, normal(3, 2)], 1))
    yield Case(aten.cat.default, ([x, torch.ones(3, 2, dtype=torch.long)], 1))
    yield Case(aten.stack.default, ([x, normal(3, 4)], 1))


def sum_cases() -> Iterator[Case]:
    x, row = normal(3, 4), normal(4)
    for op in (aten.add.Tensor, aten.sub.Tensor):
        yield Case(op, (x, normal(3, 4)))
        yield Case(op, (row, x))
        yield Case(op, (x, row), {"alpha": -3})
        yield Case(op, (x, row), {"alpha": -1})
        yield Case(op, (x, 2.5), {"alpha": 2})
        yield Case(op, (torch.ones(3, 4, dtype=torch.long), row))
        yield Case(op, (normal(2, dtype=torch.float32), normal(2)))
    yield Case(aten.add.Scalar, (x, 2.5))
    yield Case(aten.sub.Scalar, (x, 2.5, 2))
    yield Case(aten.rsub.Scalar, (x, 2))
    yield Case(aten.rsub.Scalar, (x, 2.5, -3))
    condition = torch.tensor([True, False, True, False])
    yield Case(aten.where.self, (condition, x, row))
    yield Case(aten.where.self, (condition, normal(), normal(3, 1)))


def product_cases() -> Iterator[Case]:
    yield Case(aten.mul.Tensor, (normal(3, 4), normal(4)))
    yield Case(aten.mul.Tensor, (normal(), normal(3)))
    yield Case(aten.mul.Tensor, (normal(3), -2.5))
    yield Case(aten.mul.Tensor, (normal(3), integers(1, 2, 3)))
    yield Case(aten.mul.Tensor, (normal(3, dtype=torch.float32), normal(3)))
    yield Case(aten.mm.default, (normal(2, 3), normal(3, 4)))
    yield Case(aten.bmm.default, (normal(2, 2, 3), normal(2, 3, 4)))
    yield Case(aten.mv.default, (normal(2, 3), normal(3)))
    yield Case(aten.dot.default, (normal(3), normal(3)))
    yield Case(aten.div.Tensor, (normal(3, 4), uniform(4)))
    yield Case(aten.div.Tensor, (normal(4), uniform(3, 4)))
    yield Case(aten.div.Tensor, (normal(3), -2.5))
    yield Case(aten.div.Tensor, (integers(1, 2, 3), uniform(3)))
    for options in ({}, {"alpha": 2}, {"beta": 3}, {"alpha": -0.5, "beta": 2}):
        yield Case(aten.addmm.default, (normal(4), normal(2, 3), normal(3, 4)), options)
        yield Case(
            aten.baddbmm.default, (normal(2, 2, 4), normal(2, 2, 3), normal(2, 3, 4)), options
        )


def elementwise_cases() -> Iterator[Case]:
    for target in tables.ELEMENTWISE | tables.FROM_BACKWARD:
        yield Case(target, (uniform(2, 3),))
    x = 4 * spread(2, 3)
    for target in (*tables.FROM_BACKWARD, aten.abs.default, aten.sin.default, aten.erfc.default):
        yield Case(target, (x / 7,))
    yield Case(aten.gelu.default, (x / 7,), {"approximate": "tanh"})
    yield Case(aten.softplus.default, (x, 2, 3))
    yield Case(aten.elu.default, (x / 7, 0.5, 2, 1.5))
    yield Case(aten.leaky_relu.default, (x, 0.3))
    yield Case(aten.hardtanh.default, (x, -0.4, 6))


def complex_cases() -> Iterator[Case]:
    """Derivatives along complex directions, conjugation included."""
    z = torch.complex(uniform(2, 3), uniform(2, 3))
    for op in ("exp", "log", "sin", "tanh", "reciprocal", "abs", "sgn", "angle", "sqrt", "_conj"):
        yield Case(getattr(aten, op).default, (z,))
    yield Case(aten.mul.Tensor, (z, z.exp()))
    yield Case(aten.mul.Tensor, (z, uniform(3)))
    yield Case(aten.div.Tensor, (z, z.exp()))
    yield Case(aten.mm.default, (z, z.t().clone()))
    yield Case(aten.pow.Tensor_Scalar, (z, 3))
    yield Case(aten.sub.Tensor, (uniform(2, 3), z), {"alpha": 2})
    yield Case(aten.where.self, (torch.tensor([True, False, True]), z, uniform(3)))
    yield Case(aten._fft_r2c.default, (uniform(2, 6), [1], 0, True))
    yield Case(aten._fft_c2r.default, (z, [1], 2, 4))


def convolution_cases() -> Iterator[Case]:
    # (input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)
    line, image = normal(2, 2, 6), normal(2, 4, 5, 5)
    yield Case(
        aten.convolution.default, (line, normal(3, 2, 3), normal(3), [1], [1], [1], False, [0], 1)
    )
    yield Case(
        aten.convolution.default, (line, normal(2, 3, 3), normal(3), [2], [1], [1], True, [1], 1)
    )
    strided = ([2, 1], [1, 0], [1, 2], False, [0, 0], 2)
    yield Case(aten.convolution.default, (image, normal(4, 2, 3, 2), normal(4), *strided))
    yield Case(aten.convolution.default, (image, normal(4, 2, 3, 2), None, *strided))
    out = aten.convolution(image, normal(4, 2, 3, 2), None, *strided)
    for mask in itertools.product([True, False], repeat=3):
        if any(mask):
            yield Case(
                aten.convolution_backward.default,
                (torch.randn_like(out), image, normal(4, 2, 3, 2), [4], *strided, list(mask)),
            )
    yield Case(
        aten.convolution_backward.default,
        (normal(2, 3, 6), line, normal(3, 2, 3), [3], [1], [1], [1], False, [0], 1, [True] * 3),
    )


def reduction_cases() -> Iterator[Case]:
    x = normal(3, 4)
    for op in (aten._softmax.default, aten._log_softmax.default):
        yield Case(op, (x, 1, False))
        yield Case(op, (x, -2, False))
    yield Case(aten.logcumsumexp.default, (x, 1))
    yield Case(aten.logcumsumexp.default, (30 * x, -2))
    yield Case(aten.logcumsumexp.default, (normal(), 0))
    yield Case(aten.pow.Tensor_Scalar, (uniform(3), 0))
    for exponent in (1, 2, 3, 0.5, -1, -2.5, 2.0):
        yield Case(aten.pow.Tensor_Scalar, (uniform(3), exponent))
    yield Case(aten.pow.Tensor_Scalar, (-uniform(3), 3))
    y = spread(2, 3, 4, 4)
    yield Case(aten.max_pool2d_with_indices.default, (y, [2, 2]))
    yield Case(aten.max_pool2d_with_indices.default, (y, [3, 2], [1, 2], [1, 1], [1, 1], True))
    yield Case(aten.max_pool2d_with_indices.default, (y[0], [2, 2], [1, 1]))
    for op in (aten.amax.default, aten.amin.default):
        yield Case(op, (y, [1, -1]))
        yield Case(op, (y, [0], True))
        yield Case(op, (y,))
    for op in (aten.maximum.default, aten.minimum.default):
        yield Case(op, (spread(3, 4), spread(3, 4) * 1.03))
        yield Case(op, (spread(3, 4), spread(4) * 1.03))
    for op in (aten.max.dim, aten.min.dim):
        yield Case(op, (y, 1))
        yield Case(op, (y, -1, True))
        yield Case(op, (normal(), 0))
    yield Case(aten.sort.default, (y,))
    yield Case(aten.sort.default, (y, 1, True))
    yield Case(aten.topk.default, (y, 2))
    yield Case(aten.topk.default, (y, 2, 1, False))
    yield Case(aten.clamp.default, (spread(3, 4), -2, 3))
    yield Case(aten.clamp.default, (spread(3, 4), None, 3))
    yield Case(aten.clamp.default, (spread(3, 4),), {"min": -2})
    yield Case(aten.clamp_min.default, (spread(3, 4), 1))
    yield Case(aten.clamp_max.default, (spread(3, 4), 1))


def fallback_cases() -> Iterator[Case]:
    """Operators without a row: PyTorch's own forward-mode rule."""
    yield Case(aten.lgamma.default, (uniform(3),))
    yield Case(aten.atan2.default, (normal(3, 4), normal(4)))
    yield Case(aten.cumprod.default, (uniform(3, 4), 1))
    yield Case(aten.prod.dim_int, (uniform(3, 4), 1, True))
    yield Case(aten.linalg_vector_norm.default, (normal(3, 4), 2, [1]))
    yield Case(aten.pow.Tensor_Tensor, (uniform(3), uniform(3)))
    yield Case(aten.addcmul.default, (normal(3), normal(3), normal(3)), {"value": 2})
    yield Case(aten.lerp.Tensor, (normal(3), normal(3), normal(3)))
    yield Case(aten.linalg_inv_ex.default, (normal(3, 3) + 4 * torch.eye(3),))
    yield Case(aten.cummax.default, (spread(3, 4), 1))
    yield Case(aten.scatter.value, (normal(3, 4), 1, integers([0], [3], [2]), 2.0))
    yield Case(aten.masked_fill.Scalar, (normal(3), torch.tensor([True, False, True]), 2.0))


def collect(*makers: Callable[[], Iterator[Case]]) -> list[Any]:
    torch.manual_seed(0)
    found = []
    for maker in makers:
        for index, case in enumerate(maker()):
            target = "stop" if case.target is stop else str(case.target)
            name = target.removeprefix("aten.").removesuffix(".default")
            found.append(pytest.param(case, id=f"{index}-{name}"))
    return found


RULES = collect(
    linear_cases,
    sum_cases,
    product_cases,
    elementwise_cases,
    convolution_cases,
    reduction_cases,
    complex_cases,
)
ZEROS = collect(zero_cases)
FALLBACKS = collect(fallback_cases)


def can_move(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype.is_complex)


def tensors_of(case: Case) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(case.args) if isinstance(x, Tensor)]


def one_op_graph(case: Case) -> GraphModule:
    """A graph of one operator: its tensors are inputs, its results (one by one) outputs."""
    graph = Graph()
    names = map("x{}".format, itertools.count())
    args = pytree.tree_map_only(Tensor, lambda x: graph.placeholder(next(names)), case.args)
    node = graph.call_function(case.target, args, case.kwargs)
    example = case.target(*case.args, **case.kwargs)
    if isinstance(example, (tuple, list)):
        items = [
            graph.call_function(operator.getitem, (node, index))
            for index, value in enumerate(example)
            if value is not None
        ]
        graph.output(tuple(items))
    else:
        graph.output((node,))
    return GraphModule(torch.nn.Module(), graph)


def difference(module: GraphModule, inputs: list[Any], moved: dict[int, Tensor]) -> list[Tensor]:
    """Central differences of every result, in float64 or complex128."""

    def at(step: float) -> list[Tensor]:
        shifted = [x + step * moved[i] if i in moved else x for i, x in enumerate(inputs)]
        return [y.clone() for y in module(*shifted)]

    # float32 inputs make the step of float64 too small to see
    step = 1e-2 if any(inputs[i].dtype == torch.float32 for i in moved) else STEP
    return [(up - down) / (2 * step) for up, down in zip(at(step), at(-step), strict=True)]


def assert_tangents(case: Case, moving: Sequence[int]) -> None:
    module, inputs = one_op_graph(case), tensors_of(case)
    torch.manual_seed(1)
    moved = {i: torch.randn_like(inputs[i]) for i in moving}
    values, tangents = push_forward(module, inputs, [moved.get(i) for i in range(len(inputs))])
    expected = difference(module, inputs, moved)
    single = any(inputs[i].dtype == torch.float32 for i in moving)
    for value, tangent, reference in zip(values, tangents, expected, strict=True):
        if not can_move(value):
            assert tangent is None
            continue
        if tangent is None:
            tangent = torch.zeros_like(value)
        assert tangent.shape == value.shape
        assert tangent.dtype == value.dtype
        size = reference.abs().max().clamp(min=1.0)
        error = (tangent - reference).abs().max() / size
        assert error < (1e-4 if single else TOLERANCE), f"{case.target}: {error:.3g}"


def subsets(case: Case) -> list[tuple[int, ...]]:
    """All arguments that can move together, then each alone, then all but one."""
    movable = [i for i, x in enumerate(tensors_of(case)) if can_move(x)]
    alone = [(i,) for i in movable]
    but_one = [tuple(j for j in movable if j != i) for i in movable]
    return list(dict.fromkeys([tuple(movable), *alone, *(s for s in but_one if s)]))


@pytest.mark.parametrize("case", RULES)
def test_rule(case: Case) -> None:
    for moving in subsets(case):
        assert_tangents(case, moving)


@pytest.mark.parametrize("case", FALLBACKS)
def test_operator_without_a_row(case: Case) -> None:
    assert not any(case.target in table for table in TABLES)
    for moving in subsets(case):
        assert_tangents(case, moving)


@pytest.mark.parametrize("case", ZEROS)
def test_zero(case: Case) -> None:
    module, inputs = one_op_graph(case), tensors_of(case)
    _, tangents = push_forward(module, inputs, [torch.ones_like(x) for x in inputs])
    assert tangents == [None]


@pytest.mark.parametrize("case", RULES + ZEROS + FALLBACKS)
def test_nothing_moves(case: Case) -> None:
    """A symbolic zero costs nothing: no rule runs, no tensor is made."""
    module, inputs = one_op_graph(case), tensors_of(case)
    values, tangents = push_forward(module, inputs, [None] * len(inputs))
    assert tangents == [None] * len(values)


FAMILIES = (tables.ZERO, tables.RULES, tables.FROM_BACKWARD, tables.ELEMENTWISE)
TABLES = (*FAMILIES, tables.LINEAR, tables.BILINEAR)


def test_every_row_has_a_case() -> None:
    """A new rule without a case fails here."""
    tested = {param.values[0].target for param in RULES + ZEROS}
    for table in TABLES:
        assert {str(op) for op in set(table) - tested} == set()


def test_one_row_per_operator() -> None:
    """`tangent_of` reads the tables in order: a second row would never be used."""
    for one, other in itertools.combinations(FAMILIES, 2):
        assert {str(op) for op in set(one) & set(other)} == set()


def reverse_mode(case: Case, position: int) -> Tensor:
    """The sum of the first result's derivatives, by reverse mode."""
    args = list(case.args)
    args[position] = args[position].clone().requires_grad_()
    out = case.target(*args, **case.kwargs)
    first = out[0] if isinstance(out, (tuple, list)) else out
    return torch.autograd.grad(first.sum(), args[position])[0]


X = torch.tensor([[-1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 2.0]], dtype=torch.float64)
Y = torch.tensor([[-1.0, 1.0, 0.0, 1.0], [0.0, 3.0, 2.0, 1.0]], dtype=torch.float64)
AT_A_KINK = [
    Case(aten.clamp.default, (X, -1.0, 1.0)),
    Case(aten.clamp.default, (X, 0.0)),
    Case(aten.clamp_min.default, (X, 1.0)),
    Case(aten.clamp_max.default, (X, 0.0)),
    Case(aten.relu.default, (X,)),
    Case(aten.abs.default, (X,)),
    Case(aten.leaky_relu.default, (X, 0.2)),
    Case(aten.hardtanh.default, (X,)),
    Case(aten.hardswish.default, (3 * X,)),
    Case(aten.hardsigmoid.default, (3 * X,)),
    Case(aten.elu.default, (X,)),
    Case(aten.amax.default, (X, [1])),
    Case(aten.amin.default, (X, [0, 1], True)),
    Case(aten.maximum.default, (X, Y)),
    Case(aten.minimum.default, (X, Y)),
    Case(aten.max.dim, (X, 1)),
    Case(aten.min.dim, (X, 0)),
    Case(aten.sort.default, (X, 1)),
    Case(aten.topk.default, (X, 2)),
    Case(aten.max_pool2d_with_indices.default, (X.reshape(1, 1, 2, 4), [2, 2])),
    Case(aten.pow.Tensor_Scalar, (X, 1)),
    Case(aten.pow.Tensor_Scalar, (X, 2)),
    Case(aten.pow.Tensor_Scalar, (X, 3)),
]


@pytest.mark.parametrize("case", AT_A_KINK, ids=lambda case: str(case.target))
def test_same_convention_as_reverse_mode(case: Case) -> None:
    """Where there is no derivative the JVP over the gradient must mean what reverse over reverse
    means."""
    for position in range(len(tensors_of(case))):
        expected = reverse_mode(case, position)
        out = case.target(*case.args, **case.kwargs)
        for index in range(expected.numel()):
            direction = torch.zeros(expected.numel(), dtype=torch.float64)
            direction[index] = 1.0
            along: list[Any] = [None] * len(case.args)
            along[position] = direction.reshape(expected.shape)
            tangent = tangent_of(case.target, out, case.args, case.kwargs, tuple(along))
            first = tangent[0] if isinstance(tangent, (tuple, list)) else tangent
            assert torch.equal(first.sum(), expected.flatten()[index])


def test_result_that_holds_no_float_is_still() -> None:
    """Comparisons and casts to integers are piecewise constant."""
    x = normal(3)
    assert tangent_of(aten.gt.Scalar, x > 0, (x, 0), {}, (x, None)) is None
    assert tangent_of(aten.argmax.default, x.argmax(), (x,), {}, (x,)) is None
    kwargs = {"dtype": torch.long}
    assert tangent_of(aten._to_copy.default, x.long(), (x,), kwargs, (x,)) is None


def test_zero_is_kept_symbolic_inside_an_operator() -> None:
    """The side of a product that does not move costs no product of its own."""
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    graph.output((graph.call_function(aten.addmm.default, (a, b, b)),))
    module = GraphModule(torch.nn.Module(), graph)
    x = normal(3, 3)

    with Calls() as calls:
        _, (tangent,) = push_forward(module, [x, x], [x, None])
    assert calls.found == [aten.addmm.default]
    assert torch.equal(tangent, x)


class Calls(TorchDispatchMode):
    """Writes down which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.append(func)
        return func(*args, **(kwargs or {}))


def test_tuple_keeps_what_does_not_move() -> None:
    """Of `convolution_backward` only the weight's gradient moves with the input."""
    tensors = normal(2, 3, 6), normal(2, 2, 6), normal(3, 2, 3)
    options = [3], [1], [1], [1], False, [0], 1, [True, True, True]
    case = Case(aten.convolution_backward.default, (*tensors, *options))
    along = (None, normal(2, 2, 6), *[None] * 9)
    out = case.target(*case.args)
    to_input, to_weight, to_bias = tangent_of(case.target, out, case.args, {}, along)
    assert to_input is None and to_bias is None
    assert to_weight.shape == (3, 2, 3)


def test_no_rule_names_the_operator() -> None:
    @torch.library.custom_op("optimize_nested_tests::cube", mutates_args=())
    def cube(x: Tensor) -> Tensor:
        return x**3

    x = normal(3)
    target = torch.ops.optimize_nested_tests.cube.default
    with pytest.raises(NoRule, match=r"optimize_nested_tests\.cube\.default: ") as caught:
        tangent_of(target, cube(x), (x,), {}, (x,))
    assert caught.value.target is target


def test_result_without_a_tangent_is_not_constant() -> None:
    """A factorisation beside the result: reading it is refused, leaving it alone is not."""
    graph = Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    node = graph.call_function(aten._linalg_solve_ex.default, (a, b))
    solution, factors = (graph.call_function(operator.getitem, (node, i)) for i in (0, 1))
    graph.output((solution, factors))
    module = GraphModule(torch.nn.Module(), graph)
    matrix, vector = normal(3, 3) + 4 * torch.eye(3), normal(3)
    with pytest.raises(NoRule, match="_linalg_solve_ex"):
        push_forward(module, [matrix, vector], [normal(3, 3), None])
    graph.output_node().args = ((solution,),)
    graph.erase_node(factors)
    moved = normal(3, 3)
    (x,), (tangent,) = push_forward(module, [matrix, vector], [moved, None])
    torch.testing.assert_close(tangent, -torch.linalg.solve(matrix, moved @ x))


def test_argument_in_a_list_moves_alone() -> None:
    case = Case(aten.cat.default, ([normal(2), normal(3)],))
    _, (tangent,) = push_forward(one_op_graph(case), tensors_of(case), [None, torch.ones(3)])
    assert tangent.tolist() == [0, 0, 1, 1, 1]


def test_eigenvectors() -> None:
    """PyTorch's own rule, along a symmetric direction, and one whose derivative is finite."""
    matrix = normal(2, 4, 4)
    matrix, moved = matrix + matrix.mT, matrix.sin() + matrix.mT.sin()
    target, out = aten._linalg_eigh.default, torch.linalg.eigh(matrix)
    found = tangent_of(target, out, (matrix,), {}, (moved,))
    expected = tables._pytorch_rule(target, out, (matrix,), {}, (moved,))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    given = matrix.requires_grad_()
    turned = tangent_of(target, torch.linalg.eigh(given), (given,), {}, (moved,))[1]
    (grad,) = torch.autograd.grad(turned.square().sum(), given)
    assert grad.isfinite().all()


@pytest.mark.parametrize("factor", [torch.linalg.cholesky, torch.linalg.eigvalsh])
def test_triangle_that_is_read(factor: Callable[[Tensor], Tensor]) -> None:
    """Along a direction that is not symmetric, what moves is what the symmetric gradient says."""
    matrix = normal(3, 3)
    matrix, moved = matrix @ matrix.mT + torch.eye(3), normal(3, 3)
    graph = make_fx(lambda x: (factor(x),))(matrix)
    _, (tangent,) = push_forward(graph, [matrix], [moved])
    given = matrix.requires_grad_()
    w = torch.randn_like(tangent)
    (grad,) = torch.autograd.grad((factor(given) * w).sum(), given)
    torch.testing.assert_close((tangent * w).sum(), (grad * moved).sum(), rtol=1e-10, atol=1e-10)
