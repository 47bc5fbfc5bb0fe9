"""Networks that several workloads share."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Sequential:
    """Build a multilayer perceptron (batch, sizes[0]) → (batch, sizes[-1])."""
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers[:-1])


def conv_critic(channels: int = 64) -> nn.Sequential:
    """Build the critic of WGAN-GP on images (batch, 3, 32, 32) → (batch, 1): 5×5, stride 2."""
    widths = [3, channels, 2 * channels, 4 * channels]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 4 * 4 * channels, 1))


def lenet() -> nn.Sequential:
    """Build LeNet on digits (batch, 1, 28, 28) → (batch, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.Tanh(),
        nn.Linear(84, 10),
    )


class EncoderLayer(nn.Module):
    """A layer of a transformer on tokens (batch, length, width). Its attention is written out:
    PyTorch's fused one has no second derivative."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in, self.project_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

    def forward(self, tokens: Tensor) -> Tensor:
        """Return tokens of the same shape."""
        found = self.project_in(tokens).chunk(3, dim=-1)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in found)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        attended = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        tokens = self.norms[0](tokens + self.project_out(attended))
        return self.norms[1](tokens + self.feed(tokens))


class Encoder(nn.Module):
    """Encode token embeddings (batch, length, width) and map their mean to (batch, classes)."""

    def __init__(self, width: int, heads: int, layers: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer(width, heads) for _ in range(layers)))
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits (batch, classes)."""
        return self.head(self.layers(tokens).mean(1))


class DeepONet(nn.Module):
    """An operator: functions by their values (functions, sensors), points (points, dim) → values
    (functions, points); a network for each, three layers, and a product of what they return.

    Source: Lu et al. (2021), "Learning nonlinear operators via DeepONet", equation 2.
    """

    def __init__(self, sensors: int, dim: int, width: int) -> None:
        super().__init__()
        self.branch = mlp([sensors, width, width, width])
        self.trunk = mlp([dim, width, width, width])
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, functions: Tensor, points: Tensor) -> Tensor:
        """Return the values."""
        return self.branch(functions) @ self.trunk(points).T + self.bias


class Velocity(nn.Module):
    """A velocity that depends on time: points (batch, dim) → (batch, dim), softplus inside."""

    def __init__(self, dim: int, widths: Sequence[int]) -> None:
        super().__init__()
        self.net = mlp([dim + 1, *widths, dim], nn.Softplus)

    def forward(self, x: Tensor, time: float) -> Tensor:
        """Return the velocities at a time."""
        return self.net(torch.cat([x, torch.full_like(x[:, :1], time)], dim=1))
