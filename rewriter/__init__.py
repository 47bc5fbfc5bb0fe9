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

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CheckFailed",
    "NestedGradientWarning",
    "NotRewritten",
    "OptimizeNestedError",
    "OptimizedLoss",
    "Report",
    "disabled",
    "optimize_nested",
]
