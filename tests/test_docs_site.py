"""The documentation site builds without a warning, and asks for nothing from outside."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import rewriter
from tests.pages import ROOT, pages

NEEDED = ("mkdocs", "material", "mkdocstrings", "mkdocs_awesome_nav", "mkdocs_click")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

# What a browser fetches when it opens a page, if it lies on another machine.
FETCHED = re.compile(
    r"""<(?:script|img|link|iframe)[^>]*?\b(?:src|href)=["']?((?:https?:)?//[^"'>\s]+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    settings = ["--config-file", "docs/site/mkdocs.yml", "--site-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", *settings],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.skipif(bool(MISSING), reason="the extra `docs` is not installed: make docs")
class TestSite:
    def test_every_page_is_built(self, site: Path) -> None:
        sources = [Path(page) for page in pages() if page.startswith("docs/")]
        built = [site / page.relative_to("docs").with_suffix(".html") for page in sources]
        assert [page for page in built if not page.is_file()] == []

    def test_every_page_is_in_the_navigation(self, site: Path) -> None:
        start = (site / "index.html").read_text(encoding="utf-8")
        sources = [Path(page).relative_to("docs") for page in pages() if page.startswith("docs/")]
        links = set(re.findall(r'href="([^"#]+)"[^>]*class="md-nav__link', start))
        assert {page.with_suffix(".html").as_posix() for page in sources} <= links | {"index.html"}

    def test_nothing_is_fetched_from_outside(self, site: Path) -> None:
        found = {
            page.name: FETCHED.findall(page.read_text(encoding="utf-8"))
            for page in site.rglob("*.html")
        }
        assert len(found) > 10
        assert {name: urls for name, urls in found.items() if urls} == {}

    def test_every_public_name_is_described(self, site: Path) -> None:
        page = (site / "api.html").read_text(encoding="utf-8")
        names = [name for name in rewriter.__all__ if not name.startswith("_")]
        missing = [name for name in names if f'id="rewriter.{name}"' not in page]
        assert missing == []
