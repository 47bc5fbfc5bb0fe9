"""Give every node of a graph that was loaded its example value, and so check it, before it runs."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from passes.graph import placeholders, results, value_of
from passes.tracing import AnySizes
from rewriter.ahead.manifest import GraphFile, Program, Stored
from rewriter.ahead.portable import device_named, dtype_named
from rewriter.ahead.sizes import evaluated
from rewriter.errors import ArtifactError

_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError, AssertionError)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep PyTorch's log of an operator's refusal from the user, who is told in our words."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


class Shapes:
    """Fake tensors for a program's inputs, with symbols for the sizes that may change."""

    def __init__(self, program: Program) -> None:
        self.program = program
        env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=env, allow_non_fake_inputs=False)
        made = AnySizes(env)
        self.sizes: dict[str, Any] = {}
        for size in program.sizes:
            if size.name not in self.sizes:
                self.sizes[size.name] = made.new(size.hint)

    def inputs(self, file: GraphFile) -> list[Tensor]:
        """Return fake inputs of a graph that takes the program's."""
        kinds = [x.kind for x in self.program.inputs]
        return [
            *(self._fake(k.dtype, k.shape, k.order, k.device) for k in kinds),
            *self.rest(file),
        ]

    def residuals(self, step: GraphModule) -> list[Tensor]:
        """Return fakes of the tensors that the pullback gets from the step, and cotangents."""
        program, given = self.program, placeholders(step.graph)
        computed = iter(results(step.graph))
        assert program.step is not None
        found = []
        for result in program.step.results:
            if result is True:
                found.append(value_of(next(computed)))
            else:
                found.append(value_of(given[result[1]]) if isinstance(result, list) else None)
        n_early = program.n_outputs + len(program.updated)
        ends = [found[i] for i in program.differentiable]
        with self.mode:
            kept = [x for x in found[n_early:] if isinstance(x, Tensor)]
            return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in [*kept, *ends]]

    def propagate(self, module: GraphModule, inputs: Sequence[Tensor], what: str) -> None:
        """Compute the shapes of a graph's nodes, ``meta["val"]``.

        Raises:
            ArtifactError: An operator refuses its arguments, or a size is fixed that may change.
        """
        taken = placeholders(module.graph)
        if len(taken) != len(inputs):
            raise ArtifactError(f"{what}: takes {len(taken)} inputs, and is given {len(inputs)}")
        env = self.mode.shape_env
        assert env is not None
        try:
            with _quiet(), env.ignore_fresh_unbacked_symbols():
                FakeTensorProp(module, self.mode).propagate_dont_convert_inputs(*inputs)
        except _FAILURES as error:
            text = (str(error).strip().splitlines() or [""])[0]
            raise ArtifactError(f"{what}: {type(error).__name__}: {text}") from error
        for node in results(module.graph):
            if not (isinstance(node, Node) and isinstance(value_of(node), Tensor)):
                raise ArtifactError(f"{what}: a result is no tensor")
        if not self.are_open():
            raise ArtifactError(f"{what}: the graph fixes a size that may change")

    def are_open(self) -> bool:
        """Whether nothing that was traced or compiled so far has fixed a size."""
        env = self.mode.shape_env
        assert env is not None
        return all(env.replace(size.node.expr).free_symbols for size in self.sizes.values())

    def rest(self, file: GraphFile) -> list[Tensor]:
        """Return fakes of a graph's constants and sizes."""
        constants = [self._stored(one) for one in file.constants]
        return constants + [self._fake("float32", (size, 0), (0, 1), "cpu") for size in file.sizes]

    def _stored(self, one: Stored) -> Tensor:
        return self._fake(one.dtype, one.shape, range(len(one.shape)), one.device)

    def _fake(self, dtype: str, shape: Sequence[Any], order: Sequence[int], device: str) -> Tensor:
        sizes = [evaluated(size, self.sizes) for size in shape]
        strides: list[Any] = [1] * len(sizes)
        expected: Any = 1
        for dim in reversed(order):
            strides[dim] = expected
            expected = expected * sizes[dim]
        kind = dtype_named(dtype)
        try:
            with self.mode:
                return torch.empty_strided(sizes, strides, dtype=kind, device=device_named(device))
        except (RuntimeError, TypeError) as error:
            raise ArtifactError(f"no tensor has the shape {sizes}") from error
