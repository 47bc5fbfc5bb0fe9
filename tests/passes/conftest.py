"""Inputs that tests of the passes share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.passes.flat import random_points


@pytest.fixture
def inputs() -> list[Tensor]:
    """Points, a weight that requires grad, and points of another kind."""
    torch.manual_seed(8)
    return [random_points(5, 3), random_points(3, 3, grad=True), random_points(5, 3)]
