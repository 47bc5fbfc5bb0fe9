"""SchNetPack: energies and forces by PaiNN, learnt from ASE's effective medium theory.

The configurations are clusters of copper, aluminium and platinum that are made here. The model
differentiates its energy by eager autograd, to forces; the loss is differentiated once more.
`make clients` installs what it needs.
"""

import tempfile
import warnings

import numpy as np
import torch
import torch.utils.data.dataloader as torchs_dataloader
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from client import Client, Line
from torch import nn

# SchNetPack before 2.2 imports a name by which PyTorch no longer has it.
if not hasattr(torchs_dataloader, "T_co"):
    torchs_dataloader.T_co = torchs_dataloader._T_co

import pytorch_lightning as lightning
import schnetpack as spk
from schnetpack import transform

CUTOFF = 5.0  # Å


def clusters(count: int, cells: int) -> list[Atoms]:
    """Make clusters of `cells` face-centred cubes in a row, four atoms each, out of equilibrium."""
    random = np.random.default_rng(0)
    found = []
    for seed in range(count):
        atoms = bulk("Cu", cubic=True).repeat((1, 1, cells))
        atoms.pbc = False
        atoms.set_chemical_symbols(random.choice(["Cu", "Al", "Pt"], len(atoms)))
        atoms.rattle(0.1, seed=seed)
        atoms.calc = EMT()
        found.append(atoms)
    return found


def painn(
    line: Line,
    dtype: torch.dtype,
    width: int = 64,
    interactions: int = 3,
    systems: int = 16,
    cells: int = 3,
    whole: bool = False,
) -> Client:
    """Train on energies and forces; the line is applied to the representation, or to the whole."""
    torch.manual_seed(0)
    representation = spk.representation.PaiNN(
        n_atom_basis=width,
        n_interactions=interactions,
        radial_basis=spk.nn.GaussianRBF(n_rbf=20, cutoff=CUTOFF),
        cutoff_fn=spk.nn.CosineCutoff(CUTOFF),
    )
    if not whole:
        representation = line(representation)
    model = spk.model.NeuralNetworkPotential(
        representation,
        input_modules=[spk.atomistic.PairwiseDistances()],
        output_modules=[
            spk.atomistic.Atomwise(n_in=width, output_key="energy"),
            spk.atomistic.Forces(energy_key="energy", force_key="forces"),
        ],
    ).to(dtype)
    if whole:
        model = line(model)

    outputs = [
        spk.task.ModelOutput("energy", nn.MSELoss(), loss_weight=0.01, metrics={}),
        spk.task.ModelOutput("forces", nn.MSELoss(), loss_weight=0.99, metrics={}),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice not to save the model twice
        task = spk.task.AtomisticTask(model, outputs, torch.optim.Adam, {"lr": 1e-3})
    loader = spk.data.AtomsLoader(_dataset(clusters(systems, cells), dtype), batch_size=systems)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    (batch,) = loader

    def step() -> None:
        optimizer.zero_grad()
        predicted = task.predict_without_postprocessing(dict(batch))
        task.loss_fn(predicted, batch).backward()
        optimizer.step()

    def train(steps: int) -> list[float]:
        seen = _Losses()
        trainer = lightning.Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[seen],
        )
        trainer.fit(task, loader)
        return seen.losses

    return Client(model, model if whole else representation, step, train)


class _Losses(lightning.Callback):
    """Keep the loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, index) -> None:
        self.losses.append(float(outputs["loss"]))


def _dataset(systems: list[Atoms], dtype: torch.dtype) -> spk.data.ASEAtomsData:
    units = {"energy": "eV", "forces": "eV/Ang"}
    found = [
        {"energy": np.array([a.get_potential_energy()]), "forces": a.get_forces()} for a in systems
    ]
    folder = tempfile.mkdtemp()
    data = spk.data.ASEAtomsData.create(f"{folder}/clusters.db", "Ang", units)
    data.add_systems(found, systems)
    cast = transform.CastTo64() if dtype is torch.float64 else transform.CastTo32()
    data.transforms = [transform.ASENeighborList(cutoff=CUTOFF), cast]
    return data
