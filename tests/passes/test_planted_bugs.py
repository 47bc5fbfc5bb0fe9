"""Rules made wrong on purpose: the oracle must notice each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from passes import (
    decompositions,
    derivative,
    graph,
    joint,
    linearize,
    markers,
    nest,
    share,
    tangent_rules,
    tangent_tables,
)
from passes.simplify import (
    aliases,
    batches,
    common,
    contractions,
    emit,
    filled,
    masks,
    narrow,
    rows,
    scales,
    sums,
    zeros,
)
from passes.simplify.factors import terms
from passes.strategies import jvp_over_gradient
from rewriter import NestedGradientWarning, step
from tests.oracle import check
from tests.passes.flat import random_points

aten = torch.ops.aten
Loss = Callable[..., Tensor]
Plant = Callable[[pytest.MonkeyPatch], None]


# Losses


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return (g.pow(2).sum(1) - 1).pow(2).mean() + g.pow(3).sum() + net(x).sum()


def values_and_gradient(net: nn.Module, x: Tensor) -> Tensor:
    """A hidden value and the output leave the derivative."""
    p = x.detach().requires_grad_()
    h = net[0](p)
    u = net[1:](h)
    (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
    return (g.sum(1) * u[:, 0]).square().sum() + h.square().sum()


def constant_factors(net: nn.Module, x: Tensor) -> Tensor:
    """One factor is constant to the inner derivative, another to the outer."""
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad((net(p) * net(x)).sum(), p, create_graph=True)
    return (g.square().sum(1, keepdim=True) * net(x).detach().sin() + net(x).sin()).sum()


def points_in_a_chain(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    h = net[0](p)
    g, k = torch.autograd.grad((net[1:](h) * h[:, :2]).sum(), (p, h), create_graph=True)
    return g.square().sum() + k.sin().sum()


def dropped_out(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    one, two = (nn.functional.dropout(net(p), 0.5) for _ in "ab")
    (g,) = torch.autograd.grad((one * two).sum() + one.square().sum(), p, create_graph=True)
    return g.square().sum()


def feature_computed_again(net: nn.Module, x: Tensor) -> Tensor:
    """Equal to the point, and a constant to the derivative at it."""
    h, again = net[0](x), net[0](x)
    (k,) = torch.autograd.grad((net[1:](h) * net[1:](again)).sum(), h, create_graph=True)
    return k.square().sum()


def two_leaves(net: nn.Module, x: Tensor) -> Tensor:
    p, q = (x.detach().requires_grad_() for _ in "ab")
    (g,) = torch.autograd.grad((net(p) * net(q)).sum(), p, create_graph=True)
    return g.square().sum()


def gradients_one_by_one(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    h = net[0](p)
    u = (net[1:](h) * h[:, :2]).sum()
    g, k = (torch.autograd.grad(u, at, create_graph=True)[0] for at in (p, h))
    return g.square().sum() + k.sin().sum()


def many_operators(net: nn.Module, x: Tensor) -> Tensor:
    """One of each family of tangents."""
    p = x.detach().requires_grad_()
    a, b = net(p).split(1, dim=1)
    u = a.sin() / (1 + b.square()) + (a * b).softmax(0) + torch.where(a > 0, a.cos() * a, b * a)
    u = u + torch.atan2(a, 2 + b * b) + (a - b).amax(1, keepdim=True).exp() + a.sign() * b.pow(3)
    u = u + (b - a).tanh()
    (g,) = torch.autograd.grad(u.square().sum(), p, create_graph=True)
    return g.square().sum()


def along(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(net, (x,), (x.cos(),))[1].square().sum()


def seeded(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p), p, net(x).cos(), create_graph=True)
    return g.square().sum()


def hidden_master(net: nn.Module, x: Tensor) -> Tensor:
    """A second derivative starts inside of what the first differentiates."""
    p = x.detach().requires_grad_()
    h = net[0](p)
    u = net[1:](h)
    (g,) = torch.autograd.grad(u.square().sum(), p, create_graph=True)
    (k,) = torch.autograd.grad((u * h[:, :2]).sum(), h, create_graph=True)
    return g.square().sum() + k.sin().sum()


def rows_of_a_jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """Cotangents that are added where they meet."""
    p = x.detach().requires_grad_()
    u = net(p)
    rows = [torch.autograd.grad(u[:, k].sum(), p, create_graph=True)[0] for k in (0, 1)]
    return sum((g.square().sum() for g in rows), u.sin().sum())


def hessian_vector(net: nn.Module, x: Tensor) -> Tensor:
    """A gradient in parameters, along a direction."""
    value, parameters = net(x).sin().mean(), list(net.parameters())
    grads = torch.autograd.grad(value, parameters, create_graph=True)
    parts = [(g * p.detach().cos()).sum() for g, p in zip(grads, parameters, strict=True)]
    return sum(parts, 0 * value)


def columns_alike(net: nn.Module, x: Tensor) -> Tensor:
    """The seed is the same for each output, not for each point."""
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = torch.autograd.grad(u, p, x[:, :1].cos().expand(u.shape), create_graph=True)
    return g.square().sum()


def second_derivative(net: nn.Module, x: Tensor) -> Tensor:
    """In the first coordinate, of the last output."""
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p)[:, -1].sum(), p, create_graph=True)
    (h,) = torch.autograd.grad(g[:, 0].sum(), p, create_graph=True)
    return (g[:, 1] + h[:, 0]).square().sum()


def norms_of_samples(net: nn.Module, x: Tensor) -> Tensor:
    """Of the gradients in all parameters, several places a sample."""

    def output(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
        return torch.func.functional_call(net, parameters, (point,)).sin().sum()

    gradient = torch.func.vmap(torch.func.grad(output), in_dims=(None, 0))
    found = gradient(dict(net.named_parameters()), x)
    return sum((g.flatten(1).square().sum(1).sin().sum() for g in found.values()), 0 * x.sum())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def with_data(net: nn.Module, x: Tensor) -> Tensor:
    """A data loss beside a penalty, at the same points."""
    p = x.detach().requires_grad_()
    u = net(p)
    (g,) = torch.autograd.grad(u.sum(), p, create_graph=True)
    return g.square().sum() + u.sin().sum()


def piecewise() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.LeakyReLU(), nn.Linear(5, 1)).double()


def normalized() -> nn.Module:
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
    return nn.Sequential(*layers).double()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 9)).double()


def convolutions() -> nn.Module:
    layers = nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 1, 2), nn.Flatten()
    return nn.Sequential(*layers).double()


@dataclass(frozen=True)
class Subject:
    """A loss with its network and points."""

    loss: Loss
    net: Callable[[], nn.Module] = mlp
    shape: tuple[int, ...] = (4, 3)
    strategy: str = "jvp_over_gradient"
    dynamic: bool | None = None

    def check(self, *, verify: bool = False) -> None:
        torch.manual_seed(12)
        points = random_points(*self.shape)
        options: dict[str, Any] = {"dynamic": self.dynamic, "verify": verify}
        check(self.loss, [self.net()], points, strategy=self.strategy, **options)


SUBJECTS = {
    "penalty": Subject(penalty),
    "convolutions": Subject(penalty, convolutions, (3, 2, 6)),
    "values": Subject(values_and_gradient),
    "factors": Subject(constant_factors),
    "chain": Subject(points_in_a_chain),
    "dropout": Subject(dropped_out),
    "again": Subject(feature_computed_again),
    "two leaves": Subject(two_leaves),
    "one by one": Subject(gradients_one_by_one),
    "operators": Subject(many_operators),
    "along": Subject(along, strategy="auto"),
    "seeded": Subject(seeded, strategy="reverse"),
    "master": Subject(hidden_master),
    "norm": Subject(penalty, normalized),
    "rows": Subject(rows_of_a_jacobian),
    "hvp": Subject(hessian_vector),
    "attention": Subject(hessian_vector, lambda: Attention().double(), (3, 2, 4), dynamic=False),
    "broadcast": Subject(columns_alike),
    "coordinate": Subject(second_derivative),
    "samples": Subject(norms_of_samples, wide, (3, 2, 9), strategy="auto", dynamic=False),
    "data": Subject(with_data, piecewise, strategy="auto"),
}


# Bugs


def tanh_of_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    wrong = lambda t, y, x: -aten.tanh_backward(t, y)  # noqa: E731
    patch.setitem(tangent_rules.FROM_BACKWARD, aten.tanh.default, wrong)


def product_without_its_second_term(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(tangent_rules.BILINEAR, aten.mul.Tensor, (0,))


def matrix_product_without_its_first_term(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(tangent_rules.BILINEAR, aten.mm.default, (1,))


def difference_as_a_sum(patch: pytest.MonkeyPatch) -> None:
    def wrong(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
        return tangent_rules.RULES[aten.add.Tensor](aten.add.Tensor, out, args, kwargs, along)

    patch.setitem(tangent_rules.RULES, aten.sub.Tensor, wrong)


def convolution_backward_without_the_weight(patch: pytest.MonkeyPatch) -> None:
    right = tangent_rules.RULES[aten.convolution_backward.default]

    def wrong(target: Any, out: Any, args: tuple, kwargs: dict, along: tuple) -> Any:
        return right(target, out, args, kwargs, (along[0], None, *along[2:]))

    patch.setitem(tangent_rules.RULES, aten.convolution_backward.default, wrong)


def every_constant_is_zero(patch: pytest.MonkeyPatch) -> None:
    filled = (aten.full.default, aten.full_like.default, aten.ones_like.default)
    patch.setattr(zeros, "is_made_of_zeros", lambda node: node.target in filled)


def doubled_is_dropped(patch: pytest.MonkeyPatch) -> None:
    """``2·x → x``, for every factor."""
    for target in (aten.mul.Tensor, aten.mul.Scalar):
        patch.setitem(aliases._WHEN, target, lambda node: not isinstance(node.args[1], Node))


def exponents_do_not_count(patch: pytest.MonkeyPatch) -> None:
    """``x² = x³``: the number is left out of what tells two powers apart."""
    right = common._key

    def wrong(node: Node) -> Any:
        if node.target is aten.pow.Tensor_Scalar:
            return node.target, node.args[0]
        return right(node)

    patch.setattr(common, "_key", wrong)


def bias_without_its_first_place(patch: pytest.MonkeyPatch) -> None:
    right = masks._bias_as_sum

    def wrong(graph: torch.fx.Graph, node: Node) -> int:
        changes = right(graph, node)
        for total in graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
            if total.args[1:] == ([0, 2],):
                with graph.inserting_before(total):
                    first = graph.call_function(aten.slice.Tensor, (total.args[0], 2, 1))
                first.meta = dict(total.args[0].meta)
                total.args = (first, [0, 2], False)
        return changes

    patch.setattr(masks, "_bias_as_sum", wrong)


def nobody_looks(patch: pytest.MonkeyPatch) -> None:
    """Merge across marks without asking which derivative sees it."""
    right = share._seen_by
    patch.setattr(share, "_seen_by", lambda graph: {point: set() for point in right(graph)})


def everything_is_looked_through(patch: pytest.MonkeyPatch) -> None:
    """A stop is taken for nothing even where a gradient comes by."""
    marks = (share.LEAF, share.STOP, share.POINT)
    patch.setattr(share, "_looked_through", lambda node, active: node.target in marks)


def stop_that_does_not_stop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(derivative, "stop", lambda x: x.clone())


def total_derivatives_in_one_call(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nest, "_split_dependent_points", lambda graph: None)


def draws_are_equal(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(graph, "is_random", lambda node: False)


def hidden_values_carry_nothing(patch: pytest.MonkeyPatch) -> None:
    """The cotangent of a value that leaves a derivative is forgotten."""
    patch.setattr(jvp_over_gradient, "is_float_value", lambda node, index: False)


def points_are_expressions(patch: pytest.MonkeyPatch) -> None:
    """What a derivative is taken at is merged with an equal constant."""
    patch.setattr(share, "_merge_expressions", common.merge_common)


def every_leaf_is_one(patch: pytest.MonkeyPatch) -> None:
    """Two leaves of one tensor are one variable, whoever tells them apart."""
    patch.setattr(share, "_seen_by", lambda graph: {})
    patch.setattr(share, "_merge_values", lambda graph, active: 0)


def gradients_merge_in_a_chain(patch: pytest.MonkeyPatch) -> None:
    """One pass back for a point and for what is computed from it, as if they were independent."""
    right = share._merge_gradients

    def wrong(graph: torch.fx.Graph) -> int:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(share, "reaches", set)
            return right(graph)

    patch.setattr(share, "_merge_gradients", wrong)
    patch.setattr(nest, "_split_dependent_points", lambda graph: None)


def parts_do_not_move(patch: pytest.MonkeyPatch) -> None:
    """The tangents of an operator with several results are forgotten."""
    patch.setattr(linearize, "_is_moving", lambda tangent: isinstance(tangent, Tensor))


def linear_operator_is_constant(patch: pytest.MonkeyPatch) -> None:
    constant = {*tangent_tables.ZERO, aten.permute.default, aten.t.default}
    patch.setattr(tangent_rules, "ZERO", constant)


def elementwise_of_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(tangent_tables.ELEMENTWISE, aten.cos.default, lambda y, x: x.sin())


def quotient_without_its_denominator(patch: pytest.MonkeyPatch) -> None:
    right = tangent_rules.RULES[aten.div.Tensor]

    def wrong(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
        return right(target, out, args, kwargs, (along[0], None))

    patch.setitem(tangent_rules.RULES, aten.div.Tensor, wrong)


def choice_of_the_wrong_branch(patch: pytest.MonkeyPatch) -> None:
    right = tangent_rules.RULES[aten.where.self]

    def wrong(target: Any, out: Tensor, args: tuple, kwargs: dict, along: tuple) -> Any:
        return right(target, out, args, kwargs, (along[0], along[2], along[1]))

    patch.setitem(tangent_rules.RULES, aten.where.self, wrong)


def affine_map_without_its_factor(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(
        tangent_rules.RULES,
        aten.addmm.default,
        lambda target, out, args, kwargs, along: aten.mm(along[1], 0 * args[2]),
    )


def rule_of_pytorch_doubled(patch: pytest.MonkeyPatch) -> None:
    right = tangent_rules._pytorch_rule
    patch.setattr(tangent_rules, "_pytorch_rule", lambda *read: 2 * right(*read))


def backward_operator_taken_apart_wrongly(patch: pytest.MonkeyPatch) -> None:
    table = decompositions.decompositions()
    patch.setitem(table, aten.tanh_backward.default, lambda grad, y: grad * (1 - y))


def norm_taken_apart_wrongly(patch: pytest.MonkeyPatch) -> None:
    """The variance is a constant to the derivative."""
    table = decompositions.before_autograd()
    target = aten._native_batch_norm_legit_functional.default
    right = table[target]

    def wrong(x: Tensor, *options: Any) -> Any:
        normal, *rest = right(x, *options)
        return (normal - x + markers.stop(x), *rest)

    patch.setitem(table, target, wrong)


def sum_and_difference_commute(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(common, "COMMUTATIVE", {*common.COMMUTATIVE, aten.sub.Tensor})


def row_scale_is_doubled(patch: pytest.MonkeyPatch) -> None:
    right = scales._shaped

    def wrong(graph: torch.fx.Graph, scale: torch.fx.Node, like: torch.fx.Node) -> torch.fx.Node:
        return emit.call(graph, aten.mul.Scalar, (right(graph, scale, like), 2), {}, scale)

    patch.setattr(scales, "_shaped", wrong)


def other_operands_do_not_count(patch: pytest.MonkeyPatch) -> None:
    """``x·a + y·b = (x + y)·a``: the sum is taken before operators that differ."""
    right = sums._readings

    def wrong(node: Node) -> Any:
        for reading in right(node):
            yield dataclasses.replace(reading, key=node.target)

    patch.setattr(sums, "_readings", wrong)


def contraction_without_the_cotangent(patch: pytest.MonkeyPatch) -> None:
    right = contractions._of_product

    def wrong(*arguments: Any) -> Any:
        pair = right(*arguments)
        return None if pair is None else (pair[1], pair[1])

    patch.setattr(contractions, "_of_product", wrong)


def places_are_summed_in_step(patch: pytest.MonkeyPatch) -> None:
    """``(Σₜ δₜ aₜ)² = Σₜ (δₜ aₜ)²``: both factors are summed over one index."""

    def wrong(self: Any) -> Any:
        names = {i: (terms.Index(i.size),) for i in sum(self.dims, ())}
        return self.renamed(names)

    patch.setattr(terms.Expression, "fresh", wrong)


def numbers_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(terms.Expression, "scaled", lambda self, scale: self)


def every_filling_is_one(patch: pytest.MonkeyPatch) -> None:
    right = filled.filling
    patch.setattr(filled, "filling", lambda *args: None if right(*args) is None else 1)


def product_of_a_batch_is_doubled(patch: pytest.MonkeyPatch) -> None:
    right = batches._of_one_weight

    def wrong(graph: torch.fx.Graph, node: Node) -> Any:
        made = right(graph, node)
        return made and emit.call(graph, aten.mul.Scalar, (made, 2), {}, node)

    patch.setattr(batches, "_of_one_weight", wrong)


def unit_vectors_are_the_first(patch: pytest.MonkeyPatch) -> None:
    """Which column is filled does not matter."""
    right = narrow._place

    def wrong(*arguments: Any) -> Any:
        place = right(*arguments)
        return place and (0, place[1] - place[0])

    patch.setattr(narrow, "_place", wrong)


def rows_are_equal(patch: pytest.MonkeyPatch) -> None:
    """What is expanded along its columns is taken for equal rows."""
    patch.setattr(rows, "is_equal", lambda size, one: True)


def last_gradient_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = joint.finish_joint

    def wrong(module: torch.fx.GraphModule) -> None:
        output = module.graph.output_node()
        values, updates, grads = output.args[0]  # pyright: ignore
        output.args = ((values, updates, [*grads[:-1], None]),)
        right(module)

    patch.setattr(joint, "finish_joint", wrong)


def state_stays(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(step.Step, "update", lambda self, inputs, out: None)


def every_derivative_is_its_own_master(patch: pytest.MonkeyPatch) -> None:
    """The second derivative loses the way from its point."""
    patch.setattr(nest, "_has_other_master", lambda mark, inside, others: False)


def seed_of_ones(patch: pytest.MonkeyPatch) -> None:
    right = derivative._pullback

    def wrong(outputs: Any, points: Any, seeds: Any, seed_dims: int) -> Any:
        return right(outputs, points, [torch.ones_like(c) for c in seeds], seed_dims)

    patch.setattr(derivative, "_pullback", wrong)


def direction_of_ones(patch: pytest.MonkeyPatch) -> None:
    right = derivative.push_forward

    def wrong(body: Any, primals: Any, tangents: Any) -> Any:
        ones = [None if v is None else torch.ones_like(v) for v in tangents]
        return right(body, primals, ones)

    patch.setattr(derivative, "push_forward", wrong)


PLANTED: dict[Plant, str] = {
    tanh_of_the_wrong_sign: "penalty",
    product_without_its_second_term: "penalty",
    matrix_product_without_its_first_term: "penalty",
    difference_as_a_sum: "penalty",
    convolution_backward_without_the_weight: "convolutions",
    every_constant_is_zero: "penalty",
    doubled_is_dropped: "penalty",
    exponents_do_not_count: "penalty",
    bias_without_its_first_place: "convolutions",
    nobody_looks: "factors",
    everything_is_looked_through: "factors",
    stop_that_does_not_stop: "factors",
    total_derivatives_in_one_call: "chain",
    draws_are_equal: "dropout",
    hidden_values_carry_nothing: "values",
    points_are_expressions: "again",
    every_leaf_is_one: "two leaves",
    gradients_merge_in_a_chain: "one by one",
    parts_do_not_move: "operators",
    linear_operator_is_constant: "penalty",
    elementwise_of_the_wrong_sign: "operators",
    quotient_without_its_denominator: "operators",
    choice_of_the_wrong_branch: "operators",
    affine_map_without_its_factor: "penalty",
    rule_of_pytorch_doubled: "operators",
    backward_operator_taken_apart_wrongly: "penalty",
    norm_taken_apart_wrongly: "norm",
    sum_and_difference_commute: "operators",
    row_scale_is_doubled: "data",
    unit_vectors_are_the_first: "coordinate",
    rows_are_equal: "broadcast",
    contraction_without_the_cotangent: "hvp",
    places_are_summed_in_step: "samples",
    numbers_are_forgotten: "samples",
    every_filling_is_one: "hvp",
    product_of_a_batch_is_doubled: "attention",
    other_operands_do_not_count: "rows",
    last_gradient_is_forgotten: "penalty",
    state_stays: "norm",
    every_derivative_is_its_own_master: "master",
    seed_of_ones: "seeded",
    direction_of_ones: "along",
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_right_without_a_bug(name: str) -> None:
    SUBJECTS[name].check()


@pytest.mark.parametrize("plant", PLANTED)
def test_bug_is_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison of numbers, not by a crash."""
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"gradient of|buffer|tensor\(|the generator"):
        SUBJECTS[PLANTED[plant]].check()


@pytest.mark.parametrize("plant", PLANTED)
def test_bug_is_harmless(plant: Plant, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first call is compared with the loss as written: the user has that one's numbers."""
    monkeypatch.setenv("OPTIMIZE_NESTED_DUMP", str(tmp_path))
    plant(monkeypatch)
    with pytest.warns(NestedGradientWarning, match="differs from the loss as written"):
        SUBJECTS[PLANTED[plant]].check(verify=True)
