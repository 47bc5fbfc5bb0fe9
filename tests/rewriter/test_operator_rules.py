"""Operators of users: their rules are checked, and used in forward and Taylor mode."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, nn

from passes.custom_rules import CUSTOM
from rewriter import RuleError, register_elementwise, register_linear, register_taylor_rule
from tests.oracle import check

counter = itertools.count()


def operator(function: Callable[..., Tensor], backward: Callable[..., Any] | None = None) -> Any:
    """Define an operator of its own name; its gradient is that of the function."""

    def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.inputs = inputs

    def pull_back(ctx: Any, cotangent: Tensor) -> Any:
        tensors = [x for x in ctx.inputs if isinstance(x, Tensor)]
        found = iter(
            torch.func.vjp(lambda *t: _called(function, ctx.inputs, t), *tensors)[1](cotangent)
        )
        return tuple(next(found) if isinstance(x, Tensor) else None for x in ctx.inputs)

    made = torch.library.custom_op(f"operator_rules::f{next(counter)}", mutates_args=())(function)
    made.register_fake(function)
    made.register_autograd(backward or pull_back, setup_context=save)
    return made


def _called(function: Callable[..., Tensor], inputs: tuple, tensors: tuple) -> Tensor:
    given = iter(tensors)
    return function(*(next(given) if isinstance(x, Tensor) else x for x in inputs))


def wave(x: Tensor, frequency: float) -> Tensor:
    return torch.sin(frequency * x) * torch.exp(-x * x)


def bent(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, torch.expm1(x))


def spread(x: Tensor) -> Tensor:
    return x.cumsum(-1) - 2 * x.flip(-1)


def torch_sin(x: Tensor) -> Tensor:
    return x.sin()


def mixed(x: Tensor) -> Tensor:
    return x - x.mean(0)


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


def scaled_series(args: tuple, series: tuple) -> list[Tensor]:
    x, w = ([a, *(s or ())] for a, s in zip(args, series, strict=True))
    orders = max(len(x), len(w))
    found = []
    for n in range(1, orders):
        terms = [x[i] * w[n - i] for i in range(n + 1) if i < len(x) and n - i < len(w)]
        found.append(sum(terms, torch.zeros_like(args[0] * args[1])))
    return found


def bent_expression(x: Any) -> Any:
    return sympy.Piecewise((x**2, x > 0), (sympy.exp(x) - 1, True))


class Net(nn.Module):
    """A network (batch, 3) → (batch, 1) with an operator behind its first layer."""

    def __init__(self, apply: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.apply_ = nn.Linear(3, 5), nn.Linear(5, 1), apply
        self.weight = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.apply_(self.first(x)).tanh())


def laplacian_loss(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    rows = [torch.autograd.grad(g[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(3)]
    return sum(rows).square().mean()


def registered_wave() -> Callable[[Tensor], Tensor]:
    made = operator(wave)
    made_of = lambda x, frequency: sympy.sin(frequency * x) * sympy.exp(-(x**2))  # noqa: E731
    register_elementwise(made, made_of, example=[torch.randn(4, 2), 1.5])
    return lambda x: made(x, 2.0)


def registered_bent() -> Callable[[Tensor], Tensor]:
    made = operator(bent)
    register_elementwise(made, bent_expression, example=[torch.linspace(-1, 1, 8)])
    return lambda x: made(x)


def registered_spread() -> Callable[[Tensor], Tensor]:
    made = operator(spread)
    made.register_vmap(lambda info, dims, x: (spread(x.movedim(dims[0], 0)), 0))
    register_linear(made, example=[torch.randn(3, 4)], rows=["x"])
    return lambda x: made(x)


def registered_scaled() -> Callable[[Tensor], Tensor]:
    made = operator(scaled)
    register_taylor_rule(
        made, scaled_series, example=[torch.randn(3, 4), torch.randn(3, 4)], rows=["x"]
    )
    return lambda x: made(x, torch.linspace(1, 2, 5, dtype=x.dtype))


@pytest.mark.parametrize(
    "make", [registered_wave, registered_bent, registered_spread, registered_scaled]
)
def test_registered_operators_run_in_taylor_mode(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    net, x = Net(make()).double(), torch.randn(4, 3).double().requires_grad_()
    report = check(laplacian_loss, [net], x, strategy="taylor").explain(net, x)
    assert {site.strategy for site in report.sites} == {"taylor"}


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g.square().sum(1).sqrt().mean()


@pytest.mark.parametrize("make", [registered_wave, registered_spread, registered_scaled])
def test_registered_operators_run_in_forward_mode(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    net, x = Net(make()).double(), torch.randn(4, 3).double().requires_grad_()
    report = check(penalty, [net], x, strategy="jvp_over_gradient").explain(net, x)
    assert {site.status for site in report.sites} == {"rewritten"}


def test_an_operator_that_is_not_registered_is_left_as_written() -> None:
    """The same loss: it is the rules that let it be rewritten."""
    made = operator(wave)
    net, x = Net(lambda x: made(x, 2.0)).double(), torch.randn(4, 3).double().requires_grad_()
    report = check(penalty, [net], x).explain(net, x)
    assert {site.status for site in report.sites} == {"as written"}


def test_a_derivative_in_another_argument_is_left_as_written() -> None:
    """A rule for ``scaled`` that is linear in x does not hold where the weight moves too."""
    made = operator(scaled)
    register_linear(made, ["x"], example=[torch.randn(3, 4), torch.randn(3, 4)])
    net, x = Net(lambda x: made(x, x)).double(), torch.randn(4, 3).double().requires_grad_()
    report = check(penalty, [net], x).explain(net, x)
    assert {site.status for site in report.sites} == {"as written"}


def wrong_series(args: tuple, series: tuple) -> list[Tensor]:
    return [2 * term for term in scaled_series(args, series)]


def short_series(args: tuple, series: tuple) -> list[Tensor]:
    return scaled_series(args, series)[:1]


def once(ctx: Any, cotangent: Tensor) -> Tensor:
    return cotangent.detach() * ctx.inputs[0].cos().detach()


PAIR = [torch.randn(3, 4), torch.randn(3, 4)]
LINE = torch.linspace(-1, 1, 8)
REFUSED: list[tuple[Callable[[], Any], Callable[[Any], None], str]] = [
    (
        lambda: operator(bent),
        lambda op: register_elementwise(op, lambda x: x**2, example=[LINE]),
        r"does not compute x\*\*2",
    ),
    (
        lambda: operator(bent),
        lambda op: register_elementwise(op, lambda x: sympy.gamma(x), example=[LINE]),
        "functions of x among exp",
    ),
    (
        lambda: operator(bent),
        lambda op: register_elementwise(
            op, lambda x: sympy.Piecewise((x**2, x > 0)), example=[LINE]
        ),
        "end it with True",
    ),
    (
        lambda: operator(torch_sin, once),
        lambda op: register_elementwise(op, sympy.sin, example=[LINE]),
        "rule is wrong at order 2|differentiates it 1 times only",
    ),
    (
        lambda: operator(scaled),
        lambda op: register_elementwise(op, lambda x, w: x * w, example=PAIR),
        "use register_taylor_rule",
    ),
    (
        lambda: operator(bent),
        lambda op: register_linear(op, example=[LINE]),
        "as a linear operator",
    ),
    (
        lambda: operator(scaled),
        lambda op: register_linear(op, ["x", "weight"], example=PAIR),
        "as a linear operator",
    ),
    (
        lambda: operator(scaled),
        lambda op: register_linear(op, ["y"], example=PAIR),
        "has no argument 'y', only x, weight",
    ),
    (
        lambda: operator(scaled),
        lambda op: register_taylor_rule(op, wrong_series, example=PAIR),
        "rule is wrong at order 1",
    ),
    (
        lambda: operator(scaled),
        lambda op: register_taylor_rule(op, short_series, example=PAIR),
        "gives 1 coefficients for 4",
    ),
    (
        lambda: operator(mixed),
        lambda op: register_linear(op, example=PAIR[:1], rows=["x"]),
        "in row 0 when others change",
    ),
    (
        lambda: torch.ops.aten.sin.default,
        lambda op: register_elementwise(op, sympy.sin, example=[LINE]),
        "PyTorch's own operators",
    ),
    (
        lambda: torch.sin,
        lambda op: register_elementwise(op, sympy.sin, example=[LINE]),
        "expected an operator, such as",
    ),
    (
        lambda: operator(scaled),
        lambda op: register_taylor_rule(op, scaled_series, example=[LINE]),
        "example has 1 arguments; .* takes x, weight",
    ),
]


@pytest.mark.parametrize("make, register, said", REFUSED, ids=[said for *_, said in REFUSED])
def test_a_rule_that_does_not_hold_is_refused(
    make: Callable[[], Any], register: Callable[[Any], None], said: str
) -> None:
    before, state = dict(CUSTOM), torch.get_rng_state()
    with pytest.raises((RuleError, TypeError), match=said):
        register(make())
    assert before == CUSTOM and torch.equal(state, torch.get_rng_state())
