"""zuko: a conditional continuous flow with a free-form Jacobian, whose trace the library takes.

`make clients` installs it.
"""

import torch
import zuko
from client import Client, Line, two_moons


def flow(
    line: Line, dtype: torch.dtype, points: int = 512, width: int = 64, exact: bool = True
) -> Client:
    """Fit a density to two moons; the trace is exact, or estimated from one random vector."""
    torch.manual_seed(0)
    cnf = zuko.flows.CNF(2, context=1, hidden_features=(width, width), exact=exact).to(dtype)
    # The model itself returns a distribution; what is differentiated is the field of the equation.
    net = line(cnf.transform.ode)

    x, context = two_moons(points, dtype)
    optimizer = torch.optim.Adam(cnf.parameters(), lr=1e-3)

    def step() -> float:
        loss = -cnf(context).log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Client(cnf, net, step, lambda steps: [step() for _ in range(steps)])
