"""Taylor mode: what a graph computes along a polynomial curve, to any order.

`jets` is the arithmetic of truncated series, `elementwise` derives the rules of elementwise
functions with sympy, `rules` holds those of all other operators, `push` runs a graph on series.
"""

from passes.taylor.jets import Jets
from passes.taylor.push import push_series
from passes.taylor.rules import NoSeries

__all__ = ["Jets", "NoSeries", "push_series"]
