"""The loops that minimise a loss with a progress bar; shared by the examples."""

from collections.abc import Callable, Iterable, Sequence

import side_by_side
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

METHODS = {"adam": "Adam", "lbfgs": "L-BFGS"}


def descend(
    name: str, optimizer: Optimizer, evaluate: Callable[[int], Tensor], steps: int
) -> list[float]:
    """Take `steps` steps of an optimizer on evaluate(step), a scalar; return it at each.

    The learning rate falls to zero as a cosine.
    """
    history: list[float] = []
    schedule = CosineAnnealingLR(optimizer, steps)
    with side_by_side.progress_bar() as progress:
        task = progress.add_task(name, total=steps, status="")
        for step in range(steps):
            optimizer.zero_grad()
            value = evaluate(step)
            value.backward()
            optimizer.step()
            schedule.step()
            history.append(value.item())
            progress.update(task, advance=1, status=f"loss {history[-1]:.2e}")
    return history


def minimise(
    net: nn.Module,
    objective: Callable[..., Tensor],
    data: Sequence[Tensor],
    method: str,
    steps: int,
) -> list[float]:
    """Minimise objective(net, *data) by "adam" or "lbfgs"; return the loss of each evaluation.

    `steps` counts evaluations of the loss, those of the line searches of L-BFGS included.
    """
    if method == "adam":
        optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
        return descend(METHODS[method], optimizer, lambda _: objective(net, *data), steps)
    return _lbfgs(net.parameters(), lambda: objective(net, *data), steps)


def _lbfgs(parameters: Iterable[Tensor], evaluate: Callable[[], Tensor], steps: int) -> list[float]:
    history: list[float] = []
    # One call of step is the whole minimisation, however small the steps get.
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=steps,
        max_eval=steps,
        history_size=50,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    with side_by_side.progress_bar() as progress:
        task = progress.add_task(METHODS["lbfgs"], total=steps, status="")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = evaluate()
            value.backward()
            history.append(value.item())
            done = min(len(history), steps)
            progress.update(task, completed=done, status=f"loss {history[-1]:.2e}")
            return value

        optimizer.step(closure)
    return history
