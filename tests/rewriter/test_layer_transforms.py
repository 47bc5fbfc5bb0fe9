"""Towered modules under `torch.func` transforms and dual levels: compiled there too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as fwd
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from rewriter import CaptureError, NestedGradientWarning, optimize_nested
from tests.cases import make, mlp, with_written_norms
from tests.oracle import assert_same, outcome

D = torch.float64


def towered(net: nn.Module) -> nn.Module:
    """Return a tower whose module may not run as written, without a word."""
    return optimize_nested(copy.deepcopy(net), backend="eager", strict=True)


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype).reshape(x.shape)


def _contract(*tensors: Tensor) -> Tensor:
    return sum(((x * _weights(x)).sin().sum() for x in tensors), torch.zeros((), dtype=D))


def grad_form(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(grad(lambda z: net(z).sin().sum())(x))


def vjp_form(net: nn.Module, x: Tensor) -> Tensor:
    u, pullback = vjp(net, x)
    return _contract(u, *pullback(_weights(u)))


def jvp_form(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(*jvp(net, (x,), (x.cos(),)))


def jvp_of_grad(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(jvp(grad(lambda z: net(z).sin().sum()), (x,), (x.cos(),))[1])


def grad_of_jvp(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(grad(lambda z: jvp(net, (z,), (z.cos(),))[1].sin().sum())(x))


def dual_form(net: nn.Module, x: Tensor) -> Tensor:
    with fwd.dual_level():
        tangent = fwd.unpack_dual(net(fwd.make_dual(x, x.cos()))).tangent
    return _contract(tangent)


def jacrev_form(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(jacrev(lambda z: net(z).flatten()[:3])(x))


def jacfwd_form(net: nn.Module, x: Tensor) -> Tensor:
    return _contract(jacfwd(lambda s: net(x * s))(torch.ones(2, 1, dtype=D)[0]))


def parameters_form(net: nn.Module, x: Tensor) -> Tensor:
    def inner(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(net, parameters, (x,)).square().sum()

    parameters = dict(net.named_parameters())
    step = {
        n: p - 0.1 * g
        for (n, p), g in zip(parameters.items(), grad(inner)(parameters).values(), strict=True)
    }
    return _contract(functional_call(net, step, (x,)))


FORMS = [
    grad_form, vjp_form, jvp_form, jvp_of_grad, grad_of_jvp, dual_form, jacrev_form, jacfwd_form,
    parameters_form,
]  # fmt: skip
NAMES = [
    "Tanh", "LeakyReLU", "layer_norm", "batch_norm_eval", "conv_strided", "glu",
]  # fmt: skip
# What eager itself cannot do: its own forward-mode formulas are not differentiable, or write over
# what they have saved.
REFUSED_BY_EAGER = {
    ("glu", "jvp_form"), ("glu", "jvp_of_grad"), ("glu", "grad_of_jvp"), ("glu", "dual_form"),
    ("glu", "jacfwd_form"),
}  # fmt: skip


# Each form around two networks, and each network in three forms, in every run; Tanh in all.
@pytest.mark.parametrize(
    ("form", "network"),
    [
        pytest.param(form, name, marks=[] if (i + j) % 3 == 0 or not j else [pytest.mark.slow])
        for i, form in enumerate(FORMS)
        for j, name in enumerate(NAMES)
    ],
)
# PyTorch says so where it has no batching rule.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_forms(form: Callable[..., Tensor], network: str) -> None:
    net, x = make(network)
    mine = outcome(form, [towered(net)], (x,), {})
    reference = with_written_norms(copy.deepcopy(net))
    with sdpa_kernel(SDPBackend.MATH):
        if (network, form.__name__) in REFUSED_BY_EAGER:
            with pytest.raises(RuntimeError):
                outcome(form, [reference], (x,), {})
            assert all(g is None or g.isfinite().all() for g in mine.grads.values())
            return
        expected = outcome(form, [reference], (x,), {})
    absent = {name for name, g in mine.grads.items() if g is None}
    zero = {name for name, g in expected.grads.items() if g is not None and not g.any()}
    expected = replace(
        expected, grads={n: None if n in absent & zero else g for n, g in expected.grads.items()}
    )
    assert_same(mine, expected)


@pytest.mark.parametrize(
    ("name", "derivative", "passes"),
    [
        ("jvp", lambda net, x: jvp(net, (x,), (x.cos(),)), 2),
        ("grad", lambda net, x: grad(lambda z: net(z).sum())(x), 2),
        ("vmap(grad)", lambda net, x: vmap(grad(lambda z: net(z).sum()))(x), 2),
        ("jvp(grad)", lambda net, x: jvp(grad(lambda z: net(z).sum()), (x,), (x.cos(),)), 4),
        ("jacfwd", lambda net, x: vmap(jacfwd(net))(x), 1 + 8),
        ("hessian", lambda net, x: vmap(hessian(lambda z: net(z).sum()))(x), 2 + 2 * 8),
    ],
)
def test_passes(name: str, derivative: Callable[..., Any], passes: float) -> None:
    """A tangent costs a pass, a pullback another; primal and first pullback are shared by all
    directions."""
    net = towered(mlp(nn.Tanh, 4, 16, 8))
    x = torch.randn(4, 8, dtype=D)
    forward = 2 * 4 * sum(p.numel() for p in net.parameters() if p.dim() == 2)
    derivative(net, x)
    found = sum(level.flops for level in net.forward.explain().levels) / forward
    assert found <= passes + 1e-9, found


def test_batch_sizes() -> None:
    """Another size is one more trace, all later ones none; sizes 0 and 1 work."""
    net, _ = make("Tanh")
    fast = towered(net)

    def form(module: nn.Module, x: Tensor) -> Tensor:
        return vmap(jacrev(lambda z: module(z).sum()))(x)

    counts = []
    for size in (5, 7, 9, 4, 13, 1, 0, 5):
        x = torch.randn(size, 3, dtype=D)
        assert torch.allclose(form(fast, x), form(net, x), rtol=1e-12, atol=1e-14)
        counts.append(len(fast.forward.explain().levels))
    assert counts[1] == counts[2] == counts[4] and counts[-1] == counts[-2]


def test_state_inside_grad() -> None:
    """BatchNorm in train mode under `torch.func.grad`, which PyTorch refuses: as by autograd."""
    net, x = make("batch_norm_train")
    fast, slow = towered(net), with_written_norms(copy.deepcopy(net))
    mine = grad(lambda z: fast(z).sin().sum())(x)
    p = x.detach().requires_grad_()
    (reference,) = torch.autograd.grad(slow(p).sin().sum(), p)
    assert torch.allclose(mine, reference, rtol=1e-9, atol=1e-14)
    for u, v in zip(fast.buffers(), slow.buffers(), strict=True):
        assert torch.allclose(u, v, rtol=1e-12)


def test_refusals() -> None:
    """What PyTorch does otherwise inside of a transform runs as written, or is its own error."""
    net, x = make("batch_norm_train")
    with pytest.raises(CaptureError, match="updates its state, inside of a vmap"):
        vmap(towered(net))(x.reshape(2, 3, 3))
    net, x = make("dropout")
    with pytest.raises(CaptureError, match=r"draws, inside of a torch.func transform"):
        grad(lambda z: towered(net)(z).sum())(x)
    fast = optimize_nested(copy.deepcopy(net), backend="eager")
    torch.manual_seed(1)
    with pytest.warns(NestedGradientWarning, match=r"draws, inside of a torch.func transform"):
        mine = grad(lambda z: fast(z).sum())(x)
    torch.manual_seed(1)
    assert torch.equal(mine, grad(lambda z: net(z).sum())(x))


# PyTorch's own, for any module with parameters.
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")
def test_other_modes_around() -> None:
    """`torch.func.linearize` and make_fx trace what they are given: as written."""
    net, x = make("Tanh")
    fast = towered(net)
    u, push = linearize(fast, x.detach())
    assert torch.allclose(u, net(x)) and torch.allclose(push(x), jvp(net, (x,), (x,))[1])
    traced = make_fx(grad(lambda z: fast(z).sum()))(x.detach())
    assert torch.allclose(traced(x), grad(lambda z: net(z).sum())(x))


def test_module_keeps_its_tensors() -> None:
    """Also when the call fails."""
    net, x = make("Tanh")
    fast = towered(net)
    before = dict(fast.named_parameters())
    with pytest.raises(RuntimeError):
        grad(lambda p: functional_call(fast, p, (x[:, :2],)).sum())(before)
    with pytest.raises(RuntimeError):
        vmap(fast)(x[..., :2])
    assert all(p is before[name] for name, p in fast.named_parameters())
    assert torch.allclose(vmap(fast)(x), net(x))


def test_structures_and_integers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.out = nn.Embedding(4, 3), nn.Linear(3, 2)

        def forward(self, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:
            h = (batch["x"] * scale + self.embedding(batch["kind"])).tanh()
            return {"u": self.out(h), "top": h.argmax(-1), "n": batch["n"]}

    torch.manual_seed(0)
    net = Net().double()
    fast = towered(net)
    x, kind = torch.randn(5, 3, dtype=D), torch.arange(5) % 4

    def energies(module: nn.Module) -> Any:
        def energy(z: Tensor, k: Tensor) -> Any:
            out = module({"x": z, "kind": k, "n": 2}, scale=1.5)
            return out["u"].sin().sum(), out["top"]

        return vmap(grad(energy, has_aux=True))(x, kind)

    for mine, reference in zip(energies(fast), energies(net), strict=True):
        assert torch.allclose(mine, reference, rtol=1e-12)
    pushed = jvp(lambda z: fast({"x": z, "kind": kind, "n": 2})["u"], (x,), (x.cos(),))[1]
    wanted = jvp(lambda z: net({"x": z, "kind": kind, "n": 2})["u"], (x,), (x.cos(),))[1]
    assert torch.allclose(pushed, wanted, rtol=1e-12)


def test_ensemble() -> None:
    """A vmap over parameters, and its gradient in all of them."""
    net, x = make("Tanh")
    fast = towered(net)
    stacked = {n: torch.stack([p, 2 * p, p.sin()]).detach() for n, p in net.named_parameters()}

    def form(module: nn.Module) -> dict[str, Tensor]:
        def loss(many: dict[str, Tensor]) -> Tensor:
            def one(p: dict[str, Tensor]) -> Tensor:
                return grad(lambda z: functional_call(module, p, (z,)).sum())(x).square().sum()

            return vmap(one)(many).sum()

        return grad(loss)(stacked)

    mine, reference = form(fast), form(net)
    assert all(torch.allclose(mine[n], g, rtol=1e-9) for n, g in reference.items())


def _trace_of_hessian(net: nn.Module, x: Tensor) -> Tensor:
    return vmap(lambda z: torch.trace(hessian(lambda y: net(y).sum())(z)))(x).square().mean()


def _compiled_outside(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return (g.norm(dim=1) - 1).square().mean()


def _second_order_of_gradient(net: nn.Module, x: Tensor) -> Tensor:
    first = grad(lambda z: net(z).sin().sum())
    return _contract(grad(lambda z: first(z).square().sum())(x))


PAINS = {
    "gradient penalty": _compiled_outside,
    "jvp": jvp_form,
    "hessian": lambda net, x: _contract(hessian(lambda z: net(z).sum())(x[0])),
    "vmap(hessian)": lambda net, x: _contract(vmap(hessian(lambda z: net(z).sum()))(x)),
    "hessian with trace": _trace_of_hessian,
    "dual level": dual_form,
    "hessian(hessian)": lambda net, x: _contract(hessian(hessian(lambda z: net(z).sum()))(x[0])),
    "BatchNorm in eval mode, forward mode": jvp_form,
    "gradient of a gradient function": _second_order_of_gradient,
}


@pytest.mark.parametrize("name", PAINS)
def test_what_stock_compilation_refuses_or_gets_wrong(name: str) -> None:
    """FACTS of PyTorch 2.13: none of these compiles. BatchNorm in train mode is above."""
    net = mlp(nn.Tanh, 2, 4, 3)
    if "BatchNorm" in name:
        net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh()).double().eval()
    x = torch.randn(5, 3, dtype=D)
    mine = outcome(PAINS[name], [towered(net)], (x,), {})
    assert_same(mine, outcome(PAINS[name], [net], (x,), {}))


def test_ways_of_vmap() -> None:
    """Dimensions, chunks, dicts, a vmap in a vmap, parameters; several sizes on the way."""
    net, x = make("Tanh")
    fast = towered(net)
    x, two = x.detach(), torch.tensor(2.0, dtype=D)
    ways: list[Callable[[nn.Module], Any]] = [
        lambda m: vmap(lambda z, s: m(z) * s, (1, None), 1, chunk_size=2)(x.T.contiguous(), two),
        lambda m: vmap(lambda d: m(d["a"] + d["b"]))({"a": x, "b": 2 * x}),
        lambda m: vmap(vmap(grad(lambda z: m(z).sum())))(x.repeat(2, 1, 1)),
        lambda m: jacrev(jacfwd(m))(x[0]),
        lambda m: jacfwd(lambda p: functional_call(m, p, (x,)).sum(0))(dict(m.named_parameters())),
        lambda m: jacfwd(lambda p: functional_call(m, p, (x[:4],)))(dict(m.named_parameters())),
    ]
    for way in ways:
        for mine, reference in zip(
            pytree.tree_leaves(way(fast)), pytree.tree_leaves(way(net)), strict=True
        ):
            assert torch.allclose(mine, reference, rtol=1e-9, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.* runs as written. no_grad and a torch.func transform")
@pytest.mark.parametrize("form", [jvp_form, grad_form, dual_form, PAINS["vmap(hessian)"]])
def test_constants_stay_constants(form: Callable[..., Tensor]) -> None:
    """What is computed under `no_grad`, around the transform or inside, sends nothing back."""
    net = mlp(nn.Tanh, 3, 6, 3)
    x = torch.randn(4, 3, dtype=D, requires_grad=True)

    def around(net: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            weight = form(net, x)
        assert not weight.requires_grad
        return (net(x) * weight).sum()

    def inside(net: nn.Module, x: Tensor) -> Tensor:
        class Constant(nn.Module):
            def forward(self, z: Tensor) -> Tensor:
                with torch.no_grad():
                    u = net(z)
                return u * z.sum()

        return (net(x) * form(Constant(), x)).sum()

    for loss in (around, inside):
        fast = optimize_nested(copy.deepcopy(net), backend="eager")
        mine, expected = outcome(loss, [fast], (x,), {}), outcome(loss, [net], (x,), {})
        assert_same(mine, expected)
