"""The chart of the benchmark."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from examples.benchmark.results import Row

# Colours that the colour-blind tell apart.
BARS = {
    "C": ("#56b4e9", "torch.compile"),
    "F": ("#e69f00", "torch.compile of the torch.func form"),
    "J": ("#cc79a7", "JAX"),
    "O": ("#009e73", "optimize_nested"),
}
EAGER = "#5f6368"


def draw(title: str, rows: list[Row], path: Path) -> None:
    """Draw how many times as fast as eager each form of each case is, on a logarithmic axis.

    Args:
        title: The machine.
        rows: The cases, from the top.
        path: An SVG, or what else matplotlib writes.
    """
    figure = Figure(figsize=(9, 0.62 * len(rows) + 1.6), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(BARS)
    for index, row in enumerate(rows):
        ran = [n for n in BARS if n in row.forms and not row.forms[n].refusal]
        for place, name in enumerate(ran):
            y = index + height * (place - (len(ran) - 1) / 2)
            speed = row.forms[name].over_eager
            axes.barh(y, speed - 1, height * 0.92, left=1, color=BARS[name][0])
            axes.annotate(
                f"{speed:.2g}" if speed < 10 else f"{speed:.0f}",
                (speed, y),
                xytext=(3 if speed >= 1 else -3, 0),
                textcoords="offset points",
                ha="left" if speed >= 1 else "right",
                va="center",
                fontsize=7,
                weight="bold" if name == "O" else "normal",
            )
    axes.set_xscale("log")
    axes.axvline(1.0, color=EAGER, linewidth=1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g} ×"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.08)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"{r.workload}\n{r.case}" for r in rows], fontsize=8)
    axes.set_xlabel("times as fast as the loss as written, eager (right is faster)")
    axes.grid(axis="x", color="#e8eaed")
    axes.set_axisbelow(True)
    handles = [Patch(color=colour, label=text) for colour, text in BARS.values()]
    figure.legend(
        handles=handles, title=title, fontsize=8, loc="outside upper center", ncols=4, frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
