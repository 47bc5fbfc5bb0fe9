"""Run every Python block of README.md and docs/, and compare what is printed with what is shown;
check the make targets that README.md names."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.pages import (
    README,
    ROOT,
    fenced_blocks,
    pages,
    renewed,
    run_page,
)

MAKE_CALL = re.compile(r"(?:^|[`;&|$])\s*make((?:[ \t]+[^\s`;&|#]+)+)", re.MULTILINE)


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
def test_page_runs(page: str, tmp_path: Path) -> None:
    """Blocks of one page build on each other; what the page shows is what they print."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if not any(block.language == "python" for block in fenced_blocks(text)):
        pytest.skip("the page has no Python to run")
    for printed in run_page(text, tmp_path):
        if printed.shown is not None and not printed.agrees:
            pytest.fail(
                f"{page}:{printed.shown.line} shows other output than\n{printed.text}"
                f"`python -m tests.pages {page}` renews what is shown",
                pytrace=False,
            )


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


SHOWN = r"""
```python
print("one\ntwo")
print(3)
```

```text title="Output"
one
t...
3
```

- and in a list

  ```python
  print(4 + unknown)
  ```

  ```text title="Output"
  5
  ```
"""


def test_output_is_compared_and_renewed(tmp_path: Path) -> None:
    page = SHOWN.replace("unknown", "0")
    first, second = run_page(page, tmp_path)
    assert first.agrees and not second.agrees
    assert renewed(page, [first, second]) == page.replace("  5\n", "  4\n")
    changed = page.replace("print(3)", "print(6)")
    results = run_page(changed, tmp_path)
    assert not results[0].agrees
    assert "one\nt...\n6\n" in renewed(changed, results)


def test_a_block_with_a_name_is_a_file(tmp_path: Path) -> None:
    block = '```python title="{}"\n{}\n```\n'
    page = block.format("told.py", "value = 7") + block.format("", "import told\nprint(told.value)")
    path = [str(tmp_path), *sys.path]
    with mock.patch.object(sys, "path", path):
        (printed,) = run_page(page, tmp_path)
    del sys.modules["told"]
    assert printed.text == "7\n"


def test_output_without_its_block_is_an_error() -> None:
    text = "text between\n\n```text"
    with pytest.raises(AssertionError, match="line 9: this output follows no Python block"):
        fenced_blocks(SHOWN.replace("```text", text, 1))


def test_a_failing_block_names_the_line_of_the_page(tmp_path: Path) -> None:
    page = SHOWN
    with pytest.raises(NameError, match="unknown") as error:
        run_page(page, tmp_path)
    assert page.splitlines()[error.traceback[-1].lineno].strip() == "print(4 + unknown)"
