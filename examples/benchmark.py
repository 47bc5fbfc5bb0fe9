"""Time every workload as written, compiled, and optimized; write a table and a chart.

    python -m examples.benchmark --quick             one case of each workload, few rounds
    python -m examples.benchmark --only burgers      the workloads named
    python -m examples.benchmark --full              the sizes for a GPU

The forms take turns in one process: E is the loss as written, eager; C is it under torch.compile
(with trace_autograd_ops); F is the loss in torch.func under torch.compile; O is optimize_nested.
"""

import argparse
import gc
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.workloads import WORKLOADS, Case, Workload
from rewriter import optimize_nested
from rewriter.bench import Contender, compiled_as_written, measure, nothing_compiled_before
from rewriter.naming import named_tensors

DOCS = Path(__file__).resolve().parents[1] / "docs"
COLOURS = {"E": "#9aa0a6", "C": "#56b4e9", "F": "#e69f00", "O": "#009e73"}
console = Console(stderr=True)


@dataclass(frozen=True)
class Row:
    """What was measured of one case."""

    workload: Workload
    case: Case
    contenders: dict[str, Contender]
    flops: dict[str, float]

    @property
    def best_other(self) -> float:
        """Median seconds of the best form that is not ours."""
        found = [t.median for name, t in self.contenders.items() if name != "O" and not t.refusal]
        return min(found)


def run(workload: Workload, case: Case, rounds: int, device: str, on_step: Any) -> Row:
    """Let the forms of one case take turns."""
    args = [moved(value, device) for value in case.args]
    ours = optimize_nested(case.loss, **case.options)
    report = ours.explain(*args)
    forms: dict[str, Any] = {"E": case.loss, "C": compiled_as_written(case.loss)}
    if case.func_form is not None:
        forms["F"] = compiled_as_written(case.func_form)
    forms["O"] = ours
    wanted = [x for x in named_tensors(case.loss, args, {}).values() if x.requires_grad]
    contenders = [Contender(name, form, wanted) for name, form in forms.items()]
    with nothing_compiled_before():
        for contender in contenders:
            on_step(contender.name)
            contender.first_step(*args)
    measure(contenders, *args, rounds=rounds, warm_up=2, on_step=on_step)
    flops = {}
    if case.forward is not None:
        with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
            case.forward()
        unit = counter.get_total_flops()
        flops = {"E": report.flops_as_written / unit, "O": report.flops / unit}
    torch._dynamo.reset()
    gc.collect()
    return Row(workload, case, {c.name: c for c in contenders}, flops)


def moved(value: Any, device: str) -> Any:
    """Return an argument on a device; a leaf stays a leaf."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return value.detach().to(device).requires_grad_()
    return value.to(device)


def table(rows: list[Row]) -> str:
    """Return the measured rows as a table in Markdown."""
    lines = [
        "| # | workload | case | E ms | C ms | F ms | ours ms | over E | over best | FLOPs/F as "
        "written | ours | figure | first step C s | ours s | gradient differs |",
        "|---|---|---|" + "---:|" * 12,
    ]
    for row in rows:
        cells = [str(row.workload.number), row.workload.name, row.case.name]
        for name in ("E", "C", "F", "O"):
            contender = row.contenders.get(name)
            cells.append("" if contender is None else _ms(contender))
        ours, eager = row.contenders["O"], row.contenders["E"]
        cells += [f"{ours.speedup(eager):.2f} ×", f"{row.best_other / ours.median:.2f} ×"]
        cells += [f"{row.flops[n]:.2f}" if n in row.flops else "" for n in ("E", "O")]
        cells.append("" if row.case.flops_over_f is None else f"{row.case.flops_over_f:g}")
        compiled = row.contenders["C"]
        cells += ["–" if compiled.refusal else f"{compiled.first_seconds:.1f}"]
        cells += [f"{ours.first_seconds:.1f}", f"{ours.distance(eager):.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _ms(contender: Contender) -> str:
    return "refused" if contender.refusal else f"{contender.median * 1e3:.2f}"


def page(rows: list[Row], rounds: int) -> str:
    """Return the page with the table, the machine and what the other forms refused."""
    speedups = [row.contenders["O"].speedup(row.contenders["E"]) for row in rows]
    mean = statistics.geometric_mean(speedups)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench`: {rounds} rounds, the forms taking turns in one process; medians. "
        "E is the loss as written, eager; C the same under `torch.compile` with "
        "`trace_autograd_ops`; F its `torch.func` form under `torch.compile`. A step is loss and "
        "gradients. The unit of FLOPs is one forward pass. First steps find nothing compiled "
        "before.",
        "",
        f"torch {torch.__version__}, Python {platform.python_version()}, {device}, "
        f"{torch.get_num_threads()} threads.",
        "",
        "![Speed over eager](benchmarks.svg)",
        "",
        table(rows),
        "",
        f"Geometric mean over eager: {mean:.2f} ×.",
        "",
    ]
    for row in rows:
        for contender in row.contenders.values():
            if contender.refusal:
                lines.append(
                    f"- {row.workload.name}, {row.case.name}, {contender.name}: {contender.refusal}"
                )
    return "\n".join(lines) + "\n"


def draw(rows: list[Row], path: Path) -> None:
    """Draw how much faster than eager each form is."""
    figure = Figure(figsize=(9, 0.55 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(("C", "F", "O")):
        for index, row in enumerate(rows):
            contender = row.contenders.get(name)
            if contender is not None and not contender.refusal:
                speedup = contender.speedup(row.contenders["E"])
                axes.barh(index + 0.27 * (number - 1), speedup, 0.25, color=COLOURS[name])
    axes.axvline(1.0, color=COLOURS["E"], linewidth=1)
    axes.set_yticks(
        range(len(rows)), [f"{r.workload.name}\n{r.case.name}" for r in rows], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the loss as written, eager")
    labels = {"C": "torch.compile", "F": "torch.compile, torch.func form", "O": "optimize_nested"}
    handles = [axes.barh(0, 0, color=COLOURS[name], label=text) for name, text in labels.items()]
    axes.legend(handles=handles, fontsize=8, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=[w.name for w in WORKLOADS], default=None)
    parser.add_argument("--quick", action="store_true", help="the first case of each, 5 rounds")
    parser.add_argument("--full", action="store_true", help="the sizes for a GPU")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--out", type=Path, default=DOCS / "benchmarks.md")
    options = parser.parse_args()
    rounds = options.rounds or (5 if options.quick else 20)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [w for w in WORKLOADS if not options.only or w.name in options.only]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    rows: list[Row] = []
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        for workload in chosen:
            torch.manual_seed(0)
            cases = workload.cases(options.full)
            for case in cases[:1] if options.quick else cases:
                task = progress.add_task(f"{workload.name}, {case.name}", total=None)
                step = lambda name, task=task: progress.advance(task)  # noqa: E731
                rows.append(run(workload, case, rounds, device, step))
                progress.update(task, total=1, completed=1)
    options.out.write_text(page(rows, rounds), encoding="utf-8")
    draw(rows, options.out.with_suffix(".svg"))
    print(table(rows))


if __name__ == "__main__":
    main()
