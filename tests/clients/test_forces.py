"""Forces from ASE's effective medium theory: one compilation for all numbers of neighbours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rewriter import optimize_nested
from tests.clients.common import example
from tests.oracle import assert_same, outcome

forces = example("ase", "forces")


@pytest.fixture
def cells() -> list:
    torch.set_default_dtype(torch.float64)
    return [forces.make_cell(seed) for seed in range(6)]


def test_one_compilation_gives_the_loss_as_written(cells: list) -> None:
    torch.manual_seed(0)
    net = forces.Potential(channels=4, waves=4, rounds=1)
    fast = optimize_nested(forces.loss.as_written, backend="eager", dynamic=True, strict=True)
    counts = set()
    # Dynamo takes sizes for one and the same that are equal at first: not two or three cells.
    for chosen in (cells[:4], cells[1:5], cells):
        arguments = forces.joined(chosen)
        counts.add(arguments[2].shape[1])
        expected = outcome(forces.loss.as_written, [net], arguments, {})
        assert_same(outcome(fast, [net], arguments, {}), expected)
    assert len(counts) == 3
    assert len(fast.steps) == 1
    report = fast.explain(net, *forces.joined(cells))
    assert [site.status for site in report.sites] == ["rewritten"]
    assert 0 < report.flops <= report.flops_as_written


def test_neighbours_are_those_within_the_cutoff(cells: list) -> None:
    """Distances go through the faces of the cell; each pair is there in both directions."""
    for cell in cells:
        source, target = cell.pairs
        distances = (cell.positions[target] + cell.shifts - cell.positions[source]).norm(dim=1)
        assert distances.min() > 1 and distances.max() <= forces.CUTOFF
        assert cell.shifts.any()
        assert torch.equal(torch.bincount(source), torch.bincount(target))


def test_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--cells", "6", "--batch", "1", "--steps", "3"]
    forces.main(["--backend", "eager", "--rounds", "2", *sizes, "--out", "picture.png"])
    printed = capsys.readouterr().out
    for words in (
        "as written (eager)",
        "optimize_nested",
        "1 compilation(s)",
        "error of the forces",
    ):
        assert words in printed
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")
    torch.compiler.reset()
