"""Norm layers inside transforms: stock PyTorch refuses BatchNorm and gets LayerNorm wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional, grad

from rewriter import optimize_nested
from tests.cases import with_written_norms
from tests.oracle import assert_same, check, outcome, relative_error


def batch_norm_net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)
    return nn.Sequential(*layers).double()


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(6, 3, dtype=torch.float64)


def by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    return grad(net(p).square().sum(), p, create_graph=True)[0].square().sum()


def by_func(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda z: net(z).square().sum())(x).square().sum()


def whole_jacobian(net: nn.Module, x: Tensor) -> Tensor:
    return functional.jacobian(net, x, create_graph=True).square().sum()


def along(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(net, (x,), (x.sin(),))[1].square().sum()


def along_by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    return functional.jvp(net, x, x.sin(), create_graph=True)[1].square().sum()


def pulled(net: nn.Module, x: Tensor) -> Tensor:
    u, pull = torch.func.vjp(net, x)
    return pull(2 * u)[0].square().sum()


def whole_hessian(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.hessian(lambda z: net(z).square().sum())(x).square().sum()


def whole_hessian_by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    energy = lambda z: net(z).square().sum()  # noqa: E731
    return functional.hessian(energy, x, create_graph=True).square().sum()


@pytest.mark.parametrize(
    ("loss", "reference"),
    [
        (by_func, by_autograd),
        (lambda net, x: torch.func.jacrev(net)(x).square().sum(), whole_jacobian),
        (lambda net, x: torch.func.jacfwd(net)(x).square().sum(), whole_jacobian),
        (along, along_by_autograd),
        (pulled, by_autograd),
        (whole_hessian, whole_hessian_by_autograd),
    ],
    ids=["grad", "jacrev", "jacfwd", "jvp", "vjp", "hessian"],
)
def test_batch_norm_in_train_mode(
    loss: Callable[..., Tensor], reference: Callable[..., Tensor]
) -> None:
    """Statistics and counter end as after the same derivative written with autograd."""
    net, x = batch_norm_net(), points()
    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        loss(copy.deepcopy(net), x)
    written = with_written_norms(batch_norm_net())
    mine = outcome(optimize_nested(loss, backend="eager"), [net], (x,), {})
    assert_same(mine, outcome(reference, [written], (x,), {}))
    assert mine.buffers["0.1.num_batches_tracked"] == 1


@pytest.mark.parametrize("loss", [by_autograd, by_func])
def test_batch_norm_of_nothing(loss: Callable[..., Tensor]) -> None:
    """Statistics are left as they are; the mean of nothing would make them nan for good."""
    net, x = batch_norm_net(), points()[:0]
    mine = outcome(optimize_nested(loss, backend="eager"), [net], (x,), {})
    assert_same(mine, outcome(by_autograd, [batch_norm_net()], (x,), {}))
    assert torch.equal(mine.buffers["0.1.running_mean"], torch.zeros(4, dtype=x.dtype))


def linearized(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.linearize(net, x)[1](x.sin()).square().sum()


def test_batch_norm_linearized() -> None:
    written = with_written_norms(batch_norm_net())
    decorated = optimize_nested(linearized, backend="eager")
    mine = outcome(decorated, [batch_norm_net()], (points(),), {})
    assert_same(mine, outcome(along_by_autograd, [written], (points(),), {}))
    assert mine.buffers["0.1.num_batches_tracked"] == 1


@pytest.mark.parametrize("vectorize", [True, False])
def test_whole_jacobian_of_a_layer_that_mixes_the_batch(vectorize: bool) -> None:
    """Seeds are batched, points are not: nothing is in the way."""

    def by_seeds(net: nn.Module, x: Tensor) -> Tensor:
        if vectorize:
            return functional.jacobian(net, x, create_graph=True, vectorize=True).square().sum()
        p = x.detach().requires_grad_()
        seeds = torch.eye(6, dtype=x.dtype)[..., None]
        (rows,) = grad(net(p), p, seeds, create_graph=True, is_grads_batched=True)
        return rows.square().sum()

    written = with_written_norms(batch_norm_net())
    decorated = optimize_nested(by_seeds, backend="eager")
    mine = outcome(decorated, [batch_norm_net()], (points(),), {})
    assert_same(mine, outcome(by_seeds, [written], (points(),), {}))
    assert mine.buffers["0.1.num_batches_tracked"] == 1


def test_per_sample_derivative_of_a_layer_that_mixes_the_batch() -> None:
    def per_sample(net: nn.Module, x: Tensor) -> Tensor:
        one = torch.func.jacrev(lambda z: net(torch.stack([z, z.sin()]))[0])
        return torch.func.vmap(one)(x).square().sum()

    with pytest.raises(RuntimeError, match="would mutate a captured Tensor") as error:
        optimize_nested(per_sample, backend="eager")(batch_norm_net(), points())
    if hasattr(error.value, "add_note"):  # Python 3.11
        assert "mixes the batch" in "".join(error.value.__notes__)
    check(per_sample, [batch_norm_net().eval()], points())


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4)], ids=["layer", "group"])
def test_forward_mode_through_a_norm(norm: nn.Module) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), norm, nn.GELU(), nn.Linear(4, 1)).double()
    written = with_written_norms(copy.deepcopy(net))
    check(along, [net], points(), reference=[written])


def test_pytorch_is_wrong_in_forward_mode() -> None:
    """The gradient of a jvp through LayerNorm; if this fails PyTorch was mended."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 1)).double()
    written = with_written_norms(copy.deepcopy(net))
    stock, exact = (
        outcome(along, [net], (points(),), {}),
        outcome(along, [written], (points(),), {}),
    )
    assert relative_error(stock.value, exact.value) < 1e-12
    assert relative_error(stock.grads["0.0.weight"], exact.grads["0.0.weight"]) > 1e-2


def test_train_and_eval_alternate() -> None:
    net, other, x = batch_norm_net(), batch_norm_net(), points()
    loss = optimize_nested(by_autograd, backend="eager")
    for training in (True, False, True, False):
        net.train(training)
        other.train(training)
        loss(net, x).backward()
        by_autograd(other, x).backward()
        for mine, reference in zip(net.parameters(), other.parameters(), strict=True):
            pair = mine.grad, reference.grad
            assert (mine.grad is reference.grad) or torch.allclose(*pair, rtol=1e-9, atol=1e-12)
        for mine, reference in zip(net.buffers(), other.buffers(), strict=True):
            assert torch.allclose(mine, reference, rtol=1e-12)
    assert len(loss.steps) == 2
