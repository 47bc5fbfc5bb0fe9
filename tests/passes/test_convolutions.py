"""The formula that stands in for PyTorch's second derivative of a convolution where that takes
numbers only."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from passes.convolutions import convolution_double_backward

aten = torch.ops.aten
CONVOLUTIONS = {
    "of two dimensions": ((2, 4, 5, 6), (6, 4, 3, 2), ([1, 2], [1, 0], [2, 1], False, [0, 0], 1)),
    "in groups": ((3, 4, 7), (6, 2, 3), ([2], [1], [1], False, [0], 2)),
    "transposed": ((2, 4, 5), (4, 3, 3), ([2], [1], [1], True, [1], 2)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_formula_is_pytorchs(name: str) -> None:
    """Whichever cotangents there are, and whichever derivatives are asked for."""
    size, kernel, how = CONVOLUTIONS[name]
    kind = {"dtype": torch.float64}
    x, weight = torch.randn(size, **kind), torch.randn(kernel, **kind)
    out = aten.convolution(x, weight, None, *how)
    cotangent, bias = torch.randn_like(out), torch.randn(out.shape[1], **kind)
    to = (torch.randn_like(x), torch.randn_like(weight), bias)
    for given in itertools.product([False, True], repeat=3):
        for wanted in itertools.product([False, True], repeat=3):
            chosen = [t if there else None for t, there in zip(to, given, strict=True)]
            args = (*chosen, cotangent, weight, x, *how, list(wanted))
            ours = convolution_double_backward(*args)
            theirs = aten._convolution_double_backward(*args)
            for mine, reference, is_wanted in zip(ours, theirs, wanted, strict=True):
                if is_wanted and reference is not None:
                    assert_close(mine, reference)
                else:
                    assert mine is None
