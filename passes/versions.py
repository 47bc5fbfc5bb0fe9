"""What differs between versions of PyTorch and no name tells."""

from __future__ import annotations

import torch

IS_BEFORE_2_13 = torch.__version__ < "2.13"

CLAMP_MOVES_AT_A_BOUND = torch.__version__ < "2.14"
"""Whether the derivative of ``clamp`` is one where its argument is a bound, not zero."""
