"""Time losses around a decorated module, beside the same losses as written and decorated whole.

Run `python examples/layers.py` (about four minutes on two cores). The loss is ordinary eager code
around `net = optimize_nested(net)`; each derivative that it takes of the network runs compiled
code. You will see a table for each workload, and what a call of a towered module costs beside the
code that was compiled for it.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import side_by_side
import torch
from side_by_side import console
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.bench import Contender, Loss, measure


def penalty(net: nn.Module, x: Tensor) -> Tensor:
    """Ask for a gradient of length one at points x, shape (batch, features)."""
    p = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p).sum(), p, create_graph=True)
    return (g.flatten(1).norm(dim=1) - 1).square().mean()


class MessagePassing(nn.Module):
    """A network on a graph of atoms: positions (atoms, 3) → energies (atoms, 1)."""

    def __init__(self, channels: int, layers: int = 2, waves: int = 16) -> None:
        super().__init__()
        self.centres = nn.Buffer(torch.linspace(0, 4, waves))
        self.start = nn.Parameter(torch.randn(channels))
        self.filters = nn.ModuleList(
            nn.Sequential(nn.Linear(waves, channels), nn.SiLU(), nn.Linear(channels, channels))
            for _ in range(layers)
        )
        self.updates = nn.ModuleList(
            nn.Sequential(nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels))
            for _ in range(layers)
        )
        self.energy = nn.Sequential(
            nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, 1)
        )

    def forward(self, positions: Tensor, source: Tensor, target: Tensor) -> Tensor:
        distance = (positions[source] - positions[target]).norm(dim=1, keepdim=True)
        waves = torch.exp(-2 * (distance - self.centres).square())
        h = self.start.expand(len(positions), -1)
        for make_filter, update in zip(self.filters, self.updates, strict=True):
            messages = h[source] * make_filter(waves)
            h = h + update(torch.zeros_like(h).index_add(0, target, messages))
        return self.energy(h)


def force_matching(
    net: nn.Module, positions: Tensor, source: Tensor, target: Tensor, forces: Tensor
) -> Tensor:
    """Compare the network's forces, shape (atoms, 3), with given ones."""
    p = positions.detach().requires_grad_()
    (g,) = torch.autograd.grad(net(p, source, target).sum(), p, create_graph=True)
    return (g + forces).square().mean()


@dataclass
class Workload:
    """A network, a loss around it and what the loss takes beside the network."""

    name: str
    net: nn.Module
    loss: Loss
    arguments: tuple[Tensor, ...]


def workloads() -> list[Workload]:
    """Build the networks and their inputs, the same in every run."""
    torch.manual_seed(0)
    sizes = [2, 32, 32, 32]
    small = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    conv = [
        m
        for a, b in ((3, 32), (32, 64), (64, 64))
        for m in (nn.Conv2d(a, b, 5, stride=2, padding=2), nn.LeakyReLU(0.2))
    ]
    atoms = 96
    pairs = torch.combinations(torch.arange(atoms))
    positions = 3 * torch.rand(atoms, 3)
    near = (positions[pairs[:, 0]] - positions[pairs[:, 1]]).norm(dim=1) < 1.2
    source, target = torch.cat([pairs[near], pairs[near].flip(1)]).T.contiguous()
    return [
        Workload(
            "penalty, MLP 2-32-32-32-1, batch 128",
            nn.Sequential(*small, nn.Linear(32, 1)),
            penalty,
            (torch.randn(128, 2),),
        ),
        Workload(
            f"force matching, message passing, 128 channels, {len(source)} pairs",
            MessagePassing(128),
            force_matching,
            (positions, source, target, torch.randn(atoms, 3)),
        ),
        Workload(
            "penalty, convolutional critic, 16 images",
            nn.Sequential(*conv, nn.Flatten(), nn.Linear(64 * 16, 1)),
            penalty,
            (torch.randn(16, 3, 32, 32),),
        ),
    ]


def contenders(work: Workload, backend: str) -> list[Contender]:
    """Enter the loss as written, around a decorated module, and decorated whole."""
    ways: dict[str, tuple[nn.Module, Loss]] = {
        "as written (eager)": (work.net, work.loss),
        "optimize_nested(net)": (
            optimize_nested(copy.deepcopy(work.net), backend=backend),
            work.loss,
        ),
        "optimize_nested(loss)": (
            copy.deepcopy(work.net),
            optimize_nested(work.loss, backend=backend),
        ),
    }

    def bound(loss: Loss, net: nn.Module) -> Loss:
        return lambda *arguments: loss(net, *arguments)

    return [
        Contender(name, bound(loss, net), net.parameters()) for name, (net, loss) in ways.items()
    ]


def microseconds(call: Callable[[], Any], calls: int = 300) -> float:
    """Return the least of nine means over many calls."""
    means = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        means.append((time.perf_counter() - start) / calls * 1e6)
    return min(means)


def overhead(backend: str) -> None:
    """Print what a call of a towered module of ten parameters costs beside its compiled graph."""
    layers = [m for _ in range(5) for m in (nn.Linear(16, 16), nn.Tanh())]
    net = optimize_nested(nn.Sequential(*layers), backend=backend, strategy="jvp_over_gradient")
    x = torch.randn(32, 16, requires_grad=True)
    net(x).sum().backward()
    base = net.forward.steps[0].base
    seen, compiled = [], base.primal
    base.primal = lambda inputs, targets: seen.append(inputs) or compiled(inputs, targets)
    net(x)
    del base.primal
    call = microseconds(lambda: net(x))
    with torch.no_grad():
        bare = microseconds(lambda: compiled(seen[0], ()))
    console.print(
        f"a call of a module of {len(list(net.parameters()))} parameters, gradients on: "
        f"{call:.0f} µs; its compiled graph alone: {bare:.0f} µs; difference {call - bare:.0f} µs"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Time losses around decorated modules.")
    parser.add_argument("--rounds", type=int, default=50, help="timed steps (default: %(default)s)")
    parser.add_argument("--backend", choices=["inductor", "eager"], default="inductor")
    options = parser.parse_args(arguments)
    for work in workloads():
        racing = contenders(work, options.backend)
        side_by_side.take_first_steps(racing, *work.arguments, backend=options.backend)
        measure(racing, *work.arguments, rounds=options.rounds)
        side_by_side.print_comparison(work.name, racing)
    overhead(options.backend)


if __name__ == "__main__":
    main()
