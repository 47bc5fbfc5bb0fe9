"""Fit a continuous normalising flow in the plane with the exact trace; see its points move.

The logarithm of the density changes along the way by the divergence of the velocity, written as the
trace of the full Jacobian of each point, in steps of the midpoint rule. The data have a density
that is known, six normal distributions on a circle, so the distance to it can be told.

Run `python examples/flow_exact.py --quick`: the report on the loss, its time per step, the training
and the divergence from the data's density, and `flow_exact.png`.
"""

import math

import pictures
import torch
from study import Study
from torch import Tensor, nn
from torch.func import jacrev, vmap

from rewriter import optimize_nested

STEPS, WIDTH, ANGLES = 4, 0.35, torch.arange(6) * math.pi / 3
CENTRES = 2 * torch.stack([ANGLES.cos(), ANGLES.sin()], dim=1)


class Velocity(nn.Module):
    """The velocity (…, 2) at points (…, 2) and a time."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        hidden = (nn.Linear(3, width), nn.Softplus(), nn.Linear(width, width), nn.Softplus())
        self.net = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x: Tensor, time: float) -> Tensor:
        return self.net(torch.cat([x, torch.full_like(x[..., :1], time)], dim=-1))


def log_density(velocity: nn.Module, x: Tensor, steps: int = STEPS) -> Tensor:
    """Return the logarithm of the flow's density at points (batch, 2): back from t = 1 to 0."""
    change = torch.zeros_like(x[:, 0])
    for step in range(steps):
        half = x - velocity(x, 1 - step / steps) / (2 * steps)
        time = 1 - (step + 0.5) / steps
        at = lambda p, time=time: velocity(p, time)  # noqa: E731
        change = change + vmap(jacrev(at))(half).diagonal(dim1=1, dim2=2).sum(1) / steps
        x = x - at(half) / steps
    return -0.5 * x.square().sum(1) - math.log(2 * math.pi) - change


def exact_log_density(x: Tensor) -> Tensor:
    """Return that of the data at points (batch, 2)."""
    powers = -(x[:, None] - CENTRES).square().sum(2) / (2 * WIDTH**2)
    return powers.logsumexp(1) - math.log(6 * 2 * math.pi * WIDTH**2)


@optimize_nested
def loss(velocity: nn.Module, x: Tensor) -> Tensor:
    """Return the negative log-likelihood of points (batch, 2), in nats per point."""
    return -log_density(velocity, x).mean()


def draw_batch(count: int) -> tuple[Tensor]:
    """Draw points (count, 2) of the data."""
    return (CENTRES[torch.randint(6, (count,))] + WIDTH * torch.randn(count, 2),)


@torch.no_grad()
def draw(velocity: nn.Module, history: list[float], path: str) -> str:
    """Draw points on their way, and the loss; return the divergence from the data's density."""
    (x,) = draw_batch(4000)
    entropy = -exact_log_density(x).mean().item()
    distance = -log_density(velocity, x, 4 * STEPS).mean().item() - entropy
    figure, axes = pictures.panels("A flow from noise to data", (0.8, 0.8, 0.8, 0.8, 1.1), 3.9)
    points, count = torch.randn(2000, 2), 24
    colours = torch.atan2(*points.T)
    for step in range(count + 1):
        if step % (count // 3) == 0:
            panel = axes[step // (count // 3)]
            panel.scatter(*points.T, c=colours, s=2, cmap="twilight", rasterized=True)
            limits = {"xlim": (-3.4, 3.4), "ylim": (-3.4, 3.4), "aspect": "equal"}
            panel.set(title=f"t = {step / count:.2f}", xticks=[], yticks=[], **limits)
        half = points + velocity(points, step / count) / (2 * count)
        points = points + velocity(half, (step + 0.5) / count) / count
    axes[4].plot(history, linewidth=0.7, label="flow")
    axes[4].axhline(entropy, color="black", linestyle="--", linewidth=1, label="entropy of data")
    title = f"negative log-likelihood: entropy + {distance:.3f}"
    pictures.plain(axes[4], title=title, xlabel="training step", ylabel="nats")
    pictures.save(figure, path)
    return f"Kullback–Leibler divergence of the flow from the data: {distance:.3f} nats"


STUDY = Study(
    *("a continuous normalising flow with exact trace", "flow_exact.png"),
    *(loss, Velocity, draw_batch, draw),
    points=512,
    steps=(1500, 6000),
)

if __name__ == "__main__":
    STUDY.run()
