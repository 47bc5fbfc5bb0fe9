"""Write a report's record as one page of HTML that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from rewriter.page.looks import LOOKS, outline
from rewriter.page.view import make_view
from rewriter.page.words import si

VENDOR = ("d3-7.9.2.min.js", "dagre-3.1.3.min.js")
SCRIPTS = ("graph.js", "layout.js", "pane.js", "inspector.js", "flops.js", "page.js")


def environment() -> Environment:
    """Return where templates come from; everything that they print is escaped."""
    loader = PackageLoader("rewriter.page")
    made = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    made.filters["si"] = si
    return made


def render_html(record: Mapping[str, Any]) -> str:
    """Return the page of a report.

    Args:
        record: What `Report.to_dict` returns.
    """
    scripts = [_asset("vendor", name) for name in VENDOR]
    scripts.append("\n".join(_asset("assets", name) for name in SCRIPTS))
    return (
        environment()
        .get_template("page.html.j2")
        .render(
            record=record,
            view=make_view(record) if record["stages"] else None,
            looks=LOOKS,
            outline=outline,
            lines=_marked_lines(record),
            css=Markup(_asset("assets", "page.css")),
            scripts=[Markup(text) for text in scripts],
            digests=[_digest(text) for text in scripts],
        )
    )


def _asset(folder: str, name: str) -> str:
    text = (resources.files("rewriter.page") / folder / name).read_text(encoding="utf-8")
    assert "</script" not in text.lower(), f"{name} would end its own element"
    return text


def _digest(script: str) -> str:
    """Return what a content security policy calls a script, so that only ours run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _marked_lines(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the source files with, for each line, its sites and how many nodes come from it."""
    counts: dict[tuple[str, int], int] = {}
    for node in record["stages"][-1]["nodes"] if record["stages"] else ():
        if node["kind"] != "input":
            counts[node["path"], node["line"]] = counts.get((node["path"], node["line"]), 0) + 1
    return [
        {
            "path": source["path"],
            "lines": [
                {
                    "number": number,
                    "text": text,
                    "sites": [
                        site["name"]
                        for site in record["sites"]
                        if (site["path"], site["line"]) == (source["path"], number)
                    ],
                    "nodes": counts.get((source["path"], number), 0),
                }
                for number, text in enumerate(source["lines"], start=source["first_line"])
            ],
        }
        for source in record["sources"]
    ]
