"""``requires_grad`` that is switched within a loss, leaves made inside, accumulators of numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.flags import left_off, left_on
from tests.several_calls import check_calls

grad = torch.autograd.grad
Loss = Callable[[nn.Module, nn.Module, Tensor], Tensor]


def net(*, draws: bool = False) -> nn.Module:
    torch.manual_seed(0)
    inside = [nn.BatchNorm1d(5), nn.Dropout(0.3)] if draws else []
    return nn.Sequential(nn.Linear(3, 5), *inside, nn.Tanh(), nn.Linear(5, 3)).double()


def calls(*, requires_grad: bool = False) -> list[tuple[Tensor]]:
    torch.manual_seed(1)
    drawn = [torch.randn(4, 3, dtype=torch.float64) for _ in range(3)]
    return [(x.requires_grad_(requires_grad),) for x in drawn]


def slope(net: nn.Module, x: Tensor) -> Tensor:
    return grad(net(x).sum(), x, create_graph=True)[0]


def frozen_and_thawed(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    for p in d.parameters():
        p.requires_grad_(False)
    value = d(g(x)).mean() + slope(d, g(x).detach().requires_grad_()).square().mean()
    for p in d.parameters():
        p.requires_grad_(True)
    return value


def thawed_for_another_term(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    """Constant in one term, not in the other; the flags are restored from a list."""
    flags = [p.requires_grad for p in d.parameters()]
    for p in d.parameters():
        p.requires_grad = False
    fake = d(g(x)).mean()
    for p, flag in zip(d.parameters(), flags, strict=True):
        p.requires_grad = flag
    return d(x).square().mean() - fake


def in_turns(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    d.requires_grad_(True)
    g.requires_grad_(False)
    first = d(g(x)).square().mean()
    d.requires_grad_(False)
    g.requires_grad_(True)
    second = d(g(x)).mean()
    d.requires_grad_(True)
    return first - second + 0 * slope(d, x.detach().requires_grad_()).sum()


def frozen_for_good(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    """What led to the parameters before gets no gradient either: `backward` looks at the end."""
    before = d(x).square().mean()
    d.requires_grad_(False)
    return before + slope(d, g(x).detach().requires_grad_()).square().mean() + g(d(x)).mean()


@contextlib.contextmanager
def frozen(net: nn.Module) -> Iterator[None]:
    flags = [(p, p.requires_grad) for p in net.parameters()]
    net.requires_grad_(False)
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


def by_a_context(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    with frozen(d):
        return slope(d, g(x).detach().requires_grad_()).square().mean() + d(g(x)).mean()


def one_parameter_between(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    """Inner gradients see what was computed while the flag was on, before and after."""
    weight = d[0].weight
    first = d(x).mean()
    weight.requires_grad_(False)
    second = d(x).square().mean()
    weight.requires_grad_(True)
    third = d(2 * x).mean()
    gradients = grad(first + second + third, d.parameters(), create_graph=True)
    return sum(g.square().sum() for g in gradients) + second


def an_input_on_and_off(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_(True)
    found = slope(g, x)
    x.requires_grad_(False)
    return found.square().mean() + d(x).square().mean()


def an_input_in_three_states(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    x.requires_grad_(True)
    first = g(x)
    x.requires_grad_(False)
    second = g(x)
    x.requires_grad_(True)
    u = 2 * first + 3 * second + 5 * g(x)
    return grad(u.square().sum(), x, create_graph=True)[0].square().mean()


def a_leaf_in_three_states(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    t = x.clone().requires_grad_()
    first = g(t)
    t.requires_grad_(False)
    second = g(t)
    t.requires_grad_(True)
    u = 2 * first + 3 * second + 5 * g(t)
    return grad(u.square().sum(), t, create_graph=True)[0].square().mean()


def leaves_of_factories(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    kind = {"dtype": x.dtype, "requires_grad": True}
    leaves = [
        torch.zeros(3, **kind),
        torch.rand(4, 3, **kind),
        torch.zeros_like(x, requires_grad=True),
        torch.tensor([1.0, 2.0, 3.0], **kind),
        torch.linspace(0, 1, 3, **kind),
        x.new_ones(4, 1, requires_grad=True),
        torch.full((), 0.5, **kind),
    ]
    point = x + leaves[0] + leaves[1] + leaves[2] + leaves[3] + leaves[4] * leaves[5] * leaves[6]
    gradients = grad(g(point).square().sum(), leaves, create_graph=True)
    return sum(v.square().sum() for v in gradients)


def a_sum_from_a_number(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    total = torch.tensor(0.0, dtype=x.dtype)
    for k in range(1, 3):
        total += slope(g, (k * x).detach().requires_grad_()).square().mean()
    return total


def sums_by_name(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    terms = {"slope": torch.tensor(0.0, dtype=x.dtype), "value": torch.zeros(1, dtype=x.dtype)}
    terms["slope"] += slope(g, x.detach().requires_grad_()).square().mean()
    terms["value"][0] += g(x).square().mean()
    return sum(term.sum() for term in terms.values())


def a_sum_from_a_leaf(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
    total = torch.tensor(0.0, dtype=x.dtype, requires_grad=True)
    return total + slope(g, x.detach().requires_grad_()).square().mean()


LOSSES = [
    frozen_and_thawed, thawed_for_another_term, in_turns, frozen_for_good, by_a_context,
    one_parameter_between, an_input_on_and_off, an_input_in_three_states, a_leaf_in_three_states,
    leaves_of_factories, a_sum_from_a_number, sums_by_name, a_sum_from_a_leaf,
]  # fmt: skip


@pytest.mark.parametrize("loss", LOSSES)
def test_the_loss_is_captured_whole(loss: Loss) -> None:
    check_calls(loss, [net(), net()], calls(), strict=True)


def test_statistics_and_draws_are_those_of_eager() -> None:
    check_calls(frozen_and_thawed, [net(), net(draws=True)], calls(), strict=True)


def test_an_input_that_comes_in_as_a_leaf_is_none_afterwards() -> None:
    check_calls(an_input_on_and_off, [net(), net()], calls(requires_grad=True), strict=True)


def test_without_gradients_flags_are_left_as_eager_leaves_them() -> None:
    loss = optimize_nested(frozen_for_good, backend="eager", strict=True)
    g, d = net(), net()
    with torch.no_grad(), torch.enable_grad():
        expected = frozen_for_good(net(), net(), calls()[0][0]).detach()
    with torch.no_grad():
        found = loss(g, d, calls()[0][0])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    assert not any(p.requires_grad for p in d.parameters())


def test_an_error_of_the_user_leaves_the_flags_as_eager_does() -> None:
    def loss(g: nn.Module, d: nn.Module, x: Tensor) -> Tensor:
        d.requires_grad_(False)
        return grad(d(x).sum(), d[0].weight, create_graph=True)[0].sum()

    own = net()
    with pytest.raises(RuntimeError, match="does not require grad"):
        optimize_nested(loss, backend="eager")(net(), own, calls()[0][0])
    assert not any(p.requires_grad for p in own.parameters())


def test_the_flags_at_the_end_are_read_off_the_graph() -> None:
    loss = check_calls(in_turns, [net(), net()], calls()[:1], strict=True)
    (step,) = loss.steps
    captured = step.rewritten.captured
    assert len(left_on(captured)) == 8 and left_off(captured) == ()
