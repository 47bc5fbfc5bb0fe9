"""The program: `python -m examples.benchmark --help`."""

import re
import tempfile
from pathlib import Path

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.benchmark.chart import draw
from examples.benchmark.forms import FIRST_STEPS, columns_of
from examples.benchmark.page import page
from examples.benchmark.processes import Died, first_steps, run_case
from examples.benchmark.results import Results, machine
from examples.workloads import WORKLOADS, Case, Workload
from rewriter.files import write_whole

DOCS = Path(__file__).resolve().parents[2] / "docs"
WARM_UP = 2
console = Console(stderr=True)


@click.command()
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([w.name for w in WORKLOADS]),
    help="A workload (several times); all without.",
)
@click.option("--case", "case_names", multiple=True, help="A case by its name (several times).")
@click.option(
    "--quick",
    is_flag=True,
    help="One case of each workload that compiles fast, or is named; 5 rounds, no first steps.",
)
@click.option("--full", is_flag=True, help="The sizes for a GPU.")
@click.option("--rounds", type=click.IntRange(1), help="Timed steps of each form. [default: 20]")
@click.option(
    "--first-steps/--no-first-steps",
    default=None,
    help="Measure first steps too, in processes of their own. [default: unless quick]",
)
@click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), help="[default: the GPU if there is one]"
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default=DOCS / "benchmarks.md",
    help="The page; the measurements and the charts lie beside it. [default: docs/benchmarks.md]",
)
def main(
    only: tuple[str, ...],
    case_names: tuple[str, ...],
    quick: bool,
    full: bool,
    rounds: int | None,
    first_steps: bool | None,
    device: str | None,
    out: Path,
) -> None:
    """Time every workload as written, compiled, and optimized.

    What this machine has measured before is kept for the cases that are not measured now, and so
    is what other machines have. Each case is written as soon as it is done.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    chosen = [w for w in WORKLOADS if w.name in only or not (only or (quick and w.compiles_long))]
    cases = [
        (workload, case)
        for workload in chosen
        for case in (workload.cases(full)[:1] if quick else workload.cases(full))
        if not case_names or case.name in case_names
    ]
    if not cases:
        raise click.UsageError("there is no such case; leave --case out to see them all run")
    sizes = ["--device", device, *(["--full"] if full else [])]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        whole = progress.add_task("cases", total=len(cases))
        for workload, case in cases:
            measure_case(
                Results(out.with_suffix(".json")),
                machine(device, full=full),
                workload,
                case,
                sizes=sizes,
                rounds=rounds or (5 if quick else 20),
                with_first_steps=not quick if first_steps is None else first_steps,
                progress=progress,
            )
            write(Results(out.with_suffix(".json")), out)
            progress.advance(whole)
    console.print(f"wrote {out}", highlight=False)


def measure_case(
    results: Results,
    name: str,
    workload: Workload,
    case: Case,
    *,
    sizes: list[str],
    rounds: int,
    with_first_steps: bool,
    progress: Progress,
) -> None:
    """Measure one case into this machine's section, and save it."""
    title, columns = f"{workload.name}, {case.name}", columns_of(case)
    compiled = [*(column for column in columns if column in "CJO"), *FIRST_STEPS]
    turns = len(columns) + ("J" in columns)  # E takes turns with JAX once more
    total = turns * (rounds + WARM_UP + 2) + 2 * len(compiled) * with_first_steps
    task = progress.add_task(title, total=total)

    def on_step(column: str) -> None:
        progress.update(task, advance=1, description=f"{title}: {column}")

    section, names = results.section(name), (workload.name, case.name)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shared = {"sizes": sizes, "cache": Path(folder), "on_step": on_step}
        if with_first_steps:
            section.first_steps[title] = first_steps(*names, columns=compiled, **shared)
        try:
            section.rows[title] = run_case(*names, columns=columns, rounds=rounds, **shared)
        except Died as death:
            console.print(f"{title}: {death}", markup=False)
    results.save()
    progress.update(task, total=1, completed=1, description=title)


def write(results: Results, out: Path) -> None:
    """Write the page and the charts of what is known."""

    def chart_of(name: str) -> str:
        return f"{out.stem}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.svg"

    measured = {name: section for name, section in results.sections.items() if section.rows}
    for name, section in measured.items():
        rows = sorted(section.rows.values(), key=lambda row: row.number)
        draw(name, rows, out.parent / chart_of(name))
    if measured:
        write_whole(out, page(measured, chart_of))


if __name__ == "__main__":
    main()
