"""Directions in parts: the same sums, the same work, less memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from passes import parts
from passes.graph import aten, needs, placeholders, results, value_of
from passes.kept import bytes_kept
from passes.kernels import is_product
from passes.origin import note
from passes.parts import in_parts
from passes.price import evaluated, price
from passes.tracing import fake_mode_of, trace
from rewriter import optimize_nested
from tests.oracle import assert_same, check, outcome

COUNT, POINTS, WIDTH = 10, 6, 16
SMALL = 2**8  # bytes


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BYTES", SMALL)


def inputs() -> list[Tensor]:
    torch.manual_seed(2)
    shapes = [(POINTS, WIDTH), (WIDTH, COUNT), (WIDTH, WIDTH), (COUNT,)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def second_order(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    """Two layers, as Taylor mode takes them: the columns of the first weight are the tangents."""
    tangents = first.T.unsqueeze(1).expand(COUNT, POINTS, WIDTH)
    total = (tangents * tangents * each.view(-1, 1, 1)).sum(0)
    tangents = (tangents * slope).reshape(-1, WIDTH) @ weight
    tangents = tangents.reshape(COUNT, POINTS, WIDTH)
    return (total @ weight * slope + (tangents.square() * each.view(-1, 1, 1)).sum(0),)


def batched(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    """Products of a batch; the sum keeps its dimension."""
    tangents = torch.bmm((first.T.unsqueeze(1) * slope), weight.expand(COUNT, WIDTH, WIDTH))
    return ((tangents.cos() * each.view(-1, 1, 1)).sum(0, keepdim=True) / 2,)


def along_columns(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    """Directions are columns; two kinds of sums of one product."""
    tangents = torch.tanh(weight @ first) * each
    found = torch.addmm(slope[:, 0].sum(), weight, tangents)
    return (found * found).sum(1), found.sum([0, 1])


def traced(function: Callable[..., Sequence[Tensor]], values: Sequence[Tensor]) -> GraphModule:
    mode = fake_mode_of([])
    fakes = [mode.from_tensor(x) for x in values]
    return trace(lambda *args: list(function(*args)), fakes, mode)


def twice(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    """Directions that begin with a sum over others."""
    (total,) = second_order(slope, first, weight, each)
    tangents = ((total[:, :COUNT].T.unsqueeze(1) * slope.T[:POINTS, :1]).sin() @ slope).cos()
    return (tangents.square().sum([0, 1]),)


def odd_sums(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    """Of a number, over no dimension (which is over all), over nothing at all."""
    products = first.T @ weight
    whole = torch.sum(products.sin() - products.sin().sum([], keepdim=True), [0])
    empty = (first[:, :0].T @ weight).sum(0)
    return whole + slope.sum().sum(0) + empty, torch.sum(products, []).sum(0)


def drawn(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    tangents = (first.T.unsqueeze(1) * slope) @ weight
    return ((torch.bernoulli(torch.sigmoid(tangents)) * tangents).sum(0),)


def test_draws_stay_in_one() -> None:
    module, values = traced(drawn, inputs()), inputs()
    in_parts(module)
    torch.manual_seed(0)
    (mine,) = module(*values)
    torch.manual_seed(0)
    torch.testing.assert_close(mine, drawn(*values)[0], rtol=1e-12, atol=1e-12)


def test_odd_sums() -> None:
    module, values = traced(odd_sums, inputs()), inputs()
    in_parts(module)
    for mine, reference in zip(module(*values), odd_sums(*values), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [second_order, batched, along_columns, twice])
def test_sums_in_parts(function: Callable[..., Sequence[Tensor]]) -> None:
    module, values = traced(function, inputs()), inputs()
    work, memory = price(module).flops, evaluated(bytes_kept(module), {})
    products = len(list(filter(is_product, module.graph.nodes)))
    assert in_parts(module)
    for mine, reference in zip(module(*values), function(*values), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)
    assert price(module).flops == work
    assert evaluated(bytes_kept(module), {}) < memory
    assert len(list(filter(is_product, module.graph.nodes))) > products


def test_parts_wait_for_one_another() -> None:
    """Whatever reads one part's slices comes after all sums of the part before."""
    module = traced(second_order, inputs())
    in_parts(module)
    barriers = module.graph.find_nodes(op="call_function", target=aten.logical_and.default)
    assert barriers
    for barrier in barriers:
        sums = {node for node in needs([barrier]) if node.target is aten.sum.dim_IntList}
        pieces = [user for user in barrier.users if user.target is aten.masked_fill.Scalar]
        assert len(sums) >= 2 and len(pieces) == 2  # of the weight and of the factors
    last = results(module.graph)[0]
    assert set(barriers) <= needs([last])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_no_number_stays_where_it_is(bad: float) -> None:
    module, values = traced(second_order, inputs()), inputs()
    in_parts(module)
    values[0][1, 2] = bad
    (mine,), (reference,) = module(*values), second_order(*values)
    torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12, equal_nan=True)


def escapes(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    tangents = torch.bmm(first.T.unsqueeze(1) * slope, weight.expand(COUNT, WIDTH, WIDTH))
    return tangents[1], (tangents * each.view(-1, 1, 1)).sum(0)


def looks_at_all(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    tangents = torch.softmax(torch.bmm(
        first.T.unsqueeze(1) * slope, weight.expand(COUNT, WIDTH, WIDTH)
    ), 0)  # fmt: skip
    return ((tangents * each.view(-1, 1, 1)).sum(0),)


def goes_round(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> tuple[Tensor, ...]:
    """A sum over the directions is read by all of them."""
    tangents = first.T @ weight
    return ((tangents * (tangents.sum(0) + each.sum())).square().sum(0),)


@pytest.mark.parametrize("function", [escapes, looks_at_all, goes_round])
def test_left_whole(function: Callable[..., Sequence[Tensor]]) -> None:
    module, values = traced(function, inputs()), inputs()
    in_parts(module)
    products = [node for node in module.graph.nodes if is_product(node)]
    assert len(products) == 1
    for mine, reference in zip(module(*values), function(*values), strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


def test_samples_are_left_whole() -> None:
    """What the loss's own code computes for each sample of a batch is the user's to part."""
    module = traced(second_order, inputs())
    for node in module.graph.nodes:
        note(node, role="primal")
    assert not in_parts(module)


def test_small_values_are_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "BYTES", 2**20)
    assert not in_parts(traced(second_order, inputs()))


def test_open_sizes_are_left_whole() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    fakes = [mode.from_tensor(inputs()[0])]
    mode.static_shapes = True
    fakes += map(mode.from_tensor, inputs()[1:])

    def function(slope: Tensor, first: Tensor, weight: Tensor, each: Tensor) -> list[Tensor]:
        tangents = first.T.unsqueeze(1) * slope @ weight
        return [(tangents * each.view(-1, 1, 1)).sum(0)]

    module = trace(function, fakes, mode)
    assert not isinstance(value_of(placeholders(module.graph)[0]).shape[0], int)
    assert not in_parts(module)


def laplacian(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    (g,) = torch.autograd.grad(u, x, torch.ones_like(u), create_graph=True)
    rows = [torch.autograd.grad(g[:, d].sum(), x, create_graph=True)[0] for d in range(COUNT)]
    return sum(rows[d][:, d] for d in range(COUNT)) / u[:, 0]


def local_energy(net: nn.Module, x: Tensor) -> Tensor:
    """As of a wave function: no gradient goes through it."""
    return laplacian(net, x).detach()


def test_value_of_a_loss() -> None:
    torch.manual_seed(5)
    net = nn.Sequential(
        nn.Linear(COUNT, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.SiLU(),
        nn.Linear(WIDTH, 1),
    ).double()  # fmt: skip
    x = torch.randn(POINTS, COUNT, dtype=torch.float64).requires_grad_()
    (step,) = check(local_energy, [net], x).steps
    graph = step.rewritten.value_graph()
    assert graph.graph.find_nodes(op="call_function", target=aten.masked_fill.Scalar)
    loss = optimize_nested(lambda net, x: laplacian(net, x).square().mean(), backend="eager")
    reference = outcome(loss.as_written, [net], (x,), {})
    assert_same(outcome(loss, [net], (x,), {}), reference)
    with torch.no_grad():
        torch.testing.assert_close(loss(net, x), reference.value, rtol=1e-9, atol=0)
