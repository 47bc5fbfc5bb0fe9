"""Cells of a copper-gold alloy with energies and forces by effective medium theory (ASE:
`pip install '.[ase]'`)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

try:
    from ase.build import bulk
    from ase.calculators.emt import EMT
    from ase.neighborlist import neighbor_list
except ModuleNotFoundError as error:
    raise SystemExit("This example needs ASE: pip install '.[ase]'") from error

CUTOFF = 5.0  # Å
ELEMENTS = ("Cu", "Au")


@dataclass(frozen=True)
class Cell:
    """Hold a configuration with its neighbours within CUTOFF and what EMT says of it.

    positions (atoms, 3) in Å, species (atoms,), pairs (2, pairs), shifts (pairs, 3) in Å of the
    image that the second atom of a pair belongs to, energy in eV, forces (atoms, 3) in eV/Å.
    """

    positions: Tensor
    species: Tensor
    pairs: Tensor
    shifts: Tensor
    energy: float
    forces: Tensor


def make_cell(seed: int) -> Cell:
    """Draw a strained cubic cell of 32 atoms out of equilibrium, a quarter of them gold."""
    generator = np.random.default_rng(seed)
    atoms = bulk("Cu", cubic=True, a=generator.uniform(3.6, 4.0)).repeat(2)
    atoms.set_chemical_symbols(generator.choice(ELEMENTS, len(atoms), p=[0.75, 0.25]))
    atoms.rattle(0.12, seed=seed)
    atoms.calc = EMT()
    source, target, images = neighbor_list("ijS", atoms, CUTOFF)
    dtype = torch.get_default_dtype()
    return Cell(
        positions=torch.tensor(atoms.positions, dtype=dtype),
        species=torch.tensor([ELEMENTS.index(name) for name in atoms.get_chemical_symbols()]),
        pairs=torch.tensor(np.stack([source, target])),
        shifts=torch.tensor(images @ atoms.cell.array, dtype=dtype),
        energy=atoms.get_potential_energy(),
        forces=torch.tensor(atoms.get_forces(), dtype=dtype),
    )


def joined(cells: Sequence[Cell]) -> tuple[Tensor, ...]:
    """Join cells to one graph: the arguments of the loss after the network."""
    sizes = [len(cell.species) for cell in cells]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    return (
        torch.cat([cell.positions for cell in cells]),
        torch.cat([cell.species for cell in cells]),
        torch.cat([cell.pairs + start for cell, start in zip(cells, starts, strict=True)], dim=1),
        torch.cat([cell.shifts for cell in cells]),
        torch.repeat_interleave(torch.arange(len(cells)), torch.tensor(sizes)),
        cells[0].positions.new_tensor([cell.energy for cell in cells]),
        torch.cat([cell.forces for cell in cells]),
    )
