"""Solve the viscous Burgers equation with a physics-informed network; see what it costs.

    u_t + u u_x - ν u_xx = 0,  x in [-1, 1], t in [0, 1],  u(x, 0) = -sin(πx),  u(±1, t) = 0

with ν = 0.01/π. Run `python examples/burgers.py --quick` (about two minutes on two cores), or leave
out `--quick` for a long training. You will see the report on the loss, a table with its time per
step as written, under torch.compile and under optimize_nested, the training, and the error against
the exact Cole–Hopf solution. The picture `burgers.png` shows the solution, its error and the loss
curve.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pictures
import side_by_side
import torch
import training
from side_by_side import console
from torch import Tensor, nn

from rewriter import optimize_nested

VISCOSITY = 0.01 / math.pi


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


def make_args() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Make what the loss takes: for `optimize-nested explain examples/burgers.py:loss`."""
    return make_network(), *make_points(1000)


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


def draw(field: Field, histories: dict[str, list[float]], path: str) -> None:
    """Draw the solution with exact contours, the absolute error and the loss curve into a file."""
    figure, (left, middle, right) = pictures.panels(
        "Burgers equation, ν = 0.01/π, by a physics-informed network", (1.2, 1.2, 1.2)
    )
    pictures.field(left, field.t, field.x, field.predicted, limit=1, label="u")
    levels = np.linspace(-0.9, 0.9, 10)
    left.contour(field.t, field.x, field.exact, levels, colors="black", linewidths=0.6)
    left.set(title="network (colours), exact (lines)", xlabel="time t", ylabel="position x")
    difference = np.abs(field.predicted - field.exact)
    pictures.distance(middle, field.t, field.x, difference, (-5, 0), label="|u − exact|")
    title = f"absolute error (relative L2: {field.error:.2%})"
    middle.set(title=title, xlabel="time t", ylabel="position x")
    pictures.curves(right, histories, title="loss", xlabel="evaluations of loss and gradient")
    pictures.save(figure, path)


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
    side_by_side.compare(
        f"time per step, {len(data[0])} points",
        *(fast, [*net.parameters(), data[0]], net, *data),
        options=options,
    )
    shares = (
        {"adam": 1 / 6, "lbfgs": 5 / 6} if options.optimizer == "both" else {options.optimizer: 1}
    )
    histories = {
        training.METHODS[method]: training.minimise(
            net, fast, data, method, math.ceil(share * steps)
        )
        for method, share in shares.items()
    }
    field = evaluate(net)
    console.print(f"relative L2 error against the exact solution: {field.error:.2%}")

    draw(field, histories, options.out)
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
