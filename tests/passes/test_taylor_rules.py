"""Every Taylor rule, orders 1 to 4, against repeated reverse mode in float64."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from passes.price import FlopCounter
from passes.tangent_tables import ZERO
from passes.taylor import Jets, NoSeries, push_series
from passes.taylor.elementwise import FUNCTIONS
from passes.taylor.jets import Series
from passes.taylor.rules import PIECEWISE_LINEAR, RULES_OF_SERIES, series_of
from tests.passes import test_tangent_rules as cases_of
from tests.passes.test_tangent_rules import Case, can_move, one_op_graph, subsets, tensors_of

ORDER, DIRECTIONS = 4, 2
aten = torch.ops.aten
# PyTorch's own derivative multiplies by 1/6 in float32.
TOLERANCE = {aten.hardswish.default: 1e-7}


def reference(module: Any, inputs: list[Tensor], moved: dict[int, Tensor]) -> list[list[Tensor]]:
    """Return for each result ``⟨c, n-th coefficient⟩``, n = 1 …, for one direction.

    ``moved`` holds coefficients, stacked.
    """
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    curve = list(inputs)
    for i, terms in moved.items():
        curve[i] = sum((t**n * c for n, c in enumerate(terms, start=1)), inputs[i])
    found = []
    for result in module(*curve):
        if not can_move(result):
            continue
        value, row = (cotangent(result) * result).sum(), []
        for n in range(1, ORDER + 1):
            if value.requires_grad:
                (value,) = torch.autograd.grad(value, t, create_graph=True, materialize_grads=True)
            else:
                value = torch.zeros_like(value)
            row.append(value / math.factorial(n))
        found.append(row)
    return found


def cotangent(result: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(result.numel())
    return torch.randn(result.shape, generator=generator, dtype=torch.float64)


def check(case: Case, moving: Sequence[int], weights: Tensor | None) -> None:
    module, inputs = one_op_graph(case), tensors_of(case)
    torch.manual_seed(1)
    moved = {i: torch.randn(DIRECTIONS, ORDER, *inputs[i].shape).double() for i in moving}
    jets = Jets(ORDER, weights)
    series: list[Series | None] = [None] * len(inputs)
    for i, terms in moved.items():
        last = terms[:, -1] if weights is None else jets.collapse(terms[:, -1])
        series[i] = Series((*terms[:, :-1].unbind(1), last))
    values, found = push_series(module, jets, inputs, series)
    expected = [
        reference(module, inputs, {i: terms[k] for i, terms in moved.items()})
        for k in range(DIRECTIONS)
    ]
    movable = [(v, s) for v, s in zip(values, found, strict=True) if can_move(v)]
    for position, (value, result) in enumerate(movable):
        for n, term in enumerate(result.terms):
            wanted = torch.stack([expected[k][position][n] for k in range(DIRECTIONS)]).detach()
            full = value.new_zeros(DIRECTIONS, *value.shape) if term is None else term
            if jets.is_collapsed(n + 1):
                assert weights is not None
                wanted = (weights * wanted).sum()
                full = torch.zeros_like(value) if term is None else term
                assert full.shape == value.shape
            else:
                assert full.shape == (DIRECTIONS, *value.shape)
            dims = tuple(range(full.dim() - value.dim(), full.dim()))
            got = (full * cotangent(value)).sum(dims) if dims else full * cotangent(value)
            error = (got - wanted).abs().max() / wanted.abs().max().clamp(min=1.0)
            assert error < TOLERANCE.get(case.target, 1e-9), (
                f"{case.target}, order {n + 1}: {error:.3g}"
            )


HAS_RULE = {*PIECEWISE_LINEAR, *RULES_OF_SERIES, *FUNCTIONS, aten.gelu.default}


def is_plain(case: Case) -> bool:
    """Whether everything is in float64, and repeated reverse mode is right.

    It fails where a transposed convolution has an output padding.
    """
    tensors = [*tensors_of(case), *pytree.tree_leaves(case.target(*case.args, **case.kwargs))]
    is_double = all(x.dtype == torch.float64 for x in tensors if can_move(x))
    has_padding = case.target is aten.convolution.default and any(case.args[7])
    return is_double and case.target is not aten.detach.default and not has_padding


def own_cases() -> Any:
    """Operators that tangents have no row of their own for."""
    x = cases_of.uniform(2, 3)
    for name in ("acosh", "atanh", "asinh"):
        yield Case(getattr(aten, name).default, (x + (name == "acosh"),))
    yield Case(aten.linalg_vector_norm.default, (x, 2, [1], True))
    yield Case(aten.linalg_vector_norm.default, (x,))
    yield Case(aten.logsumexp.default, (x, [1]))
    yield Case(aten.logsumexp.default, (100 * x, [0, 1], True))
    yield Case(aten.log_sigmoid_forward.default, (x - 0.5,))
    yield Case(aten.silu.default, (x - 100,))
    line, weight = cases_of.normal(2, 2, 6), cases_of.normal(2, 3, 3)
    strided = ([2], [1], [1], True, [0], 1)
    yield Case(aten.convolution.default, (line, weight, cases_of.normal(3), *strided))


CASES = [
    pytest.param(*param.values, id=param.id)
    for param in [*cases_of.RULES, *cases_of.collect(own_cases)]
    if param.values[0].target in HAS_RULE and is_plain(param.values[0])
]


@pytest.mark.parametrize("case", CASES)
def test_rule(case: Case) -> None:
    together, *others = subsets(case)
    check(case, together, torch.tensor([0.7, -1.3], dtype=torch.float64))
    for moving in others or [together]:
        check(case, moving, None)


# Of complex numbers, of several types, part of other cases, or no derivative in reverse mode.
NOT_ALONE = {
    aten.imag.default, aten._conj.default, aten.view_as_real.default, aten.view_as_complex.default,
    aten._to_copy.default, aten.detach.default, operator.getitem,
}  # fmt: skip


def test_a_hundred_operators() -> None:
    """Every row is tested."""
    tested = {param.values[0].target for param in CASES}
    assert len(tested) >= 100
    assert tested == HAS_RULE - NOT_ALONE


def test_zero_operators() -> None:
    """What is constant does not move."""
    for target in sorted(ZERO, key=str):
        assert series_of(Jets(2), target, torch.ones(2), (), {}, ()).is_zero


@pytest.mark.parametrize("target", [aten.lgamma.default, aten.cumprod.default])
def test_without_a_rule(target: Any) -> None:
    args = (cases_of.uniform(2, 3), 0)[: 1 + (target is aten.cumprod.default)]
    with pytest.raises(NoSeries, match=target.name()):
        check(Case(target, args), [0], None)


def test_collapsed_top_costs_one_vector() -> None:
    """Matrix products of a Laplacian of a two-layer network: one for the value, one for each
    direction, one for all second derivatives."""
    torch.manual_seed(0)
    width, dim = 64, 10
    first, second = torch.randn(dim, width), torch.randn(width, 1)

    def network(x: Tensor) -> Tensor:
        return (x @ first).tanh() @ second

    x = torch.randn(8, dim)
    module = make_fx(lambda x: (network(x),))(x)
    jets = Jets(2, torch.ones(dim))
    with FlopCounter() as counter:
        network(x)
    forward = counter.flops
    with FlopCounter() as counter:
        basis = torch.eye(dim)[:, None].expand(dim, 8, dim)
        (_,), (series,) = push_series(module, jets, [x], [Series((basis, None))])
    hidden = 2 * 8 * width  # the second derivative starts behind the first layer
    assert counter.flops == forward * (dim + 1) + hidden
    laplacian = torch.func.vmap(lambda x: torch.func.hessian(network)(x)[0].trace())(x)
    torch.testing.assert_close(2 * series.terms[1][:, 0], laplacian, rtol=1e-4, atol=1e-4)
