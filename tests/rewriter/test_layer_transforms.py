"""Towered modules under `torch.func` transforms and dual levels: compiled there too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as fwd
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from passes.price import price, size_hints
from rewriter import optimize_nested
from rewriter.tower import CompiledLevel
from tests.cases import NETWORKS, make, mlp, with_written_norms
from tests.oracle import assert_same, outcome

D = torch.float64


def towered(net: nn.Module) -> nn.Module:
    """Return a tower whose module may not run as written, without a word."""
    return optimize_nested(copy.deepcopy(net), backend="eager", strict=True)


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)


def _contract(*tensors: Tensor) -> Tensor:
    return sum(((x * _weights(x)).sin().sum() for x in tensors), torch.zeros((), dtype=D))


def grad_form(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(grad(lambda z: net(z).sin().sum())(x))


def vjp_form(net: nn.Module, x: Tensor) -> Tensor:
    u, pullback = vjp(net, x)
    return _contract(u, *pullback(_weights(u)))


def jvp_form(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(*jvp(net, (x,), (x.cos(),)))


def jvp_of_grad(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(jvp(grad(lambda z: net(z).sin().sum()), (x,), (x.cos(),))[1])


def grad_of_jvp(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(grad(lambda z: jvp(net, (z,), (z.cos(),))[1].sin().sum())(x))


def dual_form(net: nn.Module, x: Tensor) -> Tensor:
    with fwd.dual_level():
        tangent = fwd.unpack_dual(net(fwd.make_dual(x, x.cos()))).tangent
    return _contract(tangent)


def jacrev_form(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(jacrev(lambda z: net(z).flatten()[:3])(x))


def jacfwd_form(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(jacfwd(lambda s: net(x * s))(torch.ones(2, 1, dtype=D)[0]))


def parameters_form(net: nn.Module, x: Tensor) -> Tensor:
    def inner(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(net, parameters, (x,)).square().sum()

    parameters = dict(net.named_parameters())
    step = {
        n: p - 0.1 * g
        for (n, p), g in zip(parameters.items(), grad(inner)(parameters).values(), strict=True)
    }
    return _contract(functional_call(net, step, (x,)))


FORMS = [
    grad_form, vjp_form, jvp_form, jvp_of_grad, grad_of_jvp, dual_form, jacrev_form, jacfwd_form,
    parameters_form,
]  # fmt: skip
NAMES = [
    "Tanh", "LeakyReLU", "Softshrink", "PReLU", "layer_norm", "group_norm", "batch_norm_eval",
    "conv_strided", "max_pool", "softmax", "glu", "attention",
]  # fmt: skip
# What eager itself cannot do: its own forward-mode formulas are not differentiable, or write over
# what they have saved.
REFUSED_BY_EAGER = {
    ("glu", "jvp_form"), ("glu", "jvp_of_grad"), ("glu", "grad_of_jvp"), ("glu", "dual_form"),
    ("glu", "jacfwd_form"), ("softmax", "dual_form"), ("attention", "dual_form"),
}  # fmt: skip


@pytest.mark.parametrize("network", NAMES)
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
# PyTorch says so where it has no batching rule.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_forms(form: Callable[..., Tensor], network: str) -> None:
    net, x = make(network)
    mine = outcome(form, [towered(net)], (x,), {})
    reference = with_written_norms(copy.deepcopy(net))
    with sdpa_kernel(SDPBackend.MATH):
        if (network, form.__name__) in REFUSED_BY_EAGER:
            with pytest.raises(RuntimeError):
                outcome(form, [reference], (x,), {})
            assert all(g is None or g.isfinite().all() for g in mine.grads.values())
            return
        expected = outcome(form, [reference], (x,), {})
    absent = {name for name, g in mine.grads.items() if g is None}
    zero = {name for name, g in expected.grads.items() if g is not None and not g.any()}
    expected = replace(
        expected, grads={n: None if n in absent & zero else g for n, g in expected.grads.items()}
    )
    assert_same(mine, expected)
