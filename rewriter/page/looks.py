"""How each kind of node is drawn, in the page and in the picture: one table for both.

The hues are Okabe and Ito's, which people with any kind of colour blindness can tell apart. The
outline says the same once more, and the words in labels and hints a third time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Corner = tuple[float, float, float, float]


@dataclass(frozen=True)
class Colours:
    """Fill, border and text; text on fill has a contrast of 7:1 or more, border on page of 3:1."""

    fill: str
    border: str
    text: str


@dataclass(frozen=True)
class Look:
    """What a kind of node looks like.

    Attributes:
        meaning: What it is, for the legend.
        light: Its colours on a light page.
        dark: Its colours on a dark page.
        corners: Its outline: each ``(a, b, c, d)`` is the point ``(a·width + b·cut, c·height +
            d·cut)``, where ``cut`` is a third of the height; none means a box with round ends.
    """

    meaning: str
    light: Colours
    dark: Colours
    corners: tuple[Corner, ...]


LOOKS: Mapping[str, Look] = {
    "primal": Look(
        "values of the loss",
        Colours("#e3f0fa", "#0072b2", "#08304a"),
        Colours("#10324a", "#56b4e9", "#e3f2fc"),
        ((0, 0, 0, 0), (1, 0, 0, 0), (1, 0, 1, 0), (0, 0, 1, 0)),
    ),
    "cotangent": Look(
        "an inner derivative, from results back to inputs",
        Colours("#e0f4ee", "#008562", "#053d2e"),
        Colours("#0b3b2f", "#2ec79b", "#dcf7ee"),
        ((0, 1, 0, 0), (1, -1, 0, 0), (1, 0, 0.5, 0), (1, -1, 1, 0), (0, 1, 1, 0), (0, 0, 0.5, 0)),
    ),
    "tangent": Look(
        "forward mode: how values move along a direction",
        Colours("#fdf1d8", "#a86f00", "#473000"),
        Colours("#43300a", "#f0b429", "#fdf0d0"),
        ((0, 1, 0, 0), (1, 0, 0, 0), (1, -1, 1, 0), (0, 0, 1, 0)),
    ),
    "gradient": Look(
        "the way to the gradients that backward() hands out",
        Colours("#fbe7f2", "#b4548c", "#4d1736"),
        Colours("#43203a", "#e08bbd", "#fce8f4"),
        (),
    ),
    "site": Look(
        "a nested derivative that is still one node",
        Colours("#fdeee4", "#d55e00", "#4a2100"),
        Colours("#452408", "#f28c45", "#fdebdd"),
        (
            (0, 0.7, 0, 0),
            (1, -0.7, 0, 0),
            (1, 0, 0, 0.7),
            (1, 0, 1, -0.7),
            (1, -0.7, 1, 0),
            (0, 0.7, 1, 0),
            (0, 0, 1, -0.7),
            (0, 0, 0, 0.7),
        ),
    ),
    "input": Look(
        "parameters and arguments",
        Colours("#f1f1f3", "#71757f", "#2b2d33"),
        Colours("#2a2d34", "#8f94a0", "#e8e9ec"),
        ((0, 0, 0, 0), (1, 0, 0, 0), (1, 0, 1, -1), (0.5, 0, 1, 0), (0, 0, 1, -1)),
    ),
    "output": Look(
        "the loss, its gradients and new state",
        Colours("#f1f1f3", "#71757f", "#2b2d33"),
        Colours("#2a2d34", "#8f94a0", "#e8e9ec"),
        ((0, 0, 0, 1), (0.5, 0, 0, 0), (1, 0, 0, 1), (1, 0, 1, 0), (0, 0, 1, 0)),
    ),
}


def look_of(node: Mapping[str, Any]) -> str:
    """Return the key of a node's look: its role if it is an operator, else its kind."""
    look = node["role"] if node["kind"] == "call" else node["kind"]
    return look if look in LOOKS else "primal"


def outline(look: str, width: float, height: float) -> str:
    """Return the outline as the ``d`` of an SVG path whose upper left corner is the origin."""
    corners, cut = LOOKS[look].corners, height / 3
    if not corners:
        r = height / 2
        arc = f"A{r:g} {r:g} 0 0 1"
        return f"M{r:g} 0H{width - r:g}{arc} {width - r:g} {height:g}H{r:g}{arc} {r:g} 0Z"
    points = [(a * width + b * cut, c * height + d * cut) for a, b, c, d in corners]
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z"


def looks() -> dict[str, Any]:
    """Return the table as plain data."""
    return {name: asdict(look) for name, look in LOOKS.items()}
