"""Modules as towers of compiled derivatives: what ordinary eager code may do with them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import functional, grad
from torch.func import functional_call, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from passes.price import price, size_hints
from passes.work import work_of
from rewriter import CheckFailed, NestedGradientWarning, disabled, optimize_nested
from rewriter.errors import OptionError
from rewriter.layer import OptimizedForward
from rewriter.tower import CompiledLevel
from tests.cases import LOSSES, NETWORKS, make, mlp, with_written_norms
from tests.oracle import assert_same, outcome, relative_error, step

D = torch.float64


def towered(net: nn.Module, **options: Any) -> nn.Module:
    return optimize_nested(copy.deepcopy(net), **({"backend": "eager"} | options))


def steps(net: nn.Module) -> list[Any]:
    assert isinstance(net.forward.__func__, OptimizedForward)
    return net.forward.steps


def same(loss: Callable[..., Tensor], net: nn.Module, *args: Any) -> nn.Module:
    """Compare a loss around a towered module with the same loss around the module, twice."""
    fast = towered(net)
    for _ in range(2):
        assert_same(step(loss, [fast], args, {}), step(loss, [net], args, {}))
    assert steps(fast), "nothing was captured"
    return fast


# Each network once in every run, the second order, which goes through every level, around half of
# them; the others are slow tests.
ORDERS = ("second_order", "penalty_and_data", "second_order", "parameter_gradient")
PAIRS = [
    pytest.param(loss, name, marks=[] if loss == ORDERS[i % 4] else [pytest.mark.slow])
    for i, name in enumerate(NETWORKS)
    for loss in dict.fromkeys(ORDERS)
]


@pytest.mark.parametrize(("loss", "network"), PAIRS)
def test_losses(loss: str, network: str) -> None:
    """PyTorch's own third derivatives of norm layers are wrong; the reference has them written
    out."""
    net, x = make(network)
    reference = with_written_norms(copy.deepcopy(net))
    expected = outcome(LOSSES[loss], [reference], (x,), {})
    fast = towered(net)
    with sdpa_kernel(SDPBackend.MATH):
        assert_same(outcome(LOSSES[loss], [fast], (x,), {}), expected)


def points(*shape: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(*shape, dtype=D, requires_grad=True)


def small() -> nn.Module:
    return mlp(nn.Tanh, 3, 6, 3)


def third(net: nn.Module, x: Tensor) -> Tensor:
    (g,) = grad(net(x).sum(), x, create_graph=True)
    (h,) = grad(g.square().sum(), x, create_graph=True)
    (k,) = grad(h.sin().sum(), x, create_graph=True)
    return k.square().sum() + h.sum()


def transforms(net: nn.Module, x: Tensor) -> Tensor:
    value = vmap(lambda z: torch.trace(hessian(lambda y: net(y).sum())(z)))(x).sum()
    value = value + jvp(net, (x,), (x.sin(),))[1].square().sum()
    value = value + vjp(net, x)[1](torch.ones(5, 1, dtype=D))[0].square().sum()
    value = value + jacrev(net)(x[0]).square().sum() + jacfwd(net)(x[1]).square().sum()
    return value + functional.hessian(lambda z: net(z).square().sum(), x[0], True).square().sum()


def functional_parameters(net: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(net.named_parameters())
    grads = grad(net(x).square().sum(), list(parameters.values()), create_graph=True)
    pairs = zip(parameters.items(), grads, strict=True)
    moved = {name: p - 0.1 * g for (name, p), g in pairs}
    return functional_call(net, moved, (x,)).square().sum()


def several_calls(net: nn.Module, x: Tensor) -> Tensor:
    u, v = net(x), net(x * 2)
    (g,) = grad((u * v).sum(), x, create_graph=True)
    return (g * net(x + 1)).square().sum()


def hooks_and_retained(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    u.register_hook(lambda c: 2 * c)
    (g,) = grad(u.sum(), x, create_graph=True, retain_graph=True)
    (h,) = grad(u.square().sum(), x, create_graph=True)
    return (g * h).sum()


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    u.mul_(2).add_(1)
    (g,) = grad(u.square().sum(), x, create_graph=True)
    return g.square().sum()


@pytest.mark.parametrize(
    "loss",
    [third, transforms, functional_parameters, several_calls, hooks_and_retained, in_place],
    ids=lambda f: f.__name__,
)
def test_eager_code_around(loss: Callable[..., Tensor]) -> None:
    same(loss, small(), points(5, 3))


class Dictionary(nn.Module):
    """Structures in and out, an integer input, an output that carries no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.net = mlp(nn.SiLU, 3, 6, 3)

    def forward(self, batch: dict[str, Tensor], *, scale: float = 1.0) -> dict[str, Any]:
        h = batch["x"] * scale + self.embedding(batch["kind"])
        energy = self.net(h)
        return {"energy": energy.sum(), "parts": (energy, h.argmax(1)), "n": len(batch)}


def test_structures() -> None:
    net = Dictionary().double()

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        out = net({"x": x, "kind": torch.arange(5) % 4}, scale=1.5)
        assert out["n"] == 2 and not out["parts"][1].requires_grad
        (force,) = grad(out["energy"], x, create_graph=True)
        return force.square().sum() + out["parts"][0].sin().sum()

    same(loss, net, points(5, 3))


def test_needs() -> None:
    """Only what is asked for is computed: frozen parameters and weights beside an input gradient
    cost nothing."""
    net = mlp(nn.Tanh, 3, 8, 8)
    fast = towered(net)
    x = points(4, 8)
    grad(fast(x).sum(), x)
    base = steps(fast)[0].base
    (pullback,) = base._derivatives.values()
    forward = price(base.level.primal()).at(size_hints(base.level.graph))[0]
    assert price(pullback.level.value()).at(size_hints(pullback.level.graph))[0] <= forward


@pytest.mark.parametrize(
    ("activation", "data", "passes"),
    [(nn.Tanh, False, 5.99), (nn.ReLU, False, 4.0), (nn.Tanh, True, 6.0), (nn.ReLU, True, 6.0)],
)
def test_passes_of_a_penalty(activation: Any, data: bool, passes: float) -> None:
    """Levels 0, 1 and 2 together cost what the one-graph form costs."""
    fast = towered(mlp(activation, 5, 64, 64))
    p = points(16, 64)
    u = fast(p)
    (g,) = grad(u.sum(), p, create_graph=True)
    ((g.norm(dim=1) - 1).square().mean() + (u.square().mean() if data else 0)).backward(
        inputs=list(fast.parameters())
    )
    base = steps(fast)[0].base
    total, stack = 0, [base]
    while stack:
        compiled = stack.pop()
        stack += compiled._derivatives.values()
        graph = compiled.level.primal() if compiled._primal else compiled.level.value()
        total += price(graph).at(size_hints(graph))[0]
    forward = price(base.level.value()).at(size_hints(base.level.graph))[0]
    assert total / forward <= passes + 1e-9


def test_nothing_is_built_twice() -> None:
    fast = towered(small())
    x = points(5, 3)
    for _ in range(4):
        third(fast, x).backward()
    counts = [len(steps(fast)), *_sizes(steps(fast)[0].base)]
    third(fast, x).backward()
    assert counts == [len(steps(fast)), *_sizes(steps(fast)[0].base)]


def _sizes(compiled: Any) -> list[int]:
    above = list(compiled._derivatives.values())
    return [len(above), *(size for level in above for size in _sizes(level))]


def test_it_is_the_users_module() -> None:
    net = small()
    fast = optimize_nested(net, backend="eager")
    assert fast is net and list(fast.state_dict()) == list(small().state_dict())
    fast.load_state_dict(small().state_dict())
    x = points(4, 3)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), fast(x))
        with torch.no_grad():
            next(twin.parameters()).add_(1)
        assert not torch.equal(twin(x), fast(x))
        assert steps(twin)
    with disabled():
        assert torch.equal(fast(x), type(fast).forward(fast, x))
    calls: list[int] = []
    fast.register_forward_hook(lambda *_: calls.append(1))
    fast(x)
    assert calls == [1]


def test_class_decorator() -> None:
    @optimize_nested(backend="eager")
    class Net(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.inner = nn.Linear(3, width)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).tanh().sum(1)

    net = Net(4).double()
    assert isinstance(net, Net)
    x = points(5, 3)
    (g,) = grad(net(x).sum(), x, create_graph=True)
    g.square().sum().backward()
    assert steps(net)


def test_modes() -> None:
    """Train and eval, gradients on and off, batch sizes, a tensor that requires grad or not."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.4), nn.Linear(4, 1))
    net = net.double()
    fast = towered(net)
    for size in (5, 7, 9, 1):
        x = points(size, 3)
        for training in (size > 1, False):
            for module in (net, fast):
                module.train(training)
            for given in (x, x.detach()):
                torch.manual_seed(3)
                reference = net(given)
                torch.manual_seed(3)
                assert torch.allclose(fast(given), reference, rtol=1e-12)
                with torch.no_grad():
                    torch.manual_seed(3)
                    reference = net(given)
                    torch.manual_seed(3)
                    mine = fast(given)
                assert not mine.requires_grad and torch.allclose(mine, reference, rtol=1e-12)
    for mine, reference in zip(fast.buffers(), net.buffers(), strict=True):
        assert torch.allclose(mine, reference, rtol=1e-12)
    x = points(4, 3)
    with torch.inference_mode():
        assert torch.allclose(fast(x), net(x), rtol=1e-12)


def test_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """``check=True`` compares two orders; a wrong derivative is an error that names the tensor."""
    x = points(5, 3)
    fast = optimize_nested(small(), backend="eager", check=True)
    fast(x)
    assert steps(fast)
    original = CompiledLevel.__call__

    def wrong(self: CompiledLevel, *inputs: Any) -> Any:
        return [u * 1.01 if u is not None else None for u in original(self, *inputs)]

    monkeypatch.setattr(CompiledLevel, "__call__", wrong)
    with pytest.raises(CheckFailed, match=r"check=True: .* differs"):
        optimize_nested(small(), backend="eager", check=True)(x)


class Picky(nn.Module):
    """Data-dependent Python around two networks, one of them picky itself."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.first = small()
        self.inner = Picky(depth - 1) if depth else None

    def forward(self, x: Tensor) -> Tensor:
        u = self.first(x)
        if self.inner is not None:
            u = u + self.inner(x * 2)
        return u * 2 if u.detach().mean().item() > 0 else u.sin()


def test_largest_submodules() -> None:
    """A module that cannot be captured runs as written, what it calls as towers; both are said."""
    net = Picky()
    fast = optimize_nested(copy.deepcopy(net), backend="eager")
    x = points(5, 3)
    said = r"Picky runs as written: a branch on the value of a tensor .*by layer: Sequential"
    with pytest.warns(NestedGradientWarning, match=said):
        assert_same(step(third, [fast], (x,), {}), step(third, [net], (x,), {}))
    report = fast.forward.explain()
    assert not report.levels and "a branch on the value" in report.reasons[0]
    assert sum("Sequential: captured" in line for line in report.layers) == 2
    assert sum("Picky: as written" in line for line in report.layers) == 1
    assert "forward" not in fast.first.__dict__


def test_explain() -> None:
    fast = towered(small())
    third(fast, points(5, 3)).backward()
    report = fast.forward.explain()
    assert [level.order for level in report.levels][:3] == [0, 1, 2]
    assert all(level.flops > 0 for level in report.levels[:3])
    assert "level 1, pullback" in str(report)


@pytest.mark.parametrize("size", [0, 1])
def test_sizes(size: int) -> None:
    """Empty batches and single points, first and after others."""
    net = small()

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        (g,) = grad(net(x).sum(), x, create_graph=True)
        return g.square().sum() + net(x).sum()

    fast = towered(net)
    for n in (size, 5, 7, size):
        x = points(n, 3)
        assert_same(step(loss, [fast], (x,), {}), step(loss, [net], (x,), {}))
    assert len(steps(fast)) <= 3


def test_memory_is_freed() -> None:
    """What a call keeps goes with its result, and what a level keeps with the backward pass."""
    fast = towered(mlp(nn.Tanh, 3, 64, 64), verify=False)
    alive: list[Any] = []
    original = CompiledLevel.primal

    def watched(self: CompiledLevel, inputs: Any, targets: Any) -> Any:
        out = original(self, inputs, targets)
        alive.extend(StorageWeakRef(x.untyped_storage()) for x in out if isinstance(x, Tensor))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledLevel, "primal", watched)
        x = points(8, 64)
        u = fast(x)
        (g,) = grad(u.sum(), x, create_graph=True)
        assert len(alive) > 4 and not any(ref.expired() for ref in alive)
        (g.square().sum() + u.sum()).backward()
        assert sum(not ref.expired() for ref in alive) == 2  # u and g
        del u, g
        assert all(ref.expired() for ref in alive)


def test_backward_twice() -> None:
    fast, net, x = towered(small()), small(), points(5, 3)
    for module in (fast, net):
        value = third(module, x)
        value.backward(retain_graph=True)
        value.backward()
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()
    for mine, reference in zip(fast.parameters(), net.parameters(), strict=True):
        assert relative_error(mine.grad, reference.grad) < 1e-9


def test_data_parallel(tmp_path: Any) -> None:
    """Wrapped by DistributedDataParallel: gradients arrive at its hooks."""
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        net, x = small(), points(5, 3)
        wrapped = nn.parallel.DistributedDataParallel(towered(net))
        loss = wrapped(x).square().sum()
        loss.backward()
        net(x).square().sum().backward()
        for mine, reference in zip(wrapped.parameters(), net.parameters(), strict=True):
            assert torch.allclose(mine.grad, reference.grad, rtol=1e-9)
        assert steps(wrapped.module)
    finally:
        dist.destroy_process_group()


class Potential(nn.Module):
    """A module that reads a number from a tensor, and adds to the dict it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(nn.SiLU, 3, 6, 3)
        self.calls = 0

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.calls += 1
        inputs["positions"].requires_grad_()
        count = int(inputs["index"][-1]) + 1
        energies = self.net(inputs["positions"])
        zeros = torch.zeros(count, 1, dtype=D)
        inputs["energy"] = zeros.index_add(0, inputs["index"], energies)
        return inputs


def test_what_a_refused_module_calls_is_captured() -> None:
    torch.manual_seed(0)
    net, x = Potential(), points(5, 3)
    fast = towered(net)

    def force(model: nn.Module, x: Tensor) -> Tensor:
        inputs = {"positions": x.detach().clone(), "index": torch.tensor([0, 0, 1, 1, 2])}
        energy = model(inputs)["energy"]
        (g,) = grad(energy.sum(), inputs["positions"], create_graph=True)
        return g.square().sum() + energy.square().sum()

    said = r"Potential runs as written: an integer .*; captured by layer: Sequential"
    with pytest.warns(NestedGradientWarning, match=said):
        assert_same(step(force, [fast], (x,), {}), step(force, [net], (x,), {}))
    calls = fast.calls
    force(fast, x)  # neither a warning nor another try
    assert fast.calls == calls + 1
    assert not steps(fast)


class Wave(nn.Module):
    """An activation of one's own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def test_little_work_runs_as_written() -> None:
    """A tower's calls cost Python; a small network does not pay for them, unless it is asked to."""
    x = points(5, 3)
    fast = optimize_nested(small())
    third(fast, x).backward()
    report = fast.forward.explain()
    assert not report.levels and "quicker as written" in report.reasons[0]
    assert not report.layers
    large = work_of(_level(small(), points(100_000, 3)))
    assert not large.is_too_little and large.operators == 2
    # One operator is never worth a level, however large.
    wave = work_of(_level(Wave(), points(100_000, 3)))
    assert wave.is_too_little and wave.is_one and str(wave).startswith("one operator")
    # What eager cannot differentiate twice is not left to it, however small.
    normed = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)).double()
    assert not work_of(_level(normed, x)).is_too_little


def _level(net: nn.Module, x: Tensor) -> Any:
    fast = towered(net)
    fast(x)
    return steps(fast)[0].base.level


def test_strategies_of_a_module() -> None:
    x = points(5, 3)
    assert steps(towered(small(), strategy="jvp_over_gradient")) == []
    plain = towered(small(), strategy="as written")
    assert "forward" not in plain.__dict__ and plain(x).shape == (5, 1)
    with pytest.raises(OptionError, match="strategy: a module takes one of 'auto'"):
        towered(small(), strategy="reverse")


def test_checkpoint() -> None:
    """The module inside of a checkpoint: what is traced for it is none of the checkpoint's."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        u = checkpoint(net, x, use_reentrant=False)
        (g,) = grad(u.sum(), x, create_graph=True)
        return g.square().sum() + u.sum()

    same(loss, small(), points(5, 3))


def test_hooks_that_come_later() -> None:
    """A hook on an inner module, registered after the capture and taken off again."""
    net, x = small(), points(5, 3)
    fast = towered(net)
    loss = optimize_nested(lambda net, x: net(x).square().sum(), backend="eager")
    for add in (False, True, False):
        handles = []
        for module in (net, fast):
            if add:
                handles.append(module[0].register_forward_hook(lambda m, i, o: o * 2))
        assert torch.allclose(fast(x), net(x), rtol=1e-12)
        assert torch.allclose(loss(net, x), net(x).square().sum(), rtol=1e-12)
        for handle in handles:
            handle.remove()


def test_autocast() -> None:
    net, x = small().float(), points(5, 3).float()

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            u = net(p)
        assert u.dtype is torch.bfloat16
        (g,) = grad(u.float().sum(), p, create_graph=True)
        return g.square().sum()

    fast = towered(net)
    mine, eager = (outcome(loss, [m], (x,), {}) for m in (fast, net))
    exact = outcome(
        lambda net, x: grad(net(x).sum(), x, create_graph=True)[0].square().sum(),
        [copy.deepcopy(net).double()], (points(5, 3),), {},
    )  # fmt: skip
    for name, g in mine.grads.items():
        if g is not None and exact.grads[name] is not None and name != "argument 0":
            own = (eager.grads[name] - exact.grads[name]).abs().max()
            assert (g - exact.grads[name]).abs().max() <= 2 * own + 1e-7


def test_what_carries_no_derivative() -> None:
    """A saved result that is a constant to autograd stays one at every order."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LogSigmoid(), nn.Linear(4, 1)).double()
    same(third, net, points(5, 3))
