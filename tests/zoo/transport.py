"""Optimal transport by convex networks, and fields given implicitly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.row import BY_LAYER, Batch, Loss


class _ConvexQuadratic(nn.Module):
    """A convex network with quadratic layers and weights kept positive."""

    def __init__(self, dim: int = 2, width: int = 8) -> None:
        super().__init__()
        self.quadratic = nn.ModuleList([nn.Linear(dim, n) for n in (width, width)])
        self.convex = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.final = nn.Linear(width, 1, bias=False)
        self.strong_convexity = 0.1

    def forward(self, x: Tensor) -> Tensor:
        out = self.quadratic[0](x).square()
        for q, c in zip(self.quadratic[1:], self.convex):
            out = F.celu(c(out) + q(x), 0.2)
        return self.final(out) + 0.5 * self.strong_convexity * (x**2).sum(1, keepdim=True)

    def push(self, x: Tensor, create_graph: bool = True) -> Tensor:
        return torch.autograd.grad(
            outputs=self.forward(x), inputs=x, create_graph=create_graph, retain_graph=True,
            only_inputs=True, grad_outputs=torch.ones_like(x[:, :1]),
        )[0]  # fmt: skip

    def convexify(self) -> None:
        for layer in self.convex:
            layer.weight.data.clamp_(0)
        self.final.weight.data.clamp_(0)


def _freeze(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(False)


def _unfreeze(model: nn.Module) -> None:
    for p in model.parameters():
        p.requires_grad_(True)


def minimax_transport() -> tuple[Any, Batch]:
    """Transport by two convex networks, one of them frozen in the inner step (Makkuva)."""
    f, g = _ConvexQuadratic(), _ConvexQuadratic()

    def positive_constraint_loss(model: nn.Module) -> Tensor:
        penalty: Any = 0
        for name, p in model.named_parameters():
            if "convex" in name:
                penalty += torch.sum(torch.pow(F.relu(-p), 2))
        return penalty

    def inner_step(x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, float]]:
        _freeze(f)
        _unfreeze(g)
        y.requires_grad_(True)
        grad_g_of_y = g.push(y)
        f_grad_g_y = f(grad_g_of_y).squeeze()
        dot_prod = (grad_g_of_y * y).sum(1)
        loss_g = (f_grad_g_y - dot_prod).mean() + 1.0 * positive_constraint_loss(g)
        logs = {"g": loss_g.item(), "w2": (f(x).mean() - dot_prod.mean()).item()}
        _unfreeze(f)
        return loss_g, logs

    return inner_step, lambda: (torch.randn(8, 2), torch.randn(8, 2))


def cycle_regularised() -> tuple[Any, Batch]:
    """Transport by a potential and its conjugate with a cycle penalty (W2GN)."""
    D, D_conj = _ConvexQuadratic(), _ConvexQuadratic()

    def loss(X: Tensor, Y: Tensor) -> Tensor:
        D.convexify()
        D_conj.convexify()
        X.requires_grad_(True)
        Y.requires_grad_(True)
        with torch.no_grad():
            X_inverse = D_conj.push(Y.detach().requires_grad_(True).clone()) if False else Y * 1.0
        loss = (D(X) - D(X_inverse)).mean()
        Y_inverse = D_conj.push(Y)
        cycle = ((D.push(Y_inverse) - Y) ** 2).mean()
        X_push = D.push(X)
        cycle = cycle + ((D_conj.push(X_push) - X) ** 2).mean()
        return loss + 35.0 * cycle

    return loss, lambda: (torch.randn(6, 2), torch.randn(6, 2))


def convex_flow_logdet() -> tuple[Any, Batch]:
    """A flow by a convex potential: its Hessian's log-determinant row by row (JKO, CP-Flow)."""
    icnn = _ConvexQuadratic()

    def loss(x: Tensor) -> tuple[Tensor, float]:
        x = x.requires_grad_(True)
        tx = icnn.push(x)
        hessian = torch.zeros(x.shape[0], 2, 2)
        for i in range(x.shape[1]):
            hessian[:, i] = torch.autograd.grad(tx[:, i].sum(), x, create_graph=True)[0]
        sign, logdet = torch.linalg.slogdet(hessian + 1e-2 * torch.eye(2))
        if (sign < 0).any():
            raise ValueError("not convex")
        return 0.5 * tx.square().sum(1).mean() - logdet.mean(), logdet.min().item()

    def batch() -> tuple[Any, ...]:
        icnn.convexify()
        return (torch.randn(6, 2),)

    return loss, batch


def entropic_potential() -> tuple[Any, Batch]:
    """A Sinkhorn loop that stops when it has converged, and the gradient of its value."""
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))

    def sinkhorn(x: Tensor, y: Tensor, eps: float = 0.5, max_iter: int = 20) -> Tensor:
        C = ((x[:, None] - y[None]) ** 2).sum(-1)
        u, v = torch.zeros(len(x)), torch.zeros(len(y))
        n, m = torch.tensor(float(len(x))), torch.tensor(float(len(y)))
        for _ in range(max_iter):
            previous = u
            u = -eps * torch.logsumexp((v[None] - C) / eps - m.log(), 1)
            v = -eps * torch.logsumexp((u[:, None] - C) / eps - n.log(), 0)
            if (u - previous).abs().sum().item() < 1e-1:
                break
        return u.mean() + v.mean()

    def loss(z: Tensor, y: Tensor) -> Tensor:
        x = net(z)
        cost = sinkhorn(x, y)
        velocity = torch.autograd.grad(cost, x, create_graph=True)[0]
        return cost + 0.1 * velocity.pow(2).sum()

    return loss, lambda: (torch.randn(6, 2), torch.randn(6, 2))


# ---- fields


class _Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3.0 * x)


def _siren(m: int, n: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(m, 12), _Sine(), nn.Linear(12, 12), _Sine(), nn.Linear(12, n))


def signed_distance() -> tuple[Any, Batch]:
    """A signed distance with an eikonal term, on and off the surface by torch.where (SIREN)."""
    model = _siren(3, 1)

    def gradient(y: Tensor, x: Tensor, grad_outputs: Tensor | None = None) -> Tensor:
        if grad_outputs is None:
            grad_outputs = torch.ones_like(y)
        return torch.autograd.grad(y, [x], grad_outputs=grad_outputs, create_graph=True)[0]

    def sdf(model_output: dict[str, Tensor], gt: dict[str, Tensor]) -> dict[str, Tensor]:
        gt_sdf, gt_normals = gt["sdf"], gt["normals"]
        coords, pred_sdf = model_output["model_in"], model_output["model_out"]
        grad = gradient(pred_sdf, coords)
        on = gt_sdf != -1
        sdf_constraint = torch.where(on, pred_sdf, torch.zeros_like(pred_sdf))
        inter = torch.where(on, torch.zeros_like(pred_sdf), torch.exp(-1e1 * torch.abs(pred_sdf)))
        normal = torch.where(
            on, 1 - F.cosine_similarity(grad, gt_normals, dim=-1)[..., None],
            torch.zeros_like(grad[..., :1]),
        )  # fmt: skip
        return {
            "sdf": torch.abs(sdf_constraint).mean() * 3e1,
            "inter": inter.mean() * 1e1,
            "normal_constraint": normal.mean() * 1e1,
            "grad_constraint": torch.abs(grad.norm(dim=-1) - 1).mean() * 5,
        }

    def train_loss(model_input: dict[str, Tensor], gt: dict[str, Tensor]) -> Tensor:
        coords = model_input["coords"].clone().detach().requires_grad_(True)
        losses = sdf({"model_in": coords, "model_out": model(coords)}, gt)
        train_loss: Any = 0.0
        for name, loss in losses.items():
            train_loss += loss.mean()
        return train_loss

    def batch() -> tuple[Any, ...]:
        gt = torch.where(torch.arange(10)[:, None] < 5, 0.0, -1.0)
        return {"coords": torch.rand(10, 3)}, {"sdf": gt, "normals": torch.randn(10, 3)}

    return train_loss, batch


def volume_rendering() -> tuple[Any, Batch]:
    """Volume rendering of a signed distance: normals, an annealed cosine, weights by cumprod."""
    sdf_network, color = _siren(3, 5), nn.Linear(10, 3)
    variance = nn.Parameter(torch.tensor(0.3))
    state = {"iter_step": 0, "anneal_end": 10}

    def render(rays_o: Tensor, rays_d: Tensor, n_samples: int = 5) -> Any:
        batch_size = len(rays_o)
        z_vals = torch.linspace(0.5, 1.5, n_samples)[None] + 0.1 * torch.rand(batch_size, 1)
        dists = torch.cat(
            [z_vals[..., 1:] - z_vals[..., :-1], torch.full((batch_size, 1), 0.2)], -1
        )
        pts = (rays_o[:, None, :] + rays_d[:, None, :] * z_vals[..., :, None]).reshape(-1, 3)
        dirs = rays_d[:, None, :].expand(batch_size, n_samples, 3).reshape(-1, 3)
        pts.requires_grad_(True)
        out = sdf_network(pts)
        sdf, feature = out[:, :1], out[:, 1:]
        d_output = torch.ones_like(sdf, requires_grad=False, device=sdf.device)
        gradients = torch.autograd.grad(
            outputs=sdf, inputs=pts, grad_outputs=d_output, create_graph=True, retain_graph=True,
            only_inputs=True,
        )[0]  # fmt: skip
        rgb = torch.sigmoid(color(torch.cat([pts, gradients, feature], -1)))
        inv_s = torch.exp(variance * 10.0).clip(1e-6, 1e6)
        true_cos = (dirs * gradients).sum(-1, keepdim=True)
        ratio = min(1.0, state["iter_step"] / state["anneal_end"])
        iter_cos = -(F.relu(-true_cos * 0.5 + 0.5) * (1.0 - ratio) + F.relu(-true_cos) * ratio)
        step = iter_cos * dists.reshape(-1, 1) * 0.5
        prev_cdf, next_cdf = (
            torch.sigmoid((sdf - step) * inv_s),
            torch.sigmoid((sdf + step) * inv_s),
        )
        alpha = ((prev_cdf - next_cdf + 1e-5) / (prev_cdf + 1e-5)).clip(0.0, 1.0)
        alpha = alpha.reshape(batch_size, n_samples)
        transparency = torch.cumprod(
            torch.cat([torch.ones([batch_size, 1]), 1.0 - alpha + 1e-7], -1), -1
        )[:, :-1]
        weights = alpha * transparency
        inside = (pts.norm(dim=-1) < 1.4).to(pts).detach()
        eikonal = inside * (gradients.norm(dim=-1) - 1.0) ** 2
        pixels = (rgb.reshape(batch_size, n_samples, 3) * weights[..., None]).sum(1)
        return pixels, eikonal.sum() / (inside.sum() + 1e-5)

    def loss(rays_o: Tensor, rays_d: Tensor, true_rgb: Tensor) -> Tensor:
        state["iter_step"] += 1
        pixels, eikonal = render(rays_o, rays_d)
        error = F.l1_loss(pixels, true_rgb, reduction="sum") / len(rays_o)
        return error + 0.1 * eikonal

    return loss, lambda: (
        0.1 * torch.randn(3, 3),
        F.normalize(torch.randn(3, 3), dim=1),
        torch.rand(3, 3),
    )


def divergence_of_shape() -> tuple[Any, Batch]:
    """A shape's network without normals: the divergence of its gradient (DiGS)."""
    net = _siren(3, 1)

    def gradient(inputs: Tensor, outputs: Tensor) -> Tensor:
        d_points = torch.ones_like(outputs, requires_grad=False, device=outputs.device)
        return torch.autograd.grad(
            outputs=outputs, inputs=inputs, grad_outputs=d_points, create_graph=True,
            retain_graph=True, only_inputs=True,
        )[0][..., -3:]  # fmt: skip

    def forward(mnfld: Tensor, nonmnfld: Tensor, div_type: str = "l2") -> dict[str, Tensor]:
        mnfld.requires_grad_()
        nonmnfld.requires_grad_()
        m_pred, n_pred = net(mnfld), net(nonmnfld)
        m_grad, n_grad = gradient(mnfld, m_pred), gradient(nonmnfld, n_pred)
        dx = gradient(nonmnfld, n_grad[:, 0])
        dy = gradient(nonmnfld, n_grad[:, 1])
        dz = gradient(nonmnfld, n_grad[:, 2])
        div = dx[:, 0] + dy[:, 1] + dz[:, 2]
        div[div.detach().abs() > 1e6] = 0.0
        eikonal = ((torch.cat([n_grad, m_grad], dim=-2).norm(2, dim=-1) - 1) ** 2).mean()
        inter = torch.exp(-1e2 * torch.abs(n_pred)).mean()
        div_loss = torch.clamp(torch.square(div), 0.1, 50).mean()
        loss = 3e1 * torch.abs(m_pred).mean() + inter + 5 * eikonal + 0.1 * div_loss
        return {"loss": loss, "eikonal": eikonal.detach(), "div": div_loss.detach()}

    return forward, lambda: (torch.rand(6, 3), torch.rand(6, 3))


LOSSES = (
    Loss(minimax_transport),
    Loss(cycle_regularised, is_slow=True),
    Loss(convex_flow_logdet, way=BY_LAYER),
    Loss(entropic_potential, way=BY_LAYER),
    Loss(signed_distance),
    Loss(volume_rendering, is_slow=True),
    Loss(divergence_of_shape, is_slow=True),
)
