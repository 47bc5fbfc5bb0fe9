"""Interatomic potentials: neighbour lists, species, forces, stresses."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.row import BY_LAYER, Batch, Loss


def _atoms(n: int, apart: float = 1.3) -> Tensor:
    """Return positions near the points of a lattice, shape (n, 3)."""
    grid = torch.tensor(list(itertools.product(range(3), repeat=3)))[:n]
    return apart * grid.to(torch.get_default_dtype()) + 0.15 * torch.randn(n, 3)


class _GaussianRBF(nn.Module):
    def __init__(self, n_rbf: int, cutoff: float) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("offsets", torch.linspace(0.0, cutoff, n_rbf))

    def forward(self, d: Tensor) -> Tensor:
        return torch.exp(-2.0 * (d[..., None] - self.offsets) ** 2)


def _cosine_cutoff(d: Tensor, cutoff: float) -> Tensor:
    return 0.5 * (torch.cos(d * math.pi / cutoff) + 1.0) * (d < cutoff)


class _Interaction(nn.Module):
    def __init__(self, width: int, n_rbf: int) -> None:
        super().__init__()
        self.filter = nn.Sequential(nn.Linear(n_rbf, width), nn.SiLU(), nn.Linear(width, width))
        self.out = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor, f: Tensor, fcut: Tensor, i: Tensor, j: Tensor) -> Tensor:
        w = self.filter(f) * fcut[:, None]
        return self.out(torch.zeros_like(x).index_add(0, i, x[j] * w))


class _SchNet(nn.Module):
    def __init__(self, width: int = 8, n_rbf: int = 6, cutoff: float = 2.2) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.embedding = nn.Embedding(10, width, padding_idx=0)
        self.rbf = _GaussianRBF(n_rbf, cutoff)
        self.interactions = nn.ModuleList([_Interaction(width, n_rbf) for _ in range(2)])
        self.readout = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def energy_per_atom(self, z: Tensor, r_ij: Tensor, i: Tensor, j: Tensor) -> Tensor:
        x = self.embedding(z)
        d_ij = torch.norm(r_ij, dim=1)
        f, fcut = self.rbf(d_ij), _cosine_cutoff(d_ij, self.cutoff)
        for interaction in self.interactions:
            x = x + interaction(x, f, fcut, i, j)
        return self.readout(x).squeeze(-1)


def neighbours_by_distance() -> tuple[Any, Batch]:
    """Energies and forces with a neighbour list made by nonzero inside the loss."""
    net = _SchNet()

    def loss(z: Tensor, pos: Tensor, energy: Tensor, forces: Tensor) -> Tensor:
        pos.requires_grad_()
        with torch.no_grad():
            close = torch.cdist(pos, pos) < net.cutoff
            close.fill_diagonal_(False)
        idx_i, idx_j = close.nonzero(as_tuple=True)
        e = net.energy_per_atom(z, pos[idx_j] - pos[idx_i], idx_i, idx_j).sum()
        f = -torch.autograd.grad(e, pos, create_graph=True)[0]
        return (e - energy) ** 2 + 10 * (f - forces).pow(2).mean()

    def batch() -> tuple[Any, ...]:
        return torch.randint(1, 9, (7,)), _atoms(7), torch.randn(()), torch.randn(7, 3)

    return loss, batch


def schnetpack_inputs() -> tuple[Any, Batch]:
    """A model on a dictionary of properties that turns gradients on and counts its molecules."""
    net = _SchNet()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.representation = net
            self.required_derivatives = ["_positions"]

        def initialize_derivatives(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            for p in self.required_derivatives:
                if p in inputs:
                    inputs[p].requires_grad_()
            return inputs

        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            inputs = self.initialize_derivatives(inputs)
            R, idx_i, idx_j = inputs["_positions"], inputs["_idx_i"], inputs["_idx_j"]
            y = net.energy_per_atom(inputs["_atomic_numbers"], R[idx_j] - R[idx_i], idx_i, idx_j)
            idx_m = inputs["_idx_m"]
            maxm = int(idx_m[-1]) + 1
            energy = torch.zeros(maxm, dtype=y.dtype).index_add(0, idx_m, y)
            go = [torch.ones_like(energy)]
            grads = torch.autograd.grad([energy], [R], grad_outputs=go, create_graph=self.training)
            if grads[0] is None:
                raise ValueError("no gradient")
            return {"energy": energy, "forces": -grads[0]}

    model = Model()
    logged: dict[str, Tensor] = {}

    def training_step(batch: dict[str, Tensor]) -> Tensor:
        targets = {k: batch[k] for k in ("energy", "forces")}
        pred = model(batch)
        loss = 0.0
        for name, weight in (("energy", 0.01), ("forces", 0.99)):
            loss_i = weight * nn.functional.mse_loss(pred[name], targets[name])
            logged[f"train_{name}"] = loss_i.detach()
            loss = loss + loss_i
        return loss

    def batch() -> tuple[Any, ...]:
        i, j = (
            x.flatten() for x in torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
        )
        i, j = i[i != j], j[i != j]
        return (
            {
                "_positions": torch.cat([_atoms(4), _atoms(4)]),
                "_atomic_numbers": torch.randint(1, 9, (8,)),
                "_idx_i": torch.cat([i, i + 4]),
                "_idx_j": torch.cat([j, j + 4]),
                "_idx_m": torch.tensor([0] * 4 + [1] * 4),
                "energy": torch.randn(2),
                "forces": torch.randn(8, 3),
            },
        )

    return training_step, batch


def networks_by_species() -> tuple[Any, Batch]:
    """One network for each species, its atoms found by a mask, as in TorchANI."""
    nets = nn.ModuleList(
        [nn.Sequential(nn.Linear(6, 8), nn.CELU(0.1), nn.Linear(8, 1)) for _ in range(3)]
    )
    eta, shifts = 4.0, torch.linspace(0.5, 2.5, 6)

    def aev(coordinates: Tensor) -> Tensor:
        d = (coordinates.unsqueeze(2) - coordinates.unsqueeze(1)).pow(2).sum(-1) + torch.eye(5)
        d = d.sqrt()
        terms = torch.exp(-eta * (d[..., None] - shifts) ** 2)
        return (terms * (1 - torch.eye(5))[None, :, :, None]).sum(2)

    def energies(species: Tensor, aev: Tensor) -> Tensor:
        species_ = species.flatten()
        features = aev.flatten(0, 1)
        output = features.new_zeros(species_.shape)
        for i, model in enumerate(nets):
            mask = species_ == i
            midx = mask.nonzero().flatten()
            if midx.shape[0] > 0:
                input_ = features.index_select(0, midx)
                output.masked_scatter_(mask, model(input_).flatten())
        return output.view_as(species).sum(dim=1)

    def loss(batch: dict[str, Tensor]) -> Tensor:
        species = batch["species"]
        coordinates = batch["coordinates"].float().to(torch.float64).requires_grad_(True)
        true_energies, true_forces = batch["energies"], batch["forces"]
        num_atoms = (species >= 0).sum(dim=1, dtype=true_energies.dtype)
        predicted = energies(species, aev(coordinates))
        forces = -torch.autograd.grad(
            predicted.sum(), coordinates, create_graph=True, retain_graph=True
        )[0]
        mse = nn.MSELoss(reduction="none")
        energy_loss = (mse(predicted, true_energies) / num_atoms.sqrt()).mean()
        force_loss = (mse(true_forces, forces).sum(dim=(1, 2)) / (3.0 * num_atoms)).mean()
        return energy_loss + 0.1 * force_loss

    def batch() -> tuple[Any, ...]:
        return (
            {
                "species": torch.randint(0, 3, (3, 5)),
                "coordinates": torch.stack([_atoms(5) for _ in range(3)]),
                "energies": torch.randn(3),
                "forces": torch.randn(3, 5, 3),
            },
        )

    return loss, batch


def symmetric_displacement() -> tuple[Any, Batch]:
    """Forces, virials and stress by a displacement of the cell, as in MACE."""
    net = _SchNet()

    def get_symmetric_displacement(positions: Tensor, cell: Tensor, batch: Tensor, n: int) -> Any:
        displacement = torch.zeros((n, 3, 3), dtype=positions.dtype, device=positions.device)
        displacement.requires_grad_(True)
        symmetric = 0.5 * (displacement + displacement.transpose(-1, -2))
        positions = positions + torch.einsum("be,bec->bc", positions, symmetric[batch])
        cell = cell.view(-1, 3, 3)
        return positions, cell + torch.matmul(cell, symmetric), displacement

    def scatter_sum(src: Tensor, index: Tensor, size: int) -> Tensor:
        return torch.zeros(size, dtype=src.dtype).scatter_add_(0, index, src)

    def forward(data: dict[str, Any], training: bool = True) -> dict[str, Tensor | None]:
        data["positions"].requires_grad_(True)
        num_graphs = data["ptr"].numel() - 1
        positions, cell, displacement = get_symmetric_displacement(
            data["positions"], data["cell"], data["batch"], num_graphs
        )
        i, j = data["edge_index"]
        shifts = torch.einsum("ei,eij->ej", data["unit_shifts"], cell[data["batch"][i]])
        node_e = net.energy_per_atom(data["z"], positions[j] - positions[i] + shifts, i, j)
        energy = scatter_sum(node_e, data["batch"], num_graphs)
        grad_outputs: list[Tensor | None] = [torch.ones_like(energy)]
        forces, virials = torch.autograd.grad(
            outputs=[energy], inputs=[data["positions"], displacement], grad_outputs=grad_outputs,
            retain_graph=training, create_graph=training, allow_unused=True,
        )  # fmt: skip
        stress = torch.zeros_like(displacement)
        if virials is not None:
            volume = torch.linalg.det(cell).abs().unsqueeze(-1)
            stress = virials / volume.view(-1, 1, 1)
            stress = torch.where(torch.abs(stress) < 1e10, stress, torch.zeros_like(stress))
        if forces is None:
            forces = torch.zeros_like(data["positions"])
        return {"energy": energy, "forces": -1 * forces, "stress": stress}

    def loss(data: dict[str, Any]) -> Tensor:
        out = forward(data)
        num_atoms = data["ptr"][1:] - data["ptr"][:-1]
        return (
            torch.mean(torch.square((data["energy"] - out["energy"]) / num_atoms))
            + 10.0 * torch.mean(torch.square(data["forces"] - out["forces"]))
            + torch.mean(torch.square(data["stress"] - out["stress"]))
        )

    def batch() -> tuple[Any, ...]:
        pairs = torch.tensor([(i, j) for i in range(4) for j in range(4) if i != j])
        edges = torch.cat([pairs, pairs + 4]).T
        return (
            {
                "positions": torch.cat([_atoms(4), _atoms(4)]),
                "cell": 5 * torch.eye(3).repeat(2, 1),
                "batch": torch.tensor([0] * 4 + [1] * 4),
                "ptr": torch.tensor([0, 4, 8]),
                "edge_index": edges,
                "unit_shifts": torch.zeros(edges.shape[1], 3),
                "z": torch.randint(1, 9, (8,)),
                "energy": torch.randn(2),
                "forces": torch.randn(8, 3),
                "stress": torch.randn(2, 3, 3),
            },
        )

    return loss, batch


class _GradientOutput(nn.Module):
    """Derivatives of a field, the flags of its inputs as before afterwards (NequIP)."""

    def __init__(self, func: nn.Module, of: str, wrt: list[str], sign: float = 1.0) -> None:
        super().__init__()
        self.func, self.of, self.wrt, self.sign = func, of, wrt, sign

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        data = data.copy()
        old_requires_grad: list[bool] = []
        for k in self.wrt:
            old_requires_grad.append(data[k].requires_grad)
            data[k].requires_grad_(True)
        wrt_tensors = [data[k] for k in self.wrt]
        data = self.func(data)
        grads = torch.autograd.grad(
            [data[self.of].sum()], wrt_tensors, create_graph=self.training, allow_unused=True
        )
        for name, k, g in zip([f"d{self.of}/d{k}" for k in self.wrt], self.wrt, grads, strict=True):
            data[name] = torch.zeros_like(data[k]) if g is None else self.sign * g
        for req_grad, k in zip(old_requires_grad, self.wrt, strict=True):
            data[k].requires_grad_(req_grad)
        return data


class _PairPotential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))
        self.register_buffer("has_scales", torch.tensor(True))
        self.register_buffer("scales", torch.tensor([1.3]))

    def forward(self, data: dict[str, Tensor]) -> dict[str, Tensor]:
        i, j = data["edge_index"]
        d = (data["pos"][j] - data["pos"][i]).norm(dim=-1, keepdim=True)
        e = self.net(torch.cat([d, d.sin(), (-d).exp(), 1 / (1 + d)], dim=-1))
        if self.has_scales:
            e = e * self.scales
        data["edge_energy"] = e
        data["total_energy"] = e.sum()
        return data


def flags_restored() -> tuple[Any, Batch]:
    """A module that turns gradients of positions on and back off, and a flag kept in a buffer."""
    model = _GradientOutput(_PairPotential(), "total_energy", ["pos"], -1.0)

    def loss(data: dict[str, Tensor], forces: Tensor) -> Tensor:
        out = model(data)
        return (out["dtotal_energy/dpos"] - forces).square().mean() + out["total_energy"] ** 2

    pairs = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j]).T
    return loss, lambda: ({"pos": _atoms(5), "edge_index": pairs}, torch.randn(5, 3))


def triplet_descriptors() -> tuple[Any, Batch]:
    """Behler's angular functions over triplets from itertools, in a loop over structures."""
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))

    def descriptors(pos: Tensor) -> Tensor:
        rows = []
        n = len(pos)
        for i in range(n):
            total = pos.new_zeros(3)
            for j, k in itertools.combinations([a for a in range(n) if a != i], 2):
                rij, rik = pos[j] - pos[i], pos[k] - pos[i]
                dij, dik = rij.norm(), rik.norm()
                cos = torch.dot(rij, rik) / (dij * dik)
                total = total + torch.stack([cos, cos**2, torch.exp(-dij - dik)])
            rows.append(total)
        return torch.stack(rows)

    def loss(structures: list[Tensor], forces: list[Tensor]) -> Tensor:
        total = torch.zeros(1)
        for pos, f in zip(structures, forces, strict=True):
            pos.requires_grad = True
            e = net(descriptors(pos)).sum()
            g = torch.autograd.grad(e, pos, create_graph=True)[0]
            total += (f + g).pow(2).mean()
        return total / len(structures)

    def batch() -> tuple[Any, ...]:
        return [_atoms(4) for _ in range(2)], [torch.randn(4, 3) for _ in range(2)]

    return loss, batch


def equilibrated_charges() -> tuple[Any, Batch]:
    """Charges by a linear solve, and Born charges as derivatives of a dipole, one by one."""
    chi, hardness = nn.Linear(3, 1), nn.Parameter(torch.tensor(1.5))

    def charges(pos: Tensor) -> Tensor:
        n = pos.shape[0]
        r = torch.sqrt(((pos[:, None] - pos[None]) ** 2).sum(-1) + torch.eye(n))
        coulomb = (1 - torch.eye(n)) / r + hardness.abs() * torch.eye(n) * 3
        A = torch.zeros(n + 1, n + 1)
        A[:n, :n] = coulomb
        A[n, :n] = 1.0
        A[:n, n] = 1.0
        rhs = torch.cat([-chi(pos.sin()).squeeze(-1), torch.zeros(1)])
        return torch.linalg.solve(A, rhs)[:n]

    def loss(pos: Tensor, born: Tensor) -> Tensor:
        pos = pos.requires_grad_()
        dipole = torch.einsum("n,nc->c", charges(pos), pos)
        z = torch.stack(
            [torch.autograd.grad(dipole[a], pos, create_graph=True)[0] for a in range(3)], dim=-1
        )
        return (z - born).abs().pow(2).mean()

    return loss, lambda: (_atoms(5), torch.randn(5, 3, 3))


def hessian_rows() -> tuple[Any, Batch]:
    """A Hessian of the energy, matched row by row, some rows drawn."""
    net = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 1))

    def loss(pos: Tensor, hessian: Tensor, num_samples: int) -> Tensor:
        pos.requires_grad_(True)
        i, j = torch.triu_indices(4, 4, offset=1)
        d = (pos[i] - pos[j]).pow(2).sum(-1, keepdim=True).sqrt()
        energy = net(d).sum()
        forces = -torch.autograd.grad(energy, pos, create_graph=True)[0]
        rows = torch.randperm(forces.numel())[:num_samples]
        total = 0.0
        for row in rows:
            (h,) = torch.autograd.grad(
                -forces.flatten()[row], pos, retain_graph=True, create_graph=True
            )
            total = total + (h.flatten() - hessian[row]).pow(2).mean()
        return total / num_samples + forces.pow(2).mean()

    return loss, lambda: (_atoms(4), torch.randn(12, 12), 3)


def unique_bonds() -> tuple[Any, Batch]:
    """Coarse beads from a mapping, and bonds made unique inside the loss."""
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(pos: Tensor, mapping: Tensor, bonds: Tensor, forces: Tensor) -> Tensor:
        n_beads = int(mapping.max().item()) + 1
        beads = torch.zeros(n_beads, 3).index_add_(0, mapping, pos)
        counts = torch.bincount(mapping, minlength=n_beads)
        beads = (beads / counts[:, None]).detach().requires_grad_(True)
        edges = torch.unique(torch.sort(mapping[bonds], dim=1)[0], dim=0)
        edges = edges[edges[:, 0] != edges[:, 1]]
        d = (beads[edges[:, 0]] - beads[edges[:, 1]]).norm(dim=1, keepdim=True)
        u = net(d).sum()
        f = -torch.autograd.grad(u, beads, create_graph=True)[0]
        target = torch.zeros_like(beads).index_add(0, mapping, forces)
        return (f - target).square().mean()

    def batch() -> tuple[Any, ...]:
        mapping = torch.tensor([0, 0, 1, 1, 2, 2, 3])
        bonds = torch.tensor([[0, 1], [1, 2], [3, 4], [2, 4], [5, 6], [1, 3]])
        return _atoms(7), mapping, bonds, torch.randn(7, 3)

    return loss, batch


LOSSES = (
    Loss(neighbours_by_distance, way=BY_LAYER, is_slow=True),
    Loss(schnetpack_inputs, way=BY_LAYER, is_slow=True),
    Loss(networks_by_species, way=BY_LAYER, is_slow=True),
    Loss(symmetric_displacement, is_slow=True),
    Loss(flags_restored),
    Loss(triplet_descriptors, is_slow=True),
    Loss(equilibrated_charges, is_slow=True),
    Loss(hessian_rows, way=BY_LAYER),
    Loss(unique_bonds, way=BY_LAYER),
)
