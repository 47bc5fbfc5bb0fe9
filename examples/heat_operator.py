"""Learn the operator that solves the heat equation, by a DeepONet and the equation alone.

    u_t = κ u_xx on [0, 1],  u(0, t) = u(1, t) = 0,  u(x, 0) = f(x) = Σ aₖ sin(kπx)

The network is a product of a branch, for the values of f at sensors, and a trunk, for x and t (Lu
et al., 2021; Wang, Wang, Perdikaris, 2021). Derivatives are taken at each function and point.

Run `python examples/heat_operator.py --quick`: the report on the loss, its time per step, the
training and the error for new functions, and `heat_operator.png`.
"""

import math

import pictures
import torch
from study import Study
from torch import Tensor, nn
from torch.func import grad, vmap

from rewriter import optimize_nested

KAPPA, WAVES, SENSORS, FUNCTIONS = 0.05, 3, 16, 16


def exact_solution(a: Tensor, x: Tensor, t: Tensor | float) -> Tensor:
    """Evaluate Σ aₖ exp(−κ(kπ)²t) sin(kπx) for amplitudes a (…, waves), at x and t (…)."""
    k = math.pi * torch.arange(1, WAVES + 1, dtype=a.dtype)
    decay = torch.exp(-KAPPA * k**2 * torch.as_tensor(t)[..., None])
    return (a * decay * torch.sin(k * x[..., None])).sum(-1)


class DeepONet(nn.Module):
    """Amplitudes (waves,) and a point x, t → the value there; right at t = 0 and on both sides."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.branch = self._layers(SENSORS, width)
        self.trunk = self._layers(2, width)

    def _layers(self, inputs: int, width: int) -> nn.Sequential:
        first, second = nn.Linear(inputs, width), nn.Linear(width, width)
        return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(width, width))

    def forward(self, a: Tensor, x: Tensor, t: Tensor) -> Tensor:
        sensors = exact_solution(a[..., None, :], torch.linspace(0, 1, SENSORS, dtype=a.dtype), 0.0)
        product = (self.branch(sensors) * self.trunk(torch.stack([x, t], dim=-1))).sum(-1)
        return exact_solution(a, x, 0.0) + t * x * (1 - x) * product


@optimize_nested
def loss(net: nn.Module, a: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Return the mean square of u_t − κ u_xx for amplitudes (functions, waves) at every point of x
    and t, both (points,)."""

    def residual(a: Tensor, x: Tensor, t: Tensor) -> Tensor:
        u_xx = grad(grad(net, argnums=1), argnums=1)(a, x, t)
        return grad(net, argnums=2)(a, x, t) - KAPPA * u_xx

    at_points = vmap(residual, (None, 0, 0))
    return vmap(at_points, (0, None, None))(a, x, t).square().mean()


def draw_batch(count: int, functions: int = FUNCTIONS) -> tuple[Tensor, Tensor, Tensor]:
    """Draw amplitudes of size 1/k, and points."""
    a = torch.randn(functions, WAVES) / torch.arange(1, WAVES + 1)
    return a, torch.rand(count), torch.rand(count)


@torch.no_grad()
def draw(net: nn.Module, history: list[float], path: str) -> str:
    """Draw what becomes of two new functions, the errors for many, and the loss."""
    x, count = torch.linspace(0, 1, 101), 200
    times, a = torch.linspace(0, 1, 11), draw_batch(1, count)[0]
    given = a[:, None, None], x.expand(count, 11, 101), times[None, :, None].expand(count, 11, 101)
    found, exact = net(*given), exact_solution(*given)
    errors = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    figure, axes = pictures.panels("The heat equation, learnt as an operator", (1, 1, 0.8, 1))
    for k in range(2):
        for i, colour in zip((0, 3, 10), ("C0", "C1", "C2"), strict=True):
            axes[k].plot(x, exact[k, i], color=colour, linewidth=3, alpha=0.35)
            axes[k].plot(x, found[k, i], color=colour, linewidth=1, label=f"t = {times[i]:.1f}")
        title = f"new function {k + 1}: network (thin), exact"
        pictures.plain(axes[k], title=title, xlabel="x", ylabel="u")
    axes[2].hist(errors.log10().numpy(), bins=20)
    pictures.plain(axes[2], legend=False, title=f"{count} new functions", xlabel="log₁₀ of error")
    pictures.curves(axes[3], {"Adam": history}, title="loss", xlabel="training step")
    pictures.save(figure, path)
    return f"relative L2 error for new functions, median: {errors.median().item():.1e}"


STUDY = Study(
    *("a DeepONet for the heat equation", "heat_operator.png"),
    *(loss, DeepONet, draw_batch, draw),
    points=128,
    steps=(3000, 15_000),
)

if __name__ == "__main__":
    STUDY.run()
