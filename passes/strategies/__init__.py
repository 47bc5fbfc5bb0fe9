"""Ways to evaluate a site and its pullback, one file each."""

from passes.strategies.base import Inside, Refused, Strategy
from passes.strategies.contraction import NAME as CONTRACTION
from passes.strategies.in_form import NAMES, STRATEGIES, put_in_form
from passes.strategies.jvp_over_gradient import JvpOverGradient
from passes.strategies.reverse import Reverse
from passes.strategies.taylor import NAME as TAYLOR

__all__ = [
    "CONTRACTION", "NAMES", "STRATEGIES", "TAYLOR", "Inside", "JvpOverGradient", "Refused",
    "Reverse", "Strategy", "put_in_form",
]  # fmt: skip
