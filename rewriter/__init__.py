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
    RuleError,
)
from rewriter.operator_rules import register_elementwise, register_linear, register_taylor_rule
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
    "RuleError",
    "__version__",
    "disabled",
    "load",
    "optimize_nested",
    "register_elementwise",
    "register_linear",
    "register_taylor_rule",
    "wait_until_compiled",
]
