"""Learn the score ∇ log p of a distribution in the plane from its samples alone, in two ways.

Exact score matching (Hyvärinen, 2005) takes the mean of ½|s|² + tr ∂s/∂x; the sliced one (Song,
Garg, Shi, Ermon, 2019) takes ½|s|² + v·(∂s/∂x)v along random directions v. Both are written with
the full Jacobian of each point; of it the trace and one product are all that is computed.

Run `python examples/scores.py --quick`: the report on the loss, its time per step, the training and
the distance to the true score, and `scores.png`.
"""

import pictures
import torch
from study import Study
from torch import Tensor, nn
from torch.func import jacrev, vmap

from rewriter import optimize_nested

CENTRES = torch.tensor([[-1.5, -0.8], [1.5, -0.8], [0.0, 1.6]])
WIDTH = 0.6


def exact_score(x: Tensor) -> Tensor:
    """Evaluate ∇ log p of three equal normal distributions, at points (batch, 2)."""
    away = CENTRES - x[:, None]
    weights = (-away.square().sum(2) / (2 * WIDTH**2)).softmax(1)
    return (weights[:, :, None] * away).sum(1) / WIDTH**2


class Scores(nn.Module):
    """Two networks (batch, 2) → (batch, 2), one for each way of matching."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        layers = lambda: (nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())  # noqa: E731
        self.exact = nn.Sequential(*layers(), nn.Linear(width, 2))
        self.sliced = nn.Sequential(*layers(), nn.Linear(width, 2))


@optimize_nested
def loss(nets: Scores, x: Tensor, v: Tensor) -> Tensor:
    """Add the two losses, at samples x and for directions v of variance one, both (batch, 2)."""
    traces = vmap(jacrev(nets.exact))(x).diagonal(dim1=1, dim2=2).sum(1)
    products = torch.einsum("ni,nij,nj->n", v, vmap(jacrev(nets.sliced))(x), v)
    norms = nets.exact(x).square().sum(1) + nets.sliced(x).square().sum(1)
    return (0.5 * norms + traces + products).mean()


def draw_batch(count: int) -> tuple[Tensor, Tensor]:
    """Draw samples, and directions of random signs, both (count, 2)."""
    x = CENTRES[torch.randint(3, (count,))] + WIDTH * torch.randn(count, 2)
    return x, torch.randn(count, 2).sign()


@torch.no_grad()
def draw(nets: Scores, history: list[float], path: str) -> str:
    """Draw the true score and both learned ones; return how far these are from it."""
    x, _ = draw_batch(8000)
    figure, axes = pictures.panels("The score of three normal distributions", (1, 1, 1, 1.1), 4.0)
    line = torch.linspace(-3, 3, 15)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), dim=-1).flatten(0, 1)
    fields = {"true": exact_score, "exact matching": nets.exact, "sliced matching": nets.sliced}
    errors = {}
    for panel, (name, field) in zip(axes, fields.items(), strict=False):
        errors[name] = ((field(x) - exact_score(x)).norm() / exact_score(x).norm()).item()
        panel.plot(*x[:2000].T, ",", color="0.6", rasterized=True)
        panel.quiver(*grid.T, *field(grid).T, angles="xy", scale=100, width=0.005, color="C0")
        title = f"{name}: error {errors[name]:.1e}" if errors[name] else "true score, samples"
        panel.set(title=title, xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal")
        panel.set(xticks=[], yticks=[])
    pictures.plain(axes[3], legend=False, title="sum of both losses", xlabel="training step")
    axes[3].plot(history, linewidth=0.7)
    pictures.save(figure, path)
    return "relative L2 error of the score: " + ", ".join(
        f"{name} {error:.1e}" for name, error in errors.items() if error
    )


STUDY = Study(
    *("score matching in the plane, exact and sliced", "scores.png"),
    *(loss, Scores, draw_batch, draw),
    points=512,
    steps=(3000, 10_000),
)

if __name__ == "__main__":
    STUDY.run()
