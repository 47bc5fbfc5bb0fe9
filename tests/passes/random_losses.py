"""Random losses of leaves, points, stops and gradients: what nobody would write."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.passes.flat import Eager, Loss, Marks, random_points

PLAIN = ("tanh", "sin", "mm", "mul", "add")
Instruction = tuple[Any, ...]  # (name, *operands); a gradient: (name, outputs, points, seed)


def random_loss(seed: int) -> tuple[Loss, list[Tensor]] | None:
    """Return a loss of three matrices and the matrices; None where the seed makes no gradient."""
    maker = _Maker(random.Random(seed), seed)
    return maker.make()


def run(program: Sequence[Instruction], marks: Marks, x: Tensor, w: Tensor, c: Tensor) -> list[Any]:
    """Return every value of a program."""
    values = [x, c]
    for name, *operands in program:
        if name == "gradient":
            outputs, points, seed = operands
            ends = [values[i] for i in outputs]
            seeds = [torch.ones_like(u) if seed is None else values[seed] for u in ends]
            values += marks.pull(ends, [values[i] for i in points], seeds)
            continue
        read = [values[i] for i in operands]
        if name == "mm":
            read.append(w)
        made = getattr(marks if name in ("leaf", "stop", "point") else torch, name)
        values.append(made(*read))
    return values


class _Maker:
    """Builds a program one instruction at a time, each tried eagerly first."""

    def __init__(self, choose: random.Random, seed: int) -> None:
        self.choose = choose
        torch.manual_seed(seed)
        grad = choose.random() < 0.6
        self.inputs = [random_points(2, 2, grad=grad), random_points(2, 2, grad=True)]
        self.inputs.append(random_points(2, 2))
        self.program: list[Instruction] = []
        self.values: list[Tensor] = [self.inputs[0], self.inputs[2]]
        self.places: list[int] = []

    def make(self) -> tuple[Loss, list[Tensor]] | None:
        for _ in range(self.choose.randint(6, 18)):
            instruction = self.instruction()
            if instruction is not None:
                self.add(instruction)
        if not any(name == "gradient" for name, *_ in self.program):
            return None
        if any(not v.isfinite().all() or v.abs().max() > 1e3 for v in self.values):
            return None
        last = len(self.values) - 1
        ends = sorted({*self.choose.sample(range(2, last + 1), min(3, last - 1)), last})
        program = tuple(self.program)

        def loss(marks: Marks, *inputs: Tensor) -> list[Tensor]:
            values = run(program, marks, *inputs)
            return [1.5 * values[i] for i in ends]

        return loss, self.inputs

    def add(self, instruction: Instruction) -> None:
        x, w, c = self.inputs
        try:
            self.values = run([*self.program, instruction], Eager(), x, w, c)
        except RuntimeError:
            return  # eager refuses it
        self.program.append(instruction)
        if instruction[0] in ("leaf", "point"):
            self.places.append(len(self.values) - 1)

    def any_value(self) -> int:
        return self.choose.randrange(len(self.values))

    def instruction(self) -> Instruction | None:
        kind = self.choose.random()
        plain = [i for i in self.program if i[0] in PLAIN]
        gradients = [i for i in self.program if i[0] == "gradient"]
        if kind < 0.15 and plain:
            return self.again(self.choose.choice(plain))
        if kind < 0.2 and gradients:
            return self.gradient_again(self.choose.choice(gradients))
        if kind < 0.35:
            return self.choose.choice(("tanh", "sin")), self.any_value()
        if kind < 0.45:
            return "mm", self.any_value()
        if kind < 0.6:
            return self.choose.choice(("mul", "add")), self.any_value(), self.any_value()
        if kind < 0.72:
            return "leaf", self.any_value()
        if kind < 0.78:
            return "stop", self.any_value()
        if kind < 0.84:
            return "point", self.any_value()
        return self.gradient()

    def again(self, instruction: Instruction) -> Instruction:
        """The same operator on operands of equal value, reached another way."""
        name, *operands = instruction
        return name, *(self.choose.choice(self.equal(o)) for o in operands)

    def equal(self, operand: int) -> list[int]:
        """All places where the value of an operand is found."""
        return [i for i, v in enumerate(self.values) if torch.equal(v, self.values[operand])]

    def gradient(self) -> Instruction | None:
        alive = [i for i, v in enumerate(self.values) if v.requires_grad]
        if not alive:
            return None
        outputs = sorted({self.choose.choice(alive) for _ in range(self.choose.choice((1, 1, 2)))})
        places = self.choose.sample(self.places, len(self.places))
        points = [p for p in places if self.reaches(outputs, p)][:2]
        if not points:
            return None
        seed = None if self.choose.random() < 0.6 else self.any_value()
        return "gradient", outputs, points, seed

    def gradient_again(self, instruction: Instruction) -> Instruction | None:
        """A gradient of what has the same value, at points of the same value."""
        _, outputs, points, seed = instruction
        outputs = [self.choose.choice(self.equal(o)) for o in outputs]
        points = [self.choose.choice(self.equal(p)) for p in points]
        points = [p for p in points if p in self.places]
        if not points or not all(self.reaches(outputs, p) for p in points):
            return None
        return "gradient", outputs, points, seed

    def reaches(self, outputs: list[int], point: int) -> bool:
        ends = [self.values[i] for i in outputs]
        if not all(u.requires_grad for u in (*ends, self.values[point])):
            return False
        (grad,) = torch.autograd.grad(
            ends,
            self.values[point],
            [torch.ones_like(u) for u in ends],
            allow_unused=True,
            retain_graph=True,
        )
        return grad is not None
