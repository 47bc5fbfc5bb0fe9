"""The page of a report, in a real browser: it opens, and everything in it does what it says."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium.webdriver import ActionChains, Chrome, ChromeOptions, ChromeService, Keys
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.page import render_html
from tests.rewriter.records import FIRST_LINE, make_record

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    not (BROWSER and DRIVER), reason="no browser: install chromium and chromedriver"
)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--force-prefers-reduced-motion",
    "--window-size=1500,1400",
]
# About ten times what a quiet machine with two cores takes.
FIRST_DRAW, REDRAW, EXPAND_ALL = 5.0, 2.0, 20.0
MANY = 130  # layers, which make 2089 nodes


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=ChromeService(str(DRIVER)))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture
def show(browser: Chrome, tmp_path: Path) -> Iterator[Callable[[dict[str, Any]], Chrome]]:
    """Open the page of a record; after the test, nothing may have been complained of or fetched."""

    def opened(record: dict[str, Any]) -> Chrome:
        path = tmp_path / "report.html"
        path.write_text(render_html(record), encoding="utf-8")
        browser.get(path.as_uri())
        return browser

    yield opened
    assert browser.get_log("browser") == []  # pyright: ignore[reportUnknownMemberType]
    fetched = "return performance.getEntriesByType('resource').map((one) => one.name)"
    assert browser.execute_script(fetched) == []


@pytest.fixture
def page(show: Callable[[dict[str, Any]], Chrome]) -> Chrome:
    return show(make_record())


def all_of(page: Chrome, css: str) -> list[WebElement]:
    return page.find_elements(By.CSS_SELECTOR, css)


def one(page: Chrome, css: str) -> WebElement:
    (found,) = all_of(page, css)
    return found


def ids(page: Chrome, css: str) -> set[str]:
    """The names of the boxes that a selector finds."""
    return {str(found.get_attribute("data-id")) for found in all_of(page, css)}


def settled(page: Chrome, is_so: Callable[[], bool]) -> None:
    WebDriverWait(page, 5).until(lambda _: is_so())


def group_of(page: Chrome, pane: str, look: str, title: str) -> str:
    """The name of a group, by what is written on it."""
    found = [
        box.get_attribute("data-id")
        for box in all_of(page, f"#{pane} .item.group.look-{look}")
        if title in box.find_element(By.CSS_SELECTOR, ".title").get_attribute("textContent").split()
    ]
    (name,) = found
    return str(name)


def test_it_opens(page: Chrome) -> None:
    assert page.title == "penalty – optimize-nested"
    assert one(page, "#before h3 .stage").text == "flatten"
    assert one(page, "#after h3 .stage").text == "joint"
    looks = {"primal", "cotangent", "tangent", "gradient"}
    outlines = {
        look: one(page, f".legend .look-{look} .outline").get_attribute("d") for look in looks
    }
    assert len(set(outlines.values())) == 4
    colours = {
        one(page, f".legend .look-{look} .outline").value_of_css_property("stroke")
        for look in looks
    }
    assert len(colours) == 4
    assert all(all_of(page, f"#after .item.look-{look}") for look in looks)
    text = one(page, ".source").text
    assert "</script><b>not markup</b>" in text
    assert one(page, "tr.taken th").text.startswith("jvp_over_gradient")


def test_a_site_leads_to_its_nodes(page: Chrome) -> None:
    one(page, ".source [data-site=gradient]").click()
    assert one(page, "#status").text == "site gradient: 37 nodes selected"
    title = one(page, "#graphs-title").location["y"] - page.execute_script("return scrollY")
    assert 0 <= title < 300, "the graphs are not in view"
    assert ids(page, "#before .item.selected") == {group_of(page, "before", "site", "gradient")}
    assert all_of(page, "#after .item.selected")
    assert not all_of(page, "#after .item.selected.look-primal")


def test_a_line_leads_to_its_nodes(page: Chrome) -> None:
    one(page, f".source [data-line='{FIRST_LINE + 3}']").click()
    assert one(page, "#status").text == f"line {FIRST_LINE + 3}: 9 nodes selected"
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    assert one(page, "#status").text == ""
    assert not all_of(page, ".item.selected")


def test_search_finds_and_leads_there(page: Chrome) -> None:
    box = one(page, "#search")
    box.send_keys("tangent mm critic.2")
    found = [chip.text for chip in all_of(page, "#found button")]
    assert found == ["mm_1 f32[32, 64]", "mm_4 f32[32, 64]"]  # "cotangent" holds "tangent" too
    box.send_keys(Keys.ENTER)
    assert ids(page, "#after .item.selected") == {"mm_1"}
    assert "aten.mm" in one(page, "#inspector").text
    assert f"train.py:{FIRST_LINE + 4}" in one(page, "#inspector").text
    box.clear()
    box.send_keys("nothing of the kind")
    assert one(page, "#status").text == "“nothing of the kind”: nothing found"


def test_the_slider_steps_and_marks(page: Chrome) -> None:
    assert not all_of(page, ".item.fresh, .item.gone")
    slider = one(page, "#stages")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert one(page, "#after h3 .stage").text == "share"
    assert one(page, "#pass").text == "share by passes.share, 0.10 s: 0 gone −0 new +0 changed ~"
    slider.send_keys(Keys.ARROW_RIGHT)
    assert [one(page, f"#{pane} h3 .stage").text for pane in ("before", "after")] == [
        "share",
        "joint",
    ]
    assert slider.get_attribute("aria-valuetext") == one(page, "#pass").text
    fresh, gone = ids(page, "#after .item.fresh"), ids(page, "#before .item.gone")
    assert group_of(page, "after", "tangent", "critic") in fresh
    assert group_of(page, "before", "site", "gradient") in gone
    one(page, "[data-step='0']").click()
    assert slider.get_attribute("value") == "0"
    assert not all_of(page, ".item.fresh, .item.gone")


def test_groups_open_and_close(page: Chrome) -> None:
    one(page, "#collapse").click()
    name = group_of(page, "after", "tangent", "critic")
    before = len(all_of(page, "#after .item"))
    box = one(page, f"#after [data-id='{name}']")
    assert box.get_attribute("aria-expanded") == "false"
    box.click()
    assert one(page, f"#after [data-id='{name}']").get_attribute("aria-expanded") == "true"
    assert len(all_of(page, "#after .item")) == before + 6
    assert all_of(page, "#after .item.node.look-tangent")
    page.switch_to.active_element.send_keys(Keys.SPACE)  # what was opened has the focus
    assert one(page, f"#after [data-id='{name}']").get_attribute("aria-expanded") == "false"
    assert len(all_of(page, "#after .item")) == before
    one(page, "#expand").click()
    assert not all_of(page, "#after .item[aria-expanded=false]")
    # Every operator and the output; no inputs.
    assert len(all_of(page, "#after .item.node")) == 57 - 4
    one(page, "#inputs").click()
    assert len(all_of(page, "#after .item.look-input")) == 1


def test_hovering_tells_shape_price_line_and_stage(page: Chrome) -> None:
    assert not one(page, "#hint").is_displayed()
    addmm = next(box for box in all_of(page, "#before .item.node") if box.text.startswith("addmm"))
    ActionChains(page).move_to_element(addmm).perform()
    hint = one(page, "#hint").text
    for said in ("f32[32, 64]", "262 kFLOP = 8192*b", f"train.py:{FIRST_LINE + 3}", "flatten"):
        assert said in hint


def test_the_keyboard_walks(page: Chrome) -> None:
    start = one(page, "#before .item[tabindex='0']")
    page.execute_script("arguments[0].focus()", start)
    seen = [page.switch_to.active_element.get_attribute("data-id")]
    for _ in range(3):
        page.switch_to.active_element.send_keys(Keys.ARROW_DOWN)
        seen.append(page.switch_to.active_element.get_attribute("data-id"))
    assert len(set(seen)) == 4
    assert len(all_of(page, "#before .item[tabindex='0']")) == 1
    page.switch_to.active_element.send_keys(Keys.ENTER)
    assert ids(page, "#before .item.selected") == {seen[-1]}
    assert page.switch_to.active_element.get_attribute("aria-label")
    unnamed = [b for b in all_of(page, "button, input") if not b.accessible_name]
    assert not unnamed


def test_zooming_and_panning_move_the_drawing(page: Chrome) -> None:
    def places() -> list[str | None]:
        return [world.get_attribute("transform") for world in all_of(page, "g.world")]

    first = places()
    one(page, "#after [data-zoom=in]").click()
    settled(page, lambda: places()[1] != first[1])
    assert places()[0] == first[0]
    one(page, "#after [data-zoom=fit]").click()
    settled(page, lambda: places() == first)
    canvas = one(page, "#after > svg")
    ActionChains(page).move_to_element_with_offset(
        canvas, -200, -250
    ).click_and_hold().move_by_offset(40, 60).release().perform()
    assert places()[1] != first[1]


def test_bars_add_up_and_lead_to_nodes(page: Chrome) -> None:
    bars = all_of(page, "#flops .bar")
    record = make_record()
    roles = {bar.accessible_name.split(":")[0]: bar for bar in bars}
    assert {"whole step", "primal", "cotangent", "tangent", "gradient"} <= set(roles)
    widths = [roles[role].size["width"] for role in ("primal", "cotangent", "tangent", "gradient")]
    assert sum(widths) == pytest.approx(roles["whole step"].size["width"], abs=12)
    roles["tangent"].click()
    tangents = [
        node
        for node in record["stages"][-1]["nodes"]
        if node["role"] == "tangent" and node["flops"]
    ]
    assert one(page, "#status").text.endswith(f"{len(tangents)} nodes selected")


def test_light_and_dark(page: Chrome) -> None:
    def colours() -> tuple[str, ...]:
        box = one(page, ".legend .look-primal .outline")
        body = page.find_element(By.TAG_NAME, "body")
        return box.value_of_css_property("fill"), body.value_of_css_property("background-color")

    light = colours()
    one(page, "#theme").click()
    assert all(a != b for a, b in zip(light, colours(), strict=True))
    one(page, "#theme").click()
    assert colours() == light


def test_two_thousand_nodes_stay_usable(show: Callable[[dict[str, Any]], Chrome]) -> None:
    page = show(make_record(MANY))
    assert one(page, "#after h3 .count").text == "2089 nodes"
    assert int(one(page, "body").get_attribute("data-ready") or "") < 1000 * FIRST_DRAW
    assert len(all_of(page, "#after .item")) < 50

    def seconds(do: Callable[[], Any]) -> float:
        start = time.perf_counter()
        do()
        page.execute_script("document.body.getBoundingClientRect()")
        return time.perf_counter() - start

    box = one(page, f"#after [data-id='{group_of(page, 'after', 'tangent', 'critic')}']")
    assert seconds(box.click) < REDRAW
    assert seconds(lambda: one(page, "#search").send_keys("mm critic.40")) < 2 * REDRAW
    assert seconds(all_of(page, "#found button")[1].click) < REDRAW
    assert len(all_of(page, "#after .item.selected")) == 1
    assert seconds(one(page, "#expand").click) < EXPAND_ALL
    assert len(all_of(page, "#after .item.node")) > 1900
    assert seconds(one(page, "#after [data-zoom=in]").click) < REDRAW


def test_a_real_loss(show: Callable[[dict[str, Any]], Chrome]) -> None:
    def penalty(net: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return g.square().sum()

    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    report = optimize_nested(penalty, backend="eager").explain(net, torch.randn(4, 3))
    page = show(report.to_dict())
    one(page, ".source [data-site]").click()
    for step, stage in enumerate(report.stages[1:], start=1):
        one(page, f"[data-step='{step}']").click()
        assert one(page, "#after h3 .stage").text == stage.name
    assert all_of(page, "#after .item.selected")
    assert all_of(page, "#after .item.fresh")


def test_a_loss_that_was_not_captured(show: Callable[[dict[str, Any]], Chrome]) -> None:
    record = make_record()
    empty = ("stages", "sites", "candidates", "sources", "inputs", "recompiles")
    nothing: dict[str, Any] = {key: [] for key in empty}
    reason = "train.py:12: int(tensor) <needs> a value"
    page = show({**record, **nothing, "captured": False, "reason": reason})
    assert one(page, "[role=alert] p").text == reason
    one(page, "#theme").click()
    assert page.find_element(By.TAG_NAME, "html").get_attribute("data-theme") == "dark"
    assert not all_of(page, ".pane")
