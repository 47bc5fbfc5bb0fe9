"""Writes to tensors that carry a gradient: under `no_grad`, through ``.data``, by assigning it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rewriter import NestedGradientWarning, optimize_nested
from tests.oracle import relative_error
from tests.several_calls import check_calls

grad = torch.autograd.grad
Loss = Callable[[nn.Module, Tensor], Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def calls() -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 3, dtype=torch.float64),) for _ in range(2)]


def slope(net: nn.Module, x: Tensor) -> Tensor:
    return grad(net(x).square().sum(), x, create_graph=True)[0].square().mean()


def error(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - x).square().mean()


def filled_under_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    t = torch.empty(4, 3, dtype=x.dtype, requires_grad=True)
    with torch.no_grad():
        t.copy_(2 * x)
    return slope(net, t)


def drawn_through_data(net: nn.Module, x: Tensor) -> Tensor:
    t = torch.empty(4, 3, dtype=x.dtype, requires_grad=True)
    t.data.uniform_(0, 1)
    return slope(net, t)


def an_attack(net: nn.Module, x: Tensor) -> Tensor:
    d = torch.zeros_like(x, requires_grad=True)
    for _ in range(2):
        (g,) = grad(error(net, x + d), d)
        with torch.no_grad():
            d += 0.05 * g.sign()
            d.clamp_(-0.08, 0.08)
    return error(net, x + d)


def an_attack_through_data(net: nn.Module, x: Tensor) -> Tensor:
    d = torch.zeros_like(x, requires_grad=True)
    for _ in range(2):
        (g,) = grad(error(net, x + d), d)
        d.data -= 0.05 * g
        d.data.add_(g, alpha=0.1)
    return error(net, x + d)


def an_attack_by_assignment(net: nn.Module, x: Tensor) -> Tensor:
    d = torch.zeros_like(x, requires_grad=True)
    for _ in range(2):
        (g,) = grad(error(net, x + d), d)
        d.data = (d + 0.05 * g.sign()).clamp(-0.08, 0.08).data
    return error(net, x + d)


def clipped_weights(net: nn.Module, x: Tensor) -> Tensor:
    for p in net.parameters():
        p.data.clamp_(-0.2, 0.2)
    return slope(net, x.clone().requires_grad_()) + error(net, x)


def decayed_weights(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
    return slope(net, x.clone().requires_grad_()) + error(net, x)


def there_and_back(net: nn.Module, x: Tensor) -> Tensor:
    """A product with the Hessian by differences: weights are moved, and moved back."""
    weights = list(net.parameters())
    v = [torch.randn_like(p) for p in weights]
    with torch.no_grad():
        for p, u in zip(weights, v, strict=True):
            p.add_(u, alpha=1e-2)
    more = grad(error(net, x), weights)
    with torch.no_grad():
        for p, u in zip(weights, v, strict=True):
            p -= 2e-2 * u
    less = grad(error(net, x), weights)
    with torch.no_grad():
        for p, u in zip(weights, v, strict=True):
            p += 1e-2 * u
    terms = zip(more, less, weights, strict=True)
    return error(net, x) + sum(((a - b) / 2e-2 * p).sum() for a, b, p in terms)


def an_unrolled_step(net: nn.Module, x: Tensor) -> Tensor:
    names = [name for name, _ in net.named_parameters()]
    fast = [p.detach().clone().requires_grad_() for p in net.parameters()]
    for _ in range(2):
        u = functional_call(net, dict(zip(names, fast, strict=True)), (x,))
        gradients = grad((u - x).square().mean(), fast)
        with torch.no_grad():
            for p, g in zip(fast, gradients, strict=True):
                p.sub_(0.1 * g)
    return sum((p * q).sum() for p, q in zip(fast, net.parameters(), strict=True))


def steps_of_all_at_once(net: nn.Module, x: Tensor) -> Tensor:
    fast = [p.detach().clone().requires_grad_() for p in net.parameters()]
    first = sum((3 * p).sum() for p in fast)
    with torch.no_grad():
        torch._foreach_mul_(fast, 0.5)
    gradients = grad(first * sum(p.sin().sum() for p in fast), fast, create_graph=True)
    return sum((g * p).sum() for g, p in zip(gradients, net.parameters(), strict=True))


def differentiated_before_and_after(net: nn.Module, x: Tensor) -> Tensor:
    """One leaf, with one value in the first term and another in the second."""
    d = torch.zeros(3, dtype=x.dtype, requires_grad=True)
    before = net(x + d)
    with torch.no_grad():
        d[0] = 1.0
        d[1:] += 2.0
    u = 2 * before + 3 * net(x + d)
    return grad(u.sum(), d, create_graph=True)[0].square().sum() + d.sum()


def written_and_made_a_leaf(net: nn.Module, x: Tensor) -> Tensor:
    x.mul_(2.0)
    return slope(net, x.requires_grad_())


def a_value_behind_its_history(net: nn.Module, x: Tensor) -> Tensor:
    p = x.clone().requires_grad_()
    u = net(p)
    u.detach().mul_(2.0)
    v = 2 * net(p)
    v.data.mul_(3)
    return grad((u * v).sum(), p, create_graph=True)[0].square().sum() + u.mean()


def the_source_of_a_leaf(net: nn.Module, x: Tensor) -> Tensor:
    v = net(x).detach() * x
    p = v.detach().requires_grad_()
    v.mul_(3)
    return slope(net, p) + v.mean()


def rounds_of_descent(net: nn.Module, x: Tensor) -> Tensor:
    """What is written carries a gradient of its own."""
    v = x.clone()
    for _ in range(2):
        z = v.detach().clone().requires_grad_()
        (g,) = grad(net(z).square().sum(), z, create_graph=True)
        v += 0.1 * grad(g.sum(), z, create_graph=True)[0]
    return v.square().mean()


LOSSES = [
    filled_under_no_grad, drawn_through_data, clipped_weights, decayed_weights,
    differentiated_before_and_after, written_and_made_a_leaf, a_value_behind_its_history,
    the_source_of_a_leaf, rounds_of_descent, steps_of_all_at_once,
]  # fmt: skip
WITH_CONSTANTS = [
    an_attack, an_attack_through_data, an_attack_by_assignment, there_and_back, an_unrolled_step,
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_captured_whole(loss: Loss) -> None:
    check_calls(loss, [net()], calls(), strict=True)


@pytest.mark.filterwarnings("ignore:.*enters the loss as a constant")
@pytest.mark.parametrize("loss", WITH_CONSTANTS)
def test_a_loss_with_constant_gradients_is_captured_whole(loss: Loss) -> None:
    check_calls(loss, [net()], calls())


def teacher(student: nn.Module, teacher: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        for p, q in zip(teacher.parameters(), student.parameters(), strict=True):
            p.data.mul_(0.9).add_(q.data, alpha=0.1)
        target = teacher(x)
    return (student(x) - target).square().mean() + slope(student, x.clone().requires_grad_())


def test_a_teacher_follows() -> None:
    check_calls(teacher, [net(), net()], calls(), strict=True)


def test_memory_of_parameters_stays_theirs() -> None:
    """What shares memory with a parameter sees what is written to it, and not what is assigned."""

    def written(net: nn.Module, x: Tensor) -> Tensor:
        net[0].bias.data.mul_(0.5)
        return slope(net, x.clone().requires_grad_())

    def assigned(net: nn.Module, x: Tensor) -> Tensor:
        net[0].bias.data = 0.5 * net[0].bias.data
        return slope(net, x.clone().requires_grad_())

    for loss, is_seen in ((written, True), (assigned, False)):
        own, (x,) = net(), calls()[0]
        before, other = own[0].bias.detach().clone(), own[0].bias.detach()
        optimize_nested(loss, backend="eager", strict=True)(own, x)
        assert relative_error(own[0].bias.detach(), 0.5 * before) == 0
        assert torch.equal(other, 0.5 * before if is_seen else before)


def after_the_fact(net: nn.Module, x: Tensor) -> Tensor:
    weight, p = net[0].weight, x.clone().requires_grad_()
    (g,) = grad((p @ weight.t()).sin().sum(), p, create_graph=True)
    value = g.square().sum()
    weight.data.mul_(0.5)
    return value


def into_an_input(net: nn.Module, x: Tensor) -> Tensor:
    x += 0.1 * net(x.clone())
    return slope(net, x.detach().clone().requires_grad_()) + x.mean()


@pytest.mark.parametrize(
    ("loss", "reason"),
    [(after_the_fact, "a write through `.data`"), (into_an_input, "written to an input")],
)
def test_what_means_something_else_in_eager_runs_as_written(loss: Loss, reason: str) -> None:
    """PyTorch takes the later weights in the pullback; and an input gets a history."""
    mine, reference = net(), net()
    (x,), (same,) = calls()[0], calls()[0]
    with pytest.warns(NestedGradientWarning, match=reason):
        optimize_nested(loss, backend="eager")(mine, x).backward()
    loss(reference, same).backward()
    for p, q in zip(mine.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p, q) and relative_error(p.grad, q.grad) <= 1e-12


@pytest.mark.filterwarnings("ignore::rewriter.NestedGradientWarning")
def test_a_value_that_eager_needs_again_is_the_users_error() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        value = slope(net, x.clone().requires_grad_())
        with torch.no_grad():
            net[-1].weight.mul_(0.5)
        return value

    value = optimize_nested(loss, backend="eager")(net(), calls()[0][0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()
