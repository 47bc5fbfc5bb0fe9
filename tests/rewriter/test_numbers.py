"""Python numbers that change from call to call: types and values as eager has them."""

import math
import operator
import types

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from rewriter import optimize_nested

SETTINGS = types.SimpleNamespace(scale=1.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float64: 1e-12}


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def gradient(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return g


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    return gradient(net, x).square().mean()


def arithmetic(net, x, c):
    p = penalty(net, x)
    return c * p + (p + c) * 0.1 - p / (1 + c) + c / (p + 1) + (c * 2 - 1) * p**2, p - c, 2 - c - p


def powers(net, x, c):
    p = penalty(net, x)
    return p**c + c**p + torch.pow(p, c) + 2**c * p


def attribute(net, x, c):
    return SETTINGS.scale * penalty(net, x), SETTINGS.scale * gradient(net, x).detach()


def comparisons(net, x, c):
    p, g = penalty(net, x), gradient(net, x)
    tenth = (p * 0 + 0.1).detach()
    # As eager compares: 0.1 in the tensor's precision, not in the number's.
    return p, tenth == 0.1 * c, tenth < c, torch.where(p > c, c, p), ((g > 0.1 * c) * g).sum()


def bounds(net, x, c):
    return penalty(net, x).clamp(max=c) + gradient(net, x).clamp(-c, c).sum()


def made_of_numbers(net, x, c):
    p = penalty(net, x)
    made = torch.full((), c) + torch.full_like(p, c) + x.new_full((), c) + torch.tensor(c)
    return made * p, torch.tensor([c, 2.0]), torch.scalar_tensor(c)


def beside_integers(net, x, c):
    p = penalty(net, x)
    three, many, yes = torch.tensor(3), torch.arange(3), torch.tensor(True)
    return p * (three * c), many * c, three * c, yes * c, three / c


def read_from_a_tensor(net, x, c):
    return penalty(net, x) + net(x).sum() * (1 + 0 * x.detach().sum().item()) * x.sum().item()


def interpolated(net, x, c):
    return torch.lerp(net(x).mean(), penalty(net, x), c)


def in_place(net, x, c):
    p = penalty(net, x) * 1
    p *= c
    p += c
    weights = torch.ones(2, dtype=x.dtype)
    weights[0] = c
    return p + (gradient(net, x) * weights).square().mean()


def on_the_way(net, x, c):
    (g,) = torch.autograd.grad(c * net(x).sum(), x, create_graph=True)
    return g.square().mean() + c


def of_functions(net, x, c):
    scale = math.exp(-c) + math.sqrt(c) + math.sin(c) + math.log1p(c)
    return scale * penalty(net, x), scale * gradient(net, x).sum()


def rows(net, x, c):
    return c * gradient(net, x).square().mean(1)


def checkpointed(net, x, c):
    return checkpoint(lambda g: c * g.square().mean(), gradient(net, x), use_reentrant=False)


def per_sample(net, x, c):
    g = torch.vmap(torch.func.grad(lambda p: net(p).sum()))(x)
    return (c * torch.vmap(lambda row: c * row.square().sum())(g)).mean()


def steps(net, x, n):
    p = penalty(net, x)
    decayed = p * 0.9**n + p * (1 - n / 100) + n * p + math.exp(-n / 10) * p
    return decayed + p**n, torch.tensor(2) * n, torch.tensor(2) / n, torch.tensor(True) * n


def scaled(net, x, c):
    return c * penalty(net, x) + penalty(net, x) * c, penalty(net, x).detach() + c


def everything(loss, net: nn.Module, x: Tensor, number) -> list:
    """Return a loss's results and all gradients."""
    SETTINGS.scale = number
    net.zero_grad()
    x = x.clone().requires_grad_()
    found = pytree.tree_leaves(loss(net, x, number))
    ends = [u for u in found if isinstance(u, Tensor) and u.requires_grad]
    sum(u.sum() for u in ends).backward()
    return [*found, x.grad, *(p.grad for p in net.parameters())]


def assert_same(loss, numbers, dtype: torch.dtype) -> int:
    """Compare some calls with the loss as written; return how many specialisations they took."""
    net, x = network(dtype), torch.linspace(-1, 1, 6, dtype=dtype).reshape(3, 2)
    rewritten = optimize_nested(loss, backend="eager", strict=True)
    for number in numbers:
        ours, written = (everything(f, net, x, number) for f in (rewritten, loss))
        assert len(ours) == len(written)
        for a, b in zip(ours, written, strict=True):
            if isinstance(b, Tensor):
                tolerance = TOLERANCE[dtype]
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
            else:
                assert type(a) is type(b)
    return len(rewritten.steps)


PLAIN = [
    arithmetic, powers, attribute, comparisons, bounds, made_of_numbers, beside_integers,
    read_from_a_tensor, interpolated, in_place, on_the_way, of_functions, rows,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:the derivative at")
@pytest.mark.parametrize("loss", PLAIN, ids=lambda f: f.__name__)
def test_changing_float(loss) -> None:
    """The first value is burnt in, the second is an input, and so are those after it."""
    assert assert_same(loss, (1.0, 2.0, 0.7, 0.9), torch.float32) <= 2


@pytest.mark.parametrize("loss", [arithmetic, comparisons, in_place], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_half_precision(loss, dtype: torch.dtype) -> None:
    assert assert_same(loss, (1.0, 2.0, 0.7), dtype) == 2


@pytest.mark.parametrize("loss", [checkpointed, per_sample], ids=lambda f: f.__name__)
def test_inside_of_other_graphs(loss) -> None:
    assert assert_same(loss, (1.0, 2.0, 0.7), torch.float32) == 2


def test_changing_integer() -> None:
    assert assert_same(steps, (1, 2, 3, 5), torch.float32) == 2


@pytest.mark.parametrize(
    "numbers",
    [
        (True, False),
        (1 + 0j, 2 + 0j),
        tuple(map(np.float64, (1, 2, 0.7))),
        tuple(map(np.float32, (1, 2, 0.7))),
        tuple(map(np.int64, (1, 2, 3))),
    ],
    ids=lambda numbers: type(numbers[0]).__name__,
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_other_kinds_of_numbers(numbers, dtype: torch.dtype) -> None:
    """Booleans, complex numbers and NumPy's: no tensor's type yields to theirs."""

    def loss(net, x, c):
        found = scaled(net, x, c)
        return pytree.tree_map(lambda u: u.abs() if u.is_complex() else u, found)

    assert assert_same(loss, numbers, dtype) <= len(numbers)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int32, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(), (2,)], ids=str)
def test_result_type(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """A number yields to tensors as `torch.result_type` says."""
    operators = (operator.mul, operator.add, operator.truediv)
    other = torch.ones(shape, dtype=dtype)

    @optimize_nested(backend="eager", strict=True)
    def loss(net, x, c):
        return penalty(net, x), *(f(other, c) for f in operators), *(f(c, other) for f in operators)

    net, x = network(torch.float32), torch.ones(3, 2, requires_grad=True)
    for number in (1.0, 2.0, 3.0):
        _, *found = loss(net, x, number)
        assert {u.dtype for u in found} == {torch.result_type(other, number)}


def test_branch_on_a_number_that_is_computed() -> None:
    """The value decides: one graph for each."""

    def loss(net, x, c):
        return penalty(net, x) * (2 if math.exp(c) > 3 else 1) * int(c * 2), torch.as_tensor(c)

    assert assert_same(loss, (1.0, 2.0, 0.7), torch.float32) == 3
