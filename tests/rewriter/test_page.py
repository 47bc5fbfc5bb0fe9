"""The page and the picture of a report, without a browser: what is in them, and what may not be."""

from __future__ import annotations

import html
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.page import render_html, render_svg
from rewriter.page.groups import MOST, Key, group
from rewriter.page.looks import LOOKS
from rewriter.page.view import MOST_OPEN, make_graph, make_view
from rewriter.report import Report
from tests.rewriter.records import make_record

SVG = "{http://www.w3.org/2000/svg}"


def node(name: str, inputs: str = "") -> dict[str, Any]:
    return {"id": name, "inputs": inputs.split()}


def grouped(nodes: list[dict[str, Any]], labels: list[str]) -> dict[str, set[str]]:
    """The nodes of each group, when every node has one key."""
    keys = [[Key("", "primal", label)] if label else [] for label in labels]
    names, groups = group(nodes, keys)
    found: dict[str, set[str]] = {}
    for one, name in zip(nodes, names, strict=True):
        found.setdefault(name, set()).add(one["id"])
    assert set(found) - {""} == set(groups)
    return found


def test_one_pass_through_a_module_is_one_group() -> None:
    nodes = [node("a"), node("b", "a"), node("c", "b"), node("d", "c")]
    assert list(grouped(nodes, ["m", "m", "m", ""]).values()) == [{"a", "b", "c"}, {"d"}]


def test_coming_back_to_a_module_is_another_group() -> None:
    nodes = [node("a"), node("b", "a"), node("c", "b")]  # m
    nodes += [node("x", "c")]  # something else
    nodes += [node("d", "x a"), node("e", "d"), node("f", "e")]  # m again
    found = grouped(nodes, ["m", "m", "m", "", "m", "m", "m"])
    assert list(found.values()) == [{"a", "b", "c"}, {"x"}, {"d", "e", "f"}]


def test_few_nodes_are_no_group() -> None:
    assert grouped([node("a"), node("b", "a")], ["m", "m"]) == {"": {"a", "b"}}


def test_no_level_has_many_members() -> None:
    for stage in make_record(130)["stages"]:
        graph = make_graph(stage, [])
        parents = [one["group"] for one in graph["nodes"]]
        parents += [one["parent"] for one in graph["groups"].values()]
        assert max(Counter(parents).values()) <= MOST


@pytest.mark.parametrize("layers", [3, 130])
def test_edges_are_between_members_of_one_level(layers: int) -> None:
    graph = make_graph(make_record(layers)["stages"][-1], [])
    level = {one["id"]: one["group"] for one in graph["nodes"]}
    level |= {name: one["parent"] for name, one in graph["groups"].items()}
    drawn = 0
    for name, edges in graph["edges"].items():
        for source, target, count in edges:
            assert level[source] == level[target] == name
            assert source != target
            drawn += count
    assert drawn == sum(len(one["inputs"]) for one in graph["nodes"])


@pytest.mark.parametrize("layers", [3, 20, 130])
def test_what_is_open_at_first_can_be_read(layers: int) -> None:
    graph = make_graph(make_record(layers)["stages"][-1], [])
    shown = [one for one in graph["nodes"] if not closed_around(graph, one["group"])]
    shown += [
        one
        for name, one in graph["groups"].items()
        if name not in graph["open"] and not closed_around(graph, one["parent"])
    ]
    assert 5 <= len(shown) <= MOST_OPEN


def closed_around(graph: dict[str, Any], name: str) -> bool:
    while name:
        if name not in graph["open"]:
            return True
        name = graph["groups"][name]["parent"]
    return False


def test_a_site_holds_its_body() -> None:
    graph = make_graph(make_record()["stages"][0], [])
    nodes = {one["id"]: one for one in graph["nodes"]}
    site = graph["groups"][nodes["gradient"]["group"]]
    assert (site["label"], site["look"], site["count"]) == ("gradient", "site", 7)
    assert nodes["gradient/tanh"]["inputs"] == ["gradient/addmm"]
    assert "gradient/tanh_2" in nodes["gradient"]["inputs"]


def test_inputs_have_the_names_that_the_user_gave_them() -> None:
    record = make_record()
    nodes = make_view(record)["pool"]
    titles = {one["title"] for one in nodes if one["kind"] == "input"}
    assert titles == {"critic.0.weight", "critic.2.weight", "critic.4.weight", "x"}


def test_stages_share_what_they_have_in_common() -> None:
    view = make_view(make_record())
    drawn = sum(len(stage["nodes"]) for stage in view["stages"])
    assert len(view["pool"]) < drawn
    assert view["stages"][0]["nodes"] == view["stages"][1]["nodes"]


class Elements(HTMLParser):
    """Count a page's elements, and keep what is in its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] += 1
        self.attributes += attrs
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data


HOSTILE = (
    "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>\" onclick='alert(1)' &amp;"
)


def hostile(value: Any) -> Any:
    """Put markup into every text of a record that the user can have written."""
    if isinstance(value, dict):
        kept = ("kind", "role", "look", "id")
        return {key: one if key in kept else hostile(one) for key, one in value.items()}
    if isinstance(value, list):
        return [
            one if isinstance(one, str) and one.isidentifier() else hostile(one) for one in value
        ]
    return value + HOSTILE if isinstance(value, str) else value


def test_nothing_in_a_record_becomes_markup() -> None:
    record = make_record()
    clean, dirty = Elements(render_html(record)), Elements(render_html(hostile(record)))
    assert dirty.counts == clean.counts
    assert dirty.counts["script"] == 4
    names = {name for name, _ in dirty.attributes}
    assert names == {name for name, _ in clean.attributes}
    assert dirty.scripts[1:] == clean.scripts[1:]
    assert HOSTILE in json.loads(dirty.scripts[0])["pool"][0]["module"]


def test_a_page_is_one_small_file() -> None:
    text = render_html(make_record())
    assert len(text) < 500_000
    assert len(render_html(make_record(130))) < 2_000_000
    assert not re.findall(
        r"(?:src|href)=[\"'](?!data:|#)", re.sub(r"<script.*?</script>", "", text)
    )
    assert "default-src 'none'" in text
    # What the content security policy lets run is what is there, and nothing else.
    assert len(re.findall(r"'sha256-[A-Za-z0-9+/=]{44}'", text)) == 3


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize(("theme", "page"), [("light", "#fafbfc"), ("dark", "#14171c")])
def test_colours_can_be_read(name: str, theme: str, page: str) -> None:
    colours = getattr(LOOKS[name], theme)
    assert contrast(colours.text, colours.fill) >= 7
    assert contrast(colours.border, page) >= 3


def test_roles_differ_in_colour_and_shape() -> None:
    roles = [LOOKS[name] for name in ("primal", "cotangent", "tangent", "gradient", "site")]
    assert len({look.corners for look in roles}) == len({look.light for look in roles}) == 5


def boxes(svg: str) -> list[ElementTree.Element]:
    root = ElementTree.fromstring(svg.encode())
    return [g for g in root.iter(f"{SVG}g") if g.get("class", "").startswith("box ")]


@pytest.mark.parametrize("stage", ["flatten", "share", "joint"])
def test_a_picture_shows_what_the_page_shows(stage: str) -> None:
    record = make_record()
    graph = make_graph({one["name"]: one for one in record["stages"]}[stage], [])
    shown = {
        one["title"]
        for one in graph["nodes"]
        if one["kind"] != "input" and not closed_around(graph, one["group"])
    }
    drawn = {box.findtext(f"{SVG}text") for box in boxes(render_svg(record, stage))}
    assert shown and shown <= drawn
    looks = {box.get("class") for box in boxes(render_svg(record, stage))}
    assert ("box look-site" in looks) == (stage != "joint")


def test_boxes_of_a_picture_do_not_overlap() -> None:
    places = []
    for box in boxes(render_svg(make_record())):
        x, y = map(float, re.findall(r"[\d.]+", box.get("transform", "")))
        shape = box.findall(f"{SVG}path")[-1].get("d", "")
        width = max(float(a) for a in re.findall(r"[ML]([\d.]+) ", shape))
        places.append((x, y, width, 36.0))
    assert len(places) > 10
    for i, (x, y, w, h) in enumerate(places):
        for other_x, other_y, other_w, other_h in places[:i]:
            apart_x = x >= other_x + other_w or other_x >= x + w
            assert apart_x or y >= other_y + other_h or other_y >= y + h


def test_a_picture_of_two_thousand_nodes_takes_seconds() -> None:
    start = time.perf_counter()
    assert boxes(render_svg(make_record(130)))
    assert time.perf_counter() - start < 30


def test_a_picture_of_a_cycle_of_groups() -> None:
    record = make_record()
    some = record["stages"][-1]["nodes"][4]
    wires = {"a": [], "b": ["a"], "c": [], "d": ["c"], "e": [], "f": ["b"]}
    modules = {"a": "m", "d": "m", "e": "m", "b": "n", "c": "n", "f": "n"}
    nodes = [{**some, "id": k, "inputs": v, "module": modules[k]} for k, v in wires.items()]
    record["stages"][-1]["nodes"] = nodes
    edges = make_graph(record["stages"][-1], [])["edges"][""]
    assert {(a, b) for a, b, _ in edges} == {(b, a) for a, b, _ in edges}, "no cycle to draw"
    frames = [g for g in ElementTree.fromstring(render_svg(record).encode()).iter(f"{SVG}g")]
    assert sum(g.get("class", "").startswith("frame ") for g in frames) == 2


def test_a_picture_holds_any_text() -> None:
    record = hostile(make_record())
    for one in record["stages"][-1]["nodes"]:
        one["where"] = "train.py:1: \x0c\x00 <&>"
    svg = render_svg(record)
    assert len(boxes(svg)) == len(boxes(render_svg(make_record())))
    assert "alert(1)</script>" not in svg


WRONG: list[tuple[Callable[[], dict[str, Any]], str, str]] = [
    (make_record, "joined", "no stage is called 'joined'; there are flatten, share, joint"),
    (lambda: {**make_record(), "stages": [], "reason": "train.py:3: .item()"}, "", r"3: \.item"),
]


@pytest.mark.parametrize(("record", "stage", "message"), WRONG)
def test_wrong_stages(record: Callable[[], dict[str, Any]], stage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_svg(record(), stage)


@pytest.fixture(scope="module")
def report() -> Report:
    def penalty(net: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return g.square().sum() + net(x).mean()

    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    return optimize_nested(penalty, backend="eager").explain(net, torch.randn(4, 3))


def test_a_report_draws_itself(report: Report, tmp_path: Path) -> None:
    report.to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "(g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)" in html.unescape(text)
    view = json.loads(Elements(text).scripts[0])
    assert [stage["name"] for stage in view["stages"]] == [s.name for s in report.stages]
    looks = {view["pool"][number]["look"] for number in view["stages"][-1]["nodes"]}
    assert looks == set(LOOKS) - {"site"}
    for stage in report.stages:
        report.to_svg(tmp_path / "graph.svg", stage.name)
        assert boxes((tmp_path / "graph.svg").read_text(encoding="utf-8"))
    with pytest.raises(ValueError, match="no stage is called 'last'"):
        report.to_svg(tmp_path / "graph.svg", "last")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["graph.svg", "report.html"]
