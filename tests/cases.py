"""Losses × layers: one row each; a new rule is a new row."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm

# Losses of (net, x): what people write.


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    """Gradient penalty on a fresh leaf."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return ((g.flatten(1).norm(dim=1) - 1) ** 2).mean()


def penalty_on_input(net: nn.Module, x: Tensor) -> Tensor:
    """Gradient of a squared output at a tensor that the caller differentiates as well."""
    x.requires_grad_()
    u = net(x)
    (g,) = torch.autograd.grad(u.square().sum(), x, create_graph=True)
    return g.square().sum() + u.sin().sum() + x.cos().mean()


def penalty_and_data(net: nn.Module, x: Tensor) -> Tensor:
    """Penalty and data loss, the network written twice."""
    data = (net(x) - 0.3).square().mean()
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return data + g.square().mean()


def func_gradient(net: nn.Module, x: Tensor) -> Tensor:
    """`torch.func.grad`, and the value beside it."""
    return torch.func.grad(lambda z: net(z).square().sum())(x).square().sum() + net(x).mean()


def second_order(net: nn.Module, x: Tensor) -> Tensor:
    """A gradient of a gradient."""
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.square().sum(), x, create_graph=True)
    return h.square().mean() + g.sum()


def parameter_gradient(net: nn.Module, x: Tensor) -> Tensor:
    """Norm of the gradient in the parameters."""
    parameters = [p for p in net.parameters() if p.requires_grad]
    grads = torch.autograd.grad(net(x).square().sum(), parameters, create_graph=True)
    return sum((g.square().sum() for g in grads), start=torch.zeros((), dtype=x.dtype))


LOSSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        penalty,
        penalty_on_input,
        penalty_and_data,
        func_gradient,
        second_order,
        parameter_gradient,
    )
}


class Attention(nn.Module):
    """Self-attention and a readout."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.readout = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(self.attention(x, x, x, need_weights=False)[0])


class FusedAttention(nn.Module):
    """`scaled_dot_product_attention` as people call it."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, dim=-1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Embedded(nn.Module):
    """Continuous input beside an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        kinds = torch.arange(x.shape[0], device=x.device) % 5
        return self.net(torch.cat([x, self.embedding(kinds)], dim=1))


class Residual(nn.Module):
    """Shared layer, in-place activation, skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        h = torch.relu_(h)
        h = h + x
        return self.inner(h).softmax(dim=-1)


def _mlp(activation: Callable[[], nn.Module]) -> nn.Module:
    """One hidden layer; two, where a layer's derivative meets the next one's, for a few."""
    more = [nn.Linear(5, 5), activation()] if activation in (nn.Tanh, nn.SiLU, nn.ReLU) else []
    return nn.Sequential(nn.Linear(3, 5), activation(), *more, nn.Linear(5, 2))


def _points(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        nn.Tanh, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Softplus, nn.Mish,
        nn.Softsign, nn.Tanhshrink, nn.LogSigmoid, nn.SELU, nn.CELU, nn.Hardtanh, nn.ReLU6,
        nn.PReLU, nn.Softshrink, nn.Hardswish, nn.Hardshrink,
    )
}  # fmt: skip
ACTIVATIONS["GELU_tanh"] = lambda: nn.GELU(approximate="tanh")

# name → (network, points)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    name: ((lambda make=make: _mlp(make)), _points(6, 3)) for name, make in ACTIVATIONS.items()
}
NETWORKS |= {
    "linear": (lambda: nn.Linear(3, 2), _points(5, 3)),
    "layer_norm": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)),
        _points(5, 3),
    ),
    "group_norm": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv1d(4, 1, 2)
        ),
        _points(3, 2, 7),
    ),
    "instance_norm": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4, affine=True), nn.Tanh()),
        _points(3, 2, 7),
    ),
    "batch_norm_train": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)),
        _points(6, 3),
    ),
    "batch_norm_eval": (
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
        ).eval(),
        _points(6, 3),
    ),
    "batch_norm_2d": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.BatchNorm2d(3),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(48, 1),
        ),
        _points(3, 2, 4, 4),
    ),
    "dropout": (
        lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 1)),
        _points(6, 3),
    ),
    "conv_strided": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(16, 1),
        ),
        _points(2, 2, 8, 8),
    ),
    "conv_transposed": (
        lambda: nn.Sequential(nn.ConvTranspose2d(2, 3, 3, stride=2), nn.Tanh(), nn.Conv2d(3, 1, 3)),
        _points(2, 2, 3, 3),
    ),
    "max_pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.MaxPool2d(2),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(12, 1),
        ),
        _points(3, 1, 4, 4),
    ),
    "avg_pool": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.AvgPool2d(2),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ),
        _points(3, 1, 4, 4),
    ),
    "softmax": (
        lambda: nn.Sequential(nn.Linear(3, 4), nn.Softmax(dim=1), nn.Linear(4, 1)),
        _points(5, 3),
    ),
    "log_softmax": (lambda: nn.Sequential(nn.Linear(3, 4), nn.LogSoftmax(dim=1)), _points(5, 3)),
    "glu": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GLU(), nn.Linear(2, 1)), _points(5, 3)),
    "residual": (lambda: Residual(), _points(5, 3)),
    "attention": (Attention, _points(2, 3, 8)),
    "fused_attention": (FusedAttention, _points(2, 3, 4)),
    "transformer": (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), nn.Linear(8, 1)
        ),
        _points(2, 3, 8),
    ),
    "embedding": (Embedded, _points(6, 2)),
    "upsample": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Upsample(scale_factor=2),
            nn.Tanh(),
            nn.Conv2d(2, 1, 3),
        ),
        _points(2, 1, 3, 3),
    ),
}


class WrittenNorm(nn.Module):
    """A norm layer, by its formula, for orders at which PyTorch's own derivative is wrong."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, parameter in layer.named_parameters():
            self.register_parameter(name, parameter)
        for name, buffer in layer.named_buffers():
            self.register_buffer(name, buffer)
        self.layer = [layer]

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        if isinstance(layer, nn.LayerNorm):
            dims, shape = [-1], [-1]
        elif isinstance(layer, nn.InstanceNorm1d):
            dims = [2]
        else:
            dims = [d for d in range(x.dim()) if d != 1]
        mean = x.mean(dims, keepdim=True)
        variance = (x - mean).square().mean(dims, keepdim=True)
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)):
            n = x.numel() / x.shape[1]
            with torch.no_grad():
                self.running_mean.mul_(0.9).add_(0.1 * mean.flatten())
                self.running_var.mul_(0.9).add_(0.1 * variance.flatten() * n / (n - 1))
                self.num_batches_tracked.add_(1)
        normal = (x - mean) * (variance + layer.eps).rsqrt()
        if layer.weight is None:
            return normal
        return normal * self.weight.view(shape) + self.bias.view(shape)


class WrittenWeightNorm(nn.Module):
    """``weight_norm`` by its formula: PyTorch's second derivatives of it by ``v`` are wrong."""

    def __init__(self, layer: _WeightNorm) -> None:
        super().__init__()
        self.dim = layer.dim

    def forward(self, g: Tensor, v: Tensor) -> Tensor:
        return v * (g / torch.norm_except_dim(v, 2, self.dim))


def with_written_norms(net: nn.Module) -> nn.Module:
    """Return the network with its norm layers and weight normalizations replaced by their
    formulas, those that keep statistics only in train mode; names of parameters stay."""
    norms = (nn.LayerNorm, nn.InstanceNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)
    for name, child in list(net.named_children()):
        if isinstance(child, norms) and (child.training or isinstance(child, nn.LayerNorm)):
            setattr(net, name, WrittenNorm(child))
        elif isinstance(child, _WeightNorm):
            setattr(net, name, WrittenWeightNorm(child))
        else:
            with_written_norms(child)
    return net


def make(name: str) -> tuple[nn.Module, Tensor]:
    """Return a network in float64 and its points, the same in every run."""
    torch.manual_seed(3)
    network, points = NETWORKS[name]
    return network().double(), points()


def mlp(
    activation: Callable[[], nn.Module], layers: int = 6, width: int = 64, inputs: int = 64
) -> nn.Module:
    """Return a multilayer perceptron with a scalar output, in float64."""
    torch.manual_seed(5)
    sizes: list[Any] = [inputs, *[width] * (layers - 1)]
    inner = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), activation())]
    return nn.Sequential(*inner, nn.Linear(sizes[-1], 1)).double()


def small_net() -> nn.Module:
    """Return a network of three inputs and two outputs, in float64, the same in every run."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
