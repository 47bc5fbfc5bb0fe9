"""Rules made wrong on purpose: the oracle must notice each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from passes import derivative, graph, nest, share, tangent_rules
from passes.simplify import aliases, common, masks, zeros
from passes.strategies import jvp_over_gradient
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


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def convolutions() -> nn.Module:
    layers = nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Conv1d(3, 1, 2), nn.Flatten()
    return nn.Sequential(*layers).double()


@dataclass(frozen=True)
class Subject:
    """A loss with its network and points."""

    loss: Loss
    net: Callable[[], nn.Module] = mlp
    shape: tuple[int, ...] = (4, 3)

    def check(self) -> None:
        torch.manual_seed(12)
        check(self.loss, [self.net()], random_points(*self.shape), strategy="jvp_over_gradient")


SUBJECTS = {
    "penalty": Subject(penalty),
    "convolutions": Subject(penalty, convolutions, (3, 2, 6)),
    "values": Subject(values_and_gradient),
    "factors": Subject(constant_factors),
    "chain": Subject(points_in_a_chain),
    "dropout": Subject(dropped_out),
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
    patch.setattr(zeros, "_is_made_of_zeros", lambda node: node.target in filled)


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
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_right_without_a_bug(name: str) -> None:
    SUBJECTS[name].check()


@pytest.mark.parametrize("plant", PLANTED)
def test_bug_is_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the comparison of numbers, not by a crash."""
    plant(monkeypatch)
    with pytest.raises(AssertionError, match=r"gradient of|tensor\(|the generator"):
        SUBJECTS[PLANTED[plant]].check()
