"""Learn the forces in an alloy of copper and gold on periodic cells, from effective medium theory.

The network is a small message-passing potential; its forces are the gradient of its energy, and the
loss compares energies and forces with those of ASE's EMT calculator. Every batch has another number
of neighbours: with `dynamic=True` one compilation serves them all, without padding.

Run `python examples/forces.py --quick` (it needs ASE: `pip install '.[ase]'`), or leave out
`--quick` for a longer training. You will see the report on the loss, a table with its time per step
as written, under torch.compile and under optimize_nested, the training, how often the loss was
compiled, and the error of the forces. The picture `forces.png` shows forces against those of EMT,
the numbers of neighbours and the loss.
"""

import random
from collections.abc import Sequence

import numpy as np
import pictures
import side_by_side
import torch
import training
from alloys import CUTOFF, ELEMENTS, Cell, joined, make_cell
from side_by_side import console
from torch import Tensor, nn

from rewriter import optimize_nested


class Potential(nn.Module):
    """Energies of atoms, shape (atoms,), from two rounds of messages between neighbours."""

    def __init__(self, channels: int = 32, waves: int = 16, rounds: int = 2) -> None:
        super().__init__()
        self.centres = nn.Buffer(torch.linspace(1.5, CUTOFF, waves))
        self.start = nn.Embedding(len(ELEMENTS), channels)
        self.filters = nn.ModuleList(_two_layers(waves, channels) for _ in range(rounds))
        self.updates = nn.ModuleList(_two_layers(channels, channels) for _ in range(rounds))
        self.energy = _two_layers(channels, 1)

    def forward(self, positions: Tensor, species: Tensor, pairs: Tensor, shifts: Tensor) -> Tensor:
        source, target = pairs
        distance = (positions[target] + shifts - positions[source]).norm(dim=1, keepdim=True)
        fade = 0.5 * (1 + torch.cos(torch.pi * distance / CUTOFF))
        waves = fade * torch.exp(-8 * (distance - self.centres).square())
        h = self.start(species)
        for make_filter, update in zip(self.filters, self.updates, strict=True):
            messages = h[source] * make_filter(waves) * fade
            h = h + update(torch.zeros_like(h).index_add(0, target, messages))
        return self.energy(h)[:, 0]


def _two_layers(inputs: int, outputs: int) -> nn.Sequential:
    width = max(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, outputs))


@optimize_nested(dynamic=True)
def loss(
    net: nn.Module,
    positions: Tensor,
    species: Tensor,
    pairs: Tensor,
    shifts: Tensor,
    cell_of: Tensor,
    energies: Tensor,
    forces: Tensor,
) -> Tensor:
    """Add the mean squares of the errors of forces, in eV/Å, and of energies per atom, in eV."""
    positions = positions.detach().requires_grad_()
    atomic = net(positions, species, pairs, shifts)
    (gradient,) = torch.autograd.grad(atomic.sum(), positions, create_graph=True)
    totals = torch.zeros_like(energies).index_add(0, cell_of, atomic)
    mismatch = (totals - energies) * len(energies) / len(species)
    return (gradient + forces).square().mean() + mismatch.square().mean()


def predict(net: nn.Module, cells: Sequence[Cell]) -> tuple[np.ndarray, np.ndarray]:
    """Return the forces on all atoms by EMT and by the network, both (atoms, 3)."""
    positions, species, pairs, shifts, *_, forces = joined(cells)
    energy = net(positions.requires_grad_(), species, pairs, shifts).sum()
    return forces.numpy(), -torch.autograd.grad(energy, positions)[0].numpy()


def draw(
    net: nn.Module, cells: Sequence[Cell], counts: list[int], history: list[float], path: str
) -> float:
    """Draw forces, numbers of neighbours and the loss; return the error of the forces."""
    exact, predicted = predict(net, cells)
    error = float(np.sqrt(np.square(predicted - exact).mean()))
    figure, (left, middle, right) = pictures.panels(
        "Forces in a copper-gold alloy on periodic cells", (1, 1, 1.1)
    )
    limit = float(np.abs(exact).max())
    left.plot([-limit, limit], [-limit, limit], color="black", linewidth=0.8)
    left.plot(exact.flatten(), predicted.flatten(), ".", markersize=2.5, alpha=0.6, rasterized=True)
    texts = {"xlabel": "force by EMT, eV/Å", "ylabel": "force by the network, eV/Å"}
    spread = float(np.sqrt(np.square(exact).mean()))
    title = f"unseen cells, error {error:.3f} of {spread:.2f} eV/Å"
    pictures.plain(left, legend=False, title=title, aspect="equal", **texts)
    middle.hist(counts, bins=30, color="tab:orange")
    texts = {"title": "neighbours, one compilation for all", "xlabel": "pairs in a batch"}
    pictures.plain(middle, legend=False, ylabel="batches", **texts)
    pictures.curves(right, {"loss": history}, title="loss", xlabel="training step")
    pictures.save(figure, path)
    return error


def main(arguments: Sequence[str] | None = None) -> None:
    """Time the loss, train, compare the forces on unseen cells, and draw."""
    parser = side_by_side.option_parser("force matching on periodic cells", "forces.png")
    parser.add_argument("--batch", type=int, default=4, help="cells (default: %(default)s)")
    parser.add_argument("--cells", type=int, default=240, help="of them, 40 unseen at most")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed), random.seed(options.seed)
    with console.status("effective medium theory"):
        cells = [make_cell(seed) for seed in range(options.cells)]
    unseen, seen = cells[: options.cells // 6], cells[options.cells // 6 :]
    net, counts = Potential(), []
    fast = optimize_nested(loss.as_written, backend=options.backend, dynamic=True)

    def evaluate(step: int) -> Tensor:
        batch = joined(random.sample(seen, options.batch))
        counts.append(batch[2].shape[1])
        return fast(net, *batch)

    side_by_side.compare(
        f"time per step, {options.batch} cells of 32 atoms",
        *(fast, net.parameters(), net, *joined(seen[: options.batch])),
        options=options,
    )
    steps = options.steps or (500 if options.quick else 3000)
    history = training.descend("Adam", torch.optim.Adam(net.parameters(), 3e-3), evaluate, steps)
    console.print(f"{len(set(counts))} numbers of neighbours, {len(fast.steps)} compilation(s)")
    error = draw(net, unseen, counts, history, options.out)
    console.print(f"root mean square error of the forces: {error:.3f} eV/Å")
    console.print(f"picture: {options.out}", markup=False)


if __name__ == "__main__":
    main()
