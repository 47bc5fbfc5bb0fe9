"""torchdiffeq: a continuous flow in the manner of the library's own example, by adaptive steps.

The field's divergence, exact, is a loop of `autograd.grad` inside of the function that the solver
integrates. `make clients` installs it.
"""

import math

import torch
from client import Client, Line, two_moons
from torch import Tensor, nn
from torchdiffeq import odeint, odeint_adjoint


class Field(nn.Module):
    """The velocity at points, shape (batch, 2), and a time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2)
        )

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.net(torch.cat([z, t.expand(z.shape[0], 1)], dim=1))


class Flow(nn.Module):
    """What the solver integrates: points and the logarithm of their density."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, states: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        z = states[0]
        with torch.set_grad_enabled(True):
            z.requires_grad_(True)
            velocity = self.field(t, z)
            divergence = trace_df_dz(velocity, z).view(z.shape[0], 1)
        return velocity, -divergence


def trace_df_dz(f: Tensor, z: Tensor) -> Tensor:
    """Sum the diagonal of the Jacobian of f in z, both of shape (batch, dim)."""
    total = torch.zeros_like(z[:, 0])
    for i in range(z.shape[1]):
        total = total + torch.autograd.grad(f[:, i].sum(), z, create_graph=True)[0][:, i]
    return total


def flow(
    line: Line,
    dtype: torch.dtype,
    points: int = 512,
    width: int = 64,
    adjoint: bool = False,
    whole: bool = False,
) -> Client:
    """Fit a density to two moons; gradients through the solver's steps, or by its adjoint.

    The line is applied to the field, or to the field with its divergence.
    """
    torch.manual_seed(0)
    field = Field(width).to(dtype)
    if not whole:
        field = line(field)
    function = Flow(field)
    if whole:
        function = line(function)

    x, _ = two_moons(points, dtype)
    times = torch.tensor([1.0, 0.0], dtype=dtype)
    solve = odeint_adjoint if adjoint else odeint
    optimizer = torch.optim.Adam(function.parameters(), lr=1e-3)

    def step() -> float:
        start = (x, torch.zeros(points, 1, dtype=dtype))
        z, delta = solve(function, start, times, atol=1e-5, rtol=1e-5, method="dopri5")
        normal = -z[-1].square().sum(1) / 2 - math.log(2 * math.pi)
        loss = -(normal - delta[-1].squeeze(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    net = function if whole else field
    return Client(function, net, step, lambda steps: [step() for _ in range(steps)])
