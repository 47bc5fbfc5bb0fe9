"""Each simplifying rule: same value, new structure, a second run changes nothing."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import FileCheck

from passes.graph import copy_graph, drop_dead, is_random, print_graph
from passes.price import price
from passes.simplify import RULES, simplify
from passes.simplify.aliases import drop_aliases
from passes.simplify.common import merge_common
from passes.simplify.masks import narrow_masks
from passes.simplify.zeros import drop_zeros, zero_nodes
from tests.passes.flat import calls, random_points
from tests.versions import views_of_open_sizes

aten = torch.ops.aten
Rule = Callable[[torch.fx.Graph], int]


@dataclass(frozen=True)
class Case:
    """A function of tensors, and what a rule makes of it.

    Attributes:
        function: Of the inputs.
        inputs: Shapes in float64, or tensors.
        changes: How often the rule fires.
        left: Operators that compute after it, by name, without dead nodes.
    """

    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    changes: int
    left: tuple[str, ...] = ()


def tensors(case: Case) -> list[Tensor]:
    torch.manual_seed(4)
    return [x if isinstance(x, Tensor) else random_points(*x) for x in case.inputs]


def traced(function: Callable[..., Any], *inputs: Tensor, mode: str = "fake") -> GraphModule:
    """Record exactly the operators that are written."""

    def flat(*values: Tensor) -> tuple[Any, ...]:
        out = function(*values)
        return tuple(out) if isinstance(out, (tuple, list)) else (out,)

    return make_fx(flat, tracing_mode=mode)(*inputs)


def operators(module: GraphModule) -> tuple[str, ...]:
    """Names of the operators in order; items of tuples do not count."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    return tuple(
        str(n.target).removeprefix("aten.").removesuffix(".default")
        for n in nodes
        if n.target is not operator.getitem
    )


def assert_same(mine: GraphModule, reference: GraphModule, inputs: list[Tensor]) -> None:
    for a, b in zip(mine(*inputs), reference(*inputs), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def settled(rule: Rule, module: GraphModule) -> int:
    """Run a rule until it returns 0; return how often it fired."""
    changes = [rule(module.graph) for _ in range(4)]
    assert changes[-1] == 0
    return sum(changes)


def assert_rule(rule: Rule, case: Case) -> None:
    """Same value, exactly these operators, idempotent."""
    inputs = tensors(case)
    module = traced(case.function, *inputs)
    reference = copy_graph(module)
    assert settled(rule, module) == case.changes
    drop_dead(module.graph)
    module.graph.lint()
    module.recompile()
    assert_same(module, reference, inputs)
    assert operators(module) == case.left
    assert rule(module.graph) == 0


M, V = (3, 4), (4,)
HALF = torch.ones(3, 4, dtype=torch.float16)
WHOLE = torch.arange(12).reshape(3, 4)

ALIASES = {
    "alias": Case(lambda x: aten.alias(x).sin(), (M,), 1, ("sin",)),
    "detach": Case(lambda x: aten.detach(x).sin(), (M,), 1, ("sin",)),
    "lift_fresh_copy": Case(lambda x: aten.lift_fresh_copy(x).sin(), (M,), 1, ("sin",)),
    "view": Case(lambda x: aten.view(x, [3, 4]).sin(), (M,), 1, ("sin",)),
    "reshape": Case(lambda x: aten.reshape.default(x, [3, 4]).sin(), (M,), 1, ("sin",)),
    "unsafe_view": Case(lambda x: aten._unsafe_view(x, [3, 4]).sin(), (M,), 1, ("sin",)),
    "expand": Case(lambda x: aten.expand(x, [3, 4]).sin(), (M,), 1, ("sin",)),
    "permute": Case(lambda x: aten.permute(x, [0, 1]).sin(), (M,), 1, ("sin",)),
    "to_copy": Case(lambda x: aten._to_copy(x, dtype=torch.float64).sin(), (M,), 1, ("sin",)),
    "clone": Case(lambda x: aten.clone(x).sin(), (M,), 1, ("sin",)),
    "times_one": Case(lambda x: (x * 1).sin() + (x * 1.0), (M,), 2, ("sin", "add.Tensor")),
    "times_one_scalar": Case(lambda x: aten.mul.Scalar(x, 1).sin(), (M,), 1, ("sin",)),
    "divided_by_one": Case(lambda x: (x / 1).sin(), (M,), 1, ("sin",)),
    "plus_zero": Case(lambda x: (x + 0).sin() + (x - 0), (M,), 2, ("sin", "add.Tensor")),
    "power_one": Case(lambda x: (x**1).sin(), (M,), 1, ("sin",)),
    "sum_of_scalar": Case(lambda x: aten.sum.dim_IntList(x, []).sin(), ((),), 1, ("sin",)),
    "mean_of_scalar": Case(lambda x: aten.mean(x).sin(), ((),), 1, ("sin",)),
    "chain": Case(lambda x: aten.alias(aten.detach((x * 1) + 0)).sin(), (M,), 4, ("sin",)),
    # What must stay.
    "times_one_changes_type": Case(lambda x: x * 1.0, (WHOLE,), 0, ("mul.Tensor",)),
    "divided_by_one_changes_type": Case(lambda x: x / 1, (WHOLE,), 0, ("div.Tensor",)),
    "floor_of_division_by_one": Case(
        lambda x: aten.div.Tensor_mode(x, 1, rounding_mode="floor"), (M,), 0, ("div.Tensor_mode",)
    ),
    "plus_zero_broadcasts": Case(
        lambda x: x + torch.zeros(2, 1, 1), (M,), 0, ("zeros", "add.Tensor")
    ),
    "times_minus_one": Case(lambda x: x * -1, (M,), 0, ("mul.Tensor",)),
    "one_minus": Case(lambda x: aten.sub.Tensor(x, 1), (M,), 0, ("sub.Tensor",)),
    "power_zero": Case(lambda x: x**0, (M,), 0, ("pow.Tensor_Scalar",)),
    "other_shape": Case(lambda x: aten.view(x, [4, 3]), (M,), 0, ("view",)),
    "other_type": Case(lambda x: aten._to_copy(x, dtype=torch.float32), (M,), 0, ("_to_copy",)),
    "other_layout": Case(
        lambda x: aten.clone(x.t(), memory_format=torch.contiguous_format), (M,), 0, ("t", "clone")
    ),
    "channels_last": Case(
        lambda x: aten.clone(x, memory_format=torch.channels_last), ((2, 3, 4, 5),), 0, ("clone",)
    ),
    "other_permutation": Case(
        lambda x: aten.permute(aten.permute(x, [2, 0, 1]), [2, 0, 1]),
        ((2, 3, 4),),
        0,
        ("permute", "permute"),
    ),
    "expand_of_one": Case(lambda x: aten.expand(x, [3, 4]), ((3, 1),), 0, ("expand",)),
    "sum_of_vector": Case(lambda x: aten.sum.dim_IntList(x, [0]), (V,), 0, ("sum.dim_IntList",)),
    "sum_changes_type": Case(
        lambda x: aten.sum.dim_IntList(x, [], dtype=torch.float32), ((),), 0, ("sum.dim_IntList",)
    ),
}


def zeros(*shape: int) -> Tensor:
    return aten.full(list(shape), 0, dtype=torch.float64)


# bias, stride, padding, dilation, transposed, output padding, groups
PLAIN = (None, [1], [0], [1], False, [0], 1)


ZEROS = {
    "plus": Case(lambda x: (x + zeros(3, 4)).sin(), (M,), 1, ("sin",)),
    "plus_on_the_left": Case(lambda x: (zeros(3, 4) + x).sin(), (M,), 1, ("sin",)),
    "plus_broadcast": Case(lambda x: (x + zeros(4)).sin(), (M,), 1, ("sin",)),
    "minus": Case(lambda x: (x - zeros(3, 4)).sin(), (M,), 1, ("sin",)),
    "zero_minus": Case(lambda x: (zeros(3, 4) - x).sin(), (M,), 1, ("neg", "sin")),
    "plus_scaled_zero": Case(
        lambda x: aten.add.Tensor(x, zeros(4), alpha=3).sin(), (M,), 1, ("sin",)
    ),
    "product": Case(lambda x: x + zeros(3, 4) * x, (M,), 2, ()),
    "matrix_product": Case(lambda x, w: x @ w + x @ zeros(4, 4), (M, (4, 4)), 2, ("mm",)),
    "chain_of_views": Case(
        lambda x: x + zeros(4, 3).t().neg().unsqueeze(0).squeeze(0), (M,), 5, ()
    ),
    "addmm_without_product": Case(
        lambda b, x: aten.addmm(b, x, zeros(4, 4)).sin(), (M, M), 1, ("sin",)
    ),
    "addmm_without_product_grows": Case(
        lambda b, x: aten.addmm(b, x, zeros(4, 4)).sin(), (V, M), 1, ("expand", "sin")
    ),
    "addmm_without_shift": Case(
        lambda x, w: aten.addmm(zeros(4), x, w).sin(), (M, (4, 4)), 1, ("mm", "sin")
    ),
    "baddbmm_without_shift": Case(
        lambda x, w: aten.baddbmm(zeros(4), x, w), ((2, 3, 4), (2, 4, 4)), 1, ("bmm",)
    ),
    "written": Case(lambda x: x.sin() * zeros(3, 4), (M,), 1, ("full",)),
    "where_of_zeros": Case(lambda x: x + torch.where(x > 0, zeros(3, 4), zeros(4)), (M,), 2, ()),
    "joined": Case(lambda x: x + torch.cat([zeros(3, 2), zeros(3, 2)], 1), (M,), 2, ()),
    "convolution": Case(
        lambda x, w: aten.convolution(x, w, *PLAIN) + aten.convolution(zeros(1, 2, 5), w, *PLAIN),
        ((1, 2, 5), (3, 2, 3)),
        2,
        ("convolution",),
    ),
    # What must stay.
    "broadcast_by_zero": Case(lambda x: x + zeros(2, 3, 4), (M,), 0, ("full", "add.Tensor")),
    "type_from_zero": Case(lambda x: x + zeros(3, 4), (HALF,), 0, ("full", "add.Tensor")),
    "scaled_after_zero": Case(
        lambda x: aten.add.Tensor(zeros(3, 4), x, alpha=2), (M,), 0, ("full", "add.Tensor")
    ),
    "addmm_scaled": Case(
        lambda b, x, w: aten.addmm(b, x, w, beta=0), (V, M, (4, 4)), 0, ("addmm",)
    ),
    "cosine_of_zero": Case(lambda x: x * zeros(3, 4).cos(), (M,), 0, ("full", "cos", "mul.Tensor")),
    "exp_of_zero": Case(lambda x: x + zeros(3, 4).exp(), (M,), 0, ("full", "exp", "add.Tensor")),
    "ones": Case(lambda x: x * torch.ones(3, 4), (M,), 0, ("ones", "mul.Tensor")),
    "full_of_one": Case(lambda x: x + torch.full((3, 4), 1.0), (M,), 0, ("full", "add.Tensor")),
    "padded_by_one": Case(
        lambda x: x + aten.constant_pad_nd(zeros(3, 2), [1, 1], 1.0),
        (M,),
        0,
        ("full", "constant_pad_nd", "add.Tensor"),
    ),
    "joined_with_others": Case(lambda x: torch.cat([x, zeros(3, 4)]), (M,), 0, ("full", "cat")),
    "where_of_one_zero": Case(
        lambda x: torch.where(x > 0, x, zeros(4)), (M,), 0, ("gt.Scalar", "full", "where.self")
    ),
    "convolution_with_bias": Case(
        lambda w, b: aten.convolution(zeros(1, 2, 5), w, b, *PLAIN[1:]),
        ((3, 2, 3), (3,)),
        0,
        ("full", "convolution"),
    ),
    "zero_as_divisor": Case(lambda x: x / zeros(4), (M,), 0, ("full", "div.Tensor")),
    "integers_joined": Case(
        lambda x, i: x + torch.cat([i, i]), ((4,), torch.tensor([3, 1])), 0, ("cat", "add.Tensor")
    ),
    "truths_stacked": Case(
        lambda x, i: torch.stack([i, i]) * x,
        ((2,), torch.tensor([True, False])),
        0,
        ("stack", "mul.Tensor"),
    ),
    "complex_joined": Case(
        lambda z: torch.cat([z, z]), (torch.tensor([1 + 2j, 3 - 1j]),), 0, ("cat",)
    ),
    "scattered_integers": Case(
        lambda x, i: aten.scatter_add(i, 0, i, i),
        ((3,), torch.tensor([2, 0, 1])),
        0,
        ("scatter_add",),
    ),
    "zeros_joined_with_integers": Case(
        lambda i: torch.cat([zeros(3), i]), (torch.tensor([2, 0, 1]),), 0, ("full", "cat")
    ),
}

COMMON = {
    "twice": Case(lambda x: x.sin() * x.sin(), (M,), 1, ("sin", "mul.Tensor")),
    "deep": Case(
        lambda x, y: (x @ y).tanh() - (x @ y).tanh(), (M, (4, 4)), 2, ("mm", "tanh", "sub.Tensor")
    ),
    "commuted": Case(
        lambda x, y: (x + y) - (y + x), (M, M), 1, ("add.Tensor", "sub.Tensor")
    ),
    "commuted_product": Case(
        lambda x, y: (x * y) - (y * x), (M, V), 1, ("mul.Tensor", "sub.Tensor")
    ),
    "commuted_extremes": Case(
        lambda x, y: torch.maximum(x, y) / torch.maximum(y, x), (M, M), 1, ("maximum", "div.Tensor")
    ),
    "same_options": Case(
        lambda x, y: aten.add.Tensor(x, y, alpha=2) / aten.add.Tensor(x, y, alpha=2),
        (M, M),
        1,
        ("add.Tensor", "div.Tensor"),
    ),
    "several_results": Case(
        lambda x: x.sort(0)[0] - x.sort(0)[0], (M,), 3, ("sort", "sub.Tensor")
    ),
    # What must stay.
    "difference": Case(
        lambda x, y: (x - y) * (y - x), (M, M), 0, ("sub.Tensor", "sub.Tensor", "mul.Tensor")
    ),
    "power": Case(
        lambda x, y: aten.pow(x, y) - aten.pow(y, x),
        (torch.tensor([2.0, 3.0]), torch.tensor([3.0, 0.5])),
        0,
        ("pow.Tensor_Tensor", "pow.Tensor_Tensor", "sub.Tensor"),
    ),
    "scaled_sum": Case(
        lambda x, y: aten.add.Tensor(x, y, alpha=2) * aten.add.Tensor(y, x, alpha=2),
        (M, M),
        0,
        ("add.Tensor", "add.Tensor", "mul.Tensor"),
    ),
    "matrix_product": Case(
        lambda x, y: (x @ y) - (y @ x), ((3, 3), (3, 3)), 0, ("mm", "mm", "sub.Tensor")
    ),
    "number_types": Case(
        lambda x: (x * 2) + (x * 2.0), (WHOLE,), 0, ("mul.Tensor", "mul.Tensor", "add.Tensor")
    ),
    "truth_is_not_one": Case(
        lambda x: aten.full([3], 1) + aten.full([3], True) + x,
        ((3,),),
        0,
        ("full", "full", "add.Tensor", "add.Tensor"),
    ),
    "constants_of_two_types": Case(
        lambda x: x + aten.full([3], 1, dtype=torch.float32) / aten.full([3], 1, dtype=torch.int64),
        ((3,),),
        0,
        ("full", "full", "div.Tensor", "add.Tensor"),
    ),
    "other_dimension": Case(
        lambda x: x.sum(0) * x.sum(1), ((3, 3),), 0,
        ("sum.dim_IntList", "sum.dim_IntList", "mul.Tensor"),
    ),
    "signed_zero": Case(
        lambda x: (x / 0.0, x / -0.0), (M,), 0, ("div.Tensor", "div.Tensor")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALIASES)
def test_drop_aliases(name: str) -> None:
    assert_rule(drop_aliases, ALIASES[name])


@pytest.mark.parametrize("name", ZEROS)
def test_drop_zeros(name: str) -> None:
    assert_rule(drop_zeros, ZEROS[name])


@pytest.mark.parametrize("name", COMMON)
def test_merge_common(name: str) -> None:
    assert_rule(merge_common, COMMON[name])


@pytest.mark.parametrize("name", [*ALIASES, *ZEROS, *COMMON])
def test_simplify(name: str) -> None:
    """All rules together: same value, and nothing is left to do."""
    case = (ALIASES | ZEROS | COMMON)[name]
    inputs = tensors(case)
    module = traced(case.function, *inputs)
    reference = copy_graph(module)
    simplify(module)
    assert_same(module, reference, inputs)
    assert len(operators(module)) <= len(case.left)
    assert not any(simplify(module).values())


def test_printed() -> None:
    """What is left of a tangent in which little moves."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        still = zeros(3, 4) @ w
        h = aten.alias(x @ w) * 1 + still
        return h.tanh() * h.tanh() + still.sin()

    module = traced(function, random_points(3, 4), random_points(4, 4))
    fired = simplify(module)
    text = print_graph(module)
    FileCheck().check("arg0_1: f64[3, 4]").check_next("arg1_1: f64[4, 4]").check_next(
        "mm_1: f64[3, 4] = mm(arg0_1, arg1_1)"
    ).check_next("tanh: f64[3, 4] = tanh(mm_1)").check_next(
        "mul_1: f64[3, 4] = mul.Tensor(tanh, tanh)"
    ).check_next("return (mul_1,)").run(text)
    assert all(fired[rule.__name__] for rule in (drop_aliases, drop_zeros, merge_common))


# Random numbers


def draws(module: GraphModule) -> int:
    return sum(is_random(node) for node in module.graph.nodes)


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: aten.bernoulli.p(x, 0.5),
        lambda x: aten.bernoulli(x.sigmoid()),
        lambda x: aten.rand([3, 4]),
        lambda x: aten.randn([3, 4]),
        lambda x: aten.rand_like(x),
        lambda x: aten.normal.Tensor_Tensor(x, x.exp()),
        lambda x: aten.multinomial(x.exp(), 2),
        lambda x: aten.randperm(4),
        lambda x: aten.native_dropout(x, 0.5, True)[0],
    ],
)
def test_draws_are_never_merged_nor_dropped(draw: Callable[[Tensor], Tensor]) -> None:
    """Two draws are two numbers, and one that nobody reads still moves the generator."""

    def function(x: Tensor) -> Tensor:
        draw(x)
        return draw(x) - draw(x)

    module = traced(function, random_points(3, 4))
    assert draws(module) == 3
    simplify(module)
    assert draws(module) == 3


# Layouts


@pytest.mark.parametrize(
    "function",
    [
        lambda x: aten.as_strided(
            aten.clone(x.t(), memory_format=torch.contiguous_format), [12], [1]
        ),
        lambda x: aten.as_strided(x[:1].expand(3, 4) + zeros(3, 4), [12], [1]),
        lambda x: aten.as_strided(x[:1].expand(3, 4) * 1, [12], [1]),
        lambda x: aten.as_strided(aten._to_copy(x.t(), dtype=torch.float64), [12], [1]),
    ],
)
def test_layout_that_is_read_stays(function: Callable[[Tensor], Tensor]) -> None:
    """`as_strided` reads memory: what comes before it must keep its strides."""
    x = random_points(3, 4)
    module = traced(function, x)
    reference = copy_graph(module)
    simplify(module)
    assert_same(module, reference, [x])


# Symbolic sizes


@views_of_open_sizes
def test_comparing_sizes_makes_no_guards() -> None:
    """A rule that asks whether two symbolic sizes are equal must not specialise the graph."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        rows = x.shape[0]
        z = aten.view(x, [rows, 4]) * 1 + aten.full([rows, 4], 0, dtype=torch.float64)
        z = aten.clone(z) + aten.expand(y, [rows, 4])
        return aten.permute(aten.permute(z, [1, 0]), [1, 0]).sum(0)

    x, y = random_points(5, 4), random_points(4)
    module = traced(function, x, y, mode="symbolic")
    shape_env = next(iter(module.graph.nodes)).meta["val"].fake_mode.shape_env
    before = list(shape_env.guards)
    simplify(module)
    assert shape_env.guards == before
    assert operators(module) == ("sym_size.int", "expand", "add.Tensor", "sum.dim_IntList")
    x = random_points(9, 4)
    torch.testing.assert_close(module(x, y)[0], function(x, y))


def test_zero_of_symbolic_size_is_dropped_from_sums() -> None:
    module = traced(
        lambda x: (x + aten.full([x.shape[0]], 0, dtype=torch.float64)).sin(),
        random_points(5),
        mode="symbolic",
    )
    simplify(module)
    assert "add.Tensor" not in operators(module)


# Infinities


def test_zero_times_infinity_is_zero() -> None:
    """A symbolic zero has no value to multiply: documented in `drop_zeros`."""
    module = traced(lambda x: zeros(2) * x, torch.tensor([1.0, float("inf")]).double())
    assert module(torch.tensor([1.0, float("inf")]).double())[0].isnan().any()
    simplify(module)
    assert module(torch.tensor([1.0, float("inf")]).double())[0].tolist() == [0, 0]


def test_what_is_proven_zero() -> None:
    module = traced(
        lambda x: (zeros(3, 4) @ x, x.new_zeros(2), zeros(3).cos(), x * 0), random_points(4, 4)
    )
    proven = {str(n.target) for n in zero_nodes(module.graph)}
    assert proven == {
        "aten.full.default",
        "aten.mm.default",
        "aten.new_zeros.default",
        "aten.mul.Tensor",
    }


# Masks


def convolution_backward(
    mask: list[bool], used: list[int], groups: int = 2
) -> tuple[GraphModule, list[Tensor]]:
    x, w = random_points(2, 4, 5), random_points(6, 4 // groups, 3)
    grad = random_points(2, 6, 5)

    def function(grad: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        found = aten.convolution_backward(grad, x, w, [6], [1], [1], [1], False, [0], groups, mask)
        return tuple(found[i] for i in used)

    return traced(function, grad, x, w), [grad, x, w]


@pytest.mark.parametrize(
    ("mask", "used", "masks_left", "sums"),
    [
        ([True, True, True], [0, 1, 2], [(1, 0, 0), (0, 1, 0)], 1),
        ([True, True, True], [0], [(1, 0, 0)], 0),
        ([True, True, True], [2], [], 1),
        ([True, True, True], [2, 2], [], 1),
        ([True, True, False], [1, 0], [(1, 0, 0), (0, 1, 0)], 0),
        ([True, False, True], [0, 2], [(1, 0, 0)], 1),
        ([False, True, False], [1], [(0, 1, 0)], 0),
        ([False, False, True], [2], [], 1),
        ([True, True, True], [], [], 0),
    ],
)
def test_narrow_masks(
    mask: list[bool], used: list[int], masks_left: list[tuple[int, ...]], sums: int
) -> None:
    module, inputs = convolution_backward(mask, used)
    reference = copy_graph(module)
    simplify(module)
    assert_same(module, reference, inputs)
    backward = module.graph.find_nodes(op="call_function", target=aten.convolution_backward.default)
    assert sorted(tuple(map(int, n.args[10])) for n in backward) == sorted(masks_left)
    assert calls(module, aten.sum.dim_IntList) == sums
    assert narrow_masks(module.graph) == 0
    for node in backward:
        present = [v is not None for v in node.meta["val"]]
        assert present == list(node.args[10])


def test_narrow_masks_costs_no_flops() -> None:
    """One call per result is what one call for all results costs; unused results cost nothing."""
    from_all, _ = convolution_backward([True, True, True], [0, 1, 2], groups=1)
    only_input, _ = convolution_backward([True, True, True], [0], groups=1)
    before = price(from_all).flops
    simplify(from_all)
    simplify(only_input)
    assert price(from_all).flops == before
    assert 2 * price(only_input).flops == before


# The fixpoint


def test_rule_that_never_settles_is_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    def restless(graph: torch.fx.Graph) -> int:
        return 1

    monkeypatch.setattr("passes.simplify.fixpoint.RULES", (*RULES, restless))
    module = traced(lambda x: x.sin(), random_points(3))
    with pytest.raises(AssertionError, match=r"simplify did not settle .*restless"):
        simplify(module, rounds=3)


def test_one_rule_makes_work_for_another() -> None:
    """``x + 0·y`` and ``x·1`` become one and the same ``x``, whose tanh is then taken once."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x + zeros(3) * y).tanh() - (x * 1).tanh()

    module = traced(function, random_points(3), random_points(3))
    simplify(module)
    assert operators(module) == ("tanh", "sub.Tensor")


PIECES: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: b - a,
    lambda a, b: a * b,
    lambda a, b: a @ b,
    lambda a, b: a.t(),
    lambda a, b: aten.clone(a),
    lambda a, b: a.sin(),
    lambda a, b: aten.detach(b),
    lambda a, b: a * 1,
    lambda a, b: a + 0,
    lambda a, b: a * 0,
    lambda a, b: zeros(3, 3),
    lambda a, b: zeros(3),
    lambda a, b: aten.permute(b, [1, 0]),
    lambda a, b: aten.addmm(a, b, a),
    lambda a, b: aten.add.Tensor(a, b, alpha=2),
    lambda a, b: torch.cat([a, b])[1:4].reshape(-1, a.shape[-1]) if a.dim() == b.dim() else a,
    lambda a, b: torch.maximum(a, b),
]


@pytest.mark.parametrize("seed", range(25))
def test_random_graphs(seed: int) -> None:
    """Any mixture of what the rules look for keeps its values."""
    choose = random.Random(seed)
    steps = [(choose.choice(PIECES), choose.random(), choose.random()) for _ in range(25)]

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        values = [x, y]
        for piece, i, j in steps:
            a, b = (values[int(f * len(values))] for f in (i, j))
            if a.dim() == b.dim() == 2:
                values.append(piece(a, b))
            else:
                values.append(a + b)
        return values[-8:]

    torch.manual_seed(seed)
    inputs = [random_points(3, 3) / 3, random_points(3, 3) / 3]
    module = traced(function, *inputs)
    reference = copy_graph(module)
    simplify(module)
    assert_same(module, reference, inputs)
    assert not any(simplify(module).values())
