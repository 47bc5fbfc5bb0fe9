"""The program of the examples that train on new points in each step, and have a known solution."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import side_by_side
import torch
import training
from side_by_side import console
from torch import Tensor, nn

from rewriter import OptimizedLoss, optimize_nested


@dataclass(frozen=True)
class Study:
    """A loss, what it takes, and who judges the network.

    Attributes:
        about: What is computed, in words.
        picture: The picture's file.
        loss: The decorated loss, of the network and a batch.
        make_network: Builds the network.
        draw_batch: The number of points → the loss's other arguments.
        draw: Network, losses of the training and file → draws the picture, returns the verdict.
        points: In a batch.
        steps: Of Adam, with ``--quick`` and without.
        rate: The first learning rate.
    """

    about: str
    picture: str
    loss: OptimizedLoss
    make_network: Callable[[], nn.Module]
    draw_batch: Callable[[int], tuple[Tensor, ...]]
    draw: Callable[[nn.Module, list[float], str], str]
    points: int
    steps: tuple[int, int]
    rate: float = 3e-3

    def run(self, arguments: Sequence[str] | None = None) -> None:
        """Time the loss, train, judge and draw."""
        parser = side_by_side.option_parser(self.about, self.picture)
        parser.add_argument("--points", type=int, default=self.points, help="default: %(default)s")
        options = parser.parse_args(arguments)
        torch.manual_seed(options.seed)
        net = self.make_network()
        fast = optimize_nested(self.loss.as_written, backend=options.backend)
        taken: tuple[Any, ...] = (net, *self.draw_batch(options.points))
        title = f"time per step, {options.points} points"
        side_by_side.compare(title, fast, net.parameters(), *taken, options=options, stock=False)
        quick, long = self.steps
        history = training.descend(
            "Adam",
            torch.optim.Adam(net.parameters(), lr=self.rate),
            lambda _: fast(net, *self.draw_batch(options.points)),
            options.steps or (quick if options.quick else long),
        )
        console.print(self.draw(net, history, options.out), markup=False)
        console.print(f"picture: {options.out}", markup=False)
