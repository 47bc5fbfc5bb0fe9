"""Solve Poisson's equation as `poisson.py` does, with Lightning's trainer in place of the loop.

Nothing is special about a decorated loss: `training_step` returns it. Run
`python examples/poisson_lightning.py --quick` (it needs Lightning: `pip install '.[lightning]'`).
You will see the report on the loss, the training and the error. The picture is
`poisson_lightning.png`.
"""

from collections.abc import Sequence

import poisson
import side_by_side
import torch
from side_by_side import console
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from rewriter import optimize_nested
from rewriter.bench import Loss

try:
    import pytorch_lightning as lightning
    from pytorch_lightning.callbacks import RichProgressBar
except ModuleNotFoundError as error:
    raise SystemExit("This example needs Lightning: pip install '.[lightning]'") from error


class Solver(lightning.LightningModule):
    """A network and what it is trained on.

    Attributes:
        history: The loss at each step.
    """

    def __init__(self, net: nn.Module, objective: Loss, steps: int) -> None:
        super().__init__()
        self.net, self.objective, self.steps = net, objective, steps
        self.history: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (points,) = batch
        value = self.objective(self.net, points)
        self.log("loss", value, prog_bar=True)
        self.history.append(value.item())
        return value

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def train(solver: Solver, points: Tensor, batch: int, progress: bool = True) -> None:
    """Train on batches of the points, shape (count, 2), in their order."""
    trainer = lightning.Trainer(
        max_steps=solver.steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=progress,
        callbacks=[RichProgressBar()] if progress else [],
    )
    trainer.fit(solver, DataLoader(TensorDataset(points), batch_size=batch))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report, train, judge by the exact solution, and draw."""
    parser = side_by_side.option_parser("PINN by Lightning", "poisson_lightning.png")
    parser.add_argument("--points", type=int, default=1000, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    net, points = poisson.Membrane(), torch.rand(options.points, 2)
    fast = optimize_nested(poisson.loss.as_written, backend=options.backend)
    print(fast.explain(net, points))
    solver = Solver(net, fast, options.steps or (1000 if options.quick else 6000))
    train(solver, points, batch=len(points))
    console.print(f"relative L2 error against the exact solution: {poisson.evaluate(net)[-1]:.1e}")
    poisson.draw(net, {"Adam, by Lightning": solver.history}, options.out)
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
