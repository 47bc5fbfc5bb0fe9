"""What the pictures of the examples have in common."""

import io
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy import ndarray
from PIL import Image


def panels(title: str, widths: Sequence[float], height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """Make a figure with a title and a row of axes of these relative widths."""
    figure = Figure(figsize=(4.2 * sum(widths), height), layout="constrained")
    figure.suptitle(title)
    return figure, list(figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0])


def plain(axes: Axes, legend: bool = True, **texts: object) -> None:
    """Give a plot its texts and a light grid, and take away what frames it."""
    axes.set(**texts)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False)


def curves(axes: Axes, histories: dict[str, list[float]], **texts: object) -> None:
    """Draw the losses of phases of one training, one after the other, on a logarithmic scale."""
    starts = itertools.accumulate((len(history) for history in histories.values()), initial=0)
    for start, (name, history) in zip(starts, histories.items(), strict=False):
        axes.semilogy(
            range(start, start + len(history)), history, linewidth=1.0, label=name, rasterized=True
        )
    plain(axes, legend=len(histories) > 1, **texts)


def field(axes: Axes, x: ndarray, y: ndarray, values: ndarray, limit: float, label: str) -> None:
    """Draw values, shape (Y, X), in colours from -limit to limit, with a bar for their scale."""
    levels = np.linspace(-limit, limit, 25)
    image = axes.contourf(x, y, values, levels, cmap="RdBu_r", extend="both")
    axes.figure.colorbar(image, ax=axes, label=label, ticks=np.linspace(-limit, limit, 5))


def distance(
    axes: Axes, x: ndarray, y: ndarray, values: ndarray, powers: tuple[int, int], label: str
) -> None:
    """Draw absolute differences, shape (Y, X), in colours between two powers of ten."""
    low, high = powers
    levels = np.arange(low, high + 0.01, 0.25)
    image = axes.contourf(x, y, np.log10(values + 1e-30), levels, cmap="magma", extend="both")
    ticks = range(low, high + 1)
    bar = axes.figure.colorbar(image, ax=axes, label=label, ticks=list(ticks))
    bar.ax.set_yticklabels([f"$10^{{{power}}}$" for power in ticks])


def tiles(axes: Axes, images: ndarray, columns: int, colours: Iterable[str] = ()) -> None:
    """Show images in [0, 1], shape (count, height, width), row by row, framed in given colours."""
    count, height, width = images.shape
    rows = -(-count // columns)
    for k, (image, colour) in enumerate(itertools.zip_longest(images, colours)):
        row, column = divmod(k, columns)
        box = (column + 0.06, column + 0.94, row + 0.94, row + 0.06)
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, extent=box, aspect="auto")
        if colour:
            axes.plot(
                [box[i] for i in (0, 1, 1, 0, 0)],
                [box[i] for i in (2, 2, 3, 3, 2)],
                color=colour,
                linewidth=2.5,
            )
    axes.set(xlim=(0, columns), ylim=(rows, 0), aspect=height / width)  # imshow sets its own
    axes.set_axis_off()


def save(figure: Figure, path: str) -> None:
    """Write a figure: of a PNG, 256 colours, a third of the size and to the eye the same."""
    if not str(path).endswith(".png"):
        figure.savefig(path, dpi=110)
        return
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    image = Image.open(drawn).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
