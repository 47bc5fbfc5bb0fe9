"""Under a dispatch mode that watches, the rewritten graph runs through it; under one that traces,
the loss is as written."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rewriter import CaptureError, optimize_nested
from tests.oracle import relative_error


class Log(TorchDispatchMode):
    """Lists the operators that come through it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 16), nn.LeakyReLU(), nn.Linear(16, 16), nn.LeakyReLU(), nn.Linear(16, 1)
    return nn.Sequential(*layers).double()


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean()


def rows(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    u = net(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return g.norm(dim=1), u.mean()


def points() -> Tensor:
    return torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(8, 4)


def gradients(net: nn.Module) -> list[Tensor]:
    return [p.grad for p in net.parameters() if p.grad is not None]


def written(loss) -> tuple[Tensor, list[Tensor]]:
    net = network()
    value = loss(net, points())
    torch.stack(
        [u.sum() for u in (value if isinstance(value, tuple) else [value])]
    ).sum().backward()
    return value, gradients(net)


def assert_gradients(net: nn.Module, expected: list[Tensor]) -> None:
    found = gradients(net)
    assert len(found) == len(expected)
    assert all(relative_error(a, b) < 1e-9 for a, b in zip(found, expected, strict=True))


def test_flops_are_those_of_the_report() -> None:
    """A piecewise linear network's penalty: 4 forward passes in place of 6, counted the usual way;
    in a first call and in later ones."""
    net, x = network(), points()
    value, expected = written(penalty)
    loss = optimize_nested(penalty, backend="eager", strict=True)
    for _ in range(2):
        net.zero_grad()
        with FlopCounterMode(display=False) as counter:
            found = loss(net, x)
            found.backward()
        assert relative_error(found.detach(), value.detach()) < 1e-9
        assert_gradients(net, expected)
        report = loss.explain(net, x)
        assert counter.get_total_flops() == report.flops < report.flops_as_written
    assert len(loss.steps) == 1
    assert not (nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks)


@pytest.mark.parametrize("inside", [True, False])
def test_two_graphs(inside: bool) -> None:
    """Where the gradients are a graph of their own, it is seen where `backward` is called."""
    net, x = network(), points()
    _, expected = written(rows)
    loss = optimize_nested(rows, backend="eager", strict=True)
    with FlopCounterMode(display=False) as counter:
        norms, mean = loss(net, x)
        forward = counter.get_total_flops()
        if inside:
            (norms.sum() + mean).backward()
    if not inside:
        (norms.sum() + mean).backward()
    assert_gradients(net, expected)
    assert 0 < forward < loss.explain(net, x).flops
    assert counter.get_total_flops() == (loss.explain(net, x).flops if inside else forward)


def test_operators_are_logged() -> None:
    """They are those of the joint graph, and neither the capture's nor a comparison's."""
    net, x = network(), points()
    loss = optimize_nested(penalty, backend="eager", strict=True)
    with Log() as log:
        loss(net, x)
    joint = loss.stages(net, x)["joint"]
    names = [n.target.overloadpacket.__name__ for n in joint.graph.nodes if n.op == "call_function"]
    assert [name for name in log.calls if name in set(names)][: len(names)] == names
    assert "mm" in names


def test_explained_inside() -> None:
    net, x = network(), points()
    loss = optimize_nested(penalty, backend="eager")
    with FlopCounterMode(display=False) as counter:
        report = loss.explain(net, x)
        stages = loss.stages(net, x)
    assert report.captured and "joint" in stages and counter.get_total_flops() == 0


def test_value_alone() -> None:
    net, x = network(), points()
    loss = optimize_nested(penalty, backend="eager")
    with torch.no_grad(), Log() as log:
        value = loss(net, x)
    assert relative_error(value, written(penalty)[0].detach()) < 1e-9 and "mm" in log.calls


def test_a_module() -> None:
    """Towers run op by op, the backward pass too."""
    net, x = network(), points()
    expected = written(penalty)[1]
    decorated = optimize_nested(net, backend="eager", strategy="jvp_over_gradient")
    with Log() as log:
        penalty(decorated, x).backward()
    assert_gradients(net, expected)
    assert log.calls.count("mm") + log.calls.count("addmm") > 6


def test_modes_that_trace() -> None:
    loss = optimize_nested(penalty, backend="eager")
    net, x = network(), points()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert loss(net, torch.ones(8, 4, dtype=torch.float64)).shape == ()
        with pytest.raises(CaptureError, match="a dispatch mode that traces"):
            loss.stages(net, x)
    graph = make_fx(lambda x: loss(net, x))(x)
    assert relative_error(graph(x).detach(), penalty(net, x).detach()) < 1e-9
    assert not loss.steps


def test_modes_are_back_after_an_error() -> None:
    @optimize_nested(backend="eager")
    def fails(net: nn.Module, x: Tensor) -> Tensor:
        raise KeyError("mine")

    with Log() as log:
        with pytest.raises(KeyError, match="mine"):
            fails(network(), points())
        torch.ones(2) + 1
    assert log.calls[-1] == "add"


@pytest.mark.inductor
def test_compiled_code_gives_way() -> None:
    """Compiled code is not seen by a mode: the graph runs op by op under one."""
    net, x = network(), points()
    _, expected = written(penalty)
    loss = optimize_nested(penalty, strict=True)
    for watched in (True, False, True):
        net.zero_grad()
        with FlopCounterMode(display=False) as counter:
            if watched:
                loss(net, x).backward()
        if not watched:
            loss(net, x).backward()
        assert_gradients(net, expected)
        assert counter.get_total_flops() == (loss.explain(net, x).flops if watched else 0)
