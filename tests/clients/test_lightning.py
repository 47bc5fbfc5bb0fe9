"""Lightning's trainer takes the steps that a plain loop takes on the loss as written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewriter import optimize_nested
from tests.clients.common import example

poisson_lightning = example("pytorch_lightning", "poisson_lightning")
poisson = poisson_lightning.poisson

pytestmark = pytest.mark.filterwarnings(
    "ignore:The 'train_dataloader' does not have many workers",
    "ignore:.*isinstance\\(treespec, LeafSpec\\). is deprecated",
)

STEPS = 5


def test_steps_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(0)
    points = torch.rand(10, 2, dtype=torch.float64)
    losses = []
    for by_lightning in (True, False):
        torch.manual_seed(1)
        net = poisson.Membrane(width=8).double()
        if by_lightning:
            fast = optimize_nested(poisson.loss.as_written, backend="eager")
            solver = poisson_lightning.Solver(net, fast, STEPS)
            poisson_lightning.train(solver, points, batch=len(points), progress=False)
            assert len(fast.steps) == 1
            losses.append(solver.history)
        else:
            loss = poisson.loss.as_written
            losses.append(poisson.training.minimise(net, loss, (points,), "adam", STEPS))
    assert len(losses[0]) == STEPS
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


def test_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["--backend", "eager", "--points", "12", "--steps", "3", "--out", "picture.png"]
    poisson_lightning.main(arguments)
    printed = capsys.readouterr().out
    for words in ("nested derivative", "relative L2 error", "picture: picture.png"):
        assert words in printed
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
