"""What losses ask of Jacobians in parameters, sample by sample, without these Jacobians."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from passes.bytes import is_view
from passes.graph import elements
from rewriter import Report
from tests.oracle import check
from tests.passes.flat import random_points

Loss = Callable[..., Tensor]


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each sample's output in each parameter."""

    def output(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
        return functional_call(net, parameters, (point,)).sin().sum()

    return vmap(grad(output), in_dims=(None, 0))(dict(net.named_parameters()), x)


def flat(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts.values()], 1)


def squared_norms(net: nn.Module, x: Tensor) -> Tensor:
    """``Σ ‖∂u/∂θ‖²`` of each sample."""
    norms = sum(g.flatten(1).square().sum(1) for g in gradients(net, x).values())
    return (norms * x[..., 0].reshape(len(x), -1)[:, 0].cos()).sum()


def gram(net: nn.Module, x: Tensor) -> Tensor:
    """A function of the tangent kernel of all pairs of samples."""
    jacobian = flat(gradients(net, x))
    return (jacobian @ jacobian.T).sin().sum()


def gram_layer_by_layer(net: nn.Module, x: Tensor) -> Tensor:
    """The kernel as in PyTorch's tutorial on it, outputs apart."""

    def output(parameters: dict[str, Tensor], point: Tensor) -> Tensor:
        return functional_call(net, parameters, (point.unsqueeze(0),)).squeeze(0)

    jacobian = vmap(jacrev(output), (None, 0))(dict(net.named_parameters()), x)
    parts = [part.flatten(2) for part in jacobian.values()]
    kernel = torch.stack([torch.einsum("Naf,Mbf->NMab", part, part) for part in parts]).sum(0)
    return kernel.sin().sum()


def clipped(net: nn.Module, x: Tensor) -> Tensor:
    """The sum of gradients that are cut to a length, as in DP-SGD."""
    found = gradients(net, x)
    weights = (2.0 / flat(found).norm(dim=1)).clamp(max=1)
    parts = [torch.einsum("n,n...->...", weights, g) for g in found.values()]
    return sum((part.square().sum() for part in parts), torch.zeros((), dtype=x.dtype))


def one_by_one(net: nn.Module, x: Tensor) -> Tensor:
    """A loop over samples."""
    parameters, total = list(net.parameters()), x.new_zeros(())
    for point in x[:2]:
        found = torch.autograd.grad(net(point[None]).sum(), parameters, create_graph=True)
        total = total + sum(g.square().sum() for g in found).square()
    return total


def mlp(width: int, outputs: int = 1) -> nn.Module:
    layers = nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
    return nn.Sequential(*layers, nn.Linear(width, outputs)).double()


class Normalized(nn.Module):
    """A layer norm by its formula: PyTorch's own has a second derivative that is wrong."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * self.weight + (
            self.bias
        )


def of_sequences() -> nn.Module:
    """Three places a sample."""
    return nn.Sequential(nn.Linear(2, 24), Normalized(24), nn.Tanh(), nn.Linear(24, 20)).double()


def convolutions(groups: int = 1) -> nn.Module:
    """Windows that overlap and leave a rest."""
    first, second = nn.Conv2d(8, 24, 3, padding=1, stride=2), nn.Conv2d(24, 32, 2, groups=groups)
    return nn.Sequential(first, nn.Tanh(), second).double()


def transposed() -> nn.Module:
    """The second puts rows and columns back that the first has left out."""
    first = nn.Conv1d(8, 24, 3, stride=2, dilation=2)
    second = nn.ConvTranspose1d(24, 32, 3, stride=2, padding=1, output_padding=1)
    return nn.Sequential(first, nn.Tanh(), second).double()


class Words(nn.Module):
    """A table of rows, of which samples look up some twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(60, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.table(x.detach().mul(2).long().remainder(60)).sin())


def normalized_groups() -> nn.Module:
    layers = nn.Conv1d(12, 24, 1), nn.GroupNorm(4, 24), nn.Tanh(), nn.Conv1d(24, 20, 1)
    return nn.Sequential(*layers).double()


@dataclass(frozen=True)
class Subject:
    """A loss, its network and points.

    Attributes:
        flops: What the step takes; exact.
        most: The most elements that a tensor may have.
    """

    loss: Loss
    net: nn.Module
    shape: tuple[int, ...]
    flops: int
    most: int

    def run(self, **options: Any) -> Report:
        x = random_points(*self.shape)
        return check(self.loss, [self.net], x, **options).explain(self.net, x)


def most_elements(report: Report) -> int:
    """Return the elements of the largest tensor that is computed."""
    nodes = [n for n in report.graph.graph.nodes if n.op == "call_function" and not is_view(n)]
    values = (n.meta["val"] for n in nodes)
    return max(elements(value) for value in values if isinstance(value, Tensor))


def subjects() -> dict[str, Subject]:
    torch.manual_seed(2)
    return {
        "squared norms": Subject(squared_norms, mlp(16), (12, 2), 41088, 256),
        "Gram": Subject(gram, mlp(16), (12, 2), 115968, 256),
        "Gram of outputs": Subject(gram_layer_by_layer, mlp(16, 2), (6, 2), 116352, 864),
        "clipped": Subject(clipped, mlp(16), (12, 2), 65352, 256),
        "one by one": Subject(one_by_one, mlp(16), (3, 2), 4224, 256),
        "sequences": Subject(squared_norms, of_sequences(), (6, 3, 2), 120096, 480),
        "convolutions": Subject(squared_norms, convolutions(2), (6, 8, 4, 5), 534144, 2592),
        "convolutions, Gram": Subject(gram, convolutions(), (6, 8, 4, 5), 1088064, 3072),
        "convolutions, clipped": Subject(clipped, convolutions(), (6, 8, 4, 5), 1117152, 3072),
        "transposed": Subject(squared_norms, transposed(), (5, 8, 8), 312000, 2304),
        "words, Gram": Subject(gram, Words().double(), (6, 4), 50832, 576),
        "words, clipped": Subject(clipped, Words().double(), (6, 4), 25752, 480),
        "groups": Subject(squared_norms, normalized_groups(), (6, 1, 12, 2), 90048, 480),
    }


def test_padding() -> None:
    """Row p of the table has no gradient for any sample."""
    net = nn.Sequential(nn.Embedding(4, 8, padding_idx=1), nn.Linear(8, 6)).double()
    words = torch.tensor([[0, 1, 1], [1, 2, 3], [3, 1, 0]])
    for strategy in ("reverse", "jvp_over_gradient"):
        check(squared_norms, [net], words, strategy=strategy)


@pytest.mark.parametrize("name", subjects())
def test_no_jacobian(name: str) -> None:
    subject = subjects()[name]
    report = subject.run()
    assert report.flops == subject.flops
    assert most_elements(report) <= subject.most
