"""Branches on values: taken as the call at hand takes them, looked at in every later call."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rewriter import OptimizedLoss, optimize_nested
from rewriter.branching import MOST_WAYS
from rewriter.errors import CaptureError, KeepsChanging
from tests.several_calls import assert_alike, check_calls, left_behind

grad = torch.autograd.grad


class Net(nn.Module):
    """A network with a flag, a counter and a number among its buffers."""

    def __init__(self, *, draws: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        inside = [nn.BatchNorm1d(5), nn.Dropout(0.3)] if draws else []
        self.layers = nn.Sequential(nn.Linear(3, 5), *inside, nn.Tanh(), nn.Linear(5, 1)).double()
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("count", torch.tensor(0))
        self.register_buffer("rounds", torch.tensor(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def points(seed: int = 1, scale: float = 1.0, n: int = 4) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, 3, dtype=torch.float64, generator=source)


def slope(net: nn.Module, x: Tensor) -> Tensor:
    return grad(net(x).sum(), x, create_graph=True)[0]


def of_flag(net: Any, x: Tensor) -> Tensor:
    g = slope(net, x.requires_grad_())
    return (g / 2 if net.flag else g).square().mean()


def of_counter(net: Any, x: Tensor) -> Tensor:
    net.count += 1
    g = slope(net, x.requires_grad_())
    return (g * 3 if net.count >= 3 else g).square().mean()


def of_numbers(net: Any, x: Tensor) -> Tensor:
    g = slope(net, x.requires_grad_())
    for _ in range(int(net.rounds)):
        g = g * 1.5
    return g.square().mean() * net.rounds.item()


def raising(net: Any, x: Tensor) -> Tensor:
    g = slope(net, x.requires_grad_())
    if torch.any(torch.isnan(g)):
        raise ValueError("not a number")
    return g.square().mean()


def asserting(net: Any, x: Tensor) -> Tensor:
    assert (x.abs() < 100).all(), "outside"
    return slope(net, x.requires_grad_()).square().mean()


def giving_up(net: Any, x: Tensor) -> Tensor:
    u = net(x.requires_grad_())
    loss = grad(u.sum(), x, create_graph=True)[0].square().mean() + u.square().mean()
    if not torch.isfinite(loss) or math.isnan(loss.detach().item()):
        return u.new_zeros((), requires_grad=True)
    return loss


def both_sides(net: Any, x: Tensor) -> Tensor:
    size = slope(net, x.requires_grad_()).norm() + x.norm() / 20
    if size > 1:
        return (size - 1) ** 2
    return size * 0.1


def of_number(net: Any, x: Tensor) -> Tensor:
    loss = slope(net, x.requires_grad_()).square().mean()
    return loss * 2 if loss.detach().item() > 1e-9 and float(loss.detach()) < 1e9 else loss


def clipped(net: Any, x: Tensor) -> Tensor:
    g = slope(net, x.requires_grad_())
    return g.square().mean() / max(g.detach().abs().max().item(), 1e-3)


def descending(net: Any, x: Tensor) -> Tensor:
    y, rounds = x.requires_grad_(), 0
    while slope(net, y).abs().max() > 0.05 and rounds < 3:
        y, rounds = y - 0.1 * slope(net, y), rounds + 1
    return slope(net, y).square().mean()


def of_masks(net: Any, x: Tensor) -> Tensor:
    g, mask = slope(net, x.requires_grad_()), x.detach()[:, 0] > -100
    if not mask.any():
        return g.sum()
    return g.square().mean() * (2 if bool(mask.all()) else 3)


def drawing(net: Any, x: Tensor) -> Tensor:
    g = slope(net, x.requires_grad_())
    g = g * 2 if torch.rand(()) < 0.7 else g
    return (g * torch.rand_like(g)).square().mean()


def of_sizes(net: Any, x: Tensor) -> Tensor:
    index = torch.tensor([0, 0, 1, 1]) * (x[0, 0] > -100)
    g = slope(net, x.requires_grad_()).square().sum(1)
    energies = g.new_zeros(int(index.max()) + 1).index_add(0, index, g)
    return energies.square().mean()


def split_by(net: Any, x: Tensor) -> Tensor:
    counts = (x[:, 0] > -100).long()[:2] + 1
    first, last = torch.split(slope(net, x.requires_grad_()), counts.tolist())
    return first.square().sum() + last.sin().sum()


def of_filters(net: Any, x: Tensor) -> Tensor:
    """A branch on a size that depends on values."""
    x = x.requires_grad_()
    e, kind = x.new_zeros(len(x)), torch.tensor([0, 1, 0, 2])
    for k in range(3):
        index = (kind * (x[:, 0] > -100) == k).nonzero().flatten()
        if index.shape[0] > 0:
            e = e.index_add(0, index, net(x.index_select(0, index)).flatten())
    return grad(e.sum(), x, create_graph=True)[0].square().mean()


SAME_WAY = [
    of_flag, of_numbers, raising, asserting, giving_up, of_number, clipped, descending, of_masks,
    of_sizes, split_by,
]  # fmt: skip


@pytest.mark.parametrize("loss", SAME_WAY)
def test_one_graph_holds_for_calls_of_the_same_branches(loss: Callable[..., Any]) -> None:
    made = check_calls(loss, [Net()], [(points(i),) for i in range(1, 4)], strict=True)
    assert len(made.steps) == 1 and made.branching.misses == 0


def test_a_branch_on_a_size_that_depends_on_values() -> None:
    calls = [(points(i),) for i in range(1, 4)]
    made = check_calls(of_filters, [Net()], calls, strict=True, strategy="reverse")
    assert len(made.steps) == 1 and made.branching.misses == 0


@pytest.mark.parametrize("loss", [of_counter, both_sides, drawing])
def test_a_branch_that_goes_the_other_way(loss: Callable[..., Any]) -> None:
    """The first such call runs as written, the next one in a graph of its own."""
    scales = [1.0, 20.0, 20.0, 20.0, 1.0, 20.0]
    calls = [(points(i, scale),) for i, scale in enumerate(scales)]
    made = check_calls(loss, [Net()], calls, strict=True)
    assert len(made.steps) == 2 and made.branching.misses >= 2


def test_a_flag_that_is_an_input_is_a_guard() -> None:
    """Nothing is computed in vain, however often it changes."""
    net: Any = Net()
    made = optimize_nested(of_flag, backend="eager", strict=True)
    for i in range(8):
        net.flag.fill_(i % 2 == 0)
        torch.testing.assert_close(made(net, points(i)), of_flag(net, points(i)))
    assert len(made.steps) == 2 and made.branching.misses == 0


def after(form: Callable[..., Any], net: nn.Module, x: Tensor) -> Any:
    """Return what a call leaves behind, or the error that it raises and what that leaves."""
    torch.manual_seed(3)
    error, value = None, torch.zeros(())
    try:
        value = form(net, x)
    except Exception as found:
        error = found
    left = left_behind(lambda *_: value.detach(), [net], [x])
    return left | {
        "error": (type(error).__name__, str(error).split("\n")[0]),
        "generator": torch.get_rng_state(),
    }


@pytest.mark.parametrize("loss", [raising, asserting, giving_up])
def test_a_call_that_raises_or_returns_early(loss: Callable[..., Any]) -> None:
    """It leaves behind what the loss as written does: statistics, generator, the error itself."""
    made = optimize_nested(loss, backend="eager", strict=True)
    nets = Net(draws=True), Net(draws=True)
    far = points(2)
    far[0, 0] = math.nan if loss is not asserting else 1e3
    for x in (points(1), far, points(3), far, points(4)):
        left = [after(form, net, x.clone()) for form, net in zip((made, loss), nets, strict=True)]
        assert left[0].pop("error") == left[1].pop("error")
        assert_alike(*left)
    assert len(made.steps) in (1, 2)


def test_the_flag_of_an_argument_is_put_back() -> None:
    def loss(net: Any, x: Tensor) -> Tensor:
        if x.detach().sum() > 0:
            return net(x).square().mean()
        return slope(net, x.requires_grad_()).square().mean()

    made, net = optimize_nested(loss, backend="eager", strict=True), Net()
    made(net, -points().abs())
    x = points().abs()
    made(net, x).backward()
    assert not x.requires_grad


def test_a_branch_that_is_another_at_each_call_runs_as_written() -> None:
    """A try in vain costs a run; there is a limit to that."""

    def loss(net: Any, x: Tensor) -> Tensor:
        g = slope(net, x.requires_grad_())
        return g.square().mean() * len(range(int(x.detach().abs().sum() * 1e6)))

    made, net = optimize_nested(loss, backend="eager"), Net()
    with pytest.warns(UserWarning, match=r"goes both ways .*int\(x\.detach"):
        for i in range(12):
            torch.testing.assert_close(made(net, points(i)), loss(net, points(i)))
    assert 1 < len(made.steps) <= MOST_WAYS and isinstance(made.branching.given_up, KeepsChanging)


def test_strict_raises_where_a_branch_goes_both_ways_too_often() -> None:
    def loss(net: Any, x: Tensor) -> Tensor:
        return slope(net, x.requires_grad_()).sum() * len(range(int(x.detach().sum() * 1e6)))

    made, net = optimize_nested(loss, backend="eager", strict=True), Net()
    with pytest.raises(CaptureError, match="goes both ways"):
        for i in range(12):
            made(net, points(i))


def test_rare_branches_do_not_use_up_the_credit() -> None:
    made, net = optimize_nested(both_sides, backend="eager", strict=True), Net()
    for i in range(60):
        x = points(i, 30.0 if i % 20 == 7 else 1.0)
        torch.testing.assert_close(made(net, x.clone()), both_sides(net, x.clone()))
    assert made.branching.given_up is None


def test_no_grad_and_value_and_grad() -> None:
    made, net = optimize_nested(both_sides, backend="eager", strict=True), Net()
    for scale in (1.0, 30.0, 30.0, 1.0):
        x = points(1, scale)
        with torch.no_grad():
            value = made(net, x.clone())
        expected = both_sides(net, x.clone())
        torch.testing.assert_close(value, expected.detach())
        value, grads = made.value_and_grad(net, x.clone())
        expected.backward()
        torch.testing.assert_close(grads["net.layers.0.weight"], net.layers[0].weight.grad)
        net.zero_grad()


def test_a_branch_that_a_graph_cannot_be_asked_for() -> None:
    """Inside of a transform the condition is not known outside: as written, in words."""

    def loss(net: Any, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return net(y).sum() if y.sum() > 0 else net(y).sin().sum()

        return torch.func.grad(inner)(x).square().mean()

    made = optimize_nested(loss, backend="eager")
    with pytest.warns(UserWarning, match="a branch on the value of a tensor"):
        made(Net(), points()).backward()


@pytest.mark.parametrize("verify", ["check", "verify"])
def test_compared_with_the_loss_as_written(verify: str) -> None:
    made: OptimizedLoss = optimize_nested(both_sides, backend="eager", **{verify: True})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scale in (1.0, 30.0, 30.0):
            made(Net(), points(1, scale)).backward()
    assert len(made.steps) == 2
