"""A model that a library trains; what `examples/clients.py` and the tests ask of each library."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# What is done to the network before the library gets it: nothing, or `optimize_nested`.
Line = Callable[[nn.Module], nn.Module]


def as_written(net: nn.Module) -> nn.Module:
    """Leave the network as it is."""
    return net


@dataclass(frozen=True)
class Client:
    """Hold a model in the hands of a library.

    `step` is one step of training by the library's code: value, gradients (which stay in `.grad`),
    optimizer. `train` takes a number of steps the way a user of the library does, and returns the
    loss before each of them. `net` is what the line was applied to.
    """

    model: nn.Module
    net: nn.Module
    step: Callable[[], object]
    train: Callable[[int], list[float]]


def two_moons(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Draw points on two half circles, shape (count, 2), and which it is, shape (count, 1)."""
    generator = torch.Generator().manual_seed(0)
    which = (torch.arange(count) % 2).to(dtype)
    angle = math.pi * torch.rand(count, generator=generator).to(dtype)
    x = torch.cos(angle) * (1 - 2 * which) + which
    y = torch.sin(angle) * (1 - 2 * which) + which / 2
    noise = 0.1 * torch.randn(count, 2, generator=generator).to(dtype)
    return torch.stack([x, y], dim=1) + noise, which.unsqueeze(1)
