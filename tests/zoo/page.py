"""The page of the zoo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tests.zoo.row import GRAPH, RECORDED, Loss

SLOWER = 0.98  # below this a loss is slower than as written
LONGEST = 160  # characters of a reason

_HEAD = """\
# A zoo of losses

Made by `make zoo`. Losses as people write them, after public research code and libraries: caches,
conditions, masks, counters, prints, NumPy, distributions, copies of networks, solvers that read
their errors. They are in `tests/zoo/`, and are not written after what is captured. Each is compared
with itself as written in float64, three calls with other data and a step of training between them:
the value, every gradient, everything that the loss can reach (buffers, caches, metrics, flags), the
random streams and what is printed.

"""

_LEGEND = """\
FLOPs (matrix products and convolutions) and kernels are those of one step as written over ours. A
kernel as written is an operator that eager starts, views aside; ours is a product, a convolution or
a group of pointwise operators. The gain is processor time as written over ours, with Inductor and
one thread, a median over turns, at these tiny sizes, where most of it is the cost of starting
operators."""


def page(rows: Sequence[Loss], records: Mapping[str, dict[str, Any]]) -> str:
    """Return the page of what was measured.

    Args:
        rows: The losses, in order.
        records: Name → what was found of it.
    """
    found = [(row, records[row.name]) for row in rows if row.name in records]
    lines = ["| loss | field | way | FLOPs | kernels | gain |", "|---|---|---|---:|---:|---:|"]
    lines += [_row(row, record) for row, record in found]
    reasons = [
        f"- **{row.name}**: {_short(record['reason'])}"
        for row, record in found
        if record["way"] not in (GRAPH, RECORDED)
    ]
    wrong = [
        f"- **{row.name}**: {_short('; '.join(record['wrong']))}"
        for row, record in found
        if record["wrong"]
    ]
    parts = [_HEAD + _figures([record for _, record in found]), _LEGEND, "\n".join(lines)]
    if missing := [row.name for row in rows if row.name not in records]:
        parts.append(f"Not measured yet: {', '.join(missing)}.")
    if wrong:
        parts += ["## What is not as written", "\n".join(wrong)]
    if reasons:
        parts += ["## Why not one graph", "\n".join(reasons)]
    return "\n\n".join(parts) + "\n"


def _figures(records: Sequence[dict[str, Any]]) -> str:
    whole = sum(record["way"] in (GRAPH, RECORDED) for record in records)
    recorded = sum(record["way"] == RECORDED for record in records)
    right = sum(not record["wrong"] for record in records)
    number = len(records)
    lines = [
        f"- One graph: **{whole} of {number}** ({whole / number:.0%}),"
        f" {recorded} of them by a recording.",
        f"- Right: **{right} of {number}**.",
    ]
    gains = sorted(record["gain"] for record in records if record.get("gain"))
    if gains:
        slower = sum(gain < SLOWER for gain in gains)
        median = gains[len(gains) // 2]
        lines.append(
            f"- Gain: {gains[0]:.2f} to {gains[-1]:.1f} ×, median {median:.2f} ×;"
            f" slower than as written by more than 2 %: {slower} of {len(gains)}."
        )
    return "\n".join(lines)


def _row(row: Loss, record: dict[str, Any]) -> str:
    way = record["way"]
    if record["graphs"] > 1:
        way += f", {record['graphs']}"
    cells = [
        row.about,
        row.field,
        way,
        _ratio(record.get("flops_as_written"), record.get("flops")),
        _ratio(record.get("kernels_as_written"), record.get("kernels")),
        f"{record['gain']:.2f} ×" if record.get("gain") else "",
    ]
    return f"| {' | '.join(cells)} |"


def _ratio(written: float | None, ours: float | None) -> str:
    return f"{written / ours:.1f}" if written and ours else ""


def _short(reason: str) -> str:
    reason = " ".join(reason.replace("<", "‹").split())
    return reason if len(reason) <= LONGEST else reason[:LONGEST] + " …"
