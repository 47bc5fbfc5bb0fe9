"""Draws inside a differentiated network: as many as eager's, in eager's order, from its stream.

The generator's end state is compared by the oracle, so one draw too many makes these red.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import NestedGradientWarning, optimize_nested
from tests.cases import small_net as net
from tests.oracle import assert_same, check, outcome

Body = Callable[[Tensor], Tensor]
D = torch.float64
Loss = Callable[[nn.Module, Tensor], Tensor]


def points() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 3, dtype=D, requires_grad=True)


def penalty(net: nn.Module, x: Tensor, body: Body) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = grad(body(net(p)).sum(), p, create_graph=True)
    return g.square().sum()


def chosen(u: Tensor) -> Tensor:
    """A draw whose probability depends on the point."""
    return torch.bernoulli(u.sigmoid())


def drawn_thrice(u: Tensor) -> Tensor:
    return u**2 * chosen(u) * torch.rand(4, 2, dtype=D) * chosen(u)


BODIES: dict[str, Body] = {
    "rrelu": lambda u: F.rrelu(u, training=True) ** 2,
    "rrelu_eval": lambda u: F.rrelu(u, training=False).square(),
    "rrelu_in_place": lambda u: F.rrelu(u * 1, training=True, inplace=True) ** 2,
    "torch_rrelu": lambda u: torch.rrelu(u, training=True) ** 2,
    "bernoulli": lambda u: u**2 * chosen(u),
    "bernoulli_method": lambda u: u**2 * u.sigmoid().bernoulli(),
    "bernoulli_in_place": lambda u: u**2 * torch.empty_like(u).bernoulli_(0.3),
    "three_draws": drawn_thrice,
    "alpha_dropout": lambda u: F.alpha_dropout(u**2, 0.4, training=True),
    "feature_alpha_dropout": lambda u: F.feature_alpha_dropout(u[:, :, None] ** 2, 0.4, True),
    "dropout1d": lambda u: F.dropout1d(u[:, :, None] ** 2, 0.4),
    "dropout_in_place": lambda u: F.dropout(u * 1, 0.4, inplace=True) ** 2,
    "dropout_after_rrelu": lambda u: F.dropout(F.rrelu(u, training=True) * u, 0.5),
    "gumbel_hard": lambda u: F.gumbel_softmax(u**2, hard=True) * u,
    "multinomial": lambda u: u.gather(1, torch.multinomial(u.softmax(-1), 1)) ** 2,
    "normal_of_mean": lambda u: u * torch.normal(u, torch.ones_like(u)),
    "normal_of_spread": lambda u: u * torch.normal(0.0, u.exp()),
    "reparametrized": lambda u: torch.distributions.Normal(u, u.exp()).rsample() ** 2,
    "exponential": lambda u: u**2 * torch.empty_like(u).exponential_(),
    "uniform": lambda u: u**2 * torch.empty_like(u).uniform_(-1, 1),
    "poisson": lambda u: u**2 * torch.poisson(u.exp()),
    "permuted": lambda u: u[torch.randperm(4)] ** 2 * u,
    "beta": lambda u: u**2 * torch.distributions.Beta(2.0, 3.0).sample(),
    "integers": lambda u: u.roll(1, 0) * u * torch.randint(0, 3, (4, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_draw(name: str) -> None:
    check(lambda net, x: penalty(net, x, BODIES[name]), [net()], points())


def outside(net: nn.Module, x: Tensor) -> Tensor:
    """Draws of constants beside the derivative."""
    kept = torch.bernoulli(torch.full((3,), 0.4, dtype=D)).sum()
    return penalty(net, x, torch.sin) * kept + torch.normal(torch.zeros(3, dtype=D), 1.0).sum()


def value_and_second_derivative(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    u = net(p)
    v = u**2 * chosen(u)
    weight = torch.rand((), dtype=D)
    (g,) = grad(v.sum() * weight, p, create_graph=True)
    (h,) = grad(g.square().sum(), p, create_graph=True)
    return h.square().sum() + v.sum() * torch.rand((), dtype=D)


def under_grad(net: nn.Module, x: Tensor) -> Tensor:
    f = lambda z: (net(z) ** 2 * chosen(net(z))).sum()  # noqa: E731
    return torch.func.grad(f)(x).square().sum()


def under_jvp(net: nn.Module, x: Tensor) -> Tensor:
    f = lambda z: net(z) ** 2 * chosen(net(z))  # noqa: E731
    return torch.func.jvp(f, (x,), (x.sin(),))[1].square().sum()


def each_sample_its_own(net: nn.Module, x: Tensor) -> Tensor:
    f = lambda z: net(z + 0.1 * torch.randn_like(z)).sum()  # noqa: E731
    return torch.func.vmap(torch.func.grad(f), randomness="different")(x).square().sum()


def all_samples_one(net: nn.Module, x: Tensor) -> Tensor:
    f = lambda z: net(z + 0.1 * torch.randn_like(z)).sum()  # noqa: E731
    return torch.func.vmap(torch.func.grad(f), randomness="same")(x).square().sum()


def dropout_in_a_hessian(net: nn.Module, x: Tensor) -> Tensor:
    f = lambda z: F.dropout(net(z) ** 2, 0.5).sum()  # noqa: E731
    return torch.func.jacrev(torch.func.grad(f))(x).square().sum()


def drawn_twice(net: nn.Module, x: Tensor) -> Tensor:
    """Two equal draws in a row are two."""
    noise = torch.rand(4, 1, dtype=D) - torch.rand(4, 1, dtype=D)
    return penalty(net, x, lambda u: u**2 * noise)


def unused_draw(net: nn.Module, x: Tensor) -> Tensor:
    torch.rand(7)
    value = penalty(net, x, torch.sin)
    net(x) * chosen(net(x))
    return value + torch.rand((), dtype=D)


def penalty_of_each_half(net: nn.Module, x: Tensor) -> Tensor:
    first = penalty(net, x[:2], lambda u: F.dropout(u**2, 0.5))
    return first + torch.rand((), dtype=D) * penalty(net, x[2:], lambda u: F.dropout(u**2, 0.5))


@pytest.mark.parametrize(
    "loss",
    [
        outside,
        value_and_second_derivative,
        under_grad,
        under_jvp,
        each_sample_its_own,
        all_samples_one,
        dropout_in_a_hessian,
        drawn_twice,
        unused_draw,
        penalty_of_each_half,
    ],
    ids=lambda f: f.__name__,
)
def test_loss(loss: Loss) -> None:
    check(loss, [net()], points())


@pytest.mark.parametrize("strategy", ["as written", "reverse", "jvp_over_gradient"])
def test_every_form_draws_once(strategy: str) -> None:
    loss = lambda net, x: penalty(net, x, drawn_thrice)  # noqa: E731
    check(loss, [net()], points(), strategy=strategy)


@pytest.mark.parametrize("training", [True, False])
def test_layer_by_mode(training: bool) -> None:
    torch.manual_seed(0)
    layers = nn.Linear(3, 5), nn.RReLU(), nn.Dropout(0.3), nn.Linear(5, 2)
    module = nn.Sequential(*layers).double().train(training)
    check(lambda net, x: penalty(net, x, torch.square), [module], points())


def test_two_derivatives_in_turn_over_draws_that_depend_on_their_points() -> None:
    """The order of the draws cannot be kept when each derivative is one piece."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        body = lambda u: u**2 * chosen(u)  # noqa: E731
        return penalty(net, x, body) * torch.rand((), dtype=D) + penalty(net, x, body)

    expected = outcome(loss, [net()], (points(),), {})
    decorated = optimize_nested(loss, backend="eager")
    with pytest.warns(NestedGradientWarning, match="a random draw"):
        assert_same(outcome(decorated, [net()], (points(),), {}), expected)


class Held:
    """Generators that somebody holds."""

    def __init__(self) -> None:
        self.python = random.Random(3)
        self.numpy_new = numpy.random.default_rng(4)
        self.numpy_old = numpy.random.RandomState(5)
        self.torch = torch.Generator().manual_seed(6)

    def states(self) -> list[Any]:
        """Return the states of these and of everybody's generators."""
        return [
            random.getstate(),
            [str(part) for part in numpy.random.get_state()],
            torch.get_rng_state().tolist(),
            self.python.getstate(),
            self.numpy_new.bit_generator.state,
            [str(part) for part in self.numpy_old.get_state(legacy=True)],
            self.torch.get_state().tolist(),
        ]


def seed_all() -> None:
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)


HOST_DRAWS: dict[str, Callable[[Held], Any]] = {
    "numpy_array": lambda held: torch.from_numpy(numpy.random.randn(4, 1)),
    "numpy_matrix": lambda held: torch.as_tensor(numpy.random.normal(size=(4, 3))),
    "numpy_number": lambda held: numpy.random.rand(),
    "numpy_generator": lambda held: torch.from_numpy(held.numpy_new.random((4, 3))),
    "numpy_legacy": lambda held: torch.from_numpy(held.numpy_old.randn(4, 3)),
    "random": lambda held: random.random(),
    "uniform": lambda held: random.uniform(0.5, 1.5),
    "randint": lambda held: random.randint(1, 50),
    "choice": lambda held: random.choice([1.0, 2.0, 5.0]),
    "branch": lambda held: 1.0 if random.random() < 0.5 else 3.0,
    "held": lambda held: held.python.uniform(1, 2),
    "made_inside": lambda held: random.Random(7).random(),
    "torch_generator": lambda held: torch.rand(4, 3, generator=held.torch, dtype=D),
}
CAPTURED = {
    "numpy_array",
    "numpy_matrix",
    "numpy_number",
    "random",
    "uniform",
    "randint",
    "made_inside",
    "branch",
}


@pytest.mark.filterwarnings("ignore::rewriter.NestedGradientWarning")
@pytest.mark.parametrize("capture", ["dynamo", "trace"])
@pytest.mark.parametrize("name", HOST_DRAWS)
def test_draws_of_other_generators(name: str, capture: str) -> None:
    """Python's and NumPy's, and generators of one's own: their values, and where they end."""

    def loss(net: nn.Module, x: Tensor, held: Held) -> Tensor:
        return penalty(net, x * HOST_DRAWS[name](held), torch.sin)

    def three_calls(function: Callable[..., Tensor]) -> tuple[list[float], list[Any]]:
        module, x, held = net(), points(), Held()
        seed_all()
        values = [function(module, x, held).item() for _ in range(2)]
        random.seed(8)
        numpy.random.seed(8)
        return [*values, function(module, x, held).item()], held.states()

    expected, ends = three_calls(loss)
    decorated = optimize_nested(loss, backend="eager", capture=capture)
    values, own_ends = three_calls(decorated)
    assert values == pytest.approx(expected, rel=1e-9)
    assert own_ends == ends
    if capture == "dynamo":
        assert bool(decorated.steps) == (name in CAPTURED)


def test_a_look_at_a_loss_draws_nothing() -> None:
    @optimize_nested(backend="eager")
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return penalty(net, x * random.random(), torch.sin) * random.uniform(1, 2)

    random.seed(1)
    before = random.getstate()
    loss.explain(net(), points())
    assert random.getstate() == before
    loss(net(), points())
    after = random.getstate()
    random.seed(1)
    random.random(), random.uniform(1, 2)
    assert random.getstate() == after
