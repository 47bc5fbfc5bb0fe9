"""Sums are taken before linear operators: same value, fewer operators, idempotent."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph

from passes.graph import copy_graph, drop_dead
from passes.price import price
from passes.simplify.sums import gather_sums
from tests.oracle import check, flops_per_forward
from tests.passes.flat import random_points
from tests.passes.test_simplify import Case, assert_rule, traced

aten = torch.ops.aten
R, W, SQUARE = (5, 4), (4, 3), (4, 4)
IMAGES, KERNEL = (5, 2, 4, 4), (2, 2, 3, 3)
PLAIN = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)


def gradient(which: int, g: Tensor, x: Tensor, w: Tensor) -> Tensor:
    only = [position == which for position in range(3)]
    return aten.convolution_backward(g, x, w, None, *PLAIN, only)[which]


def convolved(x: Tensor, w: Tensor) -> Tensor:
    return aten.convolution(x, w, None, *PLAIN)


def chains(w: Tensor, v: Tensor, t: Tensor, a: Tensor, *cotangents: Tensor) -> list[Tensor]:
    """Pull cotangents back through two layers: gradients of both weights and of one bias."""
    at_w, at_v, at_bias = [], [], []
    for d in cotangents:
        at_v.append(aten.mm(d.permute(1, 0), a))
        d = aten.mm(d, v) * t
        at_bias.append(d.sum([0]))
        at_w.append(aten.mm(d.permute(1, 0), w))
    return [sum(parts[1:], parts[0]) for parts in (at_w, at_v, at_bias)]


ADD, SUB, MM, MUL = "add.Tensor", "sub.Tensor", "mm", "mul.Tensor"
CASES: dict[str, Case] = {
    "left": Case(lambda a, x, y: a @ x + a @ y, (R, W, W), 1, (ADD, MM)),
    "right": Case(lambda a, b, x: a @ x + b @ x, (R, R, W), 1, (ADD, MM)),
    "three": Case(lambda a, b, c, x: a @ x + (b @ x + c @ x), (R, R, R, W), 1, (ADD, ADD, MM)),
    "among others": Case(
        lambda a, b, c, x: a @ x + c.sin() + b @ x, (R, R, (5, 3), W), 1, (ADD, "sin", MM, ADD)
    ),
    "two groups": Case(
        lambda a, b, x, y: a @ x + b @ x + a @ y + b @ y, (R, R, W, W), 3, (ADD, ADD, MM)
    ),
    "differences": Case(
        lambda a, b, c, x: (a @ x - b @ x) - c @ x, (R, R, R, W), 1, (SUB, SUB, MM)
    ),
    "all negative": Case(lambda a, b, x: -(a @ x) - b @ x, (R, R, W), 1, (ADD, MM, "neg")),
    "factor": Case(lambda x, y, t: x * t + t * y, (R, R, R), 1, (ADD, MUL)),
    "quotient": Case(lambda x, y, t: x / t - y / t, (R, R, R), 1, ("sub.Tensor", "div.Tensor")),
    "number": Case(lambda x, y: x * 3.0 + y * 3.0, (R, R), 1, (ADD, MUL)),
    "branches": Case(
        lambda x, y, z, m: torch.where(m, x, z) + torch.where(m, y, x),
        (R, R, R, torch.arange(20).reshape(5, 4) > 7),
        1,
        (ADD, ADD, "where.self"),
    ),
    "views": Case(
        lambda x, y: x.permute(1, 0) + y.permute(1, 0), (R, R), 1, (ADD, "permute")
    ),
    "batches": Case(
        lambda a, x, y: torch.bmm(a, x) + torch.bmm(a, y),
        ((2, 3, 4), (2, 4, 5), (2, 4, 5)),
        1,
        (ADD, "bmm"),
    ),
    "convolution of a sum": Case(
        lambda x, y, w: convolved(x, w) + convolved(y, w), (IMAGES, IMAGES, KERNEL), 1,
        (ADD, "convolution"),
    ),
    "convolution with a sum": Case(
        lambda x, w, v: convolved(x, w) + convolved(x, v), (IMAGES, KERNEL, KERNEL), 1,
        (ADD, "convolution"),
    ),
    "pullbacks to images": Case(
        lambda g, k, x, y, w: gradient(0, g, x, w) + gradient(0, k, y, w),
        (IMAGES, IMAGES, IMAGES, IMAGES, KERNEL),
        1,
        (ADD, "convolution_backward"),
    ),
    "pullbacks to kernels": Case(
        lambda g, x, y, w, v: gradient(1, g, x, w) + gradient(1, g, y, v),
        (IMAGES, IMAGES, IMAGES, KERNEL, KERNEL),
        1,
        (ADD, "convolution_backward"),
    ),
    "chains": Case(
        chains, ((5, 3), SQUARE, R, (5, 6), R, R, R), 7,
        (ADD, ADD, "permute", MM, MUL, "permute", MM, MM, "sum.dim_IntList"),
    ),
    "square": Case(lambda x, y: x * x + x * y, (R, R), 1, (ADD, MUL)),
    "branches of different signs": Case(
        lambda x, y, z, m: torch.where(m, x, z) - torch.where(m, y, x),
        (R, R, R, torch.arange(20).reshape(5, 4) > 7),
        0,
        ("where.self", "where.self", SUB),
    ),
    # What must stay.
    "square alone": Case(lambda x, y: x * x + y, (R, R), 0, (MUL, ADD)),
    "read elsewhere": Case(
        lambda a, x, y: ((z := a @ x) + a @ y, z.sin()), (R, W, W), 0, (MM, MM, ADD, "sin")
    ),
    "twice the same": Case(lambda a, x: (a @ x) + (a @ x), (R, W), 1, (ADD, MM)),
    "nothing in common": Case(
        lambda a, b, x, y: a @ x + b @ y, (R, R, W, W), 0, (MM, MM, ADD)
    ),
    "sums alone": Case(
        lambda x, y: x.sum([0]) + y.sum([0]), (R, R), 0,
        ("sum.dim_IntList", "sum.dim_IntList", ADD),
    ),
    "times a number": Case(
        lambda a, x, y: aten.add.Tensor(a @ x, a @ y, alpha=2), (R, W, W), 0, (MM, MM, ADD)
    ),
    "of other shapes": Case(
        lambda x, y, t: x * t + y * t, (R, (5, 1), R), 0, (MUL, MUL, ADD)
    ),
    "of other strides": Case(
        lambda x, y, t: x * t + y.permute(1, 0) * t, (R, (4, 5), R), 0,
        (MUL, "permute", MUL, ADD),
    ),
    "in half precision": Case(
        lambda x, y: x * 0.25 + y * 0.25, (torch.ones(3).half(), torch.ones(3).half()), 0,
        (MUL, MUL, ADD),
    ),
    "to another type": Case(
        lambda x, y: x.double() + y.double(), (torch.ones(3), torch.ones(3)), 0,
        ("_to_copy", "_to_copy", ADD),
    ),
    "not linear": Case(lambda x, y: x.sin() + y.sin(), (R, R), 0, ("sin", "sin", ADD)),
    "with a bias": Case(
        lambda x, y, w, b: aten.convolution(x, w, b, *PLAIN) + aten.convolution(y, w, b, *PLAIN),
        (IMAGES, IMAGES, KERNEL, (2,)),
        0,
        ("convolution", "convolution", ADD),
    ),
}  # fmt: skip


def _without_dead_results(graph: Graph) -> int:
    """As in the fixpoint; a trace holds all results of an operator."""
    drop_dead(graph)
    return gather_sums(graph)


@pytest.mark.parametrize("name", CASES)
def test_gather_sums(name: str) -> None:
    assert_rule(_without_dead_results, CASES[name])


def test_one_walk_goes_all_the_way() -> None:
    """However deep the network is, one call settles it: the rounds of a fixpoint are few."""
    depth = 30

    def pulled(weight: Tensor, *cotangents: Tensor) -> Tensor:
        ends = list(cotangents)
        for _ in range(depth):
            ends = [aten.mm(d, weight) for d in ends]
        return ends[0] + ends[1]

    module = traced(pulled, *(random_points(4, 4) for _ in range(3)))
    before = price(module).flops
    assert gather_sums(module.graph) == depth and gather_sums(module.graph) == 0
    assert price(module).flops * 2 == before


def test_random_graphs() -> None:
    """Whatever is written, the value stays."""
    steps = (
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: -a,
        lambda a, b: a @ b,
        lambda a, b: a * b,
        lambda a, b: a.permute(1, 0),
        lambda a, b: a * 0.5,
    )
    for seed in range(40):
        pick = random.Random(seed)

        def written(*values: Tensor) -> Tensor:
            found = list(values)
            for _ in range(25):
                step, a, b = (pick.choice(of) for of in (steps, found, found))  # noqa: B023
                found.append(step(a, b) / 4)
            return sum(found[3:], found[0])

        inputs = [random_points(4, 4) for _ in range(3)]
        module = traced(written, *inputs)
        drop_dead(module.graph)
        reference, nodes = copy_graph(module), len(module.graph.nodes)
        flops = price(module).flops
        changes = gather_sums(module.graph)
        module.graph.lint()
        module.recompile()
        torch.testing.assert_close(module(*inputs), reference(*inputs), rtol=1e-9, atol=1e-12)
        assert (len(module.graph.nodes) < nodes) == (changes > 0)
        assert price(module).flops <= flops


def frobenius(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = net(x)
    rows = [torch.autograd.grad(u[:, k].sum(), x, create_graph=True)[0] for k in range(u.shape[1])]
    return sum((g.square().sum() for g in rows), u.square().sum())


@pytest.mark.parametrize("strategy", ["jvp_over_gradient", "auto"])
def test_rows_of_a_jacobian_go_back_together(strategy: str) -> None:
    """Three products for each row, and one backward pass for all of them: 3 C + 3."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 4)
    )
    x = random_points(6, 40)
    loss = check(frobenius, [net.double()], x, strategy=strategy)
    assert flops_per_forward(loss, net, x) <= 3 * 4 + 3
