"""Every entry of PyTorch's databases on tensors of one element, of one row and of none::

    python -m tests.narrowed

writes what became of them to the end of ``docs/conformance.md``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress
from torch import Tensor
from torch.utils import _pytree as pytree

from tests.conformance import (
    AS_WRITTEN,
    CRASH,
    REFUSED,
    RESULTS,
    SKIPPED,
    TABLE,
    WRONG,
    Result,
    Sample,
    entries,
    row,
    run_all,
    run_sample,
    samples_of,
)

TITLE = "## Of one element, one row and none"

_ABOUT = """
The loss of the table above, each entry at samples of which every tensor is cut: to nothing along
its first dimension, to one row, or to one element. What PyTorch does not take so is left out.
Written by `python -m tests.narrowed`.
"""

# PyTorch reads beyond what is there, and ends the process.
UNCHECKED = {
    "_batch_norm_with_update", "_native_batch_norm_legit", "native_batch_norm",
    "nn.functional.embedding_bag", "nn.functional.pdist",
}  # fmt: skip

SAMPLES = 6  # that are tried until one can be cut

CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "no rows": lambda x: x[:0],
    "one row": lambda x: x[:1],
    "one element": lambda x: x[(slice(1),) * x.ndim],
}


def cut(sample: Sample, how: str) -> Sample:
    """Return a sample whose tensors, but those without dimensions, are cut."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim == 0:
            return x
        return CUTS[how](x.detach()).clone().requires_grad_(x.requires_grad)

    args, kwargs = pytree.tree_map(one, (sample.args, sample.kwargs))
    return dataclasses.replace(sample, args=args, kwargs=kwargs)


def run_cut(label: str, known: dict[str, Any]) -> Result:
    """Compare an entry at the first of its samples that PyTorch takes where it is cut.

    Args:
        label: The entry's name, a colon, and one of `CUTS`.
        known: All entries.
    """
    name, how = label.rsplit(": ", 1)
    result = Result(name, SKIPPED)
    try:
        samples = samples_of(known[name])[:SAMPLES]
    except Exception:  # no samples on this machine, which the table above says
        samples = []
    for sample in samples:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                result = run_sample(name, cut(sample, how), ("auto",))
            except RuntimeError as error:  # of differences, where nothing else looks at the sizes
                result = Result(name, REFUSED, (), str(error).splitlines()[0])
        if result.result not in (SKIPPED, REFUSED):
            break
    return dataclasses.replace(result, entry=label)


def page(results: Sequence[Result]) -> str:
    """Return the section: counts of each cut, and the lines of what is not rewritten."""
    kinds = [kind for kind in RESULTS if kind not in (SKIPPED, REFUSED)]
    lines = [f"| cut to | {' | '.join(kinds)} |", f"|---{'|---' * len(kinds)}|"]
    for how in CUTS:
        counts = Counter(r.result for r in results if r.entry.endswith(f": {how}"))
        lines.append(f"| {how} | {' | '.join(str(counts[kind]) for kind in kinds)} |")
    lines += ["", "| entry | result | strategies | reason |", "|---|---|---|---|"]
    lines += [row(result) for result in results if result.result in (AS_WRITTEN, WRONG, CRASH)]
    return "\n".join(["", TITLE, _ABOUT, *lines, ""])


def main(given: Sequence[str] | None = None) -> int:
    """Run everything and write the section; 1 if anything is wrong or crashed."""
    parser = argparse.ArgumentParser(prog="python -m tests.narrowed", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run and print these alone")
    parser.add_argument("--kept", type=Path, help="a file of results, to go on from")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    options = parser.parse_args(given)
    found: dict[str, Result] = {}
    if options.kept is not None and options.kept.exists():
        kept = [Result(*json.loads(text)) for text in options.kept.read_text().splitlines()]
        found = {result.entry: result for result in kept}
    names = [name for name in options.only or entries() if name not in UNCHECKED]
    work = [f"{name}: {how}" for name in names for how in CUTS]
    with Progress() as progress:
        task = progress.add_task("cut", total=len(work), completed=len(found))

        def done(result: Result) -> None:
            found[result.entry] = result
            progress.advance(task)
            if options.kept is not None:
                with options.kept.open("a") as file:
                    file.write(json.dumps(dataclasses.astuple(result)) + "\n")
            if options.only or result.result in (WRONG, CRASH):
                progress.console.print(f"{result.entry}: {result.result} {result.reason}")

        run_all([label for label in work if label not in found], options.jobs, done, run_cut)
    results = [found[label] for label in work]
    if not options.only:
        TABLE.write_text(TABLE.read_text().split("\n" + TITLE, 1)[0] + page(results))
    return int(any(result.result in (WRONG, CRASH) for result in results))


if __name__ == "__main__":
    sys.exit(main())
