"""Run every Python block of README.md and docs/; check the make targets that README.md names."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

FENCE = re.compile(r"^\s*(?P<marks>`{3,}|~{3,})\s*(?P<language>[\w+-]*)")
SKIP = re.compile(r"^\s*<!--\s*no test:\s*(?P<reason>\S.*?)\s*-->\s*$")
MAKE_CALL = re.compile(r"(?:^|[`;&|$])\s*make((?:[ \t]+[^\s`;&|#]+)+)", re.MULTILINE)


class Block(NamedTuple):
    """One fenced block: its language, the line of its first code line, and why not to run it."""

    language: str
    line: int
    code: str
    skip_reason: str | None


def fenced_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown text in order; a fence inside a fence is text."""
    blocks: list[Block] = []
    opening: re.Match[str] | None = None
    first = 0
    reason: str | None = None
    last_text = ""
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if opening is None and fence:
            skip = SKIP.match(last_text)
            opening, first, reason = fence, number + 1, skip["reason"] if skip else None
        elif opening and line.strip().startswith(opening["marks"]) and not fence["language"]:
            code = dedent("\n".join(lines[first - 1 : number - 1])) + "\n"
            blocks.append(Block(opening["language"], first, code, reason))
            opening = None
        if line.strip():
            last_text = line
    assert opening is None, f"line {first - 1}: this fence is never closed"
    return blocks


def pages() -> list[str]:
    """Return the pages of the documentation, as paths from the root."""
    found = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [page.relative_to(ROOT).as_posix() for page in found if page.exists()]


def script_of(text: str) -> str:
    """Return a page's Python blocks as one script, each on its own lines; blocks marked `no test`
    are left out."""
    lines = [""] * len(text.splitlines())
    for block in fenced_blocks(text):
        if block.language == "python" and block.skip_reason is None:
            code = block.code.splitlines()
            lines[block.line - 1 : block.line - 1 + len(code)] = code
    return "\n".join(lines) + "\n"


def make_targets_named_in(text: str) -> list[str]:
    """Return the targets of every `make …` in code: inline, or a line of a console block."""
    consoles = [b.code for b in fenced_blocks(text) if b.language != "python"]
    inline = re.findall(r"`make[^`\n]*`", text)
    words = " ".join(MAKE_CALL.findall("\n".join(consoles + inline))).split()
    return sorted({word for word in words if re.fullmatch(r"[a-z][a-z-]*", word)})


@pytest.fixture
def one_thread_and_clean_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give a block one thread, and take back the global state of torch that it may change."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    with torch.random.fork_rng():
        yield
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.compiler.reset()


@pytest.mark.parametrize("page", pages())
@pytest.mark.usefixtures("one_thread_and_clean_torch")
def test_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one page build on each other; a traceback shows the line of the page."""
    script = script_of((ROOT / page).read_text(encoding="utf-8"))
    if not script.strip():
        pytest.skip("the page has no Python to run")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.py").write_text(script, encoding="utf-8")
    runpy.run_path(str(tmp_path / "page.py"), run_name="__main__")


@pytest.mark.skipif(not README.exists(), reason="there is no README.md")
def test_make_targets_in_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    defined = set(re.findall(r"^([a-z][a-z-]*):(?!=)", makefile, re.MULTILINE))
    named = make_targets_named_in(README.read_text(encoding="utf-8"))
    assert "test" in named, "README.md does not say how to run the tests: `make test`"
    assert set(named) <= defined, f"not in Makefile: {sorted(set(named) - defined)}"


PAGE = """\
Prose: make sure that `make demo` works.

```python
a = 1
```

<!-- no test: needs a GPU -->

```python
b = 2
```

- in a list

  ```python
  if a:
      c = 3
  ```

````markdown
```python
not_a_block()
```
````

```console
$ cd here && make setup lint  # make clean
$ make -j2 test ARGS="-x"
```
"""


def test_blocks_are_found() -> None:
    found = [block for block in fenced_blocks(PAGE) if block.language == "python"]
    assert [block.code for block in found] == ["a = 1\n", "b = 2\n", "if a:\n    c = 3\n"]
    assert [block.line for block in found] == [4, 10, 16]
    assert [block.skip_reason for block in found] == [None, "needs a GPU", None]


def test_open_fence_is_an_error() -> None:
    with pytest.raises(AssertionError, match="line 2: this fence is never closed"):
        fenced_blocks("text\n```python\na = 1\n")


def test_make_targets_are_found() -> None:
    assert make_targets_named_in(PAGE) == ["demo", "lint", "setup", "test"]
