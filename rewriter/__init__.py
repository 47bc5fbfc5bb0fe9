"""Rewrite the nested derivatives of PyTorch losses into their cheapest exact form."""

from rewriter.api import OptimizedLoss, optimize_nested
from rewriter.errors import (
    CaptureError,
    CheckFailed,
    NestedGradientWarning,
    NotRewritten,
    OptimizeNestedError,
)
from rewriter.options import disabled
from rewriter.report import Report
from rewriter.version import __version__

__all__ = [
    "CaptureError",
    "CheckFailed",
    "NestedGradientWarning",
    "NotRewritten",
    "OptimizeNestedError",
    "OptimizedLoss",
    "Report",
    "__version__",
    "disabled",
    "optimize_nested",
]
