"""Solve the viscous Burgers equation with a physics-informed network; see what it costs.

    u_t + u u_x - ν u_xx = 0,  x in [-1, 1], t in [0, 1],  u(x, 0) = -sin(πx),  u(±1, t) = 0

with ν = 0.01/π. Run `python examples/burgers.py --quick` (about two minutes on two cores), or leave
out `--quick` for a long training. You will see the report on the loss, the training, the error
against the exact Cole–Hopf solution, and a table with the time per step of the loss as written,
under torch.compile, and under optimize_nested. The picture `burgers.png` shows the solution, its
error and the loss curve.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import side_by_side
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from side_by_side import console
from torch import Tensor, nn

from rewriter import optimize_nested

VISCOSITY = 0.01 / math.pi
METHODS = {"adam": "Adam", "lbfgs": "L-BFGS"}


@optimize_nested
def loss(net: nn.Module, points: Tensor, data_points: Tensor, data_values: Tensor) -> Tensor:
    """Add the mean squares of the residual at points (batch, 2) and of the mismatch to the data.

    A point is (x, t) and requires grad; data points have shape (data, 2), values (data, 1).
    """
    u = net(points)
    gradient = torch.autograd.grad(u, points, torch.ones_like(u), create_graph=True)[0]
    u_x, u_t = gradient[:, 0:1], gradient[:, 1:2]
    second = torch.autograd.grad(u_x, points, torch.ones_like(u_x), create_graph=True)[0]
    residual = u_t + u * u_x - VISCOSITY * second[:, 0:1]
    mismatch = net(data_points) - data_values
    return residual.square().mean() + mismatch.square().mean()


def make_network(width: int = 20, depth: int = 8) -> nn.Sequential:
    """Build the network (batch, 2) → (batch, 1) with `depth` hidden tanh layers."""
    sizes = itertools.pairwise([2] + [width] * depth)
    hidden = [layer for size in sizes for layer in (nn.Linear(*size), nn.Tanh())]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def make_points(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw points (count, 2) that require grad, data points (400, 2) and their values (400, 1)."""
    points = torch.rand(count, 2) * torch.tensor([2.0, 1.0]) - torch.tensor([1.0, 0.0])
    x = torch.rand(200, 1) * 2 - 1
    start = torch.cat([x, torch.zeros(200, 1)], dim=1)
    walls = torch.cat([torch.tensor([[-1.0], [1.0]]).repeat(100, 1), torch.rand(200, 1)], dim=1)
    values = torch.cat([-torch.sin(math.pi * x), torch.zeros(200, 1)])
    return points.requires_grad_(), torch.cat([start, walls]), values


def exact_solution(x: np.ndarray, t: np.ndarray, nodes: int = 100) -> np.ndarray:
    """Evaluate the Cole–Hopf solution in float64 at positions x and times t ≥ 0 that broadcast.

    With y = x - 2 √(νt) z and f(y) = exp(-cos(πy) / 2πν), the integrals over the heat kernel,

        u = -∫ sin(πy) f(y) exp(-z²) dz  /  ∫ f(y) exp(-z²) dz,

    are Gauss–Hermite sums (Basdevant et al., Computers & Fluids 14, 1986). f runs from exp(-50) to
    exp(50); the exponents are shifted by their largest, which cancels in the quotient.
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    x, t = np.broadcast_arrays(np.asarray(x, dtype=np.float64), np.asarray(t, dtype=np.float64))
    y = x[..., None] - 2 * np.sqrt(VISCOSITY * t)[..., None] * z
    exponents = np.log(weights) - np.cos(math.pi * y) / (2 * math.pi * VISCOSITY)
    terms = np.exp(exponents - exponents.max(axis=-1, keepdims=True))
    return -(np.sin(math.pi * y) * terms).sum(axis=-1) / terms.sum(axis=-1)


def check_exact_solution() -> float:
    """Return the largest error of the exact solution, after asserting that it is below 1e-9.

    Known are the values at t = 0 and at the walls; elsewhere, a quadrature with more nodes.
    """
    x, t = np.linspace(-1, 1, 101)[:, None], np.linspace(0, 1, 51)
    errors = [
        exact_solution(x, np.zeros(1)) + np.sin(math.pi * x),
        exact_solution(np.array([[-1.0], [1.0]]), t),
        exact_solution(x, t) - exact_solution(x, t, nodes=160),
    ]
    worst = max(float(np.abs(error).max()) for error in errors)
    assert worst < 1e-9, f"the exact solution is off by {worst:.1e}; expected less than 1e-9"
    return worst


@dataclass(frozen=True)
class Field:
    """Hold the exact and the predicted u, shape (X, T), at positions x (X,) and times t (T,)."""

    x: np.ndarray
    t: np.ndarray
    exact: np.ndarray
    predicted: np.ndarray

    @property
    def error(self) -> float:
        """Return the relative L2 error of the prediction."""
        return float(np.linalg.norm(self.predicted - self.exact) / np.linalg.norm(self.exact))


def evaluate(net: nn.Module) -> Field:
    """Evaluate the network and the exact solution on a grid of 257 positions and 101 times."""
    x, t = np.linspace(-1, 1, 257), np.linspace(0, 1, 101)
    grid = np.stack(np.meshgrid(x, t, indexing="ij"), axis=-1)
    with torch.no_grad():
        predicted = net(torch.tensor(grid, dtype=torch.float32))[..., 0]
    return Field(x, t, exact_solution(grid[..., 0], grid[..., 1]), predicted.double().numpy())


def train(
    net: nn.Module,
    objective: Callable[..., Tensor],
    data: Sequence[Tensor],
    method: str,
    steps: int,
) -> list[float]:
    """Minimise objective(net, *data) by "adam" or "lbfgs"; return the loss of each evaluation.

    `steps` counts evaluations of the loss, those of the line searches of L-BFGS included.
    """
    history: list[float] = []
    with side_by_side.progress_bar() as progress:
        task = progress.add_task(f"{METHODS[method]:7}", total=steps, status="")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = objective(net, *data)
            value.backward()
            history.append(value.item())
            progress.update(
                task, completed=min(len(history), steps), status=f"loss {history[-1]:.2e}"
            )
            return value

        if method == "adam":
            optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(steps):
                optimizer.step(closure)
                schedule.step()
            return history
        # One call of step is the whole minimisation, however small the steps get.
        optimizer = torch.optim.LBFGS(
            net.parameters(),
            max_iter=steps,
            max_eval=steps,
            history_size=50,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)
    return history


def draw(field: Field, histories: dict[str, list[float]], path: str) -> None:
    """Draw the solution with exact contours, the absolute error and the loss curve into a file."""
    figure = Figure(figsize=(15, 4.4), layout="constrained")
    figure.suptitle("Burgers equation, ν = 0.01/π, by a physics-informed network")
    left, middle, right = figure.subplots(1, 3)
    style = {"shading": "gouraud", "rasterized": True}
    image = left.pcolormesh(
        field.t, field.x, field.predicted, cmap="RdBu_r", vmin=-1, vmax=1, **style
    )
    figure.colorbar(image, ax=left, label="u")
    levels = np.linspace(-0.9, 0.9, 10)
    lines = {"colors": "black", "linewidths": 0.7, "linestyles": "solid"}
    left.contour(field.t, field.x, field.exact, levels, **lines)
    left.set(title="network (colours), exact (lines)", xlabel="time t", ylabel="position x")

    distance = np.abs(field.predicted - field.exact)
    scale = LogNorm(vmin=1e-5, vmax=1, clip=True)
    image = middle.pcolormesh(field.t, field.x, distance, cmap="magma", norm=scale, **style)
    figure.colorbar(image, ax=middle, label="|u − exact|")
    title = f"absolute error (relative L2: {field.error:.2%})"
    middle.set(title=title, xlabel="time t", ylabel="position x")

    start = 0
    for method, history in histories.items():
        steps = range(start, start + len(history))
        right.semilogy(steps, history, linewidth=1.2, label=METHODS[method])
        start += len(history)
    right.set(title="loss", xlabel="evaluations of the loss and its gradient")
    right.grid(alpha=0.3)
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False)
    figure.savefig(path, dpi=140)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, judge by the exact solution, time the loss evaluated in three ways, and draw."""
    parser = side_by_side.option_parser("PINN for the viscous Burgers equation", "burgers.png")
    parser.add_argument("--optimizer", choices=["adam", "lbfgs", "both"], default="both")
    parser.add_argument("--points", type=int, help="collocation points (10000, quick: 5000)")
    options = parser.parse_args(arguments)
    steps = options.steps or (1800 if options.quick else 12000)
    torch.manual_seed(options.seed)
    net = make_network()
    data = make_points(options.points or (5000 if options.quick else 10000))
    console.print(f"exact solution: passes its check, error {check_exact_solution():.0e}")

    fast = optimize_nested(loss.as_written, backend=options.backend)
    inputs = [*net.parameters(), data[0]]
    eager = side_by_side.as_written(loss.as_written, inputs)
    compiled = side_by_side.compiled_as_written(loss.as_written, inputs, options.backend)
    ours = side_by_side.optimized(fast, inputs)
    contenders = [eager, compiled, ours]
    side_by_side.take_first_steps(contenders, net, *data, backend=options.backend)
    report = fast.explain(net, *data)
    print(report)

    shares = (
        {"adam": 1 / 6, "lbfgs": 5 / 6} if options.optimizer == "both" else {options.optimizer: 1}
    )
    histories = {
        method: train(net, fast, data, method, math.ceil(share * steps))
        for method, share in shares.items()
    }
    field = evaluate(net)
    console.print(f"relative L2 error against the exact solution: {field.error:.2%}")

    side_by_side.measure(contenders, net, *data, rounds=options.rounds)
    eager.flops, ours.flops = report.flops_as_written, report.flops
    side_by_side.print_comparison(f"time per step, {len(data[0])} points", contenders)
    draw(field, histories, options.out)
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
