"""What an artifact says of itself: its manifest, as records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class Machine:
    """What code of an artifact runs on.

    Attributes:
        devices: Devices of the tensors, such as ``"cpu"`` and ``"cuda"``.
        system: Operating system and processor family; empty for the portable form, as what follows.
        instructions: Instruction sets of the processor that the code may use.
        capability: Compute capability of the GPU, such as ``"9.0"``; empty without one.
    """

    devices: tuple[str, ...]
    system: str
    instructions: tuple[str, ...]
    capability: str


@dataclass(frozen=True)
class Member:
    """A file in the archive: its SHA-256 and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Kind:
    """What a tensor must be.

    Attributes:
        dtype: Such as ``"float32"``.
        shape: Each size a number, or an expression in the names of sizes (see
            `rewriter.ahead.sizes`).
        order: The dimensions in the order of memory, slowest first.
        device: Such as ``"cpu"`` or ``"cuda:0"``.
    """

    dtype: str
    shape: tuple[Any, ...]
    order: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class Stored:
    """A tensor whose value the artifact holds, elements as raw bytes in the order of indices."""

    member: str
    dtype: str
    shape: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class Input:
    """An input of a program's graphs.

    Attributes:
        name: ``"net.0.weight"``, ``"x"``: what its gradient is called.
        role: ``"state"``, ``"argument"`` or ``"constant"``.
        root: State: which root's it is.
        keys: State: its names in the root; several if the root has it more than once.
        leaf: Argument: which tensor of the call.
        stored: Constant, or a buffer that ``state_dict()`` leaves out: its value.
        kind: What it must be.
        has_gradient: Whether it is one of those with a gradient.
        is_promoted: Whether the loss itself makes it require grad.
    """

    name: str
    role: str
    root: str
    keys: tuple[str, ...]
    leaf: int
    stored: Stored | None
    kind: Kind
    has_gradient: bool
    is_promoted: bool


@dataclass(frozen=True)
class Size:
    """A size that may change from call to call.

    Attributes:
        name: As the user named it.
        least: The smallest it may be.
        most: The largest; None if there is no bound.
        hint: What it was when it was compiled.
        input: Which input it is read from.
        dim: Which of its dimensions.
    """

    name: str
    least: int
    most: int | None
    hint: int
    input: int
    dim: int


@dataclass(frozen=True)
class GraphFile:
    """A graph of a program.

    Attributes:
        member: Where it is kept.
        constants: Tensors that it takes after its inputs.
        sizes: Sizes that it takes after these, as empty tensors of shape ``(size, 0)``.
        results: For each of its results: True if it is a tensor, in order; ``["input", i]`` if it
            is one of the inputs; else None or the expression of a size.
    """

    member: str
    constants: tuple[Stored, ...]
    sizes: tuple[Any, ...]
    results: tuple[Any, ...]


@dataclass(frozen=True)
class Program:
    """One specialisation of the loss.

    Attributes:
        inputs: What its graphs take.
        sizes: Sizes that may change.
        conditions: What must hold of them.
        n_outputs: How many results are the loss's own.
        updated: Inputs that the next results are written to.
        unreached: Inputs among those with a gradient that eager leaves without one.
        reached: Output → inputs it has a gradient for.
        hollow: Outputs that require grad and lead to no input.
        result: What the loss returns: a structure with ``{"output": 0}`` and ``{"leaf": 0}`` in it.
        step: Outputs, updates and gradients; or, where cotangents are inputs, residuals in place of
            gradients.
        pullback: Residuals and cotangents to gradients, where cotangents are inputs.
        value: Outputs and updates alone.
    """

    inputs: tuple[Input, ...]
    sizes: tuple[Size, ...]
    conditions: tuple[Any, ...]
    n_outputs: int
    updated: tuple[int, ...]
    unreached: tuple[int, ...]
    reached: dict[str, tuple[int, ...]]
    hollow: tuple[int, ...]
    result: Any
    step: GraphFile | None
    pullback: GraphFile | None
    value: GraphFile

    @property
    def wanted(self) -> tuple[int, ...]:
        """Positions of the inputs with a gradient."""
        return tuple(i for i, x in enumerate(self.inputs) if x.has_gradient)

    @property
    def differentiable(self) -> tuple[int, ...]:
        """Positions of the outputs that have a gradient for some input."""
        return tuple(int(i) for i, inputs in self.reached.items() if inputs)


@dataclass(frozen=True)
class Slot:
    """A program for one mode of the modules.

    Attributes:
        name: ``"train"``, ``"eval"``, or ``"as compiled"``.
        modes: Root → submodule → whether it is in train mode; None if the program holds for all.
        program: Which program.
    """

    name: str
    modes: dict[str, dict[str, bool]] | None
    program: int


@dataclass(frozen=True)
class Entry:
    """An entry of a root's ``state_dict()``: None for dtype and shape if it is no tensor."""

    dtype: str | None
    shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Root:
    """A module that the loss reads.

    Attributes:
        name: The argument's name, or the path it was found by, such as ``"self.net"``.
        state: The entries of its ``state_dict()``.
    """

    name: str
    state: dict[str, Entry]


@dataclass(frozen=True)
class Argument:
    """An argument of the loss.

    Attributes:
        name: Its name.
        by_position: Whether it may be given by position.
        by_name: Whether it may be given by name.
        value: What it must be: a structure with ``{"tensor": 0}`` and ``{"module": "net"}`` in it;
            everything else was burned in and must be equal.
        is_module: Whether nothing but modules is in it.
        has_tensors: Whether a tensor is in it.
    """

    name: str
    by_position: bool
    by_name: bool
    value: Any
    is_module: bool
    has_tensors: bool


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself.

    Attributes:
        format: Version of the format.
        form: ``"native"`` or ``"portable"``.
        project: Version of this project.
        torch: Version of PyTorch.
        machine: What its code runs on.
        loss: The loss's name.
        arguments: Its arguments.
        leaves: Names of the tensors among them.
        roots: The modules it reads.
        slots: Which program is for which mode of the modules.
        programs: The programs.
        members: All other files of the archive.
    """

    format: int
    form: str
    project: str
    torch: str
    machine: Machine
    loss: str
    arguments: tuple[Argument, ...]
    leaves: tuple[str, ...]
    roots: tuple[Root, ...]
    slots: tuple[Slot, ...]
    programs: tuple[Program, ...]
    members: dict[str, Member]
