"""Sizes that the user declares to change from call to call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.export import Dim

from passes.graph import hint, placeholders, value_of
from passes.tracing import without_fused_kernels
from rewriter.ahead.manifest import Size
from rewriter.ahead.sizes import evaluated, shown, size_of
from rewriter.capture import mark_dynamic
from rewriter.errors import CaptureError
from rewriter.rewrite import Rewritten

# PyTorch compiles sizes 0 and 1 as numbers, because they broadcast.
LEAST = 2
_TRIED = 64


@dataclass(frozen=True)
class Declared:
    """A dimension of an argument whose size may change.

    Attributes:
        argument: The argument's name, such as ``"x"`` or ``"batch.points"``.
        dim: Which dimension.
        name: The size's name; dimensions of one name have equal sizes.
        least: The smallest size.
        most: The largest; None if there is no bound.
        tensor: The argument of the call that is compiled.
    """

    argument: str
    dim: int
    name: str
    least: int
    most: int | None
    tensor: Tensor

    def __str__(self) -> str:
        return f"dynamic[{self.argument!r}][{self.dim}]"

    @property
    def range(self) -> str:
        """The range, in words."""
        return shown_range(self.least, self.most)


def shown_range(least: int, most: int | None) -> str:
    """Print a range of sizes."""
    return f"{least} or more" if most is None else f"{least} to {most}"


def declared_sizes(dynamic: Any, tensors: Mapping[str, Tensor]) -> list[Declared]:
    """Read the user's ``dynamic``: argument → dimension → name, ``Dim``, ``(least, most)`` or
    ``(name, least, most)``.

    Raises:
        TypeError, ValueError: It names no tensor or no dimension of one, or contradicts itself.
    """
    if dynamic is None:
        return []
    if not isinstance(dynamic, Mapping):
        raise TypeError(
            'dynamic: expected a mapping such as {"x": {0: "batch"}}, got '
            f"{type(dynamic).__name__}"
        )
    found: list[Declared] = []
    for argument, dims in dynamic.items():
        if argument not in tensors:
            names = ", ".join(tensors) or "none"
            raise ValueError(
                f"dynamic: no tensor {argument!r} among the arguments; there are {names}"
            )
        if not isinstance(dims, Mapping):
            raise TypeError(
                f'dynamic[{argument!r}]: expected a mapping such as {{0: "batch"}}, got '
                f"{type(dims).__name__}"
            )
        tensor = tensors[argument]
        for dim, given in dims.items():
            where = f"dynamic[{argument!r}][{dim!r}]"
            if type(dim) is not int or not -tensor.dim() <= dim < tensor.dim():
                raise ValueError(f"{where}: {argument} has {tensor.dim()} dimensions")
            dim %= tensor.dim()
            name, least, most = _read(given, where, f"{argument}.{dim}")
            found.append(Declared(argument, dim, name, least, most, tensor))
    for one in found:
        _check(one, found)
    return found


def _read(given: Any, where: str, name: str) -> tuple[str, int, int | None]:
    if isinstance(given, str):
        return given, LEAST, None
    if isinstance(given, Dim):
        most = getattr(given, "max", None)
        most = most if type(most) is int and most < 2**62 else None
        return given.__name__, max(LEAST, int(getattr(given, "min", LEAST))), most
    if isinstance(given, (tuple, list)):
        parts = list(given)
        if parts and isinstance(parts[0], str):
            name = parts.pop(0)
        if (
            len(parts) == 2
            and type(parts[0]) is int
            and (parts[1] is None or type(parts[1]) is int)
        ):
            return name, parts[0], parts[1]
    raise TypeError(
        f"{where}: expected a name, a torch.export.Dim, (least, most) or (name, least, most), got "
        f"{given!r}"
    )


def _check(one: Declared, all_: list[Declared]) -> None:
    size = one.tensor.shape[one.dim]
    if one.least < LEAST or (one.most is not None and one.most < one.least):
        raise ValueError(
            f"{one}: expected a range that begins at {LEAST} or above (PyTorch compiles sizes 0 "
            f"and 1 as numbers), got {one.range}"
        )
    if size < one.least or (one.most is not None and size > one.most):
        raise ValueError(f"{one}: the argument given has size {size}, not {one.range}")
    for other in all_:
        if other.name == one.name and (
            (other.least, other.most) != (one.least, one.most)
            or other.tensor.shape[other.dim] != size
        ):
            raise ValueError(f"{one} and {other} are both {one.name!r}, and differ")


def mark(declared: list[Declared]) -> None:
    """Tell Dynamo which sizes to leave open."""
    for one in declared:
        mark_dynamic(one.tensor, one.dim, one.least, one.most)


@contextlib.contextmanager
def kernels_not_chosen() -> Iterator[None]:
    """Keep convolutions, in the block, from asking for the size of their batch, which they do to
    choose between oneDNN, NNPACK and PyTorch's own: graphs would hold for the sizes of one choice.
    """
    with without_fused_kernels(), torch.backends.nnpack.flags(enabled=False):
        yield


def check_declared(
    rewritten: Rewritten, inputs: Sequence[Any], declared: Sequence[Declared]
) -> None:
    """Check that a graph leaves open what was declared.

    Args:
        rewritten: What was made of the captured graph.
        inputs: What that was captured with.
        declared: What was declared.

    Raises:
        CaptureError: The loss fixes such a size, or holds for a part of its range only.
    """
    nodes = placeholders(rewritten.captured.graph)
    fakes = {id(x): n.meta["example_value"] for n, x in zip(nodes, inputs, strict=True)}
    _open(declared, fakes)


def sizes_of(
    rewritten: Rewritten, declared: Sequence[Declared], position: Mapping[int, int]
) -> tuple[dict[sympy.Symbol, str], list[Size], list[Any]]:
    """Return the open sizes: their names by symbol, their records, and the conditions on them.

    Args:
        rewritten: What they occur in.
        declared: What was declared.
        position: ``id`` of a tensor → which of the graph's tensors it is.

    Raises:
        CaptureError: As `check_declared`.
    """
    values = [value_of(node) for node in placeholders(rewritten.derivative.graph)]
    tensors = [value for value in values if isinstance(value, Tensor)]
    fakes = {number: tensors[place] for number, place in position.items()}
    names, conditions = _open(declared, fakes)
    sizes = []
    for one in declared:
        if id(one.tensor) in fakes:
            size: Any = fakes[id(one.tensor)].shape[one.dim]
            name, place = names[size.node.expr], position[id(one.tensor)]
            sizes.append(Size(name, one.least, one.most, hint(size), place, one.dim))
    return names, sizes, conditions


def _open(
    declared: Sequence[Declared], fakes: Mapping[int, Tensor]
) -> tuple[dict[sympy.Symbol, str], list[Any]]:
    """Return the names of sizes by symbol, and the conditions on them."""
    names: dict[sympy.Symbol, str] = {}
    conditions: list[Any] = []
    env: Any = None
    for one in declared:
        if id(one.tensor) not in fakes:
            continue  # the loss does not read it
        size = fakes[id(one.tensor)].shape[one.dim]
        env = size.node.shape_env if isinstance(size, torch.SymInt) else env
        expression = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
        if not isinstance(expression, sympy.Symbol):
            raise CaptureError(
                f"{one}: the loss fixes this size to {expression}; leave it out of `dynamic`"
            )
        names.setdefault(expression, one.name)
    for guard in env.guards if env else ():
        expression = env.replace(guard.expr)
        if expression != sympy.true and expression.free_symbols:
            conditions.append(size_of(expression, names))
            _check_range(conditions[-1], declared, names, str(guard.sloc.maybe_user_loc or "?"))
    return names, conditions


def _check_range(
    condition: Any, declared: Sequence[Declared], names: Mapping[Any, str], line: str
) -> None:
    """Try a condition at the ends of each range and at the sizes next to them."""
    sizes = {one.name: one for one in declared if one.name in names.values()}
    hints = {name: one.tensor.shape[one.dim] for name, one in sizes.items()}
    for name, one in sizes.items():
        most = one.most if one.most is not None else 2**20 + 1
        tried = {*range(one.least, min(one.least + _TRIED, most + 1)), most - 1, most}
        for number in sorted(tried - {LEAST - 1}):
            if not evaluated(condition, {**hints, name: number}):
                raise CaptureError(
                    f"the loss as captured holds only where {shown(condition)}, which {name} = "
                    f"{number} breaks: narrow the range of {name} in `dynamic`",
                    line,
                )
