"""Ways to evaluate a site and its pullback, one file each."""

from passes.strategies.base import Refused, Strategy
from passes.strategies.jvp_over_gradient import JvpOverGradient
from passes.strategies.reverse import Reverse

# In order of preference at equal price.
STRATEGIES: tuple[Strategy, ...] = (JvpOverGradient(), Reverse())
NAMES = tuple(strategy.name for strategy in STRATEGIES)

__all__ = ["NAMES", "STRATEGIES", "JvpOverGradient", "Refused", "Reverse", "Strategy"]
