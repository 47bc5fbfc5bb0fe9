"""The cases of Lux.jl's nested AD, by id, in float64 against the loss as written.

The models with BatchNorm in train mode have a second row in autograd form as their reference where
PyTorch refuses the `torch.func` form.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from rewriter import optimize_nested
from tests.cases import with_written_norms
from tests.oracle import assert_same, check, outcome

D = torch.float64


def dense(*, norm: bool = True) -> nn.Module:
    middle = [nn.BatchNorm1d(4)] if norm else []
    return nn.Sequential(nn.Linear(2, 4), *middle, nn.GELU(), nn.Linear(4, 2))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.BatchNorm2d(3),
        nn.Conv2d(3, 2, 3, padding=1), nn.GELU(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 1),
    )  # fmt: skip


def small_conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 2, 3, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(18, 2),
    )  # fmt: skip


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 4), nn.GELU(), nn.Linear(4, 2))


def energy(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda z: net(z).square().sum()


def squares(x: Tensor) -> Tensor:
    return (0.01 * x).square().sum()


INNER: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "forward Jacobian": lambda net, x: squares(jacfwd(net)(x)),
    "reverse Jacobian": lambda net, x: squares(jacrev(net)(x)),
    "forward gradient": lambda net, x: squares(jacfwd(energy(net))(x)),
    "reverse gradient": lambda net, x: squares(grad(energy(net))(x)),
}


def _jacobian_reference(net: nn.Module, x: Tensor) -> Tensor:
    return squares(functional.jacobian(net, x, create_graph=True))


def _gradient_reference(net: nn.Module, x: Tensor) -> Tensor:
    return squares(torch.autograd.grad(energy(net)(x), x, create_graph=True)[0])


def _points(*shape: int) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=D, requires_grad=True)


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().double()


def _each(dense: Any, conv: Any, ids: tuple[str, str]) -> Any:
    """Every way around both networks; forward mode around convolutions is slow."""
    return pytest.mark.parametrize(
        ("make", "shape", "name"),
        [
            pytest.param(
                make,
                shape,
                name,
                id=f"{number}-{name}",
                marks=[pytest.mark.slow] if make is conv and "forward" in name else [],
            )
            for (make, shape), number in zip(
                [(dense, (4, 2)), (conv, (2, 2, 3, 3))], ids, strict=True
            )
            for name in INNER
        ],
    )


@_each(dense, conv, ("I1-I4", "I5-I8"))
def test_with_respect_to_inputs(
    make: Callable[[], nn.Module], shape: tuple[int, ...], name: str
) -> None:
    """BatchNorm in train mode; PyTorch refuses the form itself, so the reference is autograd's."""
    reference = _jacobian_reference if "Jacobian" in name else _gradient_reference
    expected = outcome(reference, [with_written_norms(_seeded(make))], (_points(*shape),), {})
    decorated = optimize_nested(INNER[name], backend="eager")
    mine = outcome(decorated, [_seeded(make)], (_points(*shape),), {})
    for key, g in expected.grads.items():
        if g is None and mine.grads[key] is not None:  # forms differ in None and zeros
            assert not mine.grads[key].any()
            expected.grads[key] = mine.grads[key]
    assert_same(mine, expected)


def in_parameters(operator: Callable[..., Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    """Differentiate in all parameters, ``operator`` over a dict of them."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        parameters = dict(net.named_parameters())
        found = operator(lambda p: functional_call(net, p, (x,)))(parameters)
        return sum(squares(block) for block in found.values())

    return loss


@pytest.mark.parametrize("operator", [jacrev, jacfwd], ids=["reverse", "forward"])
@pytest.mark.parametrize(
    ("make", "shape"), [(mlp, (3, 2)), (small_conv, (2, 2, 3, 3))], ids=["P1-P2", "P5-P6"]
)
def test_parameter_jacobian(
    make: Callable[[], nn.Module], shape: tuple[int, ...], operator: Any
) -> None:
    check(in_parameters(operator), [_seeded(make)], _points(*shape))


def test_parameter_gradient() -> None:
    """P4, P8."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        parameters = dict(net.named_parameters())
        found = grad(lambda p: functional_call(net, p, (x,)).square().sum())(parameters)
        return sum(squares(g) for g in found.values())

    check(loss, [_seeded(mlp)], _points(3, 2))
    check(loss, [_seeded(small_conv)], _points(2, 2, 3, 3))


@pytest.mark.parametrize(
    ("make", "shape"), [(small_conv, (4, 2, 3, 3)), (mlp, (4, 2))], ids=["conv", "mlp"]
)
class TestProducts:
    """V1 to V4: products with the model's own output, and along a random direction."""

    def test_vjp(self, make: Any, shape: Any) -> None:
        def loss(net: nn.Module, x: Tensor) -> Tensor:
            u, pull = vjp(net, x)
            return pull(u)[0].sum()

        check(loss, [_seeded(make)], _points(*shape))

    def test_jvp(self, make: Any, shape: Any) -> None:
        def loss(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
            return jvp(net, (x,), (v,))[1].sum()

        check(loss, [_seeded(make)], _points(*shape), _points(*shape).detach().sin())

    def test_gradient_in_the_seed(self, make: Any, shape: Any) -> None:
        """What Lux drops."""

        def loss(net: nn.Module, x: Tensor, seed: Tensor) -> Tensor:
            return jvp(net, (x,), (seed,))[1].square().sum()

        check(loss, [_seeded(make)], _points(*shape), _points(*shape).detach().requires_grad_())

    @pytest.mark.parametrize("operator", [jacrev, jacfwd], ids=["reverse", "forward"])
    def test_batched_jacobian(self, make: Any, shape: Any, operator: Any) -> None:
        """B1 to B4, F1."""

        def loss(net: nn.Module, x: Tensor) -> Tensor:
            return vmap(operator(lambda z: net(z[None])[0]))(x).square().sum()

        check(loss, [_seeded(make)], _points(*shape))


@pytest.mark.parametrize("operator", [jacrev, jacfwd], ids=["reverse", "forward"])
def test_batched_jacobian_of_a_square(operator: Any) -> None:
    """B5: the gradient is exactly 8x."""
    x = _points(2, 4)
    loss = optimize_nested(
        lambda x: vmap(operator(lambda z: z * z))(x).square().sum(), backend="eager"
    )
    loss(x).backward()
    assert torch.equal(x.grad, 8 * x.detach())


class Diagonal(nn.Module):
    """S1: a layer whose forward is the diagonal of a Jacobian of another."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = nn.Sequential(nn.Linear(5, 5), nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        jacobian = jacrev(self.potential)(x)
        return torch.diagonal(jacobian.reshape(25, 25)).reshape(5, 5)


def test_layer_with_a_jacobian_inside() -> None:
    check(lambda net, x: net(x).square().sum(), [_seeded(Diagonal)], _points(5, 5))


def test_value_and_gradient() -> None:
    """E1."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return (grad(lambda z: net(z).sum())(x) + net(x).square() / 2).sum()

    make = lambda: nn.Sequential(nn.Linear(1, 8), nn.Sigmoid(), nn.Linear(8, 1))  # noqa: E731
    check(loss, [_seeded(make)], _points(12, 1))


@pytest.mark.parametrize("width", [2, 4, 8, 11, 12])
def test_widths(width: int) -> None:
    """F2."""
    make = lambda: nn.Sequential(nn.Linear(width, width), nn.GELU())  # noqa: E731
    for operator in (jacrev, jacfwd):
        loss = lambda net, x, o=operator: vmap(o(net))(x).square().sum()  # noqa: E731
        check(loss, [_seeded(make)], _points(3, width))


def test_data_and_jacobian() -> None:
    """D2."""

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - y).square().mean() + squares(vmap(jacfwd(net))(x))

    make = lambda: nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))  # noqa: E731
    check(loss, [_seeded(make)], _points(10, 2), _points(10, 2).detach().cos())


def _deep() -> nn.Module:
    sizes = [1, 12, 12, 12]
    inner = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*inner, nn.Linear(12, 1))


def test_match_a_derivative() -> None:
    """D3."""
    loss = lambda net, t: (grad(energy(net))(t) - t.cos()).square().mean()  # noqa: E731
    check(loss, [_seeded(_deep)], _points(16, 1))


def test_squared_parameter_jacobian() -> None:
    """D4."""
    check(in_parameters(jacrev), [_seeded(_deep)], _points(16, 1))


def test_hutchinson_three_ways() -> None:
    """D5: three forms of one trace estimate have one value and one gradient."""

    def by_vjp(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return (vjp(net, x)[1](v)[0] * v).sum()

    def by_jvp(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return (jvp(net, (x,), (v,))[1] * v).sum()

    def by_jacobian(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
        return torch.einsum("bi,bij,bj->", v, vmap(jacrev(net))(x), v)

    make = lambda: nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 4))  # noqa: E731
    v = _points(12, 4).detach().sign()
    found = []
    for loss in (by_vjp, by_jvp, by_jacobian):
        decorated = check(loss, [_seeded(make)], _points(12, 4), v)
        found.append(outcome(decorated, [_seeded(make)], (_points(12, 4), v), {}))
    for other in found[1:]:
        assert_same(other, found[0])


def test_two_inputs() -> None:
    """U2: a gradient in one of two inputs."""

    def loss(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        g = grad(lambda z: net(torch.cat([z, t], dim=1)).sum())(x)
        return g.square().sum()

    make = lambda: nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 1))  # noqa: E731
    check(loss, [_seeded(make)], _points(20, 2), _points(20, 1).detach().requires_grad_())


def test_linear_layer() -> None:
    """U3: the second derivative is zero."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        u, pull = vjp(net, x)
        return pull(torch.ones_like(u))[0].square().sum()

    check(loss, [_seeded(lambda: nn.Linear(3, 3))], _points(1, 3))


def test_worked_example() -> None:
    """H1: h(x) = (sum of ∇f)³ for f = 1/‖x‖; ∇h is 3s² times the Hessian of f times ones."""
    x = _points(5)
    f = lambda z: 1 / z.norm()  # noqa: E731
    loss = optimize_nested(lambda x: grad(f)(x).sum() ** 3, backend="eager")
    loss(x).backward()
    plain = x.detach()
    s, curvature = grad(f)(plain).sum(), hessian(f)(plain)
    expected = 3 * s**2 * curvature @ torch.ones(5, dtype=D)
    assert torch.allclose(x.grad, expected, rtol=1e-9)


def dense_for_parameters() -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, 4), nn.GELU(), nn.BatchNorm1d(4), nn.Sigmoid(), nn.Linear(4, 2)
    )


def conv_for_parameters() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 3, padding=1), nn.Tanh(), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(18, 1),
    )  # fmt: skip


def _of_parameters(net: nn.Module, x: Tensor, energy: bool) -> Callable[..., Tensor]:
    def at(parameters: dict[str, Tensor]) -> Tensor:
        u = functional_call(net, parameters, (x,))
        return u.square().sum() if energy else u

    return at


@_each(dense_for_parameters, conv_for_parameters, ("P1-P4", "P5-P8"))
def test_with_respect_to_parameters(
    make: Callable[[], nn.Module], shape: tuple[int, ...], name: str
) -> None:
    """BatchNorm in train mode: statistics as after one call."""
    operator: Any = grad if name == "reverse gradient" else jacrev if "reverse" in name else jacfwd
    energy = "gradient" in name

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        found = operator(_of_parameters(net, x, energy))(dict(net.named_parameters()))
        return sum(squares(block) for block in found.values())

    def reference(net: nn.Module, x: Tensor) -> Tensor:
        names, parameters = zip(*net.named_parameters(), strict=True)
        at = _of_parameters(net, x, energy)
        flat = lambda *ps: at(dict(zip(names, ps, strict=True)))  # noqa: E731
        found = functional.jacobian(flat, parameters, create_graph=True)
        return sum(squares(block) for block in found)

    expected = outcome(reference, [with_written_norms(_seeded(make))], (_points(*shape),), {})
    decorated = optimize_nested(loss, backend="eager")
    mine = outcome(decorated, [_seeded(make)], (_points(*shape),), {})
    for key, g in expected.grads.items():
        if (g is None) != (mine.grads[key] is None):  # forms differ in None and zeros
            there = mine.grads[key] if g is None else g
            assert not there.any()
            expected.grads[key] = mine.grads[key]
    assert_same(mine, expected)
    assert decorated.steps


def test_jacobian_returned_in_a_tuple() -> None:
    """U1."""

    def jacobian(net: nn.Module, x: Tensor) -> tuple[Tensor]:
        return (jacrev(net)(x),)

    loss = lambda net, x: sum(squares(block) for block in jacobian(net, x))  # noqa: E731
    expected = outcome(
        _jacobian_reference, [with_written_norms(_seeded(dense))], (_points(4, 2),), {}
    )
    mine = outcome(optimize_nested(loss, backend="eager"), [_seeded(dense)], (_points(4, 2),), {})
    assert_same(mine, expected)


def test_batch_dimension_dropped() -> None:
    """F3: known answer, and an error that says which shapes do not fit."""
    x = _points(3, 2)
    square = optimize_nested(lambda x: vmap(jacrev(torch.square))(x).sum(), backend="eager")
    assert torch.allclose(square(x).detach(), (2 * x.detach()).sum())

    def rows(x: Tensor, drop: bool) -> Tensor:
        u = x.square().sum(0) if drop else x.square()
        seeds = torch.eye(2, dtype=D)[:, None].expand(2, 3, 2)
        (found,) = torch.autograd.grad(u, x, seeds, create_graph=True, is_grads_batched=True)
        return found.square().sum()

    check(lambda x: rows(x, False), [], x)
    for loss in (rows, optimize_nested(rows, backend="eager")):
        with pytest.raises(RuntimeError, match=r"is_grads_batched=True.* a mismatch was detected"):
            loss(x, True)


def test_structures_of_inputs() -> None:
    """F4: products against the Jacobian; functions of nested tuples and dicts."""
    x, v = _points(3, 3), _points(3, 3).detach().cos()
    f = lambda z: z.abs().square()  # noqa: E731

    def products(x: Tensor, v: Tensor) -> Tensor:
        return vjp(f, x)[1](v)[0].sin().sum() + jvp(f, (x,), (v,))[1].square().sum()

    def by_jacobian(x: Tensor, v: Tensor) -> Tensor:
        jacobian = jacrev(f)(x)
        pulled = torch.einsum("ij,ijkl->kl", v, jacobian)
        return pulled.sin().sum() + torch.einsum("ijkl,kl->ij", jacobian, v).square().sum()

    check(products, [], x, v)
    assert_same(
        outcome(optimize_nested(products, backend="eager"), [], (x, v), {}),
        outcome(by_jacobian, [], (x, v), {}),
    )

    def nested(x: Tensor, v: Tensor) -> Tensor:
        g = lambda d: {"u": (d["a"][0] * d["b"], f(d["a"][1]))}  # noqa: E731
        at, along = {"a": (x, x.sin()), "b": x.exp()}, {"a": (v, v), "b": v.sin()}
        u, moved = jvp(g, (at,), (along,))
        (pulled,) = vjp(g, at)[1](moved)
        total = (moved["u"][0] * u["u"][1] + moved["u"][1]).square().sum()
        return total + (pulled["a"][0] * pulled["b"]).sum() + pulled["a"][1].square().sum()

    check(nested, [], x, v)


def test_data_and_jacobian_with_norm() -> None:
    """D1, also by finite differences."""
    make = lambda: nn.Sequential(  # noqa: E731
        nn.Linear(2, 4), nn.Tanh(), nn.BatchNorm1d(4), nn.Linear(4, 2)
    )
    y = _points(10, 2).detach().cos()

    def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - y).square().mean() + squares(jacfwd(net)(x))

    def reference(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return (net(x) - y).square().mean() + _jacobian_reference(net, x)

    written = with_written_norms(_seeded(make))
    expected = outcome(reference, [written], (_points(10, 2), y), {})
    decorated = optimize_nested(loss, backend="eager")
    mine = outcome(decorated, [_seeded(make)], (_points(10, 2), y), {})
    assert_same(mine, expected)
    assert mine.buffers["0.2.num_batches_tracked"] == 2

    def value(step: float) -> float:
        x = _points(10, 2).detach()
        x[3, 1] += step
        return decorated(_seeded(make), x.requires_grad_(), y).item()

    difference = (value(1e-5) - value(-1e-5)) / 2e-5
    assert abs(difference - mine.grads["argument 0"][3, 1].item()) < 1e-7


# Which test has which of the cases.
CASES = {
    "test_with_respect_to_inputs": "I1 I2 I3 I4 I5 I6 I7 I8",
    "test_with_respect_to_parameters": "P1 P2 P3 P4 P5 P6 P7 P8",
    "TestProducts": "V1 V2 V3 V4 B1 B2 B3 B4 F1",
    "test_batched_jacobian_of_a_square": "B5",
    "test_layer_with_a_jacobian_inside": "S1",
    "test_value_and_gradient": "E1",
    "test_widths": "F2",
    "test_batch_dimension_dropped": "F3",
    "test_structures_of_inputs": "F4",
    "test_data_and_jacobian_with_norm": "D1",
    "test_data_and_jacobian": "D2",
    "test_match_a_derivative": "D3",
    "test_squared_parameter_jacobian": "D4",
    "test_hutchinson_three_ways": "D5",
    "test_jacobian_returned_in_a_tuple": "U1",
    "test_two_inputs": "U2",
    "test_linear_layer": "U3",
    "test_worked_example": "H1",
}


def test_no_case_is_missing() -> None:
    assert all(name in globals() for name in CASES)
    numbers = {"I": 8, "P": 8, "V": 4, "B": 5, "S": 1, "E": 1, "F": 4, "D": 5, "U": 3, "H": 1}
    expected = {f"{letter}{k}" for letter, n in numbers.items() for k in range(1, n + 1)}
    assert {name for names in CASES.values() for name in names.split()} == expected
