"""Compile the training step that `train.cpp` runs."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from rewriter import optimize_nested
from rewriter.ahead.load import unpack_to


@optimize_nested
def penalty(net: nn.Module, x: Tensor) -> Tensor:
    """Let the network's slope have length one."""
    x = x.detach().requires_grad_()
    u = net(x)
    (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return (g.square().sum(1) - 1).square().mean() + u.mean().square()


def main(folder: str = ".") -> None:
    """Write ``penalty.pt2`` and its files, ``penalty/``, to a folder."""
    net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))
    artifact = Path(folder, "penalty.pt2")
    digest = penalty.compile_ahead(artifact, net, torch.randn(64, 2), dynamic={"x": {0: "points"}})
    manifest = unpack_to(artifact, Path(folder, "penalty"), sha256=digest)
    names = [x.name for x in manifest.programs[0].inputs]
    print(f"{artifact}, SHA-256 {digest}; inputs of the step: {', '.join(names)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
