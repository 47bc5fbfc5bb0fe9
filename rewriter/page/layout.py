"""Where everything of a picture goes: grandalf lays out the members of one group at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil, sqrt
from typing import Any

from grandalf.graphs import Edge, Graph, Vertex, graph_core
from grandalf.layouts import SugiyamaLayout

# The same as in layout.js.
CHARACTER, HEIGHT, MARGIN, TITLE = 6.7, 36.0, 14.0, 22.0
GAP = 26
PASSES = 3
"""How often grandalf goes up and down over the layers to remove crossings."""

Point = tuple[float, float]


@dataclass
class Box:
    """A node or group with its place; the upper left corner is relative to what is around it."""

    name: str
    width: float
    height: float
    x: float = 0.0
    y: float = 0.0
    inner: Level | None = None


@dataclass
class Level:
    """What is drawn inside one open group: boxes, and edges as their points and weight."""

    boxes: list[Box] = field(default_factory=list)
    edges: list[tuple[list[Point], int]] = field(default_factory=list)
    width: float = 0.0
    height: float = 0.0


class _Slot(Vertex):
    """A box as grandalf sees it: it reads width and height and writes the place of the middle."""

    def __init__(self, box: Box) -> None:
        super().__init__(box.name)
        self.box, self.view = box, self
        self.w, self.h = box.width, box.height
        self.xy: Point = (0.0, 0.0)


class _Route(Edge):
    """An edge as grandalf sees it: it writes the points that the edge goes through."""

    def __init__(self, source: _Slot, target: _Slot) -> None:
        super().__init__(source, target)
        self.source, self.target, self.view = source.box, target.box, self
        self.points: Sequence[Point] = ()

    def setpath(self, points: Sequence[Point]) -> None:
        self.points = list(points)


def arrange(graph: Mapping[str, Any]) -> Level:
    """Lay out a graph from `rewriter.page.view.make_graph`, without inputs, as it is open."""
    members: dict[str, list[str]] = {"": []}
    for name, one in graph["groups"].items():
        members[name] = []
        members[one["parent"]].append(name)
    things = dict(graph["groups"])
    for node in graph["nodes"]:
        members[node["group"]].append(node["id"])
        things[node["id"]] = node
    return _level("", graph, members, things)


def _level(
    name: str,
    graph: Mapping[str, Any],
    members: Mapping[str, Sequence[str]],
    things: Mapping[str, Mapping[str, Any]],
) -> Level:
    boxes = {}
    for member in members[name]:
        thing = things[member]
        if thing["look"] == "input":
            continue
        if member in graph["open"]:
            inner = _level(member, graph, members, things)
            head = len(thing["title"] + thing["about"]) * CHARACTER + 54
            width = max(inner.width + 2 * MARGIN, head)
            boxes[member] = Box(member, width, inner.height + TITLE + 1.5 * MARGIN, inner=inner)
        else:
            longest = max(len(thing["title"]) + 2, len(thing["about"]))
            boxes[member] = Box(member, max(64.0, longest * CHARACTER + 28), HEIGHT)
    edges = [one for one in graph["edges"].get(name, ()) if one[0] in boxes and one[1] in boxes]
    return _placed(boxes, edges)


def _placed(boxes: Mapping[str, Box], edges: Sequence[tuple[str, str, int]]) -> Level:
    """Give boxes their places, one connected part beside the other."""
    slots = {name: _Slot(box) for name, box in boxes.items()}
    drawn = {_Route(slots[a], slots[b]): count for a, b, count in edges}
    # What has no edges would all stand in one row: edges that are not drawn make it several.
    linked = {name for a, b, _ in edges for name in (a, b)}
    alone = [slots[name] for name in boxes if name not in linked]
    columns = max(3, ceil(sqrt(len(alone) / 2)))
    hidden = [_Route(a, b) for a, b in zip(alone, alone[columns:], strict=False)]
    level = Level()
    for part in Graph(list(slots.values()), [*drawn, *hidden]).C:
        own = _lay_out(part)
        left = min(slot.xy[0] - slot.w / 2 for slot in own)
        top = min(slot.xy[1] - slot.h / 2 for slot in own)
        shift = (level.width + (GAP if level.boxes else 0.0) - left, -top)
        heights: dict[float, float] = {}
        for slot in own:
            x, y = slot.xy
            slot.box.x, slot.box.y = x - slot.w / 2 + shift[0], y - slot.h / 2 + shift[1]
            heights[y] = max(heights.get(y, 0.0), slot.h)
            level.boxes.append(slot.box)
        for route in part.sE:
            if route in drawn:
                bends = _upright(route.points[1:-1], heights, shift)
                level.edges.append((_linked(route.source, route.target, bends), drawn[route]))
        level.width = max(box.x + box.width for box in level.boxes)
        level.height = max(box.y + box.height for box in level.boxes)
    return level


def _upright(
    bends: Sequence[Point], heights: Mapping[float, float], shift: Point
) -> list[tuple[Point, Point]]:
    """Return for each layer that an edge passes the points above and below, so that it does not cut
    a corner of the boxes beside it."""
    found = []
    for x, y in bends:
        half = heights.get(y, 0.0) / 2
        found.append(((x + shift[0], y - half + shift[1]), (x + shift[0], y + half + shift[1])))
    return found


def _linked(source: Box, target: Box, bends: Sequence[tuple[Point, Point]]) -> list[Point]:
    """Return an edge's points, from side to side; one that closes a cycle goes upwards."""
    down = source.y <= target.y
    start = (source.x + source.width / 2, source.y + (source.height if down else 0.0))
    end = (target.x + target.width / 2, target.y + (0.0 if down else target.height))
    return [start, *(point for pair in bends for point in (pair if down else pair[::-1])), end]


def _lay_out(part: graph_core) -> list[_Slot]:
    """Lay out one connected part and return its boxes."""
    own = [vertex for vertex in part.sV if isinstance(vertex, _Slot)]
    layout = SugiyamaLayout(part)
    layout.xspace, layout.yspace = 18, GAP
    layout.dw = 4  # the room that an edge takes where it passes a layer
    # A part that is one cycle has no root: any vertex will do.
    roots = [slot for slot in own if not slot.e_in()] or own[:1]
    layout.init_all(roots=roots, optimize=True)
    layout.draw(PASSES)
    return own
