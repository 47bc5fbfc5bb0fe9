"""Small layers from tensors of shape (batch, 4) to tensors of that shape, for random programs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

WIDTH = 4


class Map(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """``x + inner(x)``."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Twice(nn.Module):
    """The same layer two times: its parameters are shared."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.inner(x))


class Beside(nn.Module):
    """Two layers side by side, and a readout of both."""

    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.readout = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(torch.cat([self.left(x), self.right(x)], dim=1))


class Product(nn.Module):
    """A bilinear form of the input and of what a layer makes of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.form = nn.Bilinear(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.inner(x))


class Embedded(nn.Module):
    """An embedding of a kind per row beside the continuous input."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 2)
        self.readout = nn.Linear(WIDTH + 2, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        kinds = torch.arange(x.shape[0], device=x.device) % 3
        return self.readout(torch.cat([x, self.embedding(kinds)], dim=1))


class Attention(nn.Module):
    """Attention between the two halves of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x.unflatten(1, (2, 2))).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v).flatten(1)


def frozen(layer: nn.Module) -> nn.Module:
    """Return the layer; its parameters take no gradient."""
    return layer.requires_grad_(False)


def randomized(net: nn.Module) -> nn.Module:
    """Move every parameter, and the statistics of norm layers, away from where layers start."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for name, buffer in net.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer += 0.3 * torch.rand_like(buffer)
    return net
