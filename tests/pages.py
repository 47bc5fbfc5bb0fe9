"""The documentation's pages as programs: run their Python blocks, compare what they print.

A block of text with the title ``Output`` that directly follows a Python block shows what that block
prints, all of it; ``...`` in it stands for anything. A Python block with a file's name for a title
is written to that file in place of being run. ``python -m tests.pages`` writes into the
pages what the blocks print now (``--check`` only says where it differs); lines that agree, with
their ``...``, stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import doctest
import io
import linecache
import os
import re
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

FENCE = re.compile(r"^\s*(?P<marks>`{3,}|~{3,})\s*(?P<language>[\w+-]*)(?P<info>.*)$")
SKIP = re.compile(r"^\s*<!--\s*no test:\s*(?P<reason>\S.*?)\s*-->\s*$")
OUTPUT = 'title="Output"'
LINE = re.compile(r"(\bpage\.py:)\d+")
PROGRAM = "page.py"
FILE = re.compile(r'title="(?P<name>[\w-]+\.py)"')


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        language: The word behind the fence.
        line: The line of its first code line, from 1.
        code: What it holds.
        skip_reason: Why not to run it, if it is marked so.
        is_output: Whether it shows what the Python block before it prints.
        file: The name of the file that it is, if it is one.
    """

    language: str
    line: int
    code: str
    skip_reason: str | None
    is_output: bool
    file: str | None


class Printed(NamedTuple):
    """What a block printed beside what its page shows; None where it shows nothing."""

    block: Block
    shown: Block | None
    text: str

    @property
    def agrees(self) -> bool:
        """Whether the page shows what was printed."""
        return self.shown is None or is_shown_by(self.text, self.shown.code)


def is_shown_by(text: str, shown: str) -> bool:
    """Whether a text is what a page shows; ``...`` stands for anything, spaces at ends do not
    count."""
    texts = ["\n".join(line.rstrip() for line in x.rstrip().splitlines()) for x in (shown, text)]
    return doctest.OutputChecker().check_output(*texts, doctest.ELLIPSIS)


def pages() -> list[str]:
    """Return the pages of the documentation, as paths from the root."""
    found = [README, *sorted((ROOT / "docs").rglob("*.md"))]
    return [page.relative_to(ROOT).as_posix() for page in found if page.exists()]


def fenced_blocks(text: str) -> list[Block]:
    """Return the fenced blocks of a Markdown text in order; a fence inside a fence is text.

    Raises:
        AssertionError: A fence that is never closed, or output that follows no Python block.
    """
    blocks: list[Block] = []
    opening: re.Match[str] | None = None
    first = 0
    reason: str | None = None
    last_text = ""
    follows_python = False
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        fence = FENCE.match(line)
        if opening is None and fence:
            skip = SKIP.match(last_text)
            opening, first, reason = fence, number + 1, skip["reason"] if skip else None
            assert OUTPUT not in fence["info"] or follows_python, (
                f"line {number}: this output follows no Python block"
            )
        elif opening and line.strip().startswith(opening["marks"]) and not fence["language"]:
            code = dedent("\n".join(lines[first - 1 : number - 1])) + "\n"
            is_output = OUTPUT in opening["info"]
            file = FILE.search(opening["info"])
            name = file["name"] if file else None
            blocks.append(Block(opening["language"], first, code, reason, is_output, name))
            follows_python = opening["language"] == "python" and reason is None
            opening = None
        elif opening is None and line.strip():
            follows_python = False
        if line.strip():
            last_text = line
    assert opening is None, f"line {first - 1}: this fence is never closed"
    return blocks


def run_page(text: str, folder: Path) -> list[Printed]:
    """Run the Python blocks of a page in order, as one program; return what each prints.

    A traceback shows the line of the page: the program is written to ``page.py`` with each block on
    its own lines, because Dynamo reads sources. Blocks marked ``no test`` are left out.
    """
    blocks = fenced_blocks(text)
    run = [b for b in blocks if b.language == "python" and not (b.skip_reason or b.file)]
    for block in blocks:
        if block.file is not None:
            (folder / block.file).write_text(block.code, encoding="utf-8")
    padded = {block: "\n" * (block.line - 1) + block.code for block in run}
    lines = [""] * len(text.splitlines())
    for block in run:
        code = block.code.splitlines()
        lines[block.line - 1 : block.line - 1 + len(code)] = code
    (folder / PROGRAM).write_text("\n".join(lines) + "\n", encoding="utf-8")
    program = types.ModuleType("__main__")
    program.__file__ = PROGRAM
    results = []
    with _as_main(program, folder):
        for block in run:
            code = compile(padded[block], PROGRAM, "exec", dont_inherit=True)
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, program.__dict__)
            after = blocks[blocks.index(block) + 1 :]
            shown = after[0] if after and after[0].is_output else None
            results.append(Printed(block, shown, printed.getvalue()))
    return results


@contextlib.contextmanager
def _as_main(program: types.ModuleType, folder: Path) -> Iterator[None]:
    """Let a module be ``__main__`` in a folder; what is imported meanwhile stays imported."""
    before, there = sys.modules["__main__"], Path.cwd()
    sys.modules["__main__"] = program
    os.chdir(folder)
    linecache.cache.pop(PROGRAM, None)  # the lines of the page before
    try:
        yield
    finally:
        os.chdir(there)
        sys.modules["__main__"] = before


def renewed(text: str, results: list[Printed]) -> str:
    """Return a page with what its blocks printed in place of what it showed; its own line numbers
    become ``...``."""
    lines = text.splitlines()
    for result in reversed(results):
        if result.shown is None or result.agrees:
            continue
        old = result.shown.code.splitlines()
        first = result.shown.line - 1
        margin = re.match(r"\s*", lines[first - 1])
        assert margin is not None
        new = [
            next((shown for shown in old if is_shown_by(line, shown)), LINE.sub(r"\1...", line))
            for line in result.text.rstrip().splitlines()
        ]
        lines[first : first + len(old)] = [(margin[0] + line).rstrip() for line in new]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Renew the output that pages show; return how many pages differ, with ``--check``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("pages", nargs="*", help="paths from the root; all pages if none")
    parser.add_argument("--check", action="store_true", help="only say where output differs")
    given = parser.parse_args()
    differing = 0
    for page in given.pages or pages():
        path = ROOT / page
        text = path.read_text(encoding="utf-8")
        with tempfile.TemporaryDirectory() as folder:
            results = run_page(text, Path(folder))
        wrong = [result for result in results if not result.agrees]
        for result in wrong:
            assert result.shown is not None
            print(f"{page}:{result.shown.line}: the output differs")
        differing += bool(wrong)
        if wrong and not given.check:
            path.write_text(renewed(text, results), encoding="utf-8")
    return differing if given.check else 0


if __name__ == "__main__":
    sys.exit(main())
