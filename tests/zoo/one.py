"""What `tests.zoo` starts for each loss: one form of it, in a process of its own.

``check NAME`` compares the loss with itself as written, and says how it is captured. ``written
NAME`` and ``ours NAME`` take steps: as many as each line of standard input says, and answer with
the processor time of one. All answers are lines of JSON.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from rewriter.report import Report
from tests.zoo.row import Loss
from tests.zoo.running import Side, capture_of, compare, in_float64, is_end, make_side
from tests.zoo.table import LOSSES
from tests.zoo.world import reachable

WARM_UP = 15


class Started(TorchDispatchMode):
    """Counts the operators that eager starts, views aside: each is a kernel at least."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in results)
        self.number += not is_view
        return func(*args, **(kwargs or {}))


def step(side: Side, args: tuple[Any, ...], row: Loss) -> None:
    value = side.loss(*args)
    if not row.is_whole_step:
        next(x for x in pytree.tree_leaves(value) if is_end(x)).backward()


def _clear(side: Side) -> None:
    for _, item in reachable([side.written]):
        if isinstance(item, nn.Parameter):
            item.grad = None


def check(row: Loss) -> dict[str, Any]:
    """Return whether a loss is right, how it is captured, and what a step of it starts."""
    torch.set_num_threads(1)
    start = time.process_time()
    wrong, side = compare(row)
    found = capture_of(side)
    record: dict[str, Any] = {
        "way": found.way, "graphs": found.graphs, "reason": found.reason, "wrong": wrong,
        "seconds": round(time.process_time() - start, 1),
    }  # fmt: skip
    with in_float64():
        written = make_side(row)
        args = written.batch()
        with Started() as counter:
            step(written, args, row)
        record["kernels_as_written"] = counter.number
        if found.graphs:
            record |= _counts(side.loss.explain(*side.batch()))
    return record


def _counts(report: Report) -> dict[str, Any]:
    if not report.captured:
        return {}
    return {
        "kernels": report.kernels + report.matmuls,
        "flops": report.flops,
        "flops_as_written": report.flops_as_written,
    }


def serve(row: Loss, **options: Any) -> None:
    """Take steps when told to."""
    torch.set_num_threads(1)
    with in_float64():
        side = make_side(row, **options)
        for _ in range(WARM_UP):
            _seconds(side, row)
        print(json.dumps({"seconds": _seconds(side, row)}), flush=True)
        for line in sys.stdin:
            times = [_seconds(side, row) for _ in range(int(line))]
            print(json.dumps({"seconds": sum(times) / len(times)}), flush=True)


def _seconds(side: Side, row: Loss) -> float:
    args = side.batch()
    _clear(side)
    start = time.process_time()
    step(side, args, row)
    return time.process_time() - start


def main(form: str, name: str, backend: str = "inductor") -> None:
    warnings.simplefilter("ignore")
    row = next(row for row in LOSSES if row.name == name)
    if form == "check":
        print(json.dumps(check(row)), flush=True)
    elif form == "written":
        serve(row)
    else:
        serve(row, backend=backend)


if __name__ == "__main__":
    main(*sys.argv[1:])
