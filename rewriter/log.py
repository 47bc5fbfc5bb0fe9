"""What ``OPTIMIZE_NESTED_LOG`` asks to be told of each specialisation that is built."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from rewriter.report import Report
from rewriter.report_text import choices_text, sites_text, stages_text
from rewriter.switches import say_once

VARIABLE = "OPTIMIZE_NESTED_LOG"
ARTIFACTS: dict[str, Callable[[Report], str]] = {
    "sites": lambda report: sites_text(report.summary()),
    "stages": lambda report: stages_text(report.summary()),
    "choices": lambda report: choices_text(report.summary()),
    "code": lambda report: report.stage("joint").text,
}
logger = logging.getLogger("optimize_nested")


def wanted() -> tuple[str, ...]:
    """Return what the environment variable names, in its order; what there is not is said once."""
    names = [name.strip() for name in os.environ.get(VARIABLE, "").split(",")]
    for name in names:
        if name and name not in ARTIFACTS:
            known = ", ".join(ARTIFACTS)
            say_once(f"{VARIABLE}: expected a comma list of {known}; got {name!r}")
    return tuple(name for name in names if name in ARTIFACTS)


def log_built(report: Report) -> None:
    """Tell what the environment variable asks for, through the logger ``optimize_nested``.

    Where nobody has given that logger a handler, or one above it, it writes to standard error.
    """
    names = wanted()
    if not names:
        return
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logger.addHandler(handler)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    for name in names:
        logger.info("%s of %s\n%s", name, report.function or "the loss", ARTIFACTS[name](report))
