"""Write what became of a loss to a folder, for a bug report."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from passes.graph import print_graph
from rewriter.report import make_report
from rewriter.rewrite import Rewritten

MAX_INPUT_BYTES = 256 * 2**20


def dump(rewritten: Rewritten, inputs: Sequence[Any]) -> Path:
    """Write every stage, the report, the versions and the inputs to a new folder; return it.

    The folder is made in ``OPTIMIZE_NESTED_DUMP``, or where the system keeps temporary files.
    """
    parent = os.environ.get("OPTIMIZE_NESTED_DUMP")
    if parent:
        os.makedirs(parent, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="optimize_nested_", dir=parent or None))
    captured = rewritten.captured.print_readable(print_output=False)
    (folder / "00_captured.py").write_text(captured)
    for number, stage in enumerate(rewritten.stages, start=1):
        text = print_graph(stage.module)
        code = stage.module.print_readable(print_output=False)
        (folder / f"{number:02}_{stage.name}.txt").write_text(text + "\n")
        (folder / f"{number:02}_{stage.name}.py").write_text(code)
    versions = f"torch {torch.__version__}\npython {platform.python_version()}\n"
    (folder / "report.txt").write_text(f"{make_report(rewritten)}\n{versions}")
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if sum(x.numel() * x.element_size() for x in tensors) <= MAX_INPUT_BYTES:
        kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
        torch.save(kept, folder / "inputs.pt")
    return folder
