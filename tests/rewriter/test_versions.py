"""What PyTorch does not do in each version that this package runs with, and the package does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jacfwd, jacrev, vmap

from rewriter import nesting, optimize_nested
from tests.cases import small_net as net
from tests.oracle import assert_same, check, outcome, step

functorch_c = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]


def points(rows: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, 3, dtype=torch.float64)


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (g.flatten(1).norm(dim=1) - 1).square().mean()


def tangent_in_parts(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        both = forward_ad.unpack_dual(net(forward_ad.make_dual(x, x.sin())))
    return both.tangent.square().sum() + both.primal.sum()


@pytest.mark.parametrize("capture", ["dynamo", "trace"])
def test_dual_level(capture: str) -> None:
    """The functions of `forward_ad` were called elsewhere before 2.13."""
    check(tangent_in_parts, [net()], points(), capture=capture)


def test_levels_are_closed_one_by_one() -> None:
    """Before 2.13 PyTorch's own function for that fails on the second."""
    opened = [
        functorch_c._vmap_increment_nesting(3, "error"),
        functorch_c._grad_increment_nesting(),
        functorch_c._jvp_increment_nesting(),
        functorch_c._grad_increment_nesting(),
    ]
    for depth in (2, 2, 0):
        nesting.close_to_depth(depth)
        assert functorch_c.get_dynamic_layer_stack_depth() == depth
    assert opened == [1, 2, 3, 4]


def test_parameters_are_frozen_and_thawed_after_many_calls() -> None:
    """Guards of 2.11 do not look at a parameter that still is in its place."""
    model, x = net(), points()
    decorated = optimize_nested(penalty, backend="eager")
    for wanted in ([False] * 4, [True, False, False, False], [True] * 4, [False] * 4):
        for p, flag in zip(model.parameters(), wanted, strict=True):
            p.requires_grad_(flag)
        for _ in range(4):
            assert_same(step(decorated, [model], (x,), {}), step(penalty, [model], (x,), {}))


class Scaled(nn.Module):
    """A layer one of whose arguments has a default."""

    def forward(self, x: Tensor, factor: float = 2.0) -> Tensor:
        return (factor * x).sin()


def test_other_defaults_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, x = [nn.Sequential(Scaled(), *net())], points()
    decorated = optimize_nested(penalty, backend="eager")
    for factor in (2.0, 3.0):
        monkeypatch.setattr(Scaled.forward, "__defaults__", (factor,))
        for _ in range(2):
            assert_same(step(decorated, modules, (x,), {}), step(penalty, modules, (x,), {}))


@pytest.mark.parametrize("layer", ["plain", "transposed"])
def test_convolutions_take_any_batch(layer: str) -> None:
    """PyTorch's second derivative of a convolution takes numbers only before 2.13."""
    torch.manual_seed(0)
    first = nn.Conv1d(1, 4, 3, padding=1)
    second = nn.Conv1d(4, 2, 3) if layer == "plain" else nn.ConvTranspose1d(4, 2, 3)
    model = nn.Sequential(first, nn.SiLU(), second, nn.Flatten()).double()
    decorated = optimize_nested(penalty, backend="eager")
    for rows in (4, 5, 7, 6):
        x = points(rows)[:, None]
        assert_same(outcome(decorated, [model], (x,), {}), outcome(penalty, [model], (x,), {}))
    assert len(decorated.steps) == 2


def rows_of_several(net: nn.Module, x: Tensor) -> Tensor:
    value, total = vmap(jacrev(lambda z: (net(z), net(z).sin().sum())))(x)
    return value.square().sum() + total.pow(3).sum()


def columns_of_several(net: nn.Module, x: Tensor) -> Tensor:
    a, b = vmap(jacfwd(lambda z, y: net(z) * y.sum(), argnums=(0, 1)))(x, x.sin())
    return (a * b).sum()


def in_chunks(net: nn.Module, x: Tensor) -> Tensor:
    return jacrev(net, chunk_size=3)(x).square().sum()


@pytest.mark.parametrize(
    "loss", [rows_of_several, columns_of_several, in_chunks], ids=lambda f: f.__name__
)
def test_jacobians(loss: Callable[..., Tensor]) -> None:
    """Before 2.13 PyTorch reads from a tensor where the ones of their seeds are."""
    check(loss, [net()], points())
