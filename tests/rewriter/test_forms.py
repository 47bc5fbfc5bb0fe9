"""Every way to write an inner derivative: captured as one graph, numbers as written."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import NestedGradientWarning, optimize_nested
from tests.cases import mlp
from tests.oracle import assert_same, check, outcome

FORMS: list[Callable[..., Tensor]] = []

# Some of these losses hold a derivative that is a constant, which is said in a warning.
CONSTANTS = pytest.mark.filterwarnings("ignore:.*enters the loss as a constant")


def form(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    FORMS.append(loss)
    return loss


# torch.autograd.grad


@form
def single(net: nn.Module, x: Tensor) -> Tensor:
    return grad(net(x).sum(), x, create_graph=True)[0].square().sum()


@form
def keyword_arguments(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(outputs=net(x).sum(), inputs=x, create_graph=True, retain_graph=True)
    return g[0].square().sum()


@form
def grad_outputs(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    (g,) = grad(
        u,
        x,
        grad_outputs=torch.linspace(0, 1, 5, dtype=x.dtype)[:, None].expand_as(u),
        create_graph=True,
    )
    return g.square().sum()


@form
def energies_and_forces(net: nn.Module, x: Tensor) -> Tensor:
    """The network's value is a row that has strides of its own once it is summed."""
    energies = net(x)[:, 0]
    (forces,) = grad(energies.sum(), x, create_graph=True)
    return forces.square().mean() + energies.square().mean()


@form
def differentiable_seed(net: nn.Module, x: Tensor) -> Tensor:
    """The seed's own gradient counts too."""
    u = net(x)
    (g,) = grad(u, x, x.square().sum(1, keepdim=True).expand_as(u), create_graph=True)
    return g.square().sum()


@form
def seed_is_the_output(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    return grad(u, x, u, create_graph=True)[0].square().sum()


@form
def several_outputs(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    v = u.sin()
    gs = grad([u, v], [x], [torch.ones_like(u), u.detach()], create_graph=True)
    return gs[0].square().sum() + v.sum()


@form
def several_outputs_one_seed_none(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    gs = grad([u.sum(), u], [x], [None, torch.ones_like(u)], create_graph=True)
    return gs[0].square().sum()


@form
def several_inputs(net: nn.Module, x: Tensor) -> Tensor:
    a, b = x[:, :1], x[:, 1:]
    ga, gb = grad(net(torch.cat([a, b], 1)).sum(), (a, b), create_graph=True)
    return (ga * gb).sum() + ga.sin().sum()


@form
def one_input_at_a_time(net: nn.Module, x: Tensor) -> Tensor:
    a, b = x[:, :1], x[:, 1:]
    u = net(torch.cat([a, b], 1)).sum()
    ga = grad(u, a, create_graph=True)[0]
    gb = grad(u, b, create_graph=True)[0]
    return (ga * gb).sum() + ga.sin().sum()


@form
def dictionary_of_inputs(net: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(net.named_parameters())
    gs = grad(net(x).sum(), list(parameters.values()), create_graph=True)
    named = dict(zip(parameters, gs, strict=True))
    return sum((g.square().sum() for g in named.values()), start=x.sum())


@form
def unused_is_none(net: nn.Module, x: Tensor) -> Tensor:
    other = torch.ones(3, dtype=x.dtype, requires_grad=False).requires_grad_()
    gx, go = grad(net(x).sum(), (x, other), create_graph=True, allow_unused=True)
    assert go is None
    return gx.square().sum()


@form
def unused_is_zeros(net: nn.Module, x: Tensor) -> Tensor:
    other = torch.ones(3, dtype=x.dtype).requires_grad_()
    gx, go = grad(net(x).sum(), (x, other), create_graph=True, materialize_grads=True)
    return gx.square().sum() + go.sum()


@form
def no_create_graph(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x)
    (g,) = grad(u.sum(), x, retain_graph=True)
    return (u.squeeze() * g.norm(dim=1)).sum()


@form
def batched_seeds(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x).squeeze()
    (j,) = grad(u, x, torch.eye(5, dtype=x.dtype), is_grads_batched=True, create_graph=True)
    return j.square().sum() + u.sum()


@form
def row_by_row(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x).squeeze()
    rows = [grad(u[i], x, create_graph=True)[0][i] for i in range(5)]
    return torch.stack(rows).square().sum()


@form
def two_fields(net: nn.Module, x: Tensor) -> Tensor:
    """Navier–Stokes style: two outputs of one network, each with its own gradient."""
    out = net(x)
    u, v = out.sin(), out.cos()
    gu = grad(u.sum(), x, create_graph=True)[0]
    gv = grad(v.sum(), x, create_graph=True)[0]
    return (u * gu[:, :1] + v * gv[:, 1:]).square().sum()


@form
def at_a_feature(net: nn.Module, x: Tensor) -> Tensor:
    """Derivatives at the input and at something between."""
    h = net[0](x)
    u = net[1:](h).sum()
    gx, gh = grad(u, x, create_graph=True)[0], grad(u, h, create_graph=True)[0]
    return gx.square().sum() + (gh * h).sum()


@form
def point_of_a_point(net: nn.Module, x: Tensor) -> Tensor:
    h = net[0](x)
    gx, gh = grad(net[1:](h).sum(), (x, h), create_graph=True)
    return gx.square().sum() + (gh * h).sum()


@form
def third_order(net: nn.Module, x: Tensor) -> Tensor:
    u = net(x).sum()
    for _ in range(3):
        u = grad(u, x, create_graph=True)[0][:, 0].sum()
    return u.square()


@form
def gradient_of_a_slice(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x).sum(), x, create_graph=True)[0]
    xx = grad(g[:, 0].sum(), x, create_graph=True)[0][:, 0]
    yy = grad(g[:, 1].sum(), x, create_graph=True)[0][:, 1]
    return (xx + yy).square().sum() + g.square().sum()


# leaves made inside


@form
def fresh_leaf(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().requires_grad_()
    return grad(net(p).sum(), p, create_graph=True)[0].square().sum() + net(x).sum()


@form
def fresh_leaf_as_a_statement(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().clone()
    before = p.sin().sum()
    p.requires_grad_(True)
    return grad(net(p).sum(), p, create_graph=True)[0].square().sum() * before


@form
def fresh_leaf_by_attribute(net: nn.Module, x: Tensor) -> Tensor:
    p = x.detach().clone()
    p.requires_grad = True
    return grad(net(p).sum(), p, create_graph=True)[0].square().sum() + p.sum()


@form
def constant_beside_a_leaf(net: nn.Module, x: Tensor) -> Tensor:
    """net(x) is a constant to the derivative at p, though it has the value of net(p)."""
    p = x.detach().requires_grad_()
    (g,) = grad((net(p) * net(x.detach())).sum(), p, create_graph=True)
    return g.square().sum()


@form
def interpolates(net: nn.Module, x: Tensor) -> Tensor:
    """The points of WGAN-GP, with noise drawn inside."""
    mix = torch.rand(5, 1, dtype=x.dtype)
    p = (mix * x.detach() + (1 - mix) * x.detach().flip(0)).requires_grad_()
    (g,) = grad(net(p), p, torch.ones(5, 1, dtype=x.dtype), create_graph=True)
    return ((g.norm(2, dim=1) - 1) ** 2).mean() + net(x).mean()


@form
def no_grad_inside(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = net(x) * 2
    g = grad(net(x).sum(), x, create_graph=True)[0]
    with torch.no_grad(), torch.enable_grad():
        h = net(x).sum()
    return (g.square().sum(1, keepdim=True) - target).square().sum() + h


@form
def transforms_under_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    """A transform differentiates under an outer `no_grad`; what it gives is a constant."""
    with torch.no_grad():
        g = torch.func.grad(lambda z: net(z).square().sum())(x)
        j = torch.func.jacrev(lambda z: net(z).sum(0))(x)
    return (g * j[0] * x).sum() + net(x).mean()


@form
def written_by_parts_under_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    """A write to a view reaches what it is a view of."""
    with torch.no_grad():
        mask = torch.zeros_like(x)
        mask[:, :1].fill_(1)
        shifted = mask.add_(1)
        shifted.mul_(2)
    g = grad(net(x).sum(), x, create_graph=True)[0]
    return (g * mask).square().sum()


@form
def at_a_feature_computed_again(net: nn.Module, x: Tensor) -> Tensor:
    """To the derivative at ``h`` the other value of the same expression is a constant."""
    h, again = net[0](x), net[0](x)
    gh = grad((net[1:](h) * net[1:](again)).sum(), h, create_graph=True)[0]
    return gh.square().sum()


@form
def unused_rows_are_one_zero(net: nn.Module, x: Tensor) -> Tensor:
    """`materialize_grads` makes one zero for a batch of seeds."""
    p, q = x.detach().requires_grad_(), x.detach().requires_grad_()
    u, seeds = net(p).sum(0), torch.ones(3, 1, dtype=x.dtype)
    a, b = grad(u, (p, q), seeds, is_grads_batched=True, create_graph=True, materialize_grads=True)
    return a.square().sum() + b.exp().sum()


@form
def zero_at_a_point(net: nn.Module, x: Tensor) -> Tensor:
    """Of symbolic size, where the batch is."""
    p = x.detach().requires_grad_()
    (g,) = grad(net(x).sum(), p, create_graph=True, materialize_grads=True)
    (k,) = grad(net(p).sum(), p, create_graph=True)
    return (g + torch.func.grad(lambda z: net(x).sum())(p)).exp().sum() + k.square().sum()


@form
def detached_factor(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x).sum(), x, create_graph=True)[0]
    return (g * g.detach()).sum() + (g.data * x).sum()


@form
def in_place_in_the_loss(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x).sum(), x, create_graph=True)[0]
    total = torch.zeros(5, dtype=x.dtype)
    total += g[:, 0]
    total[1:] *= g[1:, 1]
    return total.square().sum()


@form
def masked(net: nn.Module, x: Tensor) -> Tensor:
    inside = (x.detach().square().sum(1) < 1).to(x.dtype)
    g = grad((net(x).squeeze() * inside).sum(), x, create_graph=True)[0]
    return torch.where(g > 0, g, 2 * g).square().sum()


# torch.func


@form
def func_grad(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.grad(lambda z: net(z).sum())(x).square().sum()


@form
def func_grad_argnums(net: nn.Module, x: Tensor) -> Tensor:
    ga, gb = torch.func.grad(lambda a, b: net(a * b).sum(), argnums=(0, 1))(x, x.cos())
    return (ga * gb).sum()


@form
def func_grad_has_aux(net: nn.Module, x: Tensor) -> Tensor:
    def body(z: Tensor) -> tuple[Tensor, Tensor]:
        u = net(z)
        return u.sum(), u

    g, u = torch.func.grad(body, has_aux=True)(x)
    return g.square().sum() + u.square().sum()


@form
def func_grad_and_value(net: nn.Module, x: Tensor) -> Tensor:
    g, value = torch.func.grad_and_value(lambda z: net(z).square().sum())(x)
    return g.square().sum() * value


@form
def func_vjp(net: nn.Module, x: Tensor) -> Tensor:
    u, pull = torch.func.vjp(net, x)
    return pull(torch.ones_like(u))[0].square().sum() + u.sum()


@form
def func_vjp_twice(net: nn.Module, x: Tensor) -> Tensor:
    u, pull = torch.func.vjp(net, x)
    a, b = pull(torch.ones_like(u))[0], pull(u)[0]
    return (a * b).sum()


@form
def func_grad_of_grad(net: nn.Module, x: Tensor) -> Tensor:
    inner = torch.func.grad(lambda z: net(z).sum())
    return torch.func.grad(lambda z: inner(z).square().sum())(x).square().sum()


@form
def func_jacrev(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacrev(lambda z: net(z).squeeze())(x).square().sum()


@form
def vmap_grad(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda z: net(z).sum()))(x).square().sum()


@form
def vmap_grad_and_value(net: nn.Module, x: Tensor) -> Tensor:
    g, u = torch.func.vmap(torch.func.grad_and_value(lambda z: net(z).sum()))(x)
    return g.square().sum() + u.square().sum()


@form
def vmap_jacrev(net: nn.Module, x: Tensor) -> Tensor:
    wide = lambda z: torch.cat([net(z), net(z.sin())])  # noqa: E731
    return torch.func.vmap(torch.func.jacrev(wide))(x).square().sum()


@form
def vmap_over_a_parameter(net: nn.Module, x: Tensor) -> Tensor:
    """A gradient per sample at a point that all samples share."""
    shared = x.mean(0)
    per_sample = torch.func.grad(lambda w, z: net(w * z).sum())
    return torch.func.vmap(per_sample, in_dims=(None, 0))(shared, x).square().sum()


@form
def vmap_hessian_by_jacrev(net: nn.Module, x: Tensor) -> Tensor:
    scalar = lambda z: net(z).sum()  # noqa: E731
    hessian = torch.func.jacrev(torch.func.jacrev(scalar))
    return torch.func.vmap(hessian)(x).diagonal(dim1=1, dim2=2).sum(1).square().sum()


@form
def functional_call(net: nn.Module, x: Tensor) -> Tensor:
    parameters = dict(net.named_parameters())
    inner = torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,)).square().mean())
    step = {
        name: p - 0.1 * g
        for (name, p), g in zip(parameters.items(), inner(parameters).values(), strict=True)
    }
    return torch.func.functional_call(net, step, (x,)).square().mean()


@CONSTANTS
@pytest.mark.parametrize("loss", FORMS, ids=lambda f: f.__name__)
def test_form(loss: Callable[..., Tensor]) -> None:
    net = mlp(nn.Tanh, 2, 6, 2)
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    report = check(loss, [net], x).explain(net, x)
    assert report.sites, "no derivative was found"
    assert report.flops <= report.flops_as_written


@CONSTANTS
@pytest.mark.parametrize("loss", FORMS[::5], ids=lambda f: f.__name__)
def test_form_with_a_dynamic_batch(loss: Callable[..., Tensor]) -> None:
    if loss.__name__ in (
        "grad_outputs",
        "row_by_row",
        "batched_seeds",
        "unused_rows_are_one_zero",
        "in_place_in_the_loss",
        "interpolates",
    ):
        pytest.skip("the loss itself fixes the batch size")
    net = mlp(nn.Tanh, 2, 6, 2)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    check(loss, [net], x, dynamic=True)


def test_two_graphs_share_nothing_across_points() -> None:
    """Two inner derivatives at two points of equal value stay two."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p, q = x.detach().requires_grad_(), x.detach().requires_grad_()
        (gp,) = grad((net(p) * net(q)).sum(), p, create_graph=True)
        (gq,) = grad((net(p) * net(q).square()).sum(), q, create_graph=True)
        return (gp * gq).sum()

    check(loss, [mlp(nn.Tanh, 2, 6, 2)], torch.randn(5, 2, dtype=torch.float64))


# forward mode: what stock Dynamo breaks on, crashes in or gets wrong

FORWARD: list[Callable[..., Tensor]] = []


def forward(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    FORWARD.append(loss)
    return loss


def scalar(net: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda z: net(z).sum()


@forward
def func_jvp(net: nn.Module, x: Tensor) -> Tensor:
    u, moved = torch.func.jvp(net, (x,), (x.sin(),))
    return (u * moved).sum() + moved.square().sum()


@forward
def func_jvp_two_primals(net: nn.Module, x: Tensor) -> Tensor:
    moved = torch.func.jvp(lambda a, b: net(a * b), (x, x.cos()), (x.sin(), x))[1]
    return moved.square().sum()


@forward
def func_jvp_has_aux(net: nn.Module, x: Tensor) -> Tensor:
    _, moved, aux = torch.func.jvp(lambda a: (net(a), a.sum()), (x,), (x.sin(),), has_aux=True)
    return moved.square().sum() * aux


@forward
def func_jvp_of_jvp(net: nn.Module, x: Tensor) -> Tensor:
    inner = lambda z: torch.func.jvp(net, (z,), (x.cos(),))[1]  # noqa: E731
    return torch.func.jvp(inner, (x,), (x.sin(),))[1].square().sum()


@forward
def func_jvp_of_grad(net: nn.Module, x: Tensor) -> Tensor:
    """A Hessian-vector product, forward over reverse."""
    return torch.func.jvp(torch.func.grad(scalar(net)), (x,), (x.cos(),))[1].square().sum()


@forward
def func_grad_of_jvp(net: nn.Module, x: Tensor) -> Tensor:
    """A Hessian-vector product, reverse over forward."""
    along = lambda z: torch.func.jvp(scalar(net), (z,), (x.cos(),))[1]  # noqa: E731
    return torch.func.grad(along)(x).square().sum()


@forward
def func_jvp_of_a_constant(net: nn.Module, x: Tensor) -> Tensor:
    u, moved = torch.func.jvp(lambda z: (net(x), z * net(z)), (x,), (x.cos(),))[1]
    return u.exp().sum() + moved.square().sum()


@forward
def func_jacfwd(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacfwd(lambda z: net(z).squeeze())(x).square().sum()


@forward
def vmap_jacfwd(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacfwd(net))(x).square().sum()


@forward
def vmap_hessian(net: nn.Module, x: Tensor) -> Tensor:
    """Stock `torch.compile` ends the process on this."""
    return torch.func.vmap(torch.func.hessian(scalar(net)))(x).square().sum()


@forward
def hessian_trace(net: nn.Module, x: Tensor) -> Tensor:
    """Stock `torch.compile` gets this silently wrong."""
    traces = torch.func.vmap(lambda z: torch.func.hessian(scalar(net))(z).trace())(x)
    return traces.square().sum()


@forward
def jacrev_of_jacfwd(net: nn.Module, x: Tensor) -> Tensor:
    hessian = torch.func.jacrev(torch.func.jacfwd(scalar(net)))
    return torch.func.vmap(hessian)(x).square().sum()


@forward
def vmap_over_directions(net: nn.Module, x: Tensor) -> Tensor:
    directions = torch.stack([x.sin(), x.cos()])
    return torch.func.vmap(lambda v: torch.func.jvp(net, (x,), (v,))[1])(directions).square().sum()


@pytest.mark.parametrize("activation", [nn.SiLU, nn.Mish, nn.GELU])
def test_forward_mode_through(activation: Callable[[], nn.Module]) -> None:
    """Operators whose backward operator PyTorch does not differentiate."""
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    check(func_jvp, [mlp(activation, 2, 6, 2)], x)


@pytest.mark.parametrize("activation", [nn.CELU, nn.PReLU, nn.Softshrink])
def test_directions_in_a_batch(activation: Callable[[], nn.Module]) -> None:
    """Operators for which PyTorch's own rule is taken."""
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    check(func_jacfwd, [mlp(activation, 2, 6, 2)], x)


@pytest.mark.parametrize(
    ("loss", "dynamic"),
    [
        *(pytest.param(f, None, id=f.__name__) for f in FORWARD),
        *(pytest.param(f, True, id=f"{f.__name__}-True") for f in FORWARD[::3]),
    ],
)
def test_forward_mode(loss: Callable[..., Tensor], dynamic: bool | None) -> None:
    torch.manual_seed(0)
    net = mlp(nn.Tanh, 2, 6, 2)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    report = check(loss, [net], x, dynamic=dynamic).explain(net, x)
    assert report.sites, "no derivative was found"
    assert report.flops <= report.flops_as_written


class Scaled:
    """A function that is an object, and a method of it."""

    def __init__(self, net: nn.Module, scale: Tensor) -> None:
        self.net, self.scale = net, scale

    def __call__(self, z: Tensor) -> Tensor:
        return self.net(self.scale * z).squeeze()

    def energy(self, z: Tensor) -> Tensor:
        return self(z).square().sum()


def jacrev_of_a_partial(net: nn.Module, x: Tensor) -> Tensor:
    """Of a function whose first arguments are given, and that has no name."""
    parameters = dict(net.named_parameters())
    call = functools.partial(torch.func.functional_call, net)
    found: dict[str, Tensor] = torch.func.jacrev(call)(parameters, (x[0],))
    return sum((j.square().sum() for j in found.values()), torch.zeros((), dtype=x.dtype))


def transforms_of_an_object(net: nn.Module, x: Tensor) -> Tensor:
    scaled = Scaled(net, x[0])
    per_sample = torch.func.vmap(torch.func.grad(scaled.energy))(x)
    return per_sample.square().sum() + torch.func.jacrev(scaled)(x[1]).square().sum()


@pytest.mark.parametrize("loss", [jacrev_of_a_partial, transforms_of_an_object])
def test_transforms_of_what_is_no_plain_function(loss: Callable[..., Tensor]) -> None:
    check(loss, [mlp(nn.Tanh, 3, 6, 2)], torch.randn(3, 2, dtype=torch.float64))


# refused: what a stop would part


def write_to_a_detached_view(net: nn.Module, x: Tensor) -> Tensor:
    u = 2 * net(x)
    u.detach().mul_(3)
    return grad(u.sum(), x, create_graph=True)[0].square().sum() + u.sum()


def loop_over_numbers(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x).sum(), x, create_graph=True)[0]
    dims, total = torch.tensor([1, 0]), torch.zeros((), dtype=x.dtype)
    for dim in dims:
        total = total + grad(g[:, dim].sum(), x, create_graph=True)[0].square().sum()
    return total


def loop_over_a_list_of_numbers(net: nn.Module, x: Tensor) -> Tensor:
    g = grad(net(x).sum(), x, create_graph=True)[0]
    rows = [grad(g[:, d].sum(), x, create_graph=True)[0] for d in torch.tensor([1, 0]).tolist()]
    return torch.stack(rows).square().sum()


def steps_read_from_a_tensor(net: nn.Module, x: Tensor) -> Tensor:
    total = torch.zeros((), dtype=x.dtype)
    for _ in range(int((x.detach() > -99).all().long() + 1)):
        x = x - grad(net(x).sum(), x, create_graph=True)[0]
        total = total + x.square().sum()
    return total


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (loop_over_numbers, "read from a tensor; index with tensors of one dimension"),
        (loop_over_a_list_of_numbers, "read from a tensor; index with tensors of one dimension"),
    ],
    ids=lambda case: getattr(case, "__name__", ""),
)
def test_refused_and_right(loss: Callable[..., Tensor], reason: str) -> None:
    """Runs as written, and says why."""
    net = mlp(nn.Tanh, 2, 6, 2)
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    expected = outcome(loss, [net], (x,), {})
    with pytest.warns(NestedGradientWarning, match=reason):
        mine = outcome(optimize_nested(loss, backend="eager"), [net], (x,), {})
    assert_same(mine, expected)


@pytest.mark.parametrize("loss", [steps_read_from_a_tensor, write_to_a_detached_view])
def test_captured_and_right(loss: Callable[..., Tensor]) -> None:
    net = mlp(nn.Tanh, 2, 6, 2)
    torch.manual_seed(0)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    decorated = optimize_nested(loss, backend="eager")
    assert_same(outcome(decorated, [net], (x,), {}), outcome(loss, [net], (x,), {}))
    assert len(decorated.steps) == 1


def test_what_the_refusal_of_an_index_says_to_write() -> None:
    def sampled(net: nn.Module, x: Tensor) -> Tensor:
        g = grad(net(x).sum(), x, create_graph=True)[0]
        dims, total = torch.tensor([1, 0]), torch.zeros((), dtype=x.dtype)
        for k in range(len(dims)):
            rows = grad(g[:, dims[k : k + 1]].sum(), x, create_graph=True)[0]
            total = total + rows.square().sum()
        return total

    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    check(sampled, [mlp(nn.Tanh, 3, 6, 2)], x)


# torch.autograd.functional

FUNCTIONAL: list[Callable[..., Tensor]] = []
functional = torch.autograd.functional


def functional_form(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    FUNCTIONAL.append(loss)
    return loss


@functional_form
def functional_jacobian(net: nn.Module, x: Tensor) -> Tensor:
    return functional.jacobian(net, x, create_graph=True).square().sum()


@functional_form
def functional_jacobian_vectorized(net: nn.Module, x: Tensor) -> Tensor:
    both = lambda a, b: (net(a * b), a.sum() * b)  # noqa: E731
    blocks = functional.jacobian(both, (x, x.sin()), create_graph=True, vectorize=True)
    return sum(block.square().sum() for row in blocks for block in row)


@functional_form
def functional_jacobian_detached(net: nn.Module, x: Tensor) -> Tensor:
    return (functional.jacobian(net, x).square().sum((0, 1, 2, 3)) * net(x)).sum()


@functional_form
def functional_hessian(net: nn.Module, x: Tensor) -> Tensor:
    return functional.hessian(scalar(net), x, create_graph=True).square().sum()


@functional_form
def functional_hessian_of_two(net: nn.Module, x: Tensor) -> Tensor:
    both = lambda a, b: net(a * b).sum()  # noqa: E731
    blocks = functional.hessian(both, (x, x.sin()), create_graph=True)
    return sum(block.square().sum() for row in blocks for block in row)


@functional_form
def functional_vjp(net: nn.Module, x: Tensor) -> Tensor:
    u, pulled = functional.vjp(net, x, torch.ones_like(net(x)), create_graph=True)
    return pulled.square().sum() + u.sum()


@functional_form
def functional_jvp(net: nn.Module, x: Tensor) -> Tensor:
    u, moved = functional.jvp(net, x, x.cos(), create_graph=True)
    return moved.square().sum() + u.sum()


@functional_form
def functional_hvp(net: nn.Module, x: Tensor) -> Tensor:
    value, product = functional.hvp(scalar(net), x, x.cos(), create_graph=True)
    return product.square().sum() * value


@functional_form
def functional_vhp(net: nn.Module, x: Tensor) -> Tensor:
    value, product = functional.vhp(scalar(net), x, x.cos(), create_graph=True)
    return product.square().sum() * value


@functional_form
def functional_hessian_that_is_zero(net: nn.Module, x: Tensor) -> Tensor:
    linear = lambda z: (net(x) * z).sum()  # noqa: E731
    (g,) = grad(net(x).sum(), x, create_graph=True)
    return functional.hessian(linear, x, create_graph=True).exp().sum() + g.square().sum()


@functional_form
def functional_under_no_grad(net: nn.Module, x: Tensor) -> Tensor:
    """`create_graph` keeps the graph under `no_grad` too."""
    with torch.no_grad():
        kept = functional.vjp(net, x, net(x).cos(), create_graph=True)[1]
        constant = functional.jacobian(lambda z: net(z).sum(0), x)
    return (kept * constant[0]).square().sum()


@CONSTANTS
@pytest.mark.parametrize("loss", FUNCTIONAL, ids=lambda f: f.__name__)
def test_functional(loss: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    net = mlp(nn.Tanh, 2, 6, 2)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert check(loss, [net], x).explain(net, x).sites, "no derivative was found"
