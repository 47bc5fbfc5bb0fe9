"""Operators beyond layers inside the differentiated network: numbers as written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import grad

from rewriter import optimize_nested
from tests.cases import mlp
from tests.oracle import assert_same, check, outcome, relative_error
from tests.versions import derivative_of_trace, second_derivative_of_grid_sample

Body = Callable[[nn.Module, Tensor], Tensor]

_KINDS = torch.tensor([0, 1, 2, 0, 1, 2])
_TWICE = torch.tensor([1, 1, 0, 6]).expand(6, 4)
_SHIFT = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)

# m is Linear(3, 4), x has shape (6, 3).
BODIES: dict[str, Body] = {
    "einsum": lambda m, x: torch.einsum("bi,bj->bij", m(x).tanh(), x).sum(2),
    "norms": lambda m, x: m(x).norm(dim=1) + torch.norm(x, p=2) + torch.linalg.vector_norm(x, 3),
    "fft": lambda m, x: torch.fft.rfft(m(x)).abs().sum(1),
    "complex_phase": lambda m, x: (m(x) * torch.exp(1j * m(x))).abs(),
    "eigvalsh": lambda m, x: torch.linalg.eigvalsh(m(x).view(6, 2, 2) + m(x).view(6, 2, 2).mT),
    "matrix_exp": lambda m, x: torch.matrix_exp(m(x).view(6, 2, 2)),
    "distances": lambda m, x: (x[:, None] - x[None]).square().sum(-1).add(1e-3).sqrt().sum(1),
    "index_add": lambda m, x: torch.zeros(3, 4, dtype=x.dtype).index_add(0, _KINDS, m(x).tanh()),
    "gather": lambda m, x: m(x).tanh()[_KINDS].gather(1, _KINDS.view(6, 1)),
    "sort": lambda m, x: m(x).sort(dim=1)[0] ** 3,
    "topk": lambda m, x: m(x).topk(2, dim=1)[0] ** 3,
    "max_along": lambda m, x: m(x).max(dim=1)[0] ** 3,
    "amax": lambda m, x: m(x).amax(dim=1) ** 2 + m(x).amin() ** 2,
    "logcumsumexp": lambda m, x: m(x).logcumsumexp(1) + (40 * m(x)).logcumsumexp(0),
    "product_with_zeros": lambda m, x: (m(x) * (_SHIFT > -0.3)).cumprod(1),
    "determinant": lambda m, x: torch.linalg.det(m(x).view(6, 2, 2)),
    "slogdet": lambda m, x: torch.linalg.slogdet(m(x).view(6, 2, 2))[1],
    "solve": lambda m, x: torch.linalg.solve(m(x).view(6, 2, 2) + 3 * torch.eye(2), x[:, :2]),
    "take_one": lambda m, x: m(x).take(torch.tensor(-5)) * m(x).take(_KINDS).tanh(),
    "trace": lambda m, x: torch.trace(m(x).tanh()),
    "circular_pad": lambda m, x: F.pad(m(x), (1, 2), mode="circular").tanh(),
    "difference": lambda m, x: torch.diff(m(x), n=0).tanh() + m(x).diff(append=_SHIFT).sin()[:, :4],
    "polar": lambda m, x: torch.polar(m(x).exp(), m(x)).real,
    "boolean_mask": lambda m, x: m(x)[_SHIFT > 0].tanh() * m(x).masked_select(_SHIFT > 0),
    "cumulative": lambda m, x: m(x).cumsum(1).prod(1),
    "logsumexp": lambda m, x: m(x).logsumexp(1),
    "spread": lambda m, x: m(x).var(1) + m(x).std(1),
    "guarded_root": lambda m, x: torch.where(x > 0, x, torch.ones_like(x)).sqrt().sum(1),
    "angles": lambda m, x: torch.atan2(m(x)[:, :3], x) + torch.hypot(x, m(x)[:, :3]),
    "pad_unfold": lambda m, x: F.pad(m(x), (1, 1)).unfold(1, 2, 1).prod(-1),
    "bilinear": lambda m, x: F.interpolate(m(x).view(6, 1, 2, 2), (3, 4), mode="bilinear"),
    "cross_entropy": lambda m, x: F.cross_entropy(m(x), _KINDS),
    "bce": lambda m, x: F.binary_cross_entropy_with_logits(m(x), _SHIFT.sigmoid()),
    "huber": lambda m, x: F.huber_loss(m(x), _SHIFT) + F.smooth_l1_loss(m(x), _SHIFT),
    "mse_l1": lambda m, x: F.mse_loss(m(x), _SHIFT) + F.l1_loss(m(x), _SHIFT),
    "max_pool1d": lambda m, x: F.max_pool1d(m(x)[:, None], 2) ** 2,
    "max_pool3d": lambda m, x: F.max_pool3d(m(x).view(1, 1, 2, 3, 4), 2) ** 2,
    "dropout2d": lambda m, x: F.dropout2d(m(x).view(1, 6, 2, 2)) ** 2,
    "alpha_dropout": lambda m, x: F.alpha_dropout(m(x), 0.3, True) ** 2,
    "gumbel_hard": lambda m, x: F.gumbel_softmax(m(x), hard=True) ** 2,
    "noise": lambda m, x: (m(x) + 0.1 * torch.randn_like(m(x))).tanh(),
    "clamps": lambda m, x: m(x).clamp(-0.5, 0.5) ** 2 + m(x).clamp(min=0.1) * m(x).clamp(max=0.2),
    "extrema": lambda m, x: torch.maximum(m(x), _SHIFT) * torch.minimum(m(x), _SHIFT),
    "rolled": lambda m, x: m(x).roll(1, 1) * m(x).flip(0) + m(x).tril(),
    "powers": lambda m, x: (m(x).square() + 1).pow(1.5) + m(x) ** 3 + 2.0 ** m(x),
    "special": lambda m, x: torch.erf(m(x)) + torch.special.i0(m(x)) + torch.lgamma(x.exp()).sum(),
    "checkpointed": lambda m, x: torch.utils.checkpoint.checkpoint(
        lambda z: m(z).tanh(), x, use_reentrant=False
    ),
}  # fmt: skip


def squared_gradient(body: Body) -> Callable[[nn.Module, Tensor], Tensor]:
    def loss(net: nn.Module, x: Tensor) -> Tensor:
        p = x.detach().requires_grad_()
        u = body(net, p)
        (g,) = grad(u.square().sum(), p, create_graph=True)
        return g.square().sum() + u.mean()

    return loss


def linear() -> nn.Module:
    torch.manual_seed(2)
    return nn.Linear(3, 4).double()


def points() -> Tensor:
    torch.manual_seed(4)
    return torch.randn(6, 3, dtype=torch.float64)


LATER = {"trace": derivative_of_trace}


@pytest.mark.parametrize("name", [pytest.param(n, marks=LATER.get(n, ())) for n in BODIES])
def test_operator(name: str) -> None:
    check(squared_gradient(BODIES[name]), [linear()], points())


def sampled(image: Tensor, x: Tensor) -> Tensor:
    return F.grid_sample(image, x[:, :2].tanh().view(1, 6, 1, 2), align_corners=True)


@pytest.mark.parametrize(
    ("body", "named"),
    [
        pytest.param(
            lambda m, x: sampled(m(x).view(1, 1, 4, 6), x),
            "grid_sampler",
            marks=[second_derivative_of_grid_sample],
        ),
        # Their derivative is not a gradient everywhere: forward mode would give other numbers.
        (lambda m, x: F.max_unpool1d(m(x), _TWICE, 2), "max_unpool2d"),
        (lambda m, x: torch.cholesky_inverse(m(x).view(6, 2, 2)), "cholesky_inverse"),
        (lambda m, x: torch.linalg.pinv(m(x).view(6, 2, 2), hermitian=True), "linalg_pinv"),
        (lambda m, x: torch.as_strided_scatter(m(x), x, (6, 3), (4, 1)), "as_strided_scatter"),
    ],
    ids=["grid_sample", "max_unpool", "cholesky_inverse", "pinv", "as_strided_scatter"],
)
def test_no_rule_stays_as_written(body: Body, named: str) -> None:
    """The operator is named in the report; numbers are right by reverse mode."""
    loss = check(squared_gradient(body), [linear()], points())
    (site,) = loss.explain(linear(), points()).sites
    assert site.status == "as written"
    assert named in site.reason


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        lambda: torch.nn.utils.parametrizations.orthogonal(nn.Linear(3, 3)),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal"],
)
def test_parametrization(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    check(squared_gradient(lambda m, x: m(x).tanh()), [make().double()], points())


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_in_float32(layer: type[nn.RNNBase]) -> None:
    """There the LSTM is one operator of oneDNN; test_recurrent.py has float64."""
    torch.manual_seed(0)
    loss = squared_gradient(lambda m, x: m(x)[0])
    net, x = layer(3, 4, batch_first=True), torch.randn(2, 3, 3)
    reference = outcome(loss, [net], (x,), {})
    mine = outcome(optimize_nested(loss, backend="eager"), [net], (x,), {})
    assert_same(mine, reference, 1e-4)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)],
    ids=["float32", "bfloat16", "autocast"],
)
def test_narrow_types(dtype: torch.dtype, autocast: bool) -> None:
    """No further from float64 than twice eager's own error."""
    plain = squared_gradient(lambda m, x: m(x))

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return plain(net, x)

    net, x = mlp(nn.Tanh, 3, 8, 3), points()
    exact = outcome(plain, [net], (x,), {})
    eager = outcome(loss, [net.to(dtype)], (x.to(dtype),), {})
    mine = outcome(optimize_nested(loss, backend="eager"), [net], (x.to(dtype),), {})
    for name, reference in exact.grads.items():
        if reference is None:
            assert mine.grads[name] is None
            continue
        ours, theirs = mine.grads[name], eager.grads[name]
        assert ours.dtype == theirs.dtype
        scale = reference.abs().max() * torch.finfo(torch.bfloat16 if autocast else dtype).eps
        own = (theirs.double() - reference).abs().max()
        assert (ours.double() - reference).abs().max() <= 2 * own + 4 * scale


class Averaged(nn.Module):
    """Buffers written by plain Python: a counter and a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x).tanh()
        self.calls += 1
        self.average.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return h - self.average.sum()


def test_buffers_written_by_the_loss() -> None:
    torch.manual_seed(0)
    check(squared_gradient(lambda m, x: m(x) + m(x.sin())), [Averaged().double()], points())


def test_loop_and_print(capsys: pytest.CaptureFixture[str]) -> None:
    plain = squared_gradient(lambda m, x: m(x).tanh())

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        print("computing")
        return sum(plain(net, x[k : k + 2]) * 0.5**k for k in range(3))

    check(loss, [linear()], points())
    assert capsys.readouterr().out == "computing\n" * 3  # the reference runs once, ours twice


def test_inner_training_steps() -> None:
    """MAML: two inner steps of gradient descent."""

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        parameters = dict(net.named_parameters())
        for _ in range(2):
            inner = torch.func.functional_call(net, parameters, (x[:3],)).square().mean()
            grads = grad(inner, list(parameters.values()), create_graph=True)
            pairs = zip(parameters.items(), grads, strict=True)
            parameters = {name: p - 0.1 * g for (name, p), g in pairs}
        return torch.func.functional_call(net, parameters, (x[3:],)).sin().mean()

    check(loss, [mlp(nn.Tanh, 3, 6, 3)], points())


def test_scaled_loss_in_half_precision() -> None:
    """What a `GradScaler` multiplies the loss by reaches float16 before its gradients underflow."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(4096, 4)

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.float16, enabled=x.dtype is torch.float32):
            x = x.detach().requires_grad_()
            (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return 1e-4 * (g.norm(dim=1) - 1).square().mean()

    def gradient(loss: Any, net: nn.Module, x: Tensor, scale: float) -> Tensor:
        own = copy.deepcopy(net)
        (scale * loss(own, x)).backward()
        grads = [p.grad for p in own.parameters() if p.grad is not None]
        return torch.cat([g.double().flatten() / scale for g in grads])

    exact = gradient(loss, copy.deepcopy(net).double(), x.double(), 1.0)
    ours = optimize_nested(loss, backend="eager", strict=True)
    lost, eager, kept = (
        (gradient(form, net, x, scale) - exact).norm() / exact.norm()
        for form, scale in ((loss, 1.0), (loss, 2.0**16), (ours, 2.0**16))
    )
    assert lost > 0.5, "unscaled gradients do not underflow: the test shows nothing"
    assert kept < 2 * eager < 0.05


def test_autocast_around_the_call() -> None:
    """Autocast of the call is part of what is captured, and ends with it, as in eager."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1))
    x = torch.randn(32, 16)

    def step(loss: Any, net: nn.Module, x: Tensor) -> list[Tensor]:
        own = copy.deepcopy(net)
        value = loss(own, x)
        value.backward()
        return [value.detach(), *(p.grad for p in own.parameters() if p.grad is not None)]

    def cast(loss: Any) -> Any:
        def call(net: nn.Module, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return loss(net, x)

        return call

    loss = squared_gradient(lambda m, x: m(x))
    exact = step(loss, copy.deepcopy(net).double(), x.double())
    eager = step(cast(loss), net, x)
    for decorated in (optimize_nested(loss, backend="eager"), loss):
        fast = net if decorated is not loss else optimize_nested(net, backend="eager")
        for mine, theirs, reference in zip(
            step(cast(decorated), fast, x), eager, exact, strict=True
        ):
            assert mine.dtype == theirs.dtype
            assert (mine - reference).abs().max() <= 2 * (theirs - reference).abs().max() + 1e-6


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("shape", [(4, 4), (7, 3), (3, 7), (3, 3, 3)])
def test_fill_diagonal(shape: tuple[int, ...], wrap: bool) -> None:
    """Of distances, before they are divided by: as potentials have it."""

    def loss(x: Tensor) -> Tensor:
        y = (x * x).sin()
        y.fill_diagonal_(0.5, wrap)
        (g,) = grad((y * x.cos()).sum(), x, create_graph=True)
        return g.square().sum()

    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found = optimize_nested(loss, backend="eager", strict=True)(x)
    (mine,), (right,) = grad(found, x), grad(loss(x), x)
    assert relative_error(mine, right) < 1e-12
