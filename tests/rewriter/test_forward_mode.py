"""Dual levels, `linearize`, and forward mode inside of forward mode, where Dynamo fails."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vmap

from rewriter import NestedGradientWarning, optimize_nested
from tests.cases import small_net as net
from tests.oracle import assert_same, check, outcome, relative_error

Loss = Callable[[nn.Module, Tensor], Tensor]


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=torch.float64, requires_grad=True)


def energy(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda z: net(z).square().sum()


# dual levels


def value_and_tangent(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        u, moved = forward_ad.unpack_dual(net(forward_ad.make_dual(x, torch.ones_like(x))))
    return moved.square().sum() + u.sum()


def in_parameters(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        named = net.named_parameters()
        duals = {name: forward_ad.make_dual(p, p.cos()) for name, p in named}
        moved = forward_ad.unpack_dual(functional_call(net, duals, (x,)).sin()).tangent
    return moved.square().sum()


def over_a_gradient(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.sin())
        (g,) = torch.autograd.grad(net(dual).square().sum(), dual, create_graph=True)
        both = forward_ad.unpack_dual(g)
    return both.tangent.square().sum() + both.primal.sum()


def returned_from_inside(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(net(forward_ad.make_dual(x, x))).tangent.square().sum()


def no_tangent(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        forward_ad.make_dual(x, torch.ones_like(x))
        moved = forward_ad.unpack_dual(net(x)).tangent
    return net(x).sum() if moved is None else moved.sum()


def two_levels_in_turn(net: nn.Module, x: Tensor) -> Tensor:
    total = x.sum()
    for direction in (x.sin(), x.cos()):
        with forward_ad.dual_level():
            u = net(forward_ad.make_dual(x, direction))
            total = total + forward_ad.unpack_dual(u).tangent.square().sum()
    return total


def two_inputs(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        a, b = forward_ad.make_dual(x, x.cos()), forward_ad.make_dual(x.sin(), x)
        return forward_ad.unpack_dual(net(a) * net(b)).tangent.square().sum()


def gradient_of_a_tangent(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    with forward_ad.dual_level():
        u = net(forward_ad.make_dual(p, p.sin()))
        moved = forward_ad.unpack_dual(u).tangent
    (g,) = torch.autograd.grad(moved.square().sum(), p, create_graph=True)
    return g.square().sum()


def several_outputs(net: nn.Module, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        u = net(forward_ad.make_dual(x, x.cos()))
        a, b = forward_ad.unpack_dual(u.sin()).tangent, forward_ad.unpack_dual(u.exp()).tangent
    return (a * b).sum()


@pytest.mark.parametrize(
    "loss",
    [
        value_and_tangent,
        in_parameters,
        over_a_gradient,
        returned_from_inside,
        no_tangent,
        two_levels_in_turn,
        two_inputs,
        gradient_of_a_tangent,
        several_outputs,
    ],
    ids=lambda f: f.__name__,
)
def test_dual_level(loss: Loss) -> None:
    check(loss, [net()], points())


def test_primal_that_enters_another_dual() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        with forward_ad.dual_level():
            u = net(forward_ad.make_dual(x, torch.ones_like(x)))
            p, moved = forward_ad.unpack_dual(u)
            again = forward_ad.unpack_dual(p * u).tangent
        return moved.square().sum() + again.square().sum()

    expected = outcome(loss, [net()], (points(),), {})
    with pytest.warns(NestedGradientWarning, match="the primal of an unpacked dual tensor"):
        assert_same(
            outcome(optimize_nested(loss, backend="eager"), [net()], (points(),), {}), expected
        )


# linearize: PyTorch's tangent map is a constant to every outer derivative


def linearized(net: nn.Module, x: Tensor) -> Tensor:
    u, tangent_map = linearize(net, x)
    return tangent_map(x.sin()).square().sum() + u.sum()


def linearized_as_jvp(net: nn.Module, x: Tensor) -> Tensor:
    u, moved = jvp(net, (x,), (x.sin(),))
    return moved.square().sum() + u.sum()


def linearized_twice_used(net: nn.Module, x: Tensor) -> Tensor:
    _, tangent_map = linearize(net, x)
    return (tangent_map(x.sin()) * tangent_map(x.cos())).sum()


def linearized_twice_used_as_jvp(net: nn.Module, x: Tensor) -> Tensor:
    return (jvp(net, (x,), (x.sin(),))[1] * jvp(net, (x,), (x.cos(),))[1]).sum()


def linearized_gradient(net: nn.Module, x: Tensor) -> Tensor:
    _, tangent_map = linearize(grad(energy(net)), x)
    return tangent_map(x.sin()).square().sum()


def linearized_gradient_as_jvp(net: nn.Module, x: Tensor) -> Tensor:
    return jvp(grad(energy(net)), (x,), (x.sin(),))[1].square().sum()


def linearized_dictionary(net: nn.Module, x: Tensor) -> Tensor:
    u, tangent_map = linearize(lambda d: {"u": net(d["a"]) * d["b"].sum()}, {"a": x, "b": x * 2})
    return tangent_map({"a": x.sin(), "b": x})["u"].square().sum() + u["u"].sum()


def linearized_dictionary_as_jvp(net: nn.Module, x: Tensor) -> Tensor:
    f = lambda d: {"u": net(d["a"]) * d["b"].sum()}  # noqa: E731
    u, moved = jvp(f, ({"a": x, "b": x * 2},), ({"a": x.sin(), "b": x},))
    return moved["u"].square().sum() + u["u"].sum()


def linearized_in_two(net: nn.Module, x: Tensor) -> Tensor:
    _, tangent_map = linearize(lambda a, b: (net(a * b), a.sum()), x, x.cos())
    moved, total = tangent_map(x.sin(), x)
    return moved.square().sum() * total


def linearized_in_two_as_jvp(net: nn.Module, x: Tensor) -> Tensor:
    f = lambda a, b: (net(a * b), a.sum())  # noqa: E731
    moved, total = jvp(f, (x, x.cos()), (x.sin(), x))[1]
    return moved.square().sum() * total


@pytest.mark.parametrize(
    ("loss", "by_jvp"),
    [
        (linearized, linearized_as_jvp),
        (linearized_twice_used, linearized_twice_used_as_jvp),
        (linearized_gradient, linearized_gradient_as_jvp),
        (linearized_dictionary, linearized_dictionary_as_jvp),
        (linearized_in_two, linearized_in_two_as_jvp),
    ],
    ids=lambda f: f.__name__,
)
def test_linearize(loss: Loss, by_jvp: Loss) -> None:
    expected = outcome(by_jvp, [net()], (points(),), {})
    decorated = optimize_nested(loss, backend="eager")
    for _ in range(2):
        assert_same(outcome(decorated, [net()], (points(),), {}), expected)
    assert decorated.steps, "nothing was captured"


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own
def test_pytorchs_linearize_is_a_constant() -> None:
    """Why the reference is `jvp`: if this fails PyTorch was mended."""
    stock = outcome(linearized, [net()], (points(),), {})
    exact = outcome(linearized_as_jvp, [net()], (points(),), {})
    assert relative_error(stock.value, exact.value) < 1e-12
    assert relative_error(stock.grads["0.0.weight"], exact.grads["0.0.weight"]) > 1e-2


# forward mode inside of forward mode


def hessian_of_hessian(net: nn.Module, x: Tensor) -> Tensor:
    inner = lambda z: hessian(energy(net))(z).square().sum()  # noqa: E731
    return hessian(inner)(x[0]).square().sum()


def forward_twice(net: nn.Module, x: Tensor) -> Tensor:
    return jacfwd(jacfwd(energy(net)))(x[0]).square().sum()


def forward_thrice(net: nn.Module, x: Tensor) -> Tensor:
    return jacfwd(jacfwd(jacrev(energy(net))))(x[0]).square().sum()


def reverse_of_hessian(net: nn.Module, x: Tensor) -> Tensor:
    return jacrev(hessian(energy(net)))(x[0]).square().sum()


def biharmonic(net: nn.Module, x: Tensor) -> Tensor:
    """``Δ²u`` by traces of Hessians, per sample."""
    laplacian = lambda f: lambda z: torch.trace(hessian(f)(z))  # noqa: E731
    return vmap(laplacian(laplacian(lambda z: net(z)[0])))(x).square().mean()


def with_aux(net: nn.Module, x: Tensor) -> Tensor:
    def aside(z: Tensor) -> tuple[Tensor, Tensor]:
        value = jacfwd(jacfwd(energy(net)))(z).square().sum()
        return value, value.sin()

    found, aux = jacfwd(aside, has_aux=True)(x[0])
    return found.square().sum() + aux


def argument_numbers(net: nn.Module, x: Tensor) -> Tensor:
    f = lambda a, b: (net(a) * net(b)).sum()  # noqa: E731
    inner = lambda a, b: hessian(f, argnums=1)(a, b).square().sum()  # noqa: E731
    return hessian(inner, argnums=0)(x[0], x[1]).square().sum()


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param(hessian_of_hessian, marks=[pytest.mark.slow]),  # the next, in one argument
        argument_numbers,
        forward_thrice,
        reverse_of_hessian,
        biharmonic,
        with_aux,
    ],
    ids=lambda f: f.__name__,
)
def test_nested(loss: Loss) -> None:
    check(loss, [net()], points())


def test_no_grad_inside_is_refused() -> None:
    """Forward mode does not stop at `no_grad`, the pullbacks that stand in for it do."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        def inner(z: Tensor) -> Tensor:
            with torch.no_grad():
                scale = net(z).mean()
            return hessian(energy(net))(z).square().sum() * scale

        return hessian(inner)(x[0]).square().sum()

    expected = outcome(loss, [net()], (points(),), {})
    with pytest.warns(NestedGradientWarning, match="runs as written"):
        assert_same(
            outcome(optimize_nested(loss, backend="eager"), [net()], (points(),), {}), expected
        )


def dispatcher() -> tuple[object, object]:
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    return include.raw_repr(), exclude.raw_repr()


@pytest.mark.parametrize("retried", [True, False], ids=["retried", "as_written"])
def test_failed_capture_leaves_the_dispatcher_alone(retried: bool) -> None:
    """What a trace leaves behind would switch autograd off whenever garbage is collected."""

    def counted(net: nn.Module, x: Tensor) -> Tensor:
        def scaled(z: Tensor) -> Tensor:
            with open(__file__):
                return jacfwd(energy(net))(z)

        return jacfwd(scaled)(x[0]).square().sum()

    before, expected = dispatcher(), outcome(reverse_of_hessian, [net()], (points(),), {})
    if retried:
        optimize_nested(forward_twice, backend="eager")(net(), points()).backward()
    else:
        with pytest.warns(NestedGradientWarning, match="runs as written"):
            optimize_nested(counted, backend="eager")(net(), points()).backward()
    assert dispatcher() == before
    for _ in range(2):
        gc.collect()
        assert dispatcher() == before
        assert_same(outcome(reverse_of_hessian, [net()], (points(),), {}), expected)
    assert not torch._C._functorch.peek_interpreter_stack()
