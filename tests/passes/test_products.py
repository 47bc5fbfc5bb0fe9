"""Products that are another one, or need not be formed: same value, new structure, idempotent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph
from torch.fx.experimental.proxy_tensor import make_fx

from passes.graph import drop_dead
from passes.simplify.aliases import drop_aliases, merge_views
from passes.simplify.batches import fold_batches
from passes.simplify.common import merge_common
from passes.simplify.contractions import contract_first
from passes.simplify.filled import fold_filled
from passes.simplify.narrow import narrow_stacks
from tests.oracle import check, flops_per_forward
from tests.passes.flat import random_points
from tests.passes.test_simplify import Case, assert_rule
from tests.passes.test_sums import convolved, gradient

aten = torch.ops.aten
A, B, C = (5, 4), (4, 3), (5, 3)
IMAGES, KERNEL = (5, 2, 4, 4), (2, 2, 3, 3)
BATCH = (6, 2, 3)
MM, MUL, SUM, TURN, VIEW = "mm", "mul.Tensor", "sum.dim_IntList", "permute", "reshape"


def turned(x: Tensor) -> Tensor:
    return x.permute(1, 0) if x.dim() == 2 else x.permute(0, 2, 1)


VIEWS = {
    "inverse": Case(
        lambda x: x.permute(2, 0, 1).permute(1, 2, 0).sin(), (BATCH,), 1, (TURN, "sin")
    ),
    "permutations": Case(
        lambda x: x.permute(2, 0, 1).permute(-1, -3, 1).sin(), (BATCH,), 1, (TURN, "sin")
    ),
    "three": Case(
        lambda x: x.permute(1, 0).permute(1, 0).permute(1, 0).sin(), (A,), 2, (TURN, "sin")
    ),
    "reshapes": Case(
        lambda x: aten.reshape(aten.reshape(x, [3, 12]), [4, 9]).sin(), (BATCH,), 1, (VIEW, "sin")
    ),
    "there and back": Case(
        lambda x: x.unsqueeze(1).reshape(5, 4).sin(), (A,), 1, ("sin",)
    ),
    "by two ways": Case(
        lambda x: x.unsqueeze(1).reshape(1, 5, 1, 4).squeeze([0, 2]).sin(), (A,), 2, ("sin",)
    ),
    "unsqueezed": Case(
        lambda x: x.unsqueeze(0).reshape(2, 10).sin(), (A,), 1, (VIEW, "sin")
    ),
    # What must stay.
    "squeezed": Case(
        lambda x: x.reshape(5, 1, 4, 1).squeeze(1).sin(), (A,), 0, (VIEW, "squeeze.dim", "sin")
    ),
    "read between": Case(
        lambda x: ((y := x.permute(1, 0)).sin(), y.permute(1, 0).cos()), (A,), 1,
        (TURN, "sin", TURN, "cos"),
    ),
    "of two kinds": Case(
        lambda x: x.reshape(6, 6).permute(1, 0).sin(), (BATCH,), 0, (VIEW, TURN, "sin")
    ),
}  # fmt: skip


def make_reshapes(graph: Graph) -> None:
    """As in a captured graph, where no view relies on a layout."""
    for node in graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


def merged(graph: Graph) -> int:
    make_reshapes(graph)
    changes = merge_views(graph)
    drop_dead(graph)
    return changes


@pytest.mark.parametrize("name", VIEWS)
def test_merge_views(name: str) -> None:
    assert_rule(merged, VIEWS[name])


def constant(number: float, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((), number, dtype=dtype).expand(shape)


STACK = (3, 5, 4)
STACKS = {
    "one": Case(
        lambda x, w: (x.reshape(15, 4) @ w).reshape(3, 5, 3)[1].sin(), (STACK, B), 1,
        ("select.int", MM, "sin"),
    ),
    "two": Case(
        lambda x, w: [y := (x.reshape(15, 4) @ w).reshape(3, 5, 3), y[0].sin() + y[-1].cos()][1],
        (STACK, B), 2, ("select.int", MM, "sin", "select.int", MM, "cos", "add.Tensor"),
    ),
    # What must stay.
    "all": Case(
        lambda x, w: [y := (x.reshape(15, 4) @ w).reshape(3, 5, 3), y[0] + y[1] + y[2]][1],
        (STACK, B), 0,
        (VIEW, MM, VIEW, "select.int", "select.int", "add.Tensor", "select.int", "add.Tensor"),
    ),
    "another stack": Case(
        lambda x, w: (x.reshape(15, 4) @ w).reshape(5, 3, 3)[1].sin(), (STACK, B), 0,
        (VIEW, MM, VIEW, "select.int", "sin"),
    ),
    "of columns": Case(
        lambda x, w: (x.reshape(15, 4) @ w).reshape(3, 5, 3).select(1, 0).sin(), (STACK, B), 0,
        (VIEW, MM, VIEW, "select.int", "sin"),
    ),
}  # fmt: skip


def narrowed(graph: Graph) -> int:
    make_reshapes(graph)
    changes = narrow_stacks(graph)
    drop_aliases(graph)
    drop_dead(graph)
    return changes


@pytest.mark.parametrize("name", STACKS)
def test_narrow_stacks(name: str) -> None:
    assert_rule(narrowed, STACKS[name])


FILLED = {
    "ones": Case(lambda x: (x * constant(1, 5, 4)).sin(), (A,), 1, ("sin",)),
    "ones first": Case(lambda x: (torch.ones_like(x) * x).sin(), (A,), 1, ("sin",)),
    "number": Case(lambda x: x * constant(3, 5, 4), (A,), 1, (MUL,)),
    "of a mean": Case(lambda x: x * (constant(1, 5, 4) / 20), (A,), 1, (MUL,)),
    "computed": Case(lambda x: x * (constant(1, 5, 4) + constant(1, 5, 4) * 3), (A,), 1, (MUL,)),
    "quotient": Case(lambda x: x / constant(4, 5, 4), (A,), 1, ("div.Tensor",)),
    "joined": Case(
        lambda x: x * torch.cat([constant(3, 2, 4), constant(3, 3, 4)]), (A,), 1, (MUL,)
    ),
    # What must stay.
    "joined of two": Case(
        lambda x: x * torch.cat([constant(3, 2, 4), constant(2, 3, 4)]), (A,), 0,
        ("full", "expand", "full", "expand", "cat", MUL),
    ),
    "grows": Case(
        lambda x: x * torch.ones(5, 4, dtype=torch.float64), ((5, 1),), 0, ("ones", MUL)
    ),
    "changes type": Case(
        lambda x: x * torch.ones(3, dtype=torch.float64), (torch.ones(3),), 0, ("ones", MUL)
    ),
    "whole numbers": Case(
        lambda x: x * torch.full((3,), 2, dtype=torch.int64), (torch.ones(3),), 0, ("full", MUL)
    ),
    "one in place of x": Case(
        lambda x: torch.ones(5, 4, dtype=torch.float64) / x, (A,), 0, ("ones", "div.Tensor")
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILLED)
def test_fold_filled(name: str) -> None:
    assert_rule(fold_filled, FILLED[name])


FOLDED = (VIEW, MM, VIEW)
BATCHES = {
    "weight": Case(
        lambda x, w: torch.bmm(x, w.expand(6, 3, 4)), (BATCH, (3, 4)), 1, FOLDED
    ),
    "weight of rank 3": Case(
        lambda x, w: torch.bmm(x, w.expand(6, 3, 4)), (BATCH, (1, 3, 4)), 1,
        ("squeeze.dims", VIEW, MM, VIEW),
    ),
    "transposed weight": Case(
        lambda x, w: torch.bmm(x, turned(w).expand(6, 3, 4)), (BATCH, (4, 3)), 1, (TURN, *FOLDED)
    ),
    "rows in another order": Case(
        lambda x, w: torch.bmm(x.permute(1, 0, 2), w.expand(6, 3, 4)), ((2, 6, 3), (3, 4)), 1,
        (TURN, *FOLDED),
    ),
    "weight's gradient": Case(
        lambda x, y: torch.bmm(turned(x), y).sum([0]), (BATCH, (6, 2, 4)), 1,
        (VIEW, VIEW, TURN, MM),
    ),
    "with its dimension": Case(
        lambda x, y: torch.bmm(turned(x), y).sum([0], keepdim=True), (BATCH, (6, 2, 4)), 1,
        (VIEW, VIEW, TURN, MM, VIEW),
    ),
    # What must stay.
    "many rows in another order": Case(
        lambda x, w: torch.bmm(x.permute(1, 0, 2), w.expand(6, 3, 2)), ((50, 6, 3), (3, 2)), 0,
        (TURN, "expand", "bmm"),
    ),
    "sum of another dimension": Case(
        lambda x, y: torch.bmm(turned(x), y).sum([1]), (BATCH, (6, 2, 4)), 0, (TURN, "bmm", SUM)
    ),
    "summed and read": Case(
        lambda x, y: ((z := torch.bmm(turned(x), y)).sum([0]), z.sin()), (BATCH, (6, 2, 4)), 0,
        (TURN, "bmm", SUM, "sin"),
    ),
    "weights of their own": Case(
        lambda x, w: torch.bmm(x, w), (BATCH, (6, 3, 4)), 0, ("bmm",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BATCHES)
def test_fold_batches(name: str) -> None:
    assert_rule(fold_batches, BATCHES[name])


def contracted(graph: Graph) -> int:
    """With what must follow for a product to be gone, and be found."""
    drop_dead(graph)
    merge_common(graph)
    changes = contract_first(graph)
    merge_common(graph)
    return changes


CONTRACTED = {
    "by the right operand": Case(
        lambda a, b, v: ((v @ turned(b)).sin(), ((a @ b) * v).sum([])), (A, B, C), 1,
        (TURN, MM, "sin", MUL, SUM),
    ),
    "by the left operand": Case(
        lambda a, b, v: ((turned(a) @ v).sin(), (v * (a @ b)).sum([0, 1])), (A, B, C), 1,
        (TURN, MM, "sin", MUL, SUM),
    ),
    "by a transpose": Case(
        lambda a, b, v: ((b @ turned(v)).sin(), ((a @ b) * v).sum([])), (A, B, C), 1,
        (TURN, MM, "sin", TURN, MUL, SUM),
    ),
    "of a transpose": Case(
        lambda a, b, v: ((turned(v) @ turned(b)).sin(), (turned(a @ b) * v).sum([])),
        (A, B, (3, 5)),
        1,
        (TURN, TURN, MM, "sin", MUL, SUM),
    ),
    "each row": Case(
        lambda a, b, v: ((v @ turned(b)).sin(), ((a @ b) * v).sum([1])), (A, B, C), 1,
        (TURN, MM, "sin", MUL, SUM),
    ),
    "each column": Case(
        lambda a, b, v: ((turned(a) @ v).sin(), ((a @ b) * v).sum([0], True)), (A, B, C), 1,
        (TURN, MM, "sin", MUL, SUM),
    ),
    "batches": Case(
        lambda a, b, v: (torch.bmm(v, turned(b)).sin(), (torch.bmm(a, b) * v).sum([])),
        ((2, 5, 4), (2, 4, 3), (2, 5, 3)),
        1,
        (TURN, "bmm", "sin", MUL, SUM),
    ),
    "pullback to images": Case(
        lambda g, x, w, v: (convolved(v, w).sin(), (gradient(0, g, x, w) * v).sum([])),
        (IMAGES, IMAGES, KERNEL, IMAGES),
        1,
        ("convolution", "sin", MUL, SUM),
    ),
    "pullback to a kernel": Case(
        lambda g, x, w, v: (convolved(x, v).sin(), (gradient(1, g, x, w) * v).sum([])),
        (IMAGES, IMAGES, KERNEL, KERNEL),
        1,
        ("convolution", "sin", MUL, SUM),
    ),
    # What must stay.
    "not there": Case(lambda a, b, v: ((a @ b) * v).sum([]), (A, B, C), 0, (MM, MUL, SUM)),
    "formed anyway": Case(
        lambda a, b, v: ((v @ turned(b)).sin(), ((c := a @ b) * v).sum([]), c.cos()), (A, B, C), 0,
        (TURN, MM, "sin", MM, MUL, SUM, "cos"),
    ),
    "other sum": Case(
        lambda a, b, v: ((v @ turned(b)).sin(), ((a @ b) * v).sum([0])), (A, B, C), 0,
        (TURN, MM, "sin", MM, MUL, SUM),
    ),
    "broadcast": Case(
        lambda a, b, v: ((v @ turned(b)).sin(), ((a @ b) * v).sum([])), (A, B, (1, 3)), 0,
        (TURN, MM, "sin", MM, MUL, SUM),
    ),
    "other strides": Case(
        lambda g, x, w, v: (
            aten.convolution(x, v, None, [2, 2], [1, 1], [1, 1], False, [0, 0], 1).sin(),
            (gradient(1, g, x, w) * v).sum([]),
        ),
        (IMAGES, IMAGES, KERNEL, KERNEL),
        0,
        ("convolution", "sin", "convolution_backward", MUL, SUM),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRACTED)
def test_contract_first(name: str) -> None:
    assert_rule(contracted, CONTRACTED[name])


def test_two_sums_do_not_change_places() -> None:
    """``Σ a ⊙ (g cᵀ) = Σ c ⊙ (aᵀ g)``: each could take the other's product."""

    def function(a: Tensor, c: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        one = (a * torch.bmm(g, turned(c))).sum([])
        return one, (c * torch.bmm(turned(a), g)).sum([])

    square = random_points(2, 3, 3)
    module = make_fx(function, tracing_mode="fake")(square, square.sin(), square.cos())
    assert contracted(module.graph) == 1
    assert contracted(module.graph) == 0
    left = module.graph.find_nodes(op="call_function", target=aten.bmm.default)
    assert len(left) == 1


def test_symbolic_sizes() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return torch.bmm(x, w.expand(x.shape[0], 3, 4)), torch.bmm(turned(x), y).sum([0])

    module = make_fx(function, tracing_mode="symbolic")(
        random_points(6, 2, 3), random_points(6, 2, 5), random_points(3, 4)
    )
    assert fold_batches(module.graph) == 2
    module.recompile()
    more = random_points(7, 3, 3), random_points(7, 3, 5), random_points(3, 4)
    torch.testing.assert_close(module(*more), function(*more), rtol=1e-12, atol=1e-12)


def hessian_vector(net: nn.Module, x: Tensor, directions: list[Tensor]) -> Tensor:
    value = net(x).square().mean()
    grads = torch.autograd.grad(value, list(net.parameters()), create_graph=True)
    return sum(((g * v).sum() for g, v in zip(grads, directions, strict=True)), 0 * value)


def test_gradient_along_a_direction_is_not_formed() -> None:
    """Its pullback multiplies by the direction anyway: 19 products in place of 22."""
    torch.manual_seed(5)
    layers = nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30), nn.Tanh(), nn.Linear(30, 30)
    net, x = nn.Sequential(*layers).double(), random_points(20, 30)
    directions = [torch.randn_like(p) for p in net.parameters()]
    loss = check(hessian_vector, [net], x, directions)
    forward = 3 + 5  # values; tangents, in the first layer of the weight alone
    backward = 2 + 4 + 5  # cotangents; their tangents; gradients of the weights
    products = 3 * flops_per_forward(loss, net, x, directions)
    assert products == pytest.approx(forward + backward)


class Attention(nn.Module):
    """Multi-head attention, whose projections PyTorch writes as a batch of products."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_projections_of_attention_are_one_product() -> None:
    torch.manual_seed(6)
    net, x = Attention().double(), random_points(3, 4, 8)
    directions = [torch.randn_like(p) for p in net.parameters()]
    report = check(hessian_vector, [net], x, directions).explain(net, x, directions)
    batched = report.graph.graph.find_nodes(op="call_function", target=aten.bmm.default)
    sizes = {tuple(node.meta["val"].shape) for node in batched}
    assert sizes == {(6, 4, 4)}, "queries times keys, and times values, in 2 heads and 3 samples"
