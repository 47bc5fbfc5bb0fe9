"""User-defined `torch.autograd.Function`: the pullback its author wrote, at every order, as eager
has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function, grad
from torch.autograd.function import once_differentiable

from rewriter import NestedGradientWarning, optimize_nested
from rewriter.errors import OptionError
from tests.oracle import assert_same, check, outcome

Body = Callable[[Tensor], Tensor]
MIX = torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=torch.float64)


def penalty(body: Body) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        u = body(net(p))
        (g,) = grad(u.sum(), p, create_graph=True)
        return g.square().sum() + u.mean()

    return loss


class Cube(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g


class CubeWithContext(Function):
    """In two parts, as `torch.func` wants it, with a forward-mode rule."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @staticmethod
    def jvp(ctx: Any, t: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * t


class StraightThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Reversal(Function):
    """A Python number kept as an attribute, and None for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.alpha = alpha
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return -ctx.alpha * g, None


class ReversalAsView(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.neg()


class SavedOutput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return y * g


class SavedIntermediate(Function):
    """To eager's double backward a saved value that is neither input nor output is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = x.sigmoid()
        ctx.save_for_backward(x, s)
        return x * s

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, s = ctx.saved_tensors
        return g * (s + x * s * (1 - s))


class TensorAttribute(Function):
    """A tensor kept on the context instead of saved: a constant to the double backward as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 1 - x.tanh() ** 2
        ctx.shape = x.shape
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return (g * ctx.slope).reshape(ctx.shape)


class SeveralInputs(Function):
    """`needs_input_grad` decides what is computed."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, power: int, c: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.power = power
        return a**power * b

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        first = g * ctx.power * a ** (ctx.power - 1) * b if ctx.needs_input_grad[0] else None
        second = g * a**ctx.power if ctx.needs_input_grad[1] else None
        return first, second, None, None


class SeveralOutputs(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x.cos() - h * x.sin()


class ConstantOutput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        largest, where = x.max(dim=1)
        ctx.save_for_backward(where)
        ctx.mark_non_differentiable(where)
        ctx.shape = x.shape
        return largest, where

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Tensor:
        (where,) = ctx.saved_tensors
        return g.new_zeros(ctx.shape).scatter(1, where[:, None], g[:, None])


class ConstantFloatOutput(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        factor = x.sin()
        ctx.mark_non_differentiable(factor)
        return x**2, factor

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * g


class CallsAnother(Function):
    """The second derivative goes through the pullback of another function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**4 / 4

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return Cube.apply(x) * g


class Mixing(Function):
    """Elementwise forward; a pullback that is no derivative of anything, and not symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (x.cos() * g) @ MIX.to(g)


class ClippedGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.3, 0.3)


class NotMaterialized(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None, h: Tensor | None) -> Tensor | None:
        (x,) = ctx.saved_tensors
        total = None if g is None else g * x.cos()
        if h is not None:
            total = -h * x.sin() if total is None else total - h * x.sin()
        return total


def _closure(u: Tensor) -> Tensor:
    """A class made inside of the loss, over a number of its own."""
    return SeveralInputs.apply(u, u.cos(), 2) * 0.5


BODIES: dict[str, Body] = {
    "cube": Cube.apply,
    "with_context": CubeWithContext.apply,
    "twice": lambda u: Cube.apply(Cube.apply(u) * 0.3),
    "beside_itself": lambda u: Cube.apply(u) * u + Cube.apply(u.sin()),
    "straight_through": lambda u: StraightThrough.apply(3 * u) * u,
    "reversal": lambda u: Reversal.apply(u, 0.3) * u,
    "reversal_as_view": lambda u: ReversalAsView.apply(u) * u.sin(),
    "saved_output": lambda u: SavedOutput.apply(u) * u,
    "saved_intermediate": SavedIntermediate.apply,
    "tensor_attribute": lambda u: TensorAttribute.apply(u) * u,
    "several_inputs": lambda u: SeveralInputs.apply(u, u.sin(), 3),
    "same_input_twice": lambda u: SeveralInputs.apply(u, u, 2),
    "constant_input": lambda u: SeveralInputs.apply(u, torch.linspace(0, 1, 2).double(), 3),
    "only_second": lambda u: SeveralInputs.apply(u.detach(), u, 3) * u,
    "none_input": lambda u: SeveralInputs.apply(u, u.cos(), 2, None),
    "closure": _closure,
    "several_outputs": lambda u: torch.mul(*SeveralOutputs.apply(u)),
    "one_of_two_outputs": lambda u: SeveralOutputs.apply(u)[1] ** 2,
    "constant_output": lambda u: ConstantOutput.apply(u)[0] ** 3 + ConstantOutput.apply(u)[1],
    "constant_float_output": lambda u: torch.mul(*ConstantFloatOutput.apply(u)),
    "calls_another": CallsAnother.apply,
    "not_symmetric": Mixing.apply,
    "clipped_gradient": lambda u: ClippedGradient.apply(u**2) * u,
    "not_materialized": lambda u: NotMaterialized.apply(u)[0] ** 2,
}


@pytest.mark.parametrize("name", BODIES)
def test_function(name: str) -> None:
    check(penalty(BODIES[name]), [net()], points())


@pytest.mark.parametrize(
    "name", ["cube", "saved_output", "saved_intermediate", "several_outputs", "calls_another"]
)
def test_third_order(name: str) -> None:
    """Dynamo traces the second derivative of the pullback, too."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        (g,) = grad(BODIES[name](net(p)).sum(), p, create_graph=True)
        (h,) = grad(g.square().sum(), p, create_graph=True)
        return h.square().sum()

    check(loss, [net()], points())


@pytest.mark.parametrize("dynamic", [None, True])
def test_under_func(dynamic: bool | None) -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: CubeWithContext.apply(net(z)).sum())(x).square().sum()

    check(loss, [net()], points(), dynamic=dynamic)


def test_outside_of_the_derivative() -> None:
    """The penalty itself keeps its cheap form."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return penalty(torch.sin)(net, x) + Reversal.apply(net(x), 0.5).square().sum()

    (site,) = check(loss, [net()], points()).explain(net(), points()).sites
    assert site.strategy == "jvp_over_gradient"


def test_parameter_of_a_function() -> None:
    """A weight as the second argument, differentiated by the inner and the outer gradient."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)
            self.scale = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return SeveralInputs.apply(self.inner(x), self.scale, 3)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        grads = grad(net(x).sum(), list(net.parameters()), create_graph=True)
        return sum(g.square().sum() for g in grads)

    torch.manual_seed(0)
    module = Scaled().double()
    check(loss, [module], points())
    module.scale.requires_grad_(False)
    check(penalty(lambda u: u.sin()), [module], points())


@pytest.mark.parametrize("name", ["cube", "not_symmetric", "reversal"])
def test_identity_of_symmetric_hessians_is_not_used(name: str) -> None:
    """Nothing says that the pullback is the derivative of the function."""
    loss = check(penalty(BODIES[name]), [net()], points())
    (site,) = loss.explain(net(), points()).sites
    assert site.strategy == "reverse"
    with pytest.raises(OptionError, match="does not accept 'jvp_over_gradient'"):
        optimize_nested(penalty(BODIES[name]), backend="eager", strategy="jvp_over_gradient")(
            net(), points()
        )


def _as_written(loss: Callable[..., Tensor], reason: str) -> None:
    expected = outcome(loss, [net()], (points(),), {})
    with pytest.warns(NestedGradientWarning, match=reason):
        assert_same(
            outcome(optimize_nested(loss, backend="eager"), [net()], (points(),), {}), expected
        )


@pytest.mark.parametrize("body", [lambda u: u, torch.square], ids=["constant_seed", "seed"])
def test_once_differentiable(body: Body) -> None:
    """Eager raises where the cotangent is differentiated, and has a constant where it is not."""

    class Once(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 3 * x**2 * g

    loss = penalty(lambda u: body(Once.apply(u)))
    if body is not torch.square:
        _as_written(loss, "once_differentiable")
        return
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        loss(net(), points()).backward()
    with pytest.warns(NestedGradientWarning, match="once_differentiable"):
        value = optimize_nested(loss, backend="eager")(net(), points())
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        value.backward()


def test_forward_mode_rule() -> None:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        moved = torch.func.jvp(lambda z: CubeWithContext.apply(net(z)), (x,), (x.sin(),))[1]
        return moved.square().sum()

    _as_written(loss, "the forward-mode rule of a user-defined autograd.Function")


def test_random_numbers_inside() -> None:
    class Noisy(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            mask = torch.rand_like(x)
            ctx.save_for_backward(mask)
            return x * mask

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * ctx.saved_tensors[0]

    _as_written(penalty(lambda u: Noisy.apply(u) * u), "draws random numbers")


def test_writes_to_its_input() -> None:
    class Doubled(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    _as_written(penalty(lambda u: Doubled.apply(u.sin()) ** 2), "autograd.Function")
