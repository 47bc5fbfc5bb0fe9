"""Fit a continuous normalising flow to points in the plane (FFJORD, Grathwohl et al., 2019).

A network is the velocity that carries data at t = 1 to a normal distribution at t = 0. Along the
way the logarithm of the density changes by the divergence of the velocity, which Hutchinson's
estimator ε·(∂v/∂x) ε takes from one vector-Jacobian product; the way is gone in Runge–Kutta steps.
So the loss has four nested derivatives per step. A penalty on the velocity and its Jacobian keeps
the ways straight: few steps are enough then (Finlay et al.: How to train your neural ODE, 2020).

Run `python examples/flow.py --quick`, or leave out `--quick` for a longer training. You will see
the report on the loss, a table with its time per step as written, under torch.compile and under
optimize_nested, and the training. The picture `flow.png` shows data, density and samples.
"""

import math
from collections.abc import Callable, Sequence

import pictures
import side_by_side
import torch
import training
from side_by_side import console
from torch import Tensor, nn
from torch.func import vjp

from rewriter import optimize_nested

STEPS = 4  # of Runge–Kutta
WEIGHT = 0.02  # of the penalty


class Velocity(nn.Module):
    """The velocity (batch, 2) at a time, shape (1,), and points, shape (batch, 2)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 2),
        )

    def forward(self, time: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([x, time.expand(len(x), 1)], dim=1))


def runge_kutta(
    rate: Callable[[Tensor, Tensor], Tensor], state: Tensor, start: float, end: float, steps: int
) -> Tensor:
    """Integrate d(state)/dt = rate(t, state) by the classical method of fourth order."""
    h = (end - start) / steps
    for step in range(steps):
        t = state.new_full((1,), start + step * h)
        k1 = rate(t, state)
        k2 = rate(t + h / 2, state + h / 2 * k1)
        k3 = rate(t + h / 2, state + h / 2 * k2)
        k4 = rate(t + h, state + h * k3)
        state = state + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return state


def log_density(
    velocity: nn.Module, x: Tensor, directions: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """Return the logarithm of the flow's density at points (batch, 2), and what the way there has
    cost: the integral of |v|² + |ε·∂v/∂x|². Both (batch,).

    With directions (batch, 2) of independent signs the former is exact in the mean.
    """

    def rate(t: Tensor, state: Tensor) -> Tensor:
        speed, pullback = vjp(lambda x: velocity(t, x), state[:, :2])
        (row,) = pullback(directions)
        divergence = (row * directions).sum(dim=1, keepdim=True)
        cost = (speed.square() + row.square()).sum(dim=1, keepdim=True)
        return torch.cat([speed, divergence, -cost], dim=1)  # it goes back in time

    end = runge_kutta(rate, torch.cat([x, torch.zeros_like(x)], dim=1), 1.0, 0.0, steps)
    start, change, cost = end[:, :2], end[:, 2], end[:, 3]
    return -0.5 * start.square().sum(dim=1) - math.log(2 * math.pi) + change, cost


@optimize_nested
def loss(velocity: nn.Module, x: Tensor, directions: Tensor) -> Tensor:
    """Add the penalty to the negative log-likelihood of points (batch, 2), in nats per point."""
    logarithm, cost = log_density(velocity, x, directions, STEPS)
    return (WEIGHT * cost - logarithm).mean()


@torch.no_grad()
def exact_log_density(velocity: nn.Module, x: Tensor, steps: int = 12) -> Tensor:
    """Return the logarithm of the density by finer steps, without an estimate, shape (batch,)."""
    # The mean over signs ++ and +- is the divergence itself: what is off the diagonal cancels.
    signs = (x.new_tensor([1.0, 1.0]), x.new_tensor([1.0, -1.0]))
    return sum(log_density(velocity, x, s.expand_as(x), steps)[0] for s in signs) / 2


def draw_batch(count: int) -> tuple[Tensor, Tensor]:
    """Draw points on a pinwheel of five arms, and directions of random signs, both (count, 2)."""
    arm = torch.randint(5, (count,))
    radius, across = 1.0 + 0.3 * torch.randn(count), 0.1 * torch.randn(count)
    angle = arm * (2 * math.pi / 5) + 0.25 * torch.exp(radius)
    along = torch.stack([angle.cos(), angle.sin()], dim=1)
    aside = torch.stack([-angle.sin(), angle.cos()], dim=1)
    points = 2 * (radius[:, None] * along + across[:, None] * aside) / 1.6
    return points, torch.randn(count, 2).sign()


@torch.no_grad()
def draw(velocity: nn.Module, history: list[float], path: str) -> None:
    """Draw data, the density, samples that follow the velocity, and the loss into a file."""
    figure, (data, density, samples, right) = pictures.panels(
        "A continuous normalising flow with Hutchinson's trace", (0.9, 0.9, 0.9, 1.1), height=3.9
    )
    x = torch.linspace(-3.2, 3.2, 121)
    grid = torch.stack(torch.meshgrid(x, x, indexing="xy"), dim=-1).flatten(0, 1)
    values = exact_log_density(velocity, grid).exp().reshape(121, 121)
    density.contourf(x, x, values, 20, cmap="magma")
    density.set(title="density of the flow")
    start = torch.randn(3000, 2)
    found = runge_kutta(lambda t, x: velocity(t, x), start, 0.0, 1.0, 12)
    for axes, points, title in ((data, draw_batch(3000)[0], "data"), (samples, found, "samples")):
        axes.plot(*points.T, ",", color="black", rasterized=True)
        axes.set(title=title)
    for axes in (data, density, samples):
        axes.set(xlim=(-3.2, 3.2), ylim=(-3.2, 3.2), aspect="equal", xticks=[], yticks=[])
    pictures.plain(
        right, legend=False, title="negative log-likelihood + penalty", xlabel="training step"
    )
    right.plot(history, linewidth=0.7)
    pictures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the loss, train, and draw."""
    parser = side_by_side.option_parser("a continuous normalising flow in the plane", "flow.png")
    parser.add_argument("--batch", type=int, default=256, help="points (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    net, fast = Velocity(), optimize_nested(loss.as_written, backend=options.backend)
    side_by_side.compare(
        f"time per step, {options.batch} points",
        *(fast, net.parameters(), net, *draw_batch(options.batch)),
        options=options,
    )
    steps = options.steps or (400 if options.quick else 900)
    optimizer = torch.optim.Adam(net.parameters(), lr=4e-3)
    history = training.descend(
        "Adam", optimizer, lambda _: fast(net, *draw_batch(options.batch)), steps
    )
    fresh = draw_batch(4000)[0]
    likelihood = -exact_log_density(net, fresh).mean().item()
    console.print(f"negative log-likelihood of new points, by finer steps: {likelihood:.3f}")
    draw(net, history, options.out)
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
