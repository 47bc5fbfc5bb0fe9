"""An inner derivative that the outer gradient does not see is said; one that it does see is not.

Warnings are errors here, so a loss that is `check`ed must not warn.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import NestedGradientWarning, NotRewritten, optimize_nested
from tests.cases import small_net as net
from tests.oracle import assert_same, check, outcome

Loss = Callable[[nn.Module, Tensor], Tensor]


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=torch.float64)


def slope(net: nn.Module, x: Tensor, *, create_graph: bool = True) -> Tensor:
    p = x.detach().requires_grad_()
    return grad(net(p).sum(), p, create_graph=create_graph, retain_graph=True)[0]


def no_create_graph(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x, create_graph=False).square().sum() * net(x).sum()


def detached(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).detach().square().sum() + net(x).sum()


def number(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).norm().item() * net(x).sum()


def under_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = torch.func.grad(lambda z: net(z).sum())(x).norm()
    return weight * slope(net, x).square().sum()


def read_after_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = torch.func.grad(lambda z: net(z).sum())(x)
    return (weight.square() * slope(net, x)).sum()


def per_sample_under_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        weight = torch.func.vmap(torch.func.grad(lambda z: net(z).sum()))(x)
    return (weight * slope(net, x)).sum()


def data(net: nn.Module, x: Tensor) -> Tensor:
    return (slope(net, x).data * net(x).sum()).sum()


def forward_mode(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(net, (x,), (x.sin(),))[1].detach().square().sum() * net(x).sum()


@pytest.mark.parametrize(
    "loss",
    [
        no_create_graph,
        detached,
        number,
        under_no_grad,
        read_after_no_grad,
        per_sample_under_no_grad,
        data,
        forward_mode,
    ],
    ids=lambda f: f.__name__,
)
def test_said_once_and_right(loss: Loss) -> None:
    """It is named by its line; numbers are as written; `strict=True` makes it an error."""
    expected = outcome(loss, [net()], (points(),), {})
    decorated = optimize_nested(loss, backend="eager")
    with pytest.warns(
        NestedGradientWarning, match=r"test_detached.py:\d+.* enters the loss as a constant"
    ) as said:
        assert_same(outcome(decorated, [net()], (points(),), {}), expected)
    assert len(said) == 1
    assert_same(outcome(decorated, [net()], (points(),), {}), expected)
    with pytest.raises(NotRewritten, match="enters the loss as a constant"):
        optimize_nested(loss, backend="eager", strict=True)(net(), points())


def both_ways(net: nn.Module, x: Tensor) -> Tensor:
    """An adaptive weight made of a derivative that is trained as well."""
    g = slope(net, x)
    return (g * g.detach().sigmoid()).sum()


def diagnostic(net: nn.Module, x: Tensor) -> Tensor:
    """A constant derivative that enters nothing."""
    slope(net, x).detach().norm()
    return slope(net, x).square().sum()


def inner_of_another(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = grad(net(p).sum(), p, create_graph=True)
    return grad(g.square().sum(), p, create_graph=True)[0].square().sum()


def of_something_fixed(net: nn.Module, x: Tensor) -> Tensor:
    """No parameter moves this derivative, so nothing is lost."""
    p = x.detach().requires_grad_()
    (g,) = grad(p.square().sum(), p)
    return (g * net(x).sum()).sum()


@pytest.mark.parametrize(
    "loss",
    [both_ways, diagnostic, inner_of_another, of_something_fixed],
    ids=lambda f: f.__name__,
)
def test_not_said(loss: Loss) -> None:
    check(loss, [net()], points())


def squared(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x, create_graph=False).square().mean()


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(net, x).square().mean()


def several(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    g = slope(net, x, create_graph=False)
    return {"loss": g.square().mean(), "gradients": g}


@pytest.mark.parametrize("loss", [squared, jacobian, several], ids=lambda f: f.__name__)
def test_no_gradient_at_all(loss: Callable[..., object]) -> None:
    """``create_graph=True`` is missing, and nothing is left to train: said once, with the line and
    what to write there; not where the value alone is asked for."""
    match = r"no gradient: the derivative at .*test_detached.py:\d+.* write create_graph=True there"
    decorated = optimize_nested(loss, backend="eager")
    strict = optimize_nested(loss, backend="eager", strict=True)
    with torch.no_grad():
        decorated(net(), points())
        if loss is not jacobian:
            strict(net(), points())
    with pytest.warns(NestedGradientWarning, match=match) as said:
        decorated(net(), points())
    assert len(said) == 1
    decorated(net(), points())
    for _ in range(2):
        with pytest.raises(NotRewritten, match=match):
            strict(net(), points())


def values(net: nn.Module, x: Tensor) -> Tensor:
    """What a sampler or a molecular dynamics needs: a value for each sample."""
    return slope(net, x, create_graph=False).square().sum(1)


def meant(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).detach().square().mean()


@pytest.mark.parametrize("loss", [values, meant], ids=lambda f: f.__name__)
def test_no_gradient_on_purpose(loss: Loss) -> None:
    optimize_nested(loss, backend="eager", strict=True)(net(), points())


def test_no_gradient_of_frozen_parameters() -> None:
    frozen = net().requires_grad_(False)
    optimize_nested(squared, backend="eager", strict=True)(frozen, points())


def test_a_term_without_gradient_beside_others() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().mean() + slope(net, x, create_graph=False).square().mean()

    match = "enters the loss as a constant: it is taken without create_graph=True.* write"
    with pytest.warns(NestedGradientWarning, match=match):
        optimize_nested(loss, backend="eager")(net(), points())


def test_returned_beside_the_loss() -> None:
    def loss(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        g = slope(net, x)
        return g.square().sum(), g.detach().norm()

    value, norm = optimize_nested(loss, backend="eager", strict=True)(net(), points())
    assert value.requires_grad and not norm.requires_grad


def test_network_without_trainable_parameters() -> None:
    frozen = net().requires_grad_(False)
    x = points().requires_grad_()
    loss = lambda net, x: slope(net, x).square().sum() * x.sum()  # noqa: E731
    check(loss, [frozen], x)
