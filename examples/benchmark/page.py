"""The page of the benchmark: for each machine a chart, the tables and the targets."""

from collections.abc import Callable, Sequence

from examples.benchmark.forms import FORMS
from examples.benchmark.results import FirstStep, Row, Section, Timing
from examples.benchmark.targets import targets_of

PRESENT = {"E": "E", "C": "C", "F": "F", "J": "J", "O": "ours"}


def page(sections: dict[str, Section], chart_of: Callable[[str], str]) -> str:
    """Return the page in Markdown.

    Args:
        sections: What each machine has measured, by its name.
        chart_of: Returns the file name of a machine's chart.
    """
    columns = "; ".join(f"{PRESENT[name]}: {text}" for name, text in FORMS.items())
    lines = [
        "# Benchmarks",
        "",
        "Made by `make bench`. The forms of a case take turns in one process, JAX with E in one "
        "of its own. A step is the loss and its gradients, without the optimizer; where the case "
        "says so, it is the value alone. "
        f"{columns}. What is blank has no such form; – did not run, for the reason given below "
        "the table.",
        "",
    ]
    for name, section in sections.items():
        lines += _section(name, section, chart_of(name))
    return "\n".join(lines)


def _section(name: str, section: Section, chart: str) -> list[str]:
    rows = sorted(section.rows.values(), key=lambda row: row.number)
    versions = ", ".join(f"{what} {number}" for what, number in section.versions.items())
    rounds = sorted({row.rounds for row in rows})
    lines = [
        f"## {name}",
        "",
        f"{versions}; threads: {section.threads}; timed steps of each form: "
        f"{' to '.join(map(str, dict.fromkeys([rounds[0], rounds[-1]])))}.",
        "",
        f"![How many times as fast as eager]({chart})",
        "",
        *[f"- {target}" for target in targets_of(section)],
        "",
        "### Time",
        "",
        "Milliseconds a step: the shortest, and the median after the stroke. How many times as "
        "fast we are is the median over the rounds; the best of the others is the best of those "
        "in PyTorch.",
        "",
        *_table(
            ["workload", "case", *PRESENT.values(), "over E", "over the best"],
            [[row.workload, row.case, *_times(row)] for row in rows],
        ),
        "",
        *_refusals(rows),
        "### Work and memory",
        "",
        "FLOPs of matmuls and convolutions, in forward passes. Memory is the most that a step "
        "has allocated at once, in MiB, gradients included. The last column is how far value "
        "and gradients are from those as written, relative.",
        "",
        *_table(
            ["workload", "case", "FLOPs as written", "FLOPs ours", "figure"]
            + [f"MiB {PRESENT[name]}" for name in "ECFO"]
            + ["ours differs"],
            [[row.workload, row.case, *_work(row)] for row in rows],
        ),
        "",
    ]
    if section.first_steps:
        lines += [
            "### First step",
            "",
            "Seconds of the first step in a process of its own: with nothing compiled before, and "
            'after the stroke in a second process. Tiered: with `start="tiered"`, nothing '
            "compiled before. Imports are not counted.",
            "",
            *_table(
                ["workload, case", "C", "J", "ours", "tiered"],
                [
                    [name, *(_first(steps.get(form)) for form in "CJO"), _cold(steps.get("T"))]
                    for name, steps in section.first_steps.items()
                ],
                text_columns=1,
            ),
            "",
        ]
    return lines


def _table(
    headings: Sequence[str], cells: Sequence[Sequence[str]], text_columns: int = 2
) -> list[str]:
    rule = "---|" * text_columns + "---:|" * (len(headings) - text_columns)
    return [f"| {' | '.join(line)} |" for line in [headings]] + [
        f"|{rule}",
        *[f"| {' | '.join(line)} |" for line in cells],
    ]


def _times(row: Row) -> list[str]:
    cells = [_milliseconds(row.forms.get(name)) for name in PRESENT]
    if row.ours.refusal:
        return [*cells, "–", "–"]
    best, timing = row.best_of("ECF")
    return [*cells, f"{row.ours.over_eager:.2f} ×", f"{timing.over_ours:.2f} × {best}"]


def _milliseconds(timing: Timing | None) -> str:
    if timing is None:
        return ""
    if timing.refusal:
        return "–"
    return f"{timing.minimum * 1e3:.3g} / {timing.median * 1e3:.3g}"


def _work(row: Row) -> list[str]:
    cells = [f"{row.flops[name]:.2f}" if name in row.flops else "" for name in "EO"]
    cells.append("" if row.figure is None else f"{row.figure:g}")
    for name in "ECFO":
        peak = row.forms[name].peak_bytes if name in row.forms else None
        cells.append("" if peak is None else f"{peak / 2**20:.2f}")
    return [*cells, "–" if row.ours.refusal else f"{row.ours.differs:.0e}"]


def _first(step: FirstStep | None) -> str:
    if step is None:
        return ""
    return "–" if step.refusal else f"{step.cold:.1f} / {step.warm:.1f}"


def _cold(step: FirstStep | None) -> str:
    if step is None:
        return ""
    return "–" if step.refusal else f"{step.cold:.1f}"


def _refusals(rows: Sequence[Row]) -> list[str]:
    found = [
        f"- {row.workload}, {row.case}, {PRESENT[name]} did not run: `{timing.refusal}`"
        for row in rows
        for name, timing in row.forms.items()
        if timing.refusal
    ]
    return [*found, ""] if found else []
