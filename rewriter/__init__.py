"""Rewrite the nested derivatives of PyTorch losses into their cheapest exact form."""

from rewriter.ahead.load import load
from rewriter.api import OptimizedLoss, optimize_nested
from rewriter.errors import (
    ArtifactError,
    CaptureError,
    CheckFailed,
    NestedGradientWarning,
    NotRewritten,
    OptimizeNestedError,
)
from rewriter.options import disabled
from rewriter.report import Report
from rewriter.start import wait_until_compiled
from rewriter.version import __version__

__all__ = [
    "ArtifactError",
    "CaptureError",
    "CheckFailed",
    "NestedGradientWarning",
    "NotRewritten",
    "OptimizeNestedError",
    "OptimizedLoss",
    "Report",
    "__version__",
    "disabled",
    "load",
    "optimize_nested",
    "wait_until_compiled",
]
