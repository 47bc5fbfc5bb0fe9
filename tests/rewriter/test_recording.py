"""``capture="trace"``: losses with host code, recorded by running them."""

from __future__ import annotations

import copy
import enum
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from rewriter import CaptureError, NestedGradientWarning, OptimizedLoss, optimize_nested
from tests.cases import LOSSES
from tests.oracle import assert_same, check, flops_per_forward, outcome, relative_error

trace = functools.partial(optimize_nested, capture="trace", backend="eager", strict=True)
traced = functools.partial(check, capture="trace", strict=True)


def slope(net: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3, dtype=torch.float64)


# Host code whose outcome depends on no value: what Dynamo refuses, and what it need not.

SCALE = torch.tensor(0.7)
SIZES = torch.tensor([2, 3])
CACHE: dict[Any, Any] = {}


def numpy_on_sizes(net: nn.Module, x: Tensor) -> Tensor:
    weights = numpy.linspace(0.0, 1.0, int(numpy.prod(x.shape))).reshape(tuple(x.shape))
    return (slope(net, x) * torch.from_numpy(weights)).square().sum() / numpy.prod(x.shape)


def number_of_a_constant(net: nn.Module, x: Tensor) -> Tensor:
    return SCALE.item() * slope(net, x).square().sum() ** float(torch.tensor(2.0))


def sizes_in_a_tensor(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x)[:, : int(SIZES[0])].square().sum() * SIZES.numpy().sum()


def cache_that_is_cleared(net: nn.Module, x: Tensor) -> Tensor:
    def cached(name: str, make: Callable[[], Tensor]) -> Tensor:
        if name not in CACHE:
            CACHE[name] = make()
        return CACHE[name]

    g = cached("slope", lambda: slope(net, x))
    value = cached("slope", lambda: slope(net, x)).square().sum() + g.sum()
    CACHE.clear()
    return value


def class_built_inside(net: nn.Module, x: Tensor) -> Tensor:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))

        def forward(self, z: Tensor) -> Tensor:
            return net(z * self.weight)

    return slope(Field(), x).square().sum()


def indices_of_a_constant_mask(net: nn.Module, x: Tensor) -> Tensor:
    rows, columns = numpy.nonzero(torch.ones(3, 3).triu().numpy())
    pairs = torch.ones(3, 3).tril().nonzero()
    mask = torch.arange(15).reshape(5, 3) % 2 == 0
    g = slope(net, x)
    g[mask] = 0
    found = (g[:, rows] * g[:, columns]).sum() + g[:, pairs[:, 0]].square().mean()
    return found + g[~mask].sin().sum() + g[:, numpy.array([True, False, True])].sum()


@functools.lru_cache
def nodes(n: int) -> tuple[Tensor, Tensor]:
    points, weights = numpy.polynomial.legendre.leggauss(n)
    return torch.from_numpy(points), torch.tensor(weights)


def cached_quadrature(net: nn.Module, x: Tensor) -> Tensor:
    points, weights = nodes(4)
    shifted = [w * slope(net, x + p).square().sum() for p, w in zip(points, weights, strict=True)]
    return torch.stack(shifted).sum()


def copied_network(net: nn.Module, x: Tensor) -> Tensor:
    frozen = copy.deepcopy(net)
    return (slope(net, x) - slope(frozen, x + 1).detach()).square().sum()


def leaf_and_attribute(net: nn.Module, x: Tensor) -> Tensor:
    p = x.clone().detach()
    p.requires_grad = True
    (g,) = torch.autograd.grad(net(p).sum(), [p], create_graph=True)
    return (g.T @ g).trace() + p.shape[0] * g.norm()


def written_in_place(net: nn.Module, x: Tensor) -> Tensor:
    g = slope(net, x)
    out = torch.zeros_like(g)
    out[:, 0] = g[:, 1]
    out += g
    out[1:].mul_(2)
    return out.square().sum()


def under_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = net(x).abs().mean() + 1
    return (slope(net, x) / scale).square().sum() + net(x).mean()


HOST_CODE = [
    numpy_on_sizes,
    number_of_a_constant,
    sizes_in_a_tensor,
    cache_that_is_cleared,
    class_built_inside,
    indices_of_a_constant_mask,
    cached_quadrature,
    copied_network,
    leaf_and_attribute,
    written_in_place,
    under_no_grad,
]


@pytest.mark.parametrize("loss", HOST_CODE, ids=lambda loss: loss.__name__)
def test_host_code(loss: Callable[..., Tensor], net: nn.Module, x: Tensor) -> None:
    traced(loss, [net], x)


@pytest.mark.parametrize("name", LOSSES)
def test_same_price_as_through_dynamo(name: str, net: nn.Module, x: Tensor) -> None:
    recorded = traced(LOSSES[name], [net], x)
    captured = optimize_nested(LOSSES[name], backend="eager")
    assert recorded.explain(net, x).flops == captured.explain(net, x).flops
    assert recorded.explain(net, x).flops_as_written == captured.explain(net, x).flops_as_written


def test_price_of_a_penalty(x: Tensor) -> None:
    torch.manual_seed(0)
    widths = [64] * 6
    layers = [m for w in widths for m in (nn.Linear(64, w), nn.LeakyReLU())]
    net = nn.Sequential(*layers, nn.Linear(64, 1)).double()
    points = torch.randn(16, 64, dtype=torch.float64)

    def penalty(net: nn.Module, x: Tensor) -> Tensor:
        n = int(numpy.prod(x.shape[1:]))
        return ((slope(net, x).norm(dim=1) - 1) ** 2).mean() / n

    assert flops_per_forward(trace(penalty), net, points) < 4.0


# Forms.

FORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda net, x: torch.func.grad(lambda z: net(z).square().sum())(x).square().sum(),
    "vjp": lambda net, x: torch.func.vjp(net, x)[1](net(x))[0].square().sum(),
    "jvp": lambda net, x: torch.func.jvp(net, (x,), (x.cos(),))[1].square().sum(),
    "jacrev": lambda net, x: torch.func.jacrev(lambda z: net(z).sum(0))(x).square().sum(),
    "vmap": lambda net, x: (
        torch.vmap(torch.func.hessian(lambda z: net(z).squeeze()))(x).square().sum()
    ),
    "functional": lambda net, x: (
        torch.autograd.functional.jacobian(lambda z: net(z).sum(0), x, create_graph=True)
        .square()
        .sum()
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_form(name: str, net: nn.Module, x: Tensor) -> None:
    check(FORMS[name], [net], x, capture="trace")


@pytest.mark.parametrize("transform", [False, True])
def test_batch_norm_in_train_mode(transform: bool, x: Tensor) -> None:
    """Its statistics are updated once a call, and not by the recording."""
    layers = nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1)
    net = nn.Sequential(*layers).double()
    if not transform:
        traced(lambda net, x: slope(net, x).square().sum() / int(numpy.prod(x.shape)), [net], x)
        return
    loss = trace(lambda net, x: torch.func.grad(lambda z: net(z).sum())(x).square().sum())
    assert_same(
        outcome(loss, [net], (x,), {}),
        outcome(lambda net, x: slope(net, x).square().sum(), [net], (x,), {}),
    )


@pytest.mark.parametrize("layer", [nn.Dropout(0.4), nn.RReLU(), nn.AlphaDropout(0.2)], ids=repr)
def test_draws(layer: nn.Module, x: Tensor) -> None:
    """One mask per call, and the generator ends where eager leaves it."""
    net = nn.Sequential(nn.Linear(3, 16), layer, nn.Tanh(), nn.Linear(16, 1)).double()
    loss = traced(lambda net, x: (slope(net, x) * torch.randn_like(x)).square().sum(), [net], x)
    assert loss(net, x) != loss(net, x)


@dataclass
class Batch:
    points: Tensor
    weight: float


def test_structures(net: nn.Module, x: Tensor) -> None:
    """Dicts, dataclasses and keywords go in; dicts and tuples come out."""

    @trace
    def loss(net: nn.Module, batch: Batch, data: dict[str, Any], *, power: int = 2) -> Any:
        n = int(numpy.prod(batch.points.shape))
        g = slope(net, batch.points) * data["mask"][0]
        return {"loss": batch.weight * (g**power).sum() / n, "n": n}, (g.detach(), data["mask"][0])

    mask = torch.rand_like(x)
    for weight, power in ((0.5, 2), (0.5, 4), (2.0, 2), (0.5, 2)):
        given = Batch(x, weight), {"mask": [mask]}
        result, (g, same) = loss(net, *given, power=power)
        expected, (h, _) = loss.as_written(net, *given, power=power)
        assert relative_error(result["loss"], expected["loss"]) < 1e-9 and result["n"] == 15
        assert relative_error(g, h) < 1e-9 and same is mask
        mine = torch.autograd.grad(result["loss"], list(net.parameters())[:1])
        assert relative_error(*mine, *torch.autograd.grad(expected["loss"], net[0].weight)) < 1e-9
    assert len(loss.steps) == 3


class Trainer:
    def __init__(self, net: nn.Module) -> None:
        self.net, self.power, self.calls, self.shown = net, 2, 0, []

    @trace
    def residual(self, x: Tensor) -> Tensor:
        self.calls += 1
        return (slope(self.net, x) ** self.power).sum() / numpy.prod(x.shape)


def test_method(net: nn.Module, x: Tensor) -> None:
    trainer = Trainer(net)
    value, grads = trainer.residual.value_and_grad(x)
    assert "self.net.0.weight" in grads
    assert relative_error(value, trainer.residual.as_written(x)) < 1e-9
    trainer.shown.append(3.0)  # nothing that the loss mentions
    with torch.no_grad():
        assert torch.equal(trainer.residual(x), value.detach())
    assert len(Trainer.residual.steps) == 1
    trainer.power = 4
    assert relative_error(trainer.residual(x), trainer.residual.as_written(x)) < 1e-9
    assert len(Trainer.residual.steps) == 2


def test_closure_that_requires_grad(net: nn.Module, x: Tensor) -> None:
    factor = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    hidden = {"shift": torch.zeros(3, dtype=torch.float64, requires_grad=True)}

    @trace
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return factor * slope(net, x + hidden["shift"]).square().sum() / numpy.prod(x.shape)

    leaves = [factor, hidden["shift"]]
    loss(net, x).backward()
    mine = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    loss.as_written(net, x).backward()
    assert all(relative_error(m, leaf.grad) < 1e-9 for m, leaf in zip(mine, leaves, strict=True))


def test_history_and_hooks(net: nn.Module, x: Tensor) -> None:
    w = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    net[0].weight.register_hook(lambda g: 2 * g)
    seen: list[int] = []
    net[2].register_forward_hook(lambda *_: seen.append(1))
    loss = trace(lambda net, h: slope(net, h).square().sum() + net(h).sum() / len(h))
    assert_gradients(loss, net, lambda: (x @ w).tanh(), [w, net[0].weight])


def assert_gradients(
    loss: OptimizedLoss, net: nn.Module, make: Callable[[], Tensor], leaves: list[Tensor]
) -> None:
    found = []
    for function in (loss, loss.as_written):
        for leaf in leaves:
            leaf.grad = None
        function(net, make()).backward()
        found.append([leaf.grad for leaf in leaves])
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(*found, strict=True))


# What a recording holds for.


def test_second_kind_of_call(net: nn.Module, x: Tensor) -> None:
    loss = trace(numpy_on_sizes)

    def same() -> bool:
        return relative_error(loss(net, x), numpy_on_sizes(net, x)) < 1e-9

    assert same() and same() and len(loss.steps) == 1
    x = torch.randn(7, 3, dtype=torch.float64)
    assert same() and len(loss.steps) == 2
    net[0].weight.requires_grad_(False)
    assert same() and len(loss.steps) == 3
    net.eval()
    assert same() and len(loss.steps) == 4
    net[0] = nn.Linear(3, 8).double()
    net.append(nn.Softplus())
    assert same() and len(loss.steps) == 5
    x = x[::2]
    assert same() and len(loss.steps) == 6
    assert relative_error(loss(copy.deepcopy(net), x), numpy_on_sizes(net, x)) < 1e-9
    assert len(loss.steps) == 6


# Recordings for any size.


def mean_by_size(net: nn.Module, x: Tensor) -> Tensor:
    rows, columns = x.shape
    weights = torch.arange(rows * columns, dtype=x.dtype).view(x.shape)
    return (slope(net, x) * weights).square().sum() / (2 * len(x) + 1 if rows < 0 else rows**2)


def rows_of_an_edge_list(net: nn.Module, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    energy = net(x[source] - x[target]).sum() + x.new_zeros(x.size(0), 3).sum()
    (forces,) = torch.autograd.grad(energy, x, create_graph=True)
    return forces.square().mean() + source.numel() * SCALE.item()


def per_sample(net: nn.Module, x: Tensor) -> Tensor:
    def value(row: Tensor) -> Tensor:
        return net(row[None]).sum()

    g = torch.func.vmap(torch.func.grad(value))(x)
    return g.square().sum() / x.size(0) * float(torch.tensor(0.5))


def halves(net: nn.Module, x: Tensor) -> Tensor:
    first = x[: x.shape[0] // 2]
    return slope(net, first).square().sum() + slope(net, x[-(x.shape[0] // 2) :]).mean()


def edges(n: int, count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count) % n, (3 * torch.arange(count) + 1) % n


@pytest.mark.parametrize(
    ("loss", "dynamic"),
    [
        (mean_by_size, True),
        (per_sample, True),
        (halves, True),
        (rows_of_an_edge_list, True),
        (mean_by_size, None),
        (rows_of_an_edge_list, None),
    ],
)
def test_any_size(loss: Callable[..., Tensor], dynamic: bool | None, net: nn.Module) -> None:
    """One recording serves all sizes, with `dynamic=None` from the second one on."""
    decorated = trace(loss, dynamic=dynamic)
    for n, count in [(5, 12), (8, 20), (6, 31), (11, 9), (5, 12)]:
        x = torch.randn(n, 3, dtype=torch.float64)
        rest = edges(n, count) if loss is rows_of_an_edge_list else ()
        results = []
        for function in (loss, decorated):
            net.zero_grad()
            value = function(net, x, *rest)
            value.backward()
            results.append([value.detach(), *(p.grad for p in net.parameters())])
        # The bias of the last layer has no gradient.
        pairs = [pair for pair in zip(*results, strict=True) if pair[0] is not None]
        assert all(relative_error(b, a) < 1e-9 for a, b in pairs), n
    assert len(decorated.steps) == (1 if dynamic else 2)


def test_any_size_but_for_branches(net: nn.Module) -> None:
    """What the loss decides by a size is a guard."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        factor = 2.0 if x.shape[0] > 6 else 3.0
        return factor * slope(net, x).square().sum() * float(SCALE)

    decorated = trace(loss, dynamic=True)
    steps = []
    for n in (3, 5, 4, 7, 9, 2, 1, 0, 30):
        x = torch.randn(n, 3, dtype=torch.float64)
        assert relative_error(decorated(net, x), loss(net, x)) < 1e-9
        steps.append(len(decorated.steps))
    assert steps == [1, 1, 1, 2, 2, 2, 3, 4, 4]


def by_type(net: nn.Module, x: Tensor) -> Tensor:
    n = x.shape[0]
    return slope(net, x).square().sum() * (n if isinstance(n, int) else 2 * n)


def by_array(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * float(numpy.ones(len(x)).sum())


def by_key(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * {5: 1.0, 7: 2.0}[x.shape[0]]


def by_length(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * float(SCALE) / len(x)


def by_values(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * torch.ones(x.shape).numpy().size


@pytest.mark.parametrize("loss", [by_type, by_key, by_array, by_values, by_length])
def test_sizes_that_are_fixed(loss: Callable[..., Tensor], net: nn.Module) -> None:
    """A symbolic size is no number to all host code: such a recording holds for one size."""
    decorated = trace(loss, dynamic=True)
    said = r"one size of an argument only: .*test_recording.py:"
    with pytest.warns(NestedGradientWarning, match=said):
        decorated(net, torch.randn(5, 3, dtype=torch.float64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NestedGradientWarning)
        for n in (7, 5, 7):
            x = torch.randn(n, 3, dtype=torch.float64)
            assert relative_error(decorated(net, x), loss(net, x)) < 1e-9
    assert len(decorated.steps) == 2


def test_autocast(net: nn.Module, x: Tensor) -> None:
    """A recording leaves no cast of other values behind."""
    net, x = net.float(), x.float()
    loss = trace(lambda net, x: net(x).float().sum() / numpy.prod(x.shape))
    with torch.autocast("cpu"):
        expected = [loss.as_written(net, x) for _ in range(2)]
        found = [loss(net, x), loss.as_written(net, x), loss(net, x)]
    assert all(relative_error(value, expected[0]) < 1e-6 for value in [*found, expected[1]])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(loss(net, x), expected[0], rtol=1e-7, atol=0.0)
    assert len(loss.steps) == 2


def test_constants_are_compared(net: nn.Module, x: Tensor) -> None:
    """A value that host code has read is part of what the recording holds for."""
    scale, parts = torch.tensor(2.0), torch.tensor([1, 2])
    config = {"power": 2}

    @trace
    def loss(net: nn.Module, x: Tensor, n: Tensor) -> Tensor:
        g = slope(net, x)[:, : int(n)] ** config["power"]
        return g.sum() * scale.item() + parts.tolist()[0]

    def same(n: int) -> bool:
        n_ = torch.tensor(n)
        return relative_error(loss(net, x, n_), loss.as_written(net, x, n_)) < 1e-9

    assert same(2) and same(2) and len(loss.steps) == 1
    assert same(3) and len(loss.steps) == 2
    scale.fill_(5.0)
    assert same(3) and len(loss.steps) == 3
    parts[0] = 7
    assert same(3) and len(loss.steps) == 4
    config["power"] = 3
    assert same(3) and len(loss.steps) == 5


def test_tensors_are_read_anew(net: nn.Module, x: Tensor) -> None:
    """Tensors that are closed over, in a cache or replaced are inputs, not constants."""
    held = {"target": torch.randn(5, 3, dtype=torch.float64)}

    @trace
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        points, _ = nodes(5)
        return (slope(net, x) - held["target"] + points[0]).square().sum() / numpy.prod(x.shape)

    for change in (lambda: None, lambda: held["target"].mul_(2), lambda: nodes(5)[0].add_(1)):
        change()
        assert relative_error(loss(net, x), loss.as_written(net, x)) < 1e-9
    held["target"] = torch.randn(5, 3, dtype=torch.float64)
    assert relative_error(loss(net, x), loss.as_written(net, x)) < 1e-9
    assert len(loss.steps) == 1
    nodes.cache_clear()
    assert relative_error(loss(net, x), loss.as_written(net, x)) < 1e-9
    assert len(loss.steps) == 2


class Kind(enum.Enum):
    SQUARE = 2
    CUBE = 3


class Powers:
    def __init__(self) -> None:
        self.power_1, self.power_2, self.shown = 2, 3, 0


def test_numbers_are_found_wherever_they_are(net: nn.Module, x: Tensor) -> None:
    """Enumerations, attributes whose names are computed, modules behind a partial function."""
    powers, hidden = Powers(), functools.partial(lambda net, z: net(z), net)
    drop = nn.Dropout(0.5)
    module_of = {"drop": drop}.get  # no way leads from a method of C to its object

    @trace
    def loss(x: Tensor, kind: Kind, n: int, which: Powers) -> Tensor:
        g = slope(hidden, x) ** kind.value
        g = g if which is powers else -g
        return module_of("drop")(g).sum() * getattr(powers, f"power_{n}")

    def same(*given: Any) -> bool:
        torch.manual_seed(0)
        mine = loss(x, *given)
        torch.manual_seed(0)
        return relative_error(mine, loss.as_written(x, *given)) < 1e-9

    assert same(Kind.SQUARE, 1, powers) and len(loss.steps) == 1
    assert same(Kind.CUBE, 1, powers) and len(loss.steps) == 2
    assert same(Kind.CUBE, 2, powers) and len(loss.steps) == 3
    powers.power_2 = 5
    assert same(Kind.CUBE, 2, powers) and len(loss.steps) == 4
    other = copy.copy(powers)
    assert same(Kind.CUBE, 2, other) and len(loss.steps) == 5
    drop.eval()
    assert same(Kind.CUBE, 2, powers) and len(loss.steps) == 6


def test_more_kinds_than_allowed(net: nn.Module, x: Tensor) -> None:
    @trace
    def loss(net: nn.Module, x: Tensor, weight: float) -> Tensor:
        return weight * slope(net, x).sum()

    loss(net, x, 0.0)
    loss._compiled._made *= 64
    with pytest.raises(CaptureError, match="more than 64"):
        loss(net, x, 1.0)


# Refusals.


def branch(net: nn.Module, x: Tensor) -> Tensor:
    g = slope(net, x)
    if g.sum() > 0:
        return g.square().sum()
    return g.abs().sum()


def number_of_a_value(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * float(x.mean())


def numpy_on_values(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * x.detach().numpy().mean()


def number_of_a_draw(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * torch.rand(()).item()


def draw_of_numpy(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x).square().sum() * float(numpy.random.rand())


def array_of_numpy(net: nn.Module, x: Tensor) -> Tensor:
    return (slope(net, x) * torch.from_numpy(numpy.random.rand(3))).square().sum()


def indices_of_values(net: nn.Module, x: Tensor) -> Tensor:
    return slope(net, x)[(x > 0).nonzero()[:, 0]].square().sum()


def shared_memory(net: nn.Module, x: Tensor) -> Tensor:
    z = torch.zeros(3, dtype=torch.float64)
    z.numpy()[0] = 2.0
    return (slope(net, x) * z).square().sum()


def reseeded(net: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return (slope(net, x) * torch.randn_like(x)).square().sum()


def backward_inside(net: nn.Module, x: Tensor) -> Tensor:
    net(x).sum().backward()
    return slope(net, x).square().sum()


def hooked(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    u.register_hook(lambda g: 2 * g)
    return u.sum() + slope(net, x).sum()


def other_mode(net: nn.Module, x: Tensor) -> Tensor:
    net.train(not net.training)
    return slope(net, x).square().sum()


def caught(net: nn.Module, x: Tensor) -> Tensor:
    try:
        torch.linalg.cholesky(x[:3, :3])
    except RuntimeError:
        return slope(net, x).sum()
    return slope(net, x).square().sum()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g


def own_derivative(net: nn.Module, x: Tensor) -> Tensor:
    return slope(lambda z: Doubled.apply(net(z)), x).square().sum()


def counted(net: nn.Module, x: Tensor) -> Tensor:
    CACHE["calls"] = CACHE.get("calls", 0) + 1
    return slope(net, x).square().sum() * CACHE["calls"]


REFUSED = {
    branch: r"__bool__ reads the value of node gt .*if g.sum\(\) > 0",
    number_of_a_value: "reads the value of node mean.*which depends on x .*float",
    numpy_on_values: "numpy reads the value of node detach.*depends on x",
    number_of_a_draw: "item reads the value of node rand.*a random draw",
    draw_of_numpy: "draws from a random generator of Python or NumPy.*numpy.random.rand",
    array_of_numpy: "draws from a random generator of Python or NumPy.*numpy.random.rand",
    indices_of_values: "nonzero.*depends on x",
    shared_memory: "memory shared with NumPy",
    reseeded: "seeds a random generator|the recorded graph",
    backward_inside: r"backward\(\) inside the loss",
    hooked: "a hook on a tensor",
    other_mode: "leaves a module in another mode",
    caught: "cholesky",
    own_derivative: r"a user-defined autograd.Function \(Doubled\)",
    counted: "two graphs",
}


@pytest.mark.parametrize("loss", REFUSED, ids=lambda loss: loss.__name__)
def test_refused(loss: Callable[..., Tensor], net: nn.Module, x: Tensor) -> None:
    """Refused in words, and nothing is left changed."""
    CACHE.clear()
    mode = [m.training for m in net.modules()]
    kept = copy.deepcopy(net.state_dict())
    generators = torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    own, versions = x.clone(), [p._version for p in net.parameters()]
    with pytest.raises(CaptureError, match=f"(?s){REFUSED[loss]}") as refusal:
        trace(loss)(net, x)
    assert "test_recording.py" in refusal.value.where or loss in (
        shared_memory,
        reseeded,
        other_mode,
    )
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert numpy.random.get_state()[1].tolist() == generators[1]
    assert torch.equal(x, own) and not x.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert [p._version for p in net.parameters()] == versions
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in kept.items())
    assert [m.training for m in net.modules()] == mode


@pytest.mark.parametrize(
    "loss",
    [branch, number_of_a_draw, draw_of_numpy, reseeded, backward_inside, hooked, caught],
    ids=lambda loss: loss.__name__,
)
def test_refused_and_right(loss: Callable[..., Tensor], net: nn.Module, x: Tensor) -> None:
    """Without ``strict`` the loss runs as written."""
    decorated = optimize_nested(loss, capture="trace", backend="eager")
    numpy.random.seed(0)
    with pytest.warns(NestedGradientWarning):
        mine = outcome(decorated, [net], (x,), {})
    numpy.random.seed(0)
    assert_same(mine, outcome(loss, [net], (x,), {}))


def test_nothing_of_a_recording_stays(net: nn.Module, x: Tensor) -> None:
    """Not on the first call either: one update of the statistics, one draw."""
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.2), net).double()
    versions = [b._version for b in net.buffers()]
    loss = trace(lambda net, x: net(x.requires_grad_()).sum() + int(numpy.prod(x.shape)))
    loss.explain(net, x)
    assert [b._version for b in net.buffers()] == versions and not x.requires_grad
    assert float(net[0].num_batches_tracked) == 0


def test_check_sees_a_wrong_recording(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``check=True`` the recording is compared with a run on the caller's own values."""
    runs: list[int] = []

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        runs.append(1)
        return slope(net, x).square().sum() / numpy.prod(x.shape)

    trace(loss, check=True)(net, x)
    assert len(runs) == 3
    runs.clear()

    def unsteady(net: nn.Module, x: Tensor) -> Tensor:
        runs.append(1)
        return slope(net, x).square().sum() * (1 if len(runs) < 3 else 2)

    with pytest.raises(CaptureError, match="two graphs"):
        trace(unsteady, check=True)(net, x)


def test_option(net: nn.Module, x: Tensor) -> None:
    ways = "'auto', 'dynamo', 'trace', 'layers'"
    with pytest.raises(ValueError, match=f"capture: expected one of {ways}, got 'jax'"):
        optimize_nested(numpy_on_sizes, capture="jax")
    with pytest.raises(ValueError, match="capture: 'trace' records a loss"):
        optimize_nested(net, capture="trace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NestedGradientWarning)
        default = optimize_nested(class_built_inside, backend="eager")
        default(net, x)
    assert not default.steps, "Dynamo captures this now: the option has a use less"


def scripted(x: Tensor) -> Tensor:
    return x.sin()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_function_is_no_constant() -> None:
    """PyTorch gives no notice of what it calls, whatever it reads."""
    compiled = torch.jit.script(scripted)

    def loss(x: Tensor) -> Tensor:
        scale, p = compiled(x), x.detach().requires_grad_()
        (g,) = torch.autograd.grad(p.sin().sum(), p, create_graph=True)
        return (g.square() * scale).mean()

    decorated = optimize_nested(loss, backend="eager", capture="trace")
    for seed in range(3):
        x = torch.full((3,), float(seed + 1), dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NestedGradientWarning)
            found = decorated(x)
        torch.testing.assert_close(found, loss(x), rtol=1e-12, atol=0)
