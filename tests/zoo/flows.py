"""Continuous flows, equilibrium layers and mechanics, their solvers inside the loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tests.zoo.row import AS_WRITTEN, BY_LAYER, Batch, Loss


def divergence_bf(dx: Tensor, y: Tensor) -> Tensor:
    """Return the trace of a Jacobian, row by row."""
    sum_diag = 0.0
    for i in range(y.shape[1]):
        sum_diag += torch.autograd.grad(dx[:, i].sum(), y, create_graph=True)[0].contiguous()[:, i]
    return sum_diag.contiguous()


def divergence_approx(f: Tensor, y: Tensor, e: Tensor) -> Tensor:
    """Return Hutchinson's estimate of a trace."""
    e_dzdx = torch.autograd.grad(f, y, e, create_graph=True)[0]
    return (e_dzdx * e).view(y.shape[0], -1).sum(dim=1)


class _ODEnet(nn.Module):
    def __init__(self, dim: int = 2, width: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(dim + 1, width)
        self.last = nn.Linear(width, dim)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        tt = torch.ones_like(y[:, :1]) * t
        return self.last(torch.tanh(self.first(torch.cat([tt, y], 1))))


class _ODEfunc(nn.Module):
    """A field and its divergence, with the number of evaluations and its noise kept (FFJORD)."""

    def __init__(self, diffeq: nn.Module, exact: bool) -> None:
        super().__init__()
        self.diffeq, self.exact = diffeq, exact
        self._e: Any = None
        self.register_buffer("_num_evals", torch.tensor(0.0))

    def before_odeint(self) -> None:
        self._e = None
        self._num_evals.fill_(0)

    def forward(self, t: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        y = states[0]
        t = torch.ones(y.size(0), 1).to(y) * t.clone().detach().type_as(y)
        self._num_evals += 1
        if self._e is None:
            self._e = torch.randn_like(y)
        with torch.set_grad_enabled(True):
            y.requires_grad_(True)
            t.requires_grad_(True)
            dy = self.diffeq(t, y)
            divergence = (
                divergence_bf(dy, y) if self.exact else divergence_approx(dy, y, self._e)
            ).view(y.size(0), 1)
        return dy, -divergence


def _rk4(func: Any, y: Any, t: Tensor) -> Any:
    for t0, t1 in zip(t[:-1], t[1:]):
        h = t1 - t0
        k1 = func(t0, y)
        k2 = func(t0 + h / 2, tuple(a + h / 2 * k for a, k in zip(y, k1)))
        k3 = func(t0 + h / 2, tuple(a + h / 2 * k for a, k in zip(y, k2)))
        k4 = func(t1, tuple(a + h * k for a, k in zip(y, k3)))
        y = tuple(a + h / 6 * (p + 2 * q + 2 * r + s) for a, p, q, r, s in zip(y, k1, k2, k3, k4))
    return y


def _adaptive_heun(func: Any, y: Any, t0: float, t1: float, tol: float = 1e-2) -> Any:
    """Integrate with steps that host code accepts, grows or halves."""
    t, h = t0, (t1 - t0) / 3
    while t < t1 - 1e-9:
        h = min(h, t1 - t)
        k1 = func(torch.tensor(t), y)
        k2 = func(torch.tensor(t + h), tuple(a + h * k for a, k in zip(y, k1)))
        error = max(((k - l) * h / 2).abs().max().item() for k, l in zip(k1, k2))
        if error < tol or h < 1e-3:
            y = tuple(a + h / 2 * (k + l) for a, k, l in zip(y, k1, k2))
            t += h
            h *= 1.5
        else:
            h /= 2
    return y


def _standard_normal_logprob(z: Tensor) -> Tensor:
    return (-0.5 * math.log(2 * math.pi) - z.pow(2) / 2).sum(1, keepdim=True)


def flow_fixed_steps() -> tuple[Any, Batch]:
    """A continuous flow by Runge–Kutta steps, Hutchinson's trace, its noise kept (FFJORD)."""
    func = _ODEfunc(_ODEnet(), exact=False)

    def loss(x: Tensor) -> Tensor:
        func.before_odeint()
        zero = torch.zeros(x.shape[0], 1).to(x)
        z, delta = _rk4(func, (x, zero), torch.linspace(0.0, 1.0, 3))
        return -torch.mean(_standard_normal_logprob(z) - delta)

    return loss, lambda: (torch.randn(8, 2),)


def flow_adaptive_steps() -> tuple[Any, Batch]:
    """A continuous flow whose solver accepts and rejects steps by an error that it reads."""
    func = _ODEfunc(_ODEnet(), exact=True)

    def loss(x: Tensor) -> Tensor:
        func.before_odeint()
        zero = torch.zeros(x.shape[0], 1).to(x)
        z, delta = _adaptive_heun(func, (x, zero), 0.0, 1.0)
        return -torch.mean(_standard_normal_logprob(z) - delta)

    return loss, lambda: (torch.randn(8, 2),)


class _Adjoint(torch.autograd.Function):
    """Euler steps whose backward pass integrates the adjoint backwards, once differentiable."""

    @staticmethod
    def forward(ctx: Any, func: Any, steps: int, y0: Tensor, *params: Tensor) -> Tensor:
        ctx.func, ctx.steps = func, steps
        with torch.no_grad():
            y = y0
            for i in range(steps):
                y = y + func(torch.tensor(i / steps), y) / steps
        ctx.save_for_backward(y, *params)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, adj_y: Tensor) -> Any:
        y, *params = ctx.saved_tensors
        func, steps = ctx.func, ctx.steps
        adj_params = [torch.zeros_like(p) for p in params]
        with torch.no_grad():
            for i in reversed(range(steps)):
                with torch.enable_grad():
                    y = y.detach().requires_grad_(True)
                    f = func(torch.tensor(i / steps), y)
                    vjp = torch.autograd.grad(f, (y, *params), adj_y, allow_unused=True)
                y = y - f / steps
                adj_y = adj_y + vjp[0] / steps
                adj_params = [
                    a if g is None else a + g / steps for a, g in zip(adj_params, vjp[1:])
                ]
        return (None, None, adj_y, *adj_params)


def adjoint_method() -> tuple[Any, Batch]:
    """An adjoint written as an autograd.Function beside a penalty on the field's Jacobian."""
    func = _ODEnet()

    def loss(x: Tensor) -> Tensor:
        z = _Adjoint.apply(func, 4, x, *tuple(func.parameters()))
        y = x.detach().requires_grad_(True)
        jac = divergence_bf(func(torch.tensor(0.5), y), y)
        return _standard_normal_logprob(z).mean().neg() + jac.pow(2).mean()

    return loss, lambda: (torch.randn(8, 2),)


def regularised_flow() -> tuple[Any, Batch]:
    """A flow with kinetic energy and Frobenius norms integrated along (RNODE)."""
    net = _ODEnet()

    def field(t: Tensor, states: Any, e: Tensor) -> Any:
        y = states[0]
        with torch.enable_grad():
            y.requires_grad_(True)
            dy = net(t, y)
            e_dzdx = torch.autograd.grad(dy, y, e, create_graph=True)[0]
        div = (e_dzdx * e).sum(1, keepdim=True)
        frobenius = e_dzdx.view(y.shape[0], -1).pow(2).mean(1, keepdim=True)
        return dy, -div, dy.pow(2).mean(1, keepdim=True), frobenius

    def loss(x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        e = torch.randn_like(x)
        states = (x, *(torch.zeros(x.shape[0], 1) for _ in range(3)))
        z, delta, *regs = _rk4(lambda t, s: field(t, s, e), states, torch.linspace(0, 1, 3))
        nll = -(_standard_normal_logprob(z) - delta).mean()
        reg_states = tuple(torch.mean(r) for r in regs)
        total = nll + sum(r * c for r, c in zip(reg_states, [0.01, 0.01]) if c != 0)
        return total, tuple(r.detach() for r in reg_states)

    return loss, lambda: (torch.randn(6, 2),)


def residual_flow() -> tuple[Any, Batch]:
    """The power series of a log-determinant, its length drawn by NumPy (residual flows)."""
    g = nn.Sequential(nn.Linear(2, 8), nn.ELU(), nn.Linear(8, 2))

    def geometric_1mcdf(p: float, k: int, offset: int) -> float:
        return 1.0 if k <= offset else (1 - p) ** max(k - offset - 1, 0)

    def logdetgrad(x: Tensor) -> Tensor:
        n_samples = np.random.geometric(0.5, 1)
        n_power_series = min(int(max(n_samples)) + 1, 4)
        vareps = torch.randn_like(x)
        with torch.enable_grad():
            x = x.requires_grad_(True)
            y = 0.5 * g(x)
            vjp = vareps
            logdet = torch.tensor(0.0).to(x)
            for k in range(1, n_power_series + 1):
                vjp = torch.autograd.grad(y, x, vjp, create_graph=True, retain_graph=True)[0]
                tr = torch.sum(vjp.view(x.shape[0], -1) * vareps.view(x.shape[0], -1), 1)
                coeff = (-1) ** (k + 1) / k / geometric_1mcdf(0.5, k, 1)
                logdet = logdet + coeff * tr
        return y, logdet.view(-1, 1)

    def loss(x: Tensor) -> Tensor:
        y, logdet = logdetgrad(x)
        return -(_standard_normal_logprob(x + y) + logdet).mean()

    return loss, lambda: (torch.randn(8, 2),)


class _DEQ(nn.Module):
    """An equilibrium layer: a fixed point without gradients, one step with, its Jacobian's norm."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.U, self.W = nn.Linear(3, width), nn.Linear(width, width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1)
        with torch.no_grad():
            self.W.weight.mul_(0.3)

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.W(self.norm(z)) + self.U(x))


def equilibrium() -> tuple[Any, Batch]:
    """A fixed point by iteration with a stopping rule, and a Jacobian regulariser (DEQ)."""
    deq = _DEQ()
    info: dict[str, Any] = {}

    def jac_loss_estimate(f0: Tensor, z0: Tensor, vecs: int = 1) -> Tensor:
        result = 0
        for _ in range(vecs):
            v = torch.randn(*z0.shape).to(z0)
            vJ = torch.autograd.grad(f0, z0, v, retain_graph=True, create_graph=True)[0]
            result += vJ.norm() ** 2
        return result / vecs / np.prod(z0.shape)

    def loss(x: Tensor, y: Tensor) -> Tensor:
        z = torch.zeros(x.shape[0], 6)
        with torch.no_grad():
            for nstep in range(12):
                z_next = deq.f(z, x)
                rel = (z_next - z).norm().item() / (z_next.norm().item() + 1e-9)
                z = z_next
                if rel < 1e-2:
                    break
            info["nstep"] = nstep
        new_z = z.detach().requires_grad_()
        f_z = deq.f(new_z, x)
        jac = jac_loss_estimate(f_z, new_z)
        return F.mse_loss(deq.head(f_z), y) + 0.1 * jac

    return loss, lambda: (torch.randn(8, 3), torch.randn(8, 1))


class _HNN(nn.Module):
    """A Hamiltonian network with a permutation tensor that is no buffer (Greydanus)."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, 12), nn.Tanh(), nn.Linear(12, 2))
        self.M = self.permutation_tensor(dim)

    def permutation_tensor(self, n: int) -> Tensor:
        M = torch.eye(n)
        M = torch.cat([M[n // 2 :], -M[: n // 2]])
        return M

    def time_derivative(self, x: Tensor) -> Tensor:
        F1, F2 = self.net(x).split(1, 1)
        conservative = torch.zeros_like(x)
        dF1 = torch.autograd.grad(F1.sum(), x, create_graph=True)[0]
        conservative = dF1 @ torch.eye(*self.M.shape)
        dF2 = torch.autograd.grad(F2.sum(), x, create_graph=True)[0]
        solenoidal = dF2 @ self.M.t()
        return conservative + solenoidal


def hamiltonian() -> tuple[Any, Batch]:
    """A Hamiltonian network's field beside measured derivatives, statistics in a dictionary."""
    model = _HNN()
    stats: dict[str, list[float]] = {"train_loss": []}

    def loss(x: Tensor, dxdt: Tensor, verbose: bool = False) -> Tensor:
        x.requires_grad_(True)
        dxdt_hat = model.time_derivative(x)
        error = (dxdt - dxdt_hat).pow(2).mean()
        stats["train_loss"].append(error.item())
        if verbose:
            print(f"train_loss {error.item():.4e}")
        return error

    return loss, lambda: (torch.randn(9, 4), torch.randn(9, 4))


def lagrangian() -> tuple[Any, Batch]:
    """A Lagrangian network: a Hessian in the velocities, inverted, by torch.func and vmap."""
    net = nn.Sequential(nn.Linear(4, 10), nn.Softplus(), nn.Linear(10, 1))

    def accelerations(q: Tensor, qt: Tensor) -> Tensor:
        def L(q: Tensor, qt: Tensor) -> Tensor:
            return net(torch.cat([q, qt])).squeeze() + 2 * (qt**2).sum()

        hess = torch.func.hessian(L, argnums=1)(q, qt)
        mixed = torch.func.jacrev(torch.func.jacrev(L, argnums=1), argnums=0)(q, qt)
        return torch.linalg.solve(hess, torch.func.grad(L)(q, qt) - mixed @ qt)

    def loss(state: Tensor, target: Tensor) -> Tensor:
        q, qt = torch.tensor_split(state, 2, dim=1)
        return F.mse_loss(torch.func.vmap(accelerations)(q, qt), target)

    return loss, lambda: (torch.randn(5, 4), torch.randn(5, 2))


LOSSES = (
    Loss(flow_fixed_steps, is_slow=True),
    Loss(flow_adaptive_steps, way=BY_LAYER, is_slow=True),
    Loss(adjoint_method, way=BY_LAYER),
    Loss(regularised_flow, is_slow=True),
    Loss(residual_flow, way=BY_LAYER),
    Loss(equilibrium, way=AS_WRITTEN),
    Loss(hamiltonian),
    Loss(lagrangian, is_slow=True),
)
