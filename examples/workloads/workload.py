"""What a benchmark is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One loss at one size.

    Attributes:
        name: What it is called in a table.
        loss: The loss as a user writes it.
        args: Its arguments.
        forward: One forward pass of the network that is differentiated, the unit F of FLOPs;
            None where a step has no such unit.
        func_form: The same loss in `torch.func`, if that is another one.
        flops_over_f: The figure to reach, in forward passes; None if there is none.
        options: Of `optimize_nested`.
        backward: Whether a step is the loss and the gradients of what it reads that requires grad;
            otherwise it is the value alone.
    """

    name: str
    loss: Loss
    args: tuple[Any, ...]
    forward: Callable[[], Any] | None = None
    func_form: Loss | None = None
    flops_over_f: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    backward: bool = True


@dataclass(frozen=True)
class Workload:
    """A benchmark with a number and a name.

    Attributes:
        number: Its row in the table of workloads.
        name: Its name.
        about: The derivative in the loss, in words.
        cases: Returns its cases; given True those of the sizes for a GPU.
        compiles_long: Whether `torch.compile` of its first case takes minutes.
    """

    number: int
    name: str
    about: str
    cases: Callable[[bool], list[Case]]
    compiles_long: bool = False
