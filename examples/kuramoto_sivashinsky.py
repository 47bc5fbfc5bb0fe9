"""Solve the Kuramoto–Sivashinsky equation, which has a fourth derivative, by a network.

    u_t + u u_x + u_xx + u_xxxx = 0,  x in [-12, 12], t in [0, 4]

A front that travels is an exact solution; its values at t = 0 and on both sides are data, the rest
is what the equation says. The derivatives are written one after the other; they are Taylor
coefficients along x, one pass for all four.

Run `python examples/kuramoto_sivashinsky.py --quick`: the report on the loss, its time per step,
the training and the error, and `kuramoto_sivashinsky.png`.
"""

import pictures
import torch
from study import Study
from torch import Tensor, nn

from rewriter import optimize_nested

RATE, SPEED, START, K = 15 / 19 * (11 / 19) ** 0.5, 1.0, -2.0, 0.5 * (11 / 19) ** 0.5
SCALE, SHIFT = torch.tensor([3.0, 2.0]), torch.tensor([0.0, 1.0])


def exact_solution(points: Tensor) -> Tensor:
    """Evaluate the travelling front (Xu, Shu, "Local discontinuous Galerkin methods for the
    Kuramoto–Sivashinsky equations", 2006, example 4.1), at another speed."""
    x, t = points.split(1, dim=1)
    front = torch.tanh(K * (x - SPEED * t - START))
    return SPEED + RATE * (11 * front**3 - 9 * front)


class Net(nn.Module):
    """A network of points (x, t), shape (batch, 2) → (batch, 1)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        hidden: list[nn.Module] = []
        for _ in range(2):
            hidden += [nn.Linear(width, width), nn.Tanh()]
        self.net = nn.Sequential(nn.Linear(2, width), nn.Tanh(), *hidden, nn.Linear(width, 1))

    def forward(self, points: Tensor) -> Tensor:
        return 2 * self.net(points / SCALE - SHIFT)


@optimize_nested
def loss(net: nn.Module, points: Tensor, data: Tensor, values: Tensor) -> Tensor:
    """Add the mean squares of the residual at points (batch, 2) that require grad, and of the
    mismatch to values (n, 1) at data points (n, 2)."""

    def slopes(u: Tensor) -> Tensor:
        return torch.autograd.grad(u.sum(), points, create_graph=True)[0]

    u = net(points)
    u_x, u_t = slopes(u).split(1, dim=1)
    u_xx = slopes(u_x)[:, :1]
    u_xxxx = slopes(slopes(u_xx)[:, :1])[:, :1]
    residual = u_t + u * u_x + u_xx + u_xxxx
    return residual.square().mean() + 10 * (net(data) - values).square().mean()


def draw_batch(count: int) -> tuple[Tensor, ...]:
    """Draw points that require grad, and data on three sides."""
    points = torch.cat([24 * torch.rand(count, 1) - 12, 4 * torch.rand(count, 1)], dim=1)
    start = torch.cat([24 * torch.rand(count, 1) - 12, torch.zeros(count, 1)], dim=1)
    sides = torch.cat([12 * torch.randn(count, 1).sign(), 4 * torch.rand(count, 1)], dim=1)
    data = torch.cat([start, sides])
    return points.requires_grad_(), data, exact_solution(data)


@torch.no_grad()
def draw(net: nn.Module, history: list[float], path: str) -> str:
    """Draw the solution, the error and profiles; return the relative error."""
    x, t = torch.linspace(-12, 12, 241), torch.linspace(0, 4, 81)
    grid = torch.stack(torch.meshgrid(x, t, indexing="xy"), dim=-1).flatten(0, 1)
    found, exact = (u(grid).reshape(81, 241) for u in (net, exact_solution))
    error = ((found - exact).norm() / exact.norm()).item()
    figure, axes = pictures.panels("The Kuramoto–Sivashinsky equation by a network", (1.2, 1, 1))
    pictures.field(axes[0], x.numpy(), t.numpy(), found.numpy(), limit=4, label="u")
    axes[0].set(title="network", xlabel="x", ylabel="t")
    for k, colour in zip((0, 40, 80), ("C0", "C1", "C2"), strict=True):
        axes[1].plot(x, exact[k], color=colour, linewidth=3, alpha=0.35)
        axes[1].plot(x, found[k], color=colour, linewidth=1, label=f"t = {t[k]:.0f}")
    title = f"network (thin), exact (broad); error {error:.1e}"
    pictures.plain(axes[1], title=title, xlabel="x", ylabel="u")
    pictures.curves(axes[2], {"Adam": history}, title="loss", xlabel="training step")
    pictures.save(figure, path)
    return f"relative L2 error against the exact solution: {error:.1e}"


STUDY = Study(
    *("a PINN for the Kuramoto–Sivashinsky equation", "kuramoto_sivashinsky.png"),
    *(loss, Net, draw_batch, draw),
    points=256,
    steps=(4000, 20_000),
)

if __name__ == "__main__":
    STUDY.run()
