"""Products kept as factors: same value, exactly these operators, never more FLOPs, idempotent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from passes.bytes import is_view
from passes.graph import copy_graph, drop_dead, elements, print_graph
from passes.simplify import simplify
from passes.simplify.factors import keep_factors
from passes.simplify.factors.lowering import work
from passes.simplify.factors.order import MOST_FACTORS
from tests.passes.flat import random_points
from tests.passes.test_simplify import Case, assert_same, tensors, traced

aten = torch.ops.aten
# Five samples; δ is [5, 6], a is [5, 7].
D, A, B = (5, 6), (5, 7), (5, 8)
MM, BMM, MUL, SUM, ADD = "mm", "bmm", "mul.Tensor", "sum.dim_IntList", "add.Tensor"
TURN, WIDEN, GROW, FOLD = "permute", "unsqueeze", "expand", "reshape"
CUT, ROOT = "slice.Tensor", "sqrt"
VIEWS = {
    TURN,
    WIDEN,
    GROW,
    FOLD,
    "view",
    "transpose.int",
    "squeeze.dims",
    "clone",
    "t",
    "_unsafe_view",
}


def outer(d: Tensor, a: Tensor) -> Tensor:
    """The gradients of a layer's weights, sample by sample."""
    return d.unsqueeze(2) * a.unsqueeze(1)


def positions(d: Tensor, a: Tensor) -> Tensor:
    """The same summed over positions, ``δₙᵀ aₙ``."""
    return torch.bmm(d.permute(0, 2, 1), a)


def flat(*parts: Tensor) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], 1)


def by_itself(jacobian: Tensor) -> Tensor:
    return jacobian @ jacobian.t()


def norm_of(d: Tensor, a: Tensor) -> Tensor:
    return torch.linalg.vector_norm(outer(d, a).flatten(1), dim=1)


def where_zero(d: Tensor, a: Tensor, s: Tensor) -> Tensor:
    """Rows that are divided by zero, and not taken."""
    rows = outer(d, a).flatten(1) / s
    return torch.where(s == 0, torch.zeros((), dtype=d.dtype), rows).square().sum(1)


# A row of zeros, to divide by.
SCALES = torch.tensor([[2.0], [0.0], [-1.0], [0.0], [0.5]], dtype=torch.float64)
TWO = (MUL, SUM, MUL, SUM, MUL)
GRAMS = (MM, MM, MUL)

KEPT = {
    "norm": Case(lambda d, a: outer(d, a).square().sum((1, 2)), (D, A), 1, TWO),
    "norm as a power": Case(lambda d, a: outer(d, a).flatten(1).pow(2).sum(1), (D, A), 1, TWO),
    "sum of all": Case(lambda d, a: outer(d, a).square().sum(), (D, A), 1, (*TWO[:4], MUL, SUM)),
    "Euclidean norm": Case(norm_of, (D, A), 1, (*TWO, ROOT)),
    "Gram": Case(lambda d, a: by_itself(flat(outer(d, a))), (D, A), 1, GRAMS),
    "Gram of two layers": Case(
        lambda d, a, b: by_itself(flat(outer(d, a), outer(d, b))), (D, A, B), 1,
        (MM, MM, MUL, MM, MUL, ADD),
    ),
    "Gram of weight and bias": Case(
        lambda d, a: by_itself(flat(outer(d, a), d)), (D, A), 1, (MM, MM, MUL, ADD)
    ),
    "product with another": Case(
        lambda d, a, e, b: (outer(d, a) * outer(e, b)).sum((1, 2)),
        ((5, 12), (5, 13), (5, 12), (5, 13)), 1, TWO
    ),
    "weighted sum": Case(
        lambda w, d, a: torch.einsum("nk,n...->k...", w, outer(d, a)), ((5, 2), D, A), 1,
        (MUL, MM),
    ),
    "sum of a batch of products": Case(
        lambda d, e, a: (positions(d, a) + positions(e, a)).sum(0),
        ((5, 1, 6), (5, 1, 6), (5, 1, 7)), 1, (MM, MM, ADD),
    ),
    "positions": Case(
        lambda d, a: positions(d, a).square().sum((1, 2)), ((5, 2, 9), (5, 2, 9)), 1,
        (BMM, BMM, MUL, SUM),
    ),
    "one part of several": Case(
        lambda d, a, b: flat(outer(d, a), outer(d, b))[:, 42:].square().sum(1), (D, A, B), 1, TWO
    ),
    "split": Case(
        lambda d, a, b: flat(outer(d, a), outer(d, b)).split_with_sizes([42, 48], 1)[1].sum(1),
        (D, A, B), 1, (SUM, SUM, MUL),
    ),
    "difference": Case(
        lambda d, a, b: (outer(d, a) - outer(d, b)).sum((1, 2)), (D, A, A), 1,
        (SUM, SUM, MUL, SUM, MUL, MUL, ADD),
    ),
    "times a direction": Case(
        lambda d, a, v: (outer(d, a) * v).sum((1, 2)), ((9, 6), (9, 7), (6, 7)), 1,
        (MM, MUL, SUM),
    ),
    "scaled": Case(
        lambda d, a: (outer(d, a) * 3 / 2).neg().sum((1, 2)), (D, A), 1, (SUM, SUM, MUL, MUL)
    ),
    "divided by a row": Case(
        lambda d, a, s: (outer(d, a) / s).sum((1, 2)), (D, A, (5, 1, 1)), 1,
        ("reciprocal", SUM, SUM, MUL, MUL),
    ),
    "chain from the right": Case(lambda a, b, c: a @ b @ c, ((9, 9), (9, 9), (9, 2)), 1, (MM, MM)),
    "chain from the left": Case(lambda a, b, c: a @ (b @ c), ((2, 9), (9, 9), (9, 9)), 1, (MM, MM)),
    "chain of four": Case(
        lambda a, b, c, d: (a @ (b @ c)) @ d, ((9, 2), (2, 9), (9, 9), (9, 1)), 1, (MM, MM, MM)
    ),
    "turned chain": Case(
        lambda a, b, c: (a @ b).t() @ c, ((9, 9), (9, 9), (9, 2)), 1, (MM, MM)
    ),
    "chain of a batch": Case(
        lambda a, b, c: a @ b @ c, ((3, 9, 9), (3, 9, 9), (3, 9, 2)), 1, (BMM, BMM)
    ),
}  # fmt: skip

SIN = "sin"
STAYS = {
    "a product that is read": Case(
        lambda d, a: outer(d, a).sin().sum(1), (D, A), 0, (MUL, SIN, SUM)
    ),
    "a chain in order": Case(lambda a, b, c: a @ b @ c, ((2, 9), (9, 9), (9, 9)), 0, (MM, MM)),
    "a product of a chain that is read": Case(
        lambda a, b, c: ((p := a @ b).sin(), p @ c), ((9, 9), (9, 9), (9, 2)), 0, (MM, SIN, MM)
    ),
    "many positions": Case(
        lambda d, a: positions(d, a).square().sum((1, 2)), ((5, 9, 3), (5, 9, 3)), 0,
        (BMM, "pow.Tensor_Scalar", SUM),
    ),
    "a cube": Case(
        lambda d, a: outer(d, a).pow(3).sum((1, 2)), (D, A), 0, (MUL, "pow.Tensor_Scalar", SUM)
    ),
    "another norm": Case(
        lambda d, a: torch.linalg.vector_norm(outer(d, a), 1, (1, 2)), (D, A), 0,
        (MUL, "linalg_vector_norm"),
    ),
    "a cut across": Case(
        lambda d, a: outer(d, a).flatten(1)[:, 3:20].sum(1), (D, A), 0, (MUL, CUT, SUM)
    ),
    "half precision": Case(
        lambda d, a: outer(d, a).square().sum((1, 2)),
        (torch.ones(5, 6).half(), torch.ones(5, 7).half()), 0, (MUL, "pow.Tensor_Scalar", SUM),
    ),
    "two types": Case(
        lambda d, a: (outer(d, d) * a).sum((1, 2)), (torch.ones(5, 6), (5, 1, 1)), 0,
        (MUL, MUL, SUM),
    ),
    "integers": Case(
        lambda d, a: outer(d, a).sum((1, 2)), (torch.ones(5, 6).long(), torch.ones(5, 7).long()), 0,
        (MUL, SUM),
    ),
    "complex": Case(
        lambda d, a: outer(d, a).sum((1, 2)), (torch.ones(5, 6) * 1j, torch.ones(5, 7) * 1j), 0,
        (MUL, SUM),
    ),
    "sum with a factor": Case(
        lambda d, a: aten.add.Tensor(outer(d, a), outer(d, a), alpha=2).sum((1, 2)), (D, A), 0,
        (MUL, MUL, ADD, SUM),
    ),
}  # fmt: skip


def without_views(rule: Callable[[Graph], int]) -> Callable[[Graph], int]:
    def cleaned(graph: Graph) -> int:
        changes = rule(graph)
        drop_dead(graph)
        return changes

    return cleaned


def computing(module: GraphModule) -> tuple[str, ...]:
    """Names of the operators that are no views, in order."""
    names = (str(n.target).removeprefix("aten.") for n in module.graph.nodes if is_call(n))
    names = (name.removesuffix(".default") for name in names)
    return tuple(name for name in names if name not in VIEWS and not name.startswith("<"))


def is_call(node: Any) -> bool:
    return node.op == "call_function"


def work_of(module: GraphModule) -> int:
    return sum(work(node) for node in module.graph.nodes if is_call(node))


def largest(module: GraphModule) -> int:
    """Return the most elements that an operator makes, views apart."""
    made = (n for n in module.graph.nodes if is_call(n) and not is_view(n))
    values = (n.meta["val"] for n in made)
    return max(elements(value) for value in values if isinstance(value, Tensor))


def kept(
    function: Callable[..., Any], inputs: list[Tensor], changes: int
) -> tuple[GraphModule, GraphModule]:
    """Return a function's graph with factors kept, and as it was: of the same value, after so many
    changes."""
    module = traced(function, *inputs)
    drop_dead(module.graph)
    reference = copy_graph(module)
    assert keep_factors(module.graph) == changes
    drop_dead(module.graph)
    module.graph.lint()
    module.recompile()
    assert_same(module, reference, inputs)
    return module, reference


def assert_kept(case: Case) -> GraphModule:
    """Same value in the same layout, exactly these operators, no more FLOPs; a second run changes
    nothing."""
    inputs = tensors(case)
    module, reference = kept(case.function, inputs, case.changes)
    for mine, theirs in zip(module(*inputs), reference(*inputs), strict=True):
        assert mine.stride() == theirs.stride()
    assert work_of(module) < work_of(reference) or not case.changes
    assert keep_factors(module.graph) == 0
    return module


@pytest.mark.parametrize("name", KEPT)
def test_is_contracted_before_it_is_formed(name: str) -> None:
    case = KEPT[name]
    module = assert_kept(case)
    assert sorted(computing(module)) == sorted(case.left), print_graph(module)
    if "chain" not in name:
        assert largest(module) < largest(traced(case.function, *tensors(case)))


@pytest.mark.parametrize("name", STAYS)
def test_stays(name: str) -> None:
    case = STAYS[name]
    assert sorted(computing(assert_kept(case))) == sorted(case.left)


def test_masked_rows_are_zero_where_the_product_is_not() -> None:
    """``0·∞``: a row that was not taken stays zero."""
    inputs = tensors(Case(where_zero, (D, A, SCALES), 0))
    module = traced(where_zero, *inputs)
    reference = copy_graph(module)
    simplify(module)
    assert_same(module, reference, inputs)
    (value,) = module(*inputs)
    assert value.isfinite().all() and (value[SCALES[:, 0] == 0] == 0).all()
    assert largest(module) <= 5 * 7


def test_shared_factors_are_multiplied_once() -> None:
    """Norms and what comes back through them."""

    def norms(d: Tensor, a: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        g = positions(d, a)
        return g.square().sum((1, 2)), torch.bmm(a, (g * c).permute(0, 2, 1))

    module = assert_kept(Case(norms, ((5, 2, 9), (5, 2, 8), (5, 1, 1)), 2))
    assert computing(module).count(BMM) == 3


def test_size_zero_and_one() -> None:
    for d, a in (((0, 6), (0, 7)), ((1, 6), (1, 7)), ((5, 1), (5, 7))):
        module = traced(
            lambda d, a: outer(d, a).square().sum((1, 2)), random_points(*d), random_points(*a)
        )
        reference = copy_graph(module)
        simplify(module)
        assert_same(module, reference, [random_points(*d), random_points(*a)])


def test_symbolic_sizes() -> None:
    """Sizes stay symbols: the graph runs at others."""

    def gram(d: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        g = outer(d, a)
        return by_itself(g.flatten(1)), g.square().sum((1, 2))

    module = traced(gram, random_points(5, 6), random_points(5, 7), mode="symbolic")
    reference = copy_graph(module)
    assert keep_factors(module.graph) > 0
    simplify(module)
    for n in (5, 4):
        assert_same(module, reference, [random_points(n, 6), random_points(n, 7)])


def test_divided_by_a_size() -> None:
    def mean(d: Tensor, a: Tensor) -> Tensor:
        return (outer(d, a) / d.shape[0]).square().sum()

    module = traced(mean, random_points(5, 6), random_points(5, 7), mode="symbolic")
    reference = copy_graph(module)
    simplify(module)
    assert_same(module, reference, [random_points(4, 6), random_points(4, 7)])


SIZES = st.sampled_from([2, 3, 11])


@st.composite
def products(draw: Any) -> tuple[str, list[tuple[int, ...]]]:
    """Random contractions of up to five tensors, written from left to right."""
    letters = {letter: draw(SIZES) for letter in "nijk"}
    names = st.text("nijk", min_size=1, max_size=3).map(lambda t: "".join(dict.fromkeys(t)))
    operands = draw(st.lists(names, min_size=2, max_size=5))
    used = "".join(dict.fromkeys("".join(operands)))
    wanted = "".join(letter for letter in used if draw(st.booleans()))
    return f"{','.join(operands)}->{wanted}", [tuple(letters[i] for i in o) for o in operands]


@hypothesis.given(products())
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_random_products(case: tuple[str, list[tuple[int, ...]]]) -> None:
    """As pointwise products and one sum."""
    equation, shapes = case
    operands, wanted = equation.split("->")
    order = "nijk"

    def written(*xs: Tensor) -> Tensor:
        total = torch.ones((), dtype=torch.float64)
        for name, x in zip(operands.split(","), xs, strict=True):
            x = x.permute(*(name.index(i) for i in sorted(name, key=order.index)))
            for at, letter in enumerate(order):
                if letter not in name:
                    x = x.unsqueeze(at)
            total = total * x
        gone = [at for at, i in enumerate(order) if i not in wanted]
        return total.sum(gone, keepdim=True) if gone else total

    inputs = [random_points(*shape) for shape in shapes]
    module = traced(written, *inputs)
    reference = copy_graph(module)
    simplify(module)
    assert_same(module, reference, inputs)
    assert work_of(module) <= work_of(reference)
    assert not any(simplify(module).values())


def test_too_many_factors_are_multiplied_part_by_part() -> None:
    inputs = [random_points(3, 2) for _ in range(MOST_FACTORS + 3)]

    def product(*xs: Tensor) -> Tensor:
        total = xs[0].unsqueeze(2)
        for at, x in enumerate(xs[1:]):
            total = total * (x.unsqueeze(1) if at % 2 else x.unsqueeze(2))
        return total.square().sum((1, 2))

    module = traced(product, *inputs)
    reference = copy_graph(module)
    simplify(module)
    assert_same(module, reference, inputs)
