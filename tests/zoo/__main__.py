"""Measure the losses of the zoo, and write the page: `python -m tests.zoo --help`."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click

from rewriter.files import write_whole
from tests.zoo.page import page
from tests.zoo.row import Loss
from tests.zoo.table import LOSSES

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = 0.02  # seconds that a form is timed for in its turn, at least
LIMIT = 600.0
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@click.command()
@click.argument("names", nargs=-1)
@click.option("--times/--no-times", default=True, help="Time each loss beside itself as written.")
@click.option("--rounds", default=15, help="Turns of each form.")
@click.option("--backend", default="inductor", type=click.Choice(["inductor", "eager"]))
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DOCS / "zoo.md",
    help="The page; the measurements lie beside it.",
)
def main(names: tuple[str, ...], times: bool, rounds: int, backend: str, out: Path) -> None:
    """Check all losses of the zoo, or those of these names, time them, and write the page.

    What was measured before is kept for the losses that are not measured now.
    """
    known = {row.name for row in LOSSES}
    if unknown := set(names) - known:
        raise click.UsageError(f"no such loss: {', '.join(sorted(unknown))}")
    path = out.with_suffix(".json")
    records = json.loads(path.read_text()) if path.exists() else {}
    records = {name: record for name, record in records.items() if name in known}
    for row in LOSSES:
        if names and row.name not in names:
            continue
        record = checked(row)
        before = records.get(row.name, {})
        kept = {"gain": before["gain"]} if "gain" in before else {}
        records[row.name] = record | (timed(row, rounds, backend) if times else kept)
        click.echo(_line(row.name, records[row.name]))
        write_whole(path, json.dumps(records, indent=1) + "\n")
        write_whole(out, page(LOSSES, records))


def _line(name: str, record: dict[str, Any]) -> str:
    gain = f"{record['gain']:.2f} ×" if record.get("gain") else ""
    said = "; ".join(record["wrong"]) or record["reason"]
    return f"{name:30} {record['way']:10} {record['graphs']} {gain:8} {said[:150]}"


def checked(row: Loss) -> dict[str, Any]:
    """Return what is found of a loss; that its process died is wrong too."""
    command = [sys.executable, "-m", "tests.zoo.one", "check", row.name]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return _dead(f"more than {LIMIT:.0f} s")
    if done.returncode:
        return _dead((done.stderr.strip().splitlines() or [f"code {done.returncode}"])[-1])
    record = json.loads(done.stdout.splitlines()[-1])
    return record | {"reason": record["reason"].replace(f"{ROOT}/", "")}


def _dead(why: str) -> dict[str, Any]:
    return {"way": "–", "graphs": 0, "reason": why, "wrong": [why]}


def timed(row: Loss, rounds: int, backend: str) -> dict[str, float]:
    """Return how many of our steps take as much processor time as one as written: the median over
    rounds, in which the two forms take turns, each in a process of its own."""
    with ExitStack() as stack:
        written, ours = (
            stack.enter_context(_serving(form, row.name, backend)) for form in ("written", "ours")
        )
        steps = max(1, int(BLOCK / max(_answer(written), 1e-6)))
        _answer(ours)
        ratios = []
        for _ in range(rounds):
            seconds = []
            for process in (written, ours):
                assert process.stdin is not None
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
                seconds.append(_answer(process))
            ratios.append(seconds[0] / seconds[1])
    return {"gain": statistics.median(ratios)}


@contextmanager
def _serving(form: str, name: str, backend: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.zoo.one", form, name, backend]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.kill()


def _answer(process: subprocess.Popen[str]) -> float:
    assert process.stdout is not None
    for line in process.stdout:  # a loss may print
        if line.startswith('{"seconds"'):
            return json.loads(line)["seconds"]
    raise click.ClickException("a process that measures ended")


if __name__ == "__main__":
    main()
