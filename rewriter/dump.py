"""Write what became of a loss to a folder: for a bug report, or because ``OPTIMIZE_NESTED_DUMP``
asks for it."""

from __future__ import annotations

import os
import platform
import re
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from rewriter.log import logger
from rewriter.make_report import make_report
from rewriter.report import Report
from rewriter.rewrite import Rewritten
from rewriter.switches import say_once

VARIABLE = "OPTIMIZE_NESTED_DUMP"
MAX_INPUT_BYTES = 256 * 2**20


def dump_failed(rewritten: Rewritten, inputs: Sequence[Any]) -> Path:
    """Write every stage, the report, the versions and the inputs to a new folder; return it.

    The folder is made in ``OPTIMIZE_NESTED_DUMP``, or where the system keeps temporary files.
    """
    report = make_report(rewritten)
    try:
        folder = _dump(rewritten, report, "check_failed")
    except OSError as error:
        if not is_asked_for():
            raise
        say_once(f"{VARIABLE}: nothing is written there: {error}")
        folder = _dump(rewritten, report, "check_failed", elsewhere=True)
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if sum(x.numel() * x.element_size() for x in tensors) <= MAX_INPUT_BYTES:
        kept = [x.detach().clone() if isinstance(x, Tensor) else x for x in inputs]
        torch.save(kept, folder / "inputs.pt")
    return folder


def dump_internal(name: str, captured: GraphModule | None, error: BaseException) -> Path | None:
    """Write an error of ours, with the captured graph and the versions, to a new folder, and say in
    the log where; return the folder, or None if there is none to be had.

    Args:
        name: The loss's name.
        captured: What Dynamo captured.
        error: What was raised.
    """
    try:
        folder = _folder(name, "internal_error")
        if captured is not None:
            code = captured.print_readable(print_output=False)
            (folder / "00_captured.py").write_text(code, encoding="utf-8")
        text = "".join(traceback.format_exception(error))
        (folder / "error.txt").write_text(f"{text}\n{_versions()}", encoding="utf-8")
    except OSError as reason:  # no folder: what is to be said of the error is said all the same
        logger.warning("%s: %r, and no folder for it: %s", name, error, reason)
        return None
    logger.warning("%s: %r; please report this, with %s", name, error, folder)
    return folder


def dump_built(rewritten: Rewritten, report: Report) -> Path | None:
    """Write every stage, the report and the versions to a new folder in ``OPTIMIZE_NESTED_DUMP``;
    return it, or None if that is not set, or nothing can be written there."""
    if not is_asked_for():
        return None
    try:
        return _dump(rewritten, report, "built")
    except OSError as error:
        say_once(f"{VARIABLE}: nothing is written there: {error}")
        return None


def is_asked_for() -> bool:
    """Whether ``OPTIMIZE_NESTED_DUMP`` is set."""
    return bool(os.environ.get(VARIABLE))


def _dump(rewritten: Rewritten, report: Report, why: str, *, elsewhere: bool = False) -> Path:
    folder = _folder(report.function, why, elsewhere=elsewhere)
    captured = rewritten.captured.print_readable(print_output=False)
    (folder / "00_captured.py").write_text(captured, encoding="utf-8")
    for number, stage in enumerate(rewritten.stages, start=1):
        code = stage.module.print_readable(print_output=False)
        start = folder / f"{number:02}_{stage.name}"
        start.with_suffix(".txt").write_text(f"{stage.text}\n", encoding="utf-8")
        start.with_suffix(".py").write_text(code, encoding="utf-8")
    (folder / "report.txt").write_text(f"{report}\n{_versions()}", encoding="utf-8")
    report.to_json(folder / "report.json")
    return folder


def _folder(function: str, why: str, *, elsewhere: bool = False) -> Path:
    """Make a folder in the one that is asked for, or where the system keeps temporary files."""
    parent = None if elsewhere else os.environ.get(VARIABLE) or None
    if parent:
        os.makedirs(parent, exist_ok=True)
    name = re.sub(r"\W+", "_", function)[:60] or "loss"
    return Path(tempfile.mkdtemp(prefix=f"optimize_nested_{name}_{why}_", dir=parent))


def _versions() -> str:
    return f"torch {torch.__version__}\npython {platform.python_version()}\n"
