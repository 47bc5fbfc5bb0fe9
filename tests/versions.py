"""Marks of tests of what PyTorch does not do in each version that this package runs with."""

from __future__ import annotations

import pytest
import torch

from passes.versions import IS_BEFORE_2_13

forward_mode_of_open_sizes = pytest.mark.xfail(
    IS_BEFORE_2_13,
    reason="forward mode under vmap takes no open sizes before torch 2.13: pullbacks stand in",
)

views_of_open_sizes = pytest.mark.xfail(
    IS_BEFORE_2_13, reason="a view fixes open sizes before torch 2.13"
)

traces_in_threads = pytest.mark.skipif(
    IS_BEFORE_2_13 and torch.version.cuda is not None and not torch.cuda.is_available(),
    reason="two traces at once, of whatever, crash in torch 2.11 for CUDA without a GPU",
)

second_derivative_of_grid_sample = pytest.mark.xfail(
    IS_BEFORE_2_13, reason="grid_sample has no second derivative before torch 2.13"
)

compiled_draws = pytest.mark.xfail(
    IS_BEFORE_2_13, reason="Inductor draws in another order than eager before torch 2.13"
)

sizes_fixed_by_convolutions = pytest.mark.skipif(
    IS_BEFORE_2_13, reason="before torch 2.13 our formula stands in, which fixes no size"
)

derivative_of_trace = pytest.mark.xfail(
    IS_BEFORE_2_13, reason="eager's derivative of the trace of a tall matrix is wrong in torch 2.11"
)
