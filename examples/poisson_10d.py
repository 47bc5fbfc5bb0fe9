"""Solve Poisson's equation in the ball of ten dimensions, by a network with an operator of its own.

    Δu = f in |x| < 1,  u = 0 on the sphere,  with f such that u = (1 − |x|²) sin(w·x)

The activation is an operator of our own, `snake.py`, that takes part in Taylor mode: a step costs
34 forward passes in place of the 64 of the loop over ten second derivatives.

Run `python examples/poisson_10d.py --quick`: the report on the loss, its time per step, the
training and the error, and `poisson_10d.png`.
"""

import pictures
import torch
from snake import snake
from study import Study
from torch import Tensor, nn

from rewriter import optimize_nested

DIM = 10
DIRECTION = torch.linspace(-1.0, 1.6, DIM)


class Ball(nn.Module):
    """A function on the ball that is zero on the sphere: points (batch, 10) → (batch,)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = (DIM, width), (width, width), (width, 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        h = snake(second(snake(first(x), 1.0)), 1.0)
        return (1 - x.square().sum(-1)) * last(h)[..., 0]


def exact_solution(x: Tensor) -> Tensor:
    """Evaluate (1 − |x|²) sin(w·x) at points (…, 10)."""
    return (1 - x.square().sum(-1)) * torch.sin(x @ DIRECTION.to(x))


def source(x: Tensor) -> Tensor:
    """Evaluate the exact solution's Laplacian."""
    w = DIRECTION.to(x)
    along = x @ w
    return -(2 * DIM + w @ w * (1 - x.square().sum(-1))) * along.sin() - 4 * along * along.cos()


@optimize_nested
def loss(net: nn.Module, x: Tensor) -> Tensor:
    """Return the mean square of Δu − f at points (batch, 10) that require grad."""
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    laplacian = torch.zeros_like(x[:, 0])
    for d in range(x.shape[1]):
        (second,) = torch.autograd.grad(g[:, d].sum(), x, create_graph=True)
        laplacian = laplacian + second[:, d]
    return (laplacian - source(x)).square().mean()


def draw_points(count: int) -> tuple[Tensor]:
    """Draw points (count, 10) in the ball, their radius uniform; they require grad."""
    direction = nn.functional.normalize(torch.randn(count, DIM), dim=1)
    return ((torch.rand(count, 1) * direction).requires_grad_(),)


@torch.no_grad()
def draw(net: nn.Module, history: list[float], path: str) -> str:
    """Draw a section through the ball, new points and the loss; return the relative error."""
    (x,) = draw_points(4000)
    found, exact = net(x), exact_solution(x)
    error = ((found - exact).norm() / exact.norm()).item()
    figure, axes = pictures.panels("Poisson's equation in a ball of ten dimensions", (1.15, 1, 1))
    s = torch.linspace(-1, 1, 101)
    plane = torch.zeros(101, 101, DIM)
    plane[..., 0], plane[..., -1] = torch.meshgrid(s, s, indexing="xy")
    outside = plane.square().sum(-1) > 1
    values = [u(plane).masked_fill(outside, torch.nan).numpy() for u in (net, exact_solution)]
    pictures.field(axes[0], s, s, values[0], limit=0.8, label="u")
    axes[0].contour(s, s, values[1], 9, colors="black", linewidths=0.6)
    axes[0].set(title="network (colours), exact (lines)", xlabel="$x_1$", ylabel="$x_{10}$")
    axes[0].set(xticks=(-1, 0, 1), yticks=(-1, 0, 1), aspect="equal")
    axes[1].plot(exact, found, ".", markersize=2, rasterized=True)
    title = f"new points (relative L2 error: {error:.1e})"
    pictures.plain(axes[1], legend=False, title=title, xlabel="exact u", ylabel="network")
    pictures.curves(axes[2], {"Adam": history}, title="loss", xlabel="training step")
    pictures.save(figure, path)
    return f"relative L2 error against the exact solution: {error:.1e}"


STUDY = Study(
    *("a PINN for Poisson's equation in ten dimensions", "poisson_10d.png"),
    *(loss, Ball, draw_points, draw),
    points=256,
    steps=(3000, 10_000),
)

if __name__ == "__main__":
    STUDY.run()
