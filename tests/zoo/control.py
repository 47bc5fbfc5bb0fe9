"""Barrier and Lyapunov functions, Hamilton–Jacobi reachability, contraction, stochastic control."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.row import BY_LAYER, Batch, Loss


def _mlp(m: int, n: int, width: int = 10) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(m, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, n)
    )


class _Barrier:
    """A barrier function, its conditions on points of a data set by masks."""

    def __init__(self) -> None:
        self.V_nn = _mlp(2, 1)
        self.u_nn = _mlp(2, 1)
        self.clf_lambda = 1.0

    def f(self, x: Tensor) -> Tensor:
        f = torch.zeros((x.shape[0], 2))
        f[:, 0] = x[:, 1]
        f[:, 1] = torch.sin(x[:, 0]) - 0.1 * x[:, 1]
        return f

    def V_lie_derivatives(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.clone().requires_grad_(True)
        V = self.V_nn(x)
        (gradV,) = torch.autograd.grad(V, x, torch.ones_like(V), create_graph=True)
        g = torch.zeros(x.shape[0], 2, 1)
        g[:, 1, 0] = 1.0
        Lf_V = (gradV * self.f(x)).sum(1, keepdim=True)
        Lg_V = torch.bmm(gradV.unsqueeze(1), g).squeeze(1)
        return V, Lf_V, Lg_V

    def training_step(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
        x, safe_mask, unsafe_mask = batch
        component_losses: dict[str, Tensor] = {}
        V, Lf_V, Lg_V = self.V_lie_derivatives(x)
        V_safe, V_unsafe = V[safe_mask], V[unsafe_mask]
        component_losses["safe"] = F.relu(0.1 + V_safe).mean()
        component_losses["unsafe"] = F.relu(0.1 - V_unsafe).mean()
        Vdot = Lf_V + torch.sum(Lg_V * self.u_nn(x), dim=-1).unsqueeze(-1)
        violation = F.relu(0.1 + Vdot + self.clf_lambda * V)
        component_losses["descent"] = violation.mean()
        total_loss = torch.tensor(0.0).type_as(x)
        for _, loss_value in component_losses.items():
            if not torch.isnan(loss_value):
                total_loss += loss_value
        return total_loss, {k: v.detach() for k, v in component_losses.items()}


def barrier_by_masks() -> tuple[Any, Batch]:
    """A neural barrier function: Lie derivatives, safe and unsafe points by masks."""
    controller = _Barrier()

    def batch() -> tuple[Any, ...]:
        x = torch.randn(12, 2)
        return ((x, x.norm(dim=1) < 1.0, x.norm(dim=1) > 1.2),)

    return controller.training_step, batch


class _ToolBox:
    """Differential operators that also say whether they met a number that is none (DeepReach)."""

    @staticmethod
    def jacobian(y: Tensor, x: Tensor) -> tuple[Tensor, int]:
        meta_batch_size, num_observations = y.shape[:2]
        jac = torch.zeros(meta_batch_size, num_observations, y.shape[-1], x.shape[-1]).to(y.device)
        for i in range(y.shape[-1]):
            y_flat = y[..., i].view(-1, 1)
            jac[:, :, i, :] = torch.autograd.grad(
                y_flat, x, torch.ones_like(y_flat), create_graph=True
            )[0]
        status = 0
        if torch.any(torch.isnan(jac)):
            status = -1
        return jac, status


def reachability() -> tuple[Any, Batch]:
    """The Hamilton–Jacobi–Isaacs equation, checks for NaN, a condition when time is all zero."""
    net = _mlp(4, 1)
    state = {"counter": 0, "pretrain_end": 1}

    def diff_constraint_hom(x: Tensor, y: Tensor) -> Tensor:
        du, status = _ToolBox.jacobian(y, x)
        dudt, dudx = du[..., 0, 0], du[..., 0, 1:]
        x_theta = x[..., 3] * 1.0
        ham = torch.cos(x_theta) * dudx[..., 0] + torch.sin(x_theta) * dudx[..., 1]
        ham = ham - 1.1 * torch.abs(dudx[..., 2])
        if status != 0:
            raise RuntimeError("NaN in the Jacobian")
        return dudt - torch.min(ham, torch.zeros_like(ham))

    def initialize_hji(coords: Tensor, gt: dict[str, Tensor]) -> dict[str, Tensor]:
        coords = coords.clone().detach().requires_grad_(True)
        y = net(coords)
        dirichlet_mask = gt["dirichlet_mask"]
        if torch.all(dirichlet_mask):
            constraint = torch.Tensor([0])
        else:
            constraint = diff_constraint_hom(coords, y)
        dirichlet = y[dirichlet_mask] - gt["source"][dirichlet_mask]
        state["counter"] += 1
        return {
            "dirichlet": torch.abs(dirichlet).sum() * 10.0,
            "diff_constraint_hom": torch.abs(constraint).sum(),
        }

    def train_loss(coords: Tensor, gt: dict[str, Tensor]) -> Tensor:
        losses = initialize_hji(coords, gt)
        train_loss: Any = 0.0
        for loss_name, loss in losses.items():
            train_loss += loss.mean()
        return train_loss

    def batch() -> tuple[Any, ...]:
        coords = torch.rand(1, 10, 4)
        coords[:, :3, 0] = 0.0
        mask = (coords[..., 0] == 0.0).unsqueeze(-1)
        return coords, {"dirichlet_mask": mask, "source": torch.rand(1, 10, 1)}

    return train_loss, batch


class _ICNN(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.W = nn.ParameterList(
            [nn.Parameter(0.5 * torch.randn(width, 2)), nn.Parameter(0.5 * torch.randn(1, 2))]
        )
        self.U = nn.ParameterList([nn.Parameter(torch.randn(1, width))])
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        z = F.softplus(F.linear(x, self.W[0], self.bias))
        return F.linear(x, self.W[1]) + F.linear(z, F.softplus(self.U[0]))


def stable_dynamics() -> tuple[Any, Batch]:
    """Dynamics projected on a learned Lyapunov function's decrease (Manek and Kolter)."""
    fhat, V = _mlp(2, 2), _ICNN()

    def rehu(x: Tensor, d: float = 0.1) -> Tensor:
        return torch.clamp(
            torch.sign(torch.clamp(x, min=0.0)) * (x**2 / (2 * d)).clamp(max=d / 2)
            + F.relu(x - d), min=0.0,
        )  # fmt: skip

    def dynamics(x: Tensor) -> Tensor:
        if not x.requires_grad:
            x.requires_grad_(True)
        fx = fhat(x)
        Vx = rehu(V(x) - V(torch.zeros_like(x))) + 1e-2 * x.pow(2).sum(1, keepdim=True)
        gV = torch.autograd.grad(list(Vx), x, create_graph=True, only_inputs=True)[0]
        rv = fx - gV * (F.relu((gV * fx).sum(dim=1) + 0.1 * Vx[:, 0]) / (gV**2).sum(dim=1))[:, None]
        return rv

    def loss(x: Tensor, target: Tensor) -> Tensor:
        return ((dynamics(x) - target) ** 2).mean()

    return loss, lambda: (torch.randn(7, 2), torch.randn(7, 2))


def contraction_metric() -> tuple[Any, Batch]:
    """A contraction metric: Jacobians filled column by column, eigenvalues in the metrics."""
    W_net, u_net = _mlp(2, 4), _mlp(2, 1)

    def Jacobian(f: Tensor, x: Tensor) -> Tensor:
        f = f + 0.0 * x.sum()
        J = torch.zeros(x.shape[0], f.size(-1), x.size(-1)).type(x.type())
        for i in range(f.size(-1)):
            J[:, i, :] = torch.autograd.grad(f[:, i].sum(), x, create_graph=True)[0]
        return J

    def weighted_gradients(W: Tensor, v: Tensor, x: Tensor) -> Tensor:
        DWDx = torch.stack([Jacobian(W[:, i, :], x) for i in range(2)], 1)
        return (DWDx * v.view(x.shape[0], 1, 1, -1)).sum(dim=3)

    def loss_pos_matrix_random_sampling(A: Tensor, K: int = 16) -> Tensor:
        z = torch.randn(K, A.size(-1))
        z = z / z.norm(dim=1, keepdim=True)
        zTAz = (z.matmul(A) * z.view(1, K, -1)).sum(dim=2).view(-1)
        negative_index = zTAz.detach().cpu().numpy() < 0
        if negative_index.sum() > 0:
            return -1.0 * (zTAz[negative_index].mean())
        return torch.tensor(0.0).requires_grad_()

    def forward(x: Tensor) -> tuple[Tensor, float]:
        x = x.requires_grad_()
        W = W_net(x).view(-1, 2, 2)
        W = W.transpose(1, 2).matmul(W) + 0.1 * torch.eye(2)
        u = u_net(x)
        dot_x = torch.cat([x[:, 1:2], torch.sin(x[:, 0:1]) + u], 1)
        A = Jacobian(dot_x, x)
        dot_W = weighted_gradients(W, dot_x, x)
        Contraction = dot_W - A.matmul(W) - (A.matmul(W)).transpose(1, 2) - 0.5 * W
        total = loss_pos_matrix_random_sampling(Contraction)
        eig = torch.linalg.eigvalsh(Contraction.detach()).max().item()
        return total + 1e-3 * W.pow(2).mean(), eig

    return forward, lambda: (torch.randn(6, 2),)


def verified_lyapunov() -> tuple[Any, Batch]:
    """A Lyapunov risk with counters, a print each few steps and a learned controller."""
    model, control = _mlp(2, 1, 6), nn.Linear(2, 1, bias=False)
    run = {"i": 0}

    def loss(x: Tensor) -> Tensor:
        x = x.requires_grad_()
        V = model(x)
        X0 = model(torch.zeros([1, 2]))
        f = torch.stack([x[:, 1], x[:, 0].sin() + control(x).squeeze(1)], 1)
        dV = torch.autograd.grad(V.sum(), x, create_graph=True)[0]
        L_V = (dV * f).sum(1)
        circle = torch.sqrt(torch.sum(x**2, dim=1))
        risk = (F.relu(-V) + 1.5 * F.relu(L_V + 0.5)).mean()
        risk = risk + 1.2 * ((circle - V.squeeze(1)) ** 2).mean() + X0.pow(2).mean()
        print(run["i"], "Lyapunov Risk=", risk.item())
        run["i"] += 1
        return risk

    return loss, lambda: (torch.randn(9, 2),)


def deep_bsde() -> tuple[Any, Batch]:
    """A forward–backward stochastic equation, Brownian paths by NumPy's cumsum (FBSNN)."""
    net = _mlp(3, 1)
    N, Dim = 3, 2

    def fetch_minibatch(M: int) -> tuple[Tensor, Tensor]:
        Dt = np.zeros((M, N + 1, 1))
        DW = np.zeros((M, N + 1, Dim))
        Dt[:, 1:, :] = 1.0 / N
        DW[:, 1:, :] = np.sqrt(1.0 / N) * np.random.normal(size=(M, N, Dim))
        t, W = np.cumsum(Dt, axis=1), np.cumsum(DW, axis=1)
        return torch.from_numpy(t), torch.from_numpy(W)

    def net_u(t: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
        u = net(torch.cat((t, X), 1))
        Du = torch.autograd.grad(
            outputs=[u], inputs=[X], grad_outputs=torch.ones_like(u), allow_unused=True,
            retain_graph=True, create_graph=True,
        )[0]  # fmt: skip
        return u, Du

    def loss_function(Xi: Tensor) -> tuple[Tensor, Tensor]:
        t, W = fetch_minibatch(Xi.shape[0])
        loss: Any = 0
        t0, W0, X0 = t[:, 0, :], W[:, 0, :], Xi.requires_grad_(True)
        Y0, Z0 = net_u(t0, X0)
        for n in range(0, N):
            t1, W1 = t[:, n + 1, :], W[:, n + 1, :]
            X1 = X0 + math.sqrt(2) * (W1 - W0)
            Y1_tilde = (
                Y0
                + (Z0**2).sum(1, keepdim=True) * (t1 - t0)
                + (Z0 * (W1 - W0)).sum(1, keepdim=True)
            )
            Y1, Z1 = net_u(t1, X1)
            loss += torch.sum(torch.pow(Y1 - Y1_tilde, 2))
            t0, W0, X0, Y0, Z0 = t1, W1, X1, Y1, Z1
        loss += torch.sum((Y1 - torch.log(0.5 + 0.5 * (X1**2).sum(1, keepdim=True))) ** 2)
        return loss, Y0[0, 0].detach()

    return loss_function, lambda: (torch.randn(5, 2),)


LOSSES = (
    Loss(barrier_by_masks),
    Loss(reachability, way=BY_LAYER, is_slow=True),
    Loss(stable_dynamics, is_slow=True),
    Loss(contraction_metric, is_slow=True),
    Loss(verified_lyapunov, is_slow=True),
    Loss(deep_bsde, way=BY_LAYER),
)
