"""Draw one stage of a report's record as an SVG picture."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from rewriter.page.html import environment
from rewriter.page.layout import MARGIN, TITLE, Box, Level, Point, arrange
from rewriter.page.looks import LOOKS, outline
from rewriter.page.view import make_graph

# What XML 1.0 has no way to write.
NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render_svg(record: Mapping[str, Any], stage: str = "") -> str:
    """Return the picture of a stage's graph, without its inputs.

    Args:
        record: What `Report.to_dict` returns.
        stage: The name of one of its stages; the last one if left out.

    Raises:
        ValueError: The loss was not captured, or has no such stage.
    """
    if not record["stages"]:
        raise ValueError(f"there is no graph to draw: {record['reason']}")
    stages = {one["name"]: one for one in record["stages"]}
    name = stage or record["stages"][-1]["name"]
    if name not in stages:
        raise ValueError(f"stage: no stage is called {stage!r}; there are {', '.join(stages)}")
    graph = make_graph(stages[name], record["inputs"])
    level = arrange(graph)
    things = graph["groups"] | {node["id"]: node for node in graph["nodes"]}
    boxes = [_described(box, x, y, things) for box, x, y in _boxes(level, 0, 0)]
    text = (
        environment()
        .get_template("graph.svg.j2")
        .render(
            title=f"{record['function']}: {name}",
            count=len(stages[name]["nodes"]),
            width=max(level.width, 760.0),
            height=level.height,
            shift=max(0.0, 760.0 - level.width) / 2,
            frames=[box for box in boxes if box["open"]],
            boxes=[box for box in boxes if not box["open"]],
            edges=[(Markup(curve(points)), count) for points, count in _edges(level, 0, 0)],
            looks=LOOKS,
            outline=outline,
        )
    )
    return NOT_XML.sub("", text)


def curve(points: list[Point]) -> str:
    """Return a smooth path through the middles between points, as the ``d`` of an SVG path."""
    (x0, y0), *inner, (x1, y1) = points
    path = f"M{x0:.1f} {y0:.1f}"
    for (ax, ay), (bx, by) in pairwise(inner):
        path += f"Q{ax:.1f} {ay:.1f} {(ax + bx) / 2:.1f} {(ay + by) / 2:.1f}"
    if inner:
        return path + f"Q{inner[-1][0]:.1f} {inner[-1][1]:.1f} {x1:.1f} {y1:.1f}"
    return path + f"L{x1:.1f} {y1:.1f}"


def _boxes(level: Level, x: float, y: float) -> Iterator[tuple[Box, float, float]]:
    """Return all boxes with their absolute places, outer ones first."""
    for box in level.boxes:
        yield box, x + box.x, y + box.y
        if box.inner:
            yield from _boxes(box.inner, *_inside(box, x, y))


def _edges(level: Level, x: float, y: float) -> Iterator[tuple[list[Point], int]]:
    for points, count in level.edges:
        yield [(a + x, b + y) for a, b in points], count
    for box in level.boxes:
        if box.inner:
            yield from _edges(box.inner, *_inside(box, x, y))


def _inside(box: Box, x: float, y: float) -> Point:
    assert box.inner is not None, "a closed group has no inside"
    return x + box.x + (box.width - box.inner.width) / 2, y + box.y + TITLE + MARGIN / 2


def _described(
    box: Box, x: float, y: float, things: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    thing = things[box.name]
    closed = "group" not in thing and box.inner is None
    hint = thing.get("where") or thing.get("label") or ""
    return {
        "x": x,
        "y": y,
        "width": box.width,
        "height": box.height,
        "open": box.inner is not None,
        "closed": closed,
        "look": thing["look"],
        "title": thing["title"],
        "about": thing["about"],
        "hint": f"{thing['look']} {box.name if 'group' in thing else ''} {hint}".strip(),
    }
