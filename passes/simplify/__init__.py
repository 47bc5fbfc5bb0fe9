"""Simplify a functional ATen graph without changing a value."""

from passes.simplify.fixpoint import RULES, simplify

__all__ = ["RULES", "simplify"]
