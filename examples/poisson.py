"""Solve Poisson's equation on a square with a physics-informed network, judged by the solution.

    -Δu = f on [0, 1]²,  u = 0 on its sides,  with f such that u = sin(πx) sin(2πy)

Run `python examples/poisson.py --quick`, or leave out `--quick` for a longer training. You will see
the report on the loss, a table with its time per step as written and under optimize_nested, the
training and the error. The picture `poisson.png` shows the solution, its error and the loss curve.

Second derivatives are written in `torch.func`, as a Hessian per point. torch.compile is not in the
table: PyTorch 2.13 fails on such a loss with an assertion of its own, in the midst of forward mode.
"""

import math
from collections.abc import Sequence

import numpy as np
import pictures
import side_by_side
import torch
import training
from side_by_side import console
from torch import Tensor, nn
from torch.func import hessian, vmap

from rewriter import optimize_nested


class Membrane(nn.Module):
    """A function on the square that is zero on its sides: points (…, 2) → values (…)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, width),
            nn.Tanh(),
            nn.Linear(width, 1),
        )

    def forward(self, points: Tensor) -> Tensor:
        x, y = points[..., 0], points[..., 1]
        return x * (1 - x) * y * (1 - y) * self.net(points)[..., 0]


def exact_solution(points: Tensor) -> Tensor:
    """Evaluate sin(πx) sin(2πy) at points (…, 2)."""
    return torch.sin(math.pi * points[..., 0]) * torch.sin(2 * math.pi * points[..., 1])


def source(points: Tensor) -> Tensor:
    """Evaluate f = -Δu = 5π² u of the exact solution at points (…, 2)."""
    return 5 * math.pi**2 * exact_solution(points)


@optimize_nested
def loss(net: nn.Module, points: Tensor) -> Tensor:
    """Return the mean square of the residual Δu + f at points, shape (batch, 2)."""
    hessians = vmap(hessian(net))(points)
    laplacians = hessians.diagonal(dim1=1, dim2=2).sum(dim=1)
    return (laplacians + source(points)).square().mean()


def evaluate(net: nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Return a grid's 101 coordinates, u on it, predicted and exact, and the relative L2 error."""
    x = torch.linspace(0, 1, 101)
    grid = torch.stack(torch.meshgrid(x, x, indexing="xy"), dim=-1)
    with torch.no_grad():
        predicted, exact = net(grid), exact_solution(grid)
    error = (predicted - exact).norm() / exact.norm()
    return x.numpy(), predicted.numpy(), exact.numpy(), error.item()


def draw(net: nn.Module, histories: dict[str, list[float]], path: str) -> None:
    """Draw the solution with exact contours, the absolute error and the loss curve into a file."""
    x, predicted, exact, error = evaluate(net)
    figure, (left, middle, right) = pictures.panels(
        "Poisson's equation by a physics-informed network", (1.1, 1.1, 1)
    )
    pictures.field(left, x, x, predicted, limit=1, label="u")
    left.contour(x, x, exact, np.linspace(-0.9, 0.9, 10), colors="black", linewidths=0.6)
    left.set(title="network (colours), exact (lines)", xlabel="x", ylabel="y", aspect="equal")
    power = math.ceil(math.log10(error))
    difference = np.abs(predicted - exact)
    pictures.distance(middle, x, x, difference, (power - 3, power), label="|u − exact|")
    middle.set(title=f"error (relative L2: {error:.1e})", xlabel="x", ylabel="y", aspect="equal")
    pictures.curves(right, histories, title="loss", xlabel="evaluations of loss and gradient")
    pictures.save(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the loss, train, judge by the exact solution, and draw."""
    parser = side_by_side.option_parser("PINN for Poisson's equation", "poisson.png")
    parser.add_argument("--points", type=int, default=1000, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    net, points = Membrane(), torch.rand(options.points, 2)
    fast = optimize_nested(loss.as_written, backend=options.backend)
    side_by_side.compare(
        f"time per step, {len(points)} points",
        *(fast, net.parameters(), net, points),
        options=options,
        stock=False,
    )
    steps = options.steps or (800 if options.quick else 4000)
    shares = {"adam": steps // 4, "lbfgs": steps - steps // 4}
    histories = {
        training.METHODS[method]: training.minimise(net, fast, (points,), method, share)
        for method, share in shares.items()
    }
    console.print(f"relative L2 error against the exact solution: {evaluate(net)[-1]:.1e}")
    draw(net, histories, options.out)
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
