"""Check a call of an artifact, and find its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.ahead.dynamic import shown_range
from rewriter.ahead.manifest import Argument, Input, Manifest, Program, Root
from rewriter.ahead.portable import dtype_named
from rewriter.ahead.program import is_in_order
from rewriter.ahead.sizes import evaluated, shown
from rewriter.ahead.structure import match


def read_call(
    manifest: Manifest, args: Sequence[Any], kwargs: Mapping[str, Any], *, with_modules: bool
) -> tuple[list[Tensor | None], dict[str, nn.Module]]:
    """Return the tensors of a call in the manifest's order, and the modules by name.

    Args:
        manifest: What the loss takes.
        args: The arguments, in the order of the loss's.
        kwargs: Arguments by the names of the loss's.
        with_modules: Whether modules are among them; otherwise their arguments are left out.

    Raises:
        TypeError: Too many, too few or unknown arguments, or one of another structure.
        ValueError: A plain value that differs from the one that was burned in.
    """
    taken = [a for a in manifest.arguments if with_modules or not a.is_module]
    given = _by_name(manifest.loss, taken, args, kwargs)
    leaves: list[Tensor | None] = [None] * len(manifest.leaves)
    modules: dict[str, nn.Module] = {}

    def leaf(kind: str, value: Any, path: str) -> None:
        name = kind.partition(" ")[2]
        if kind.startswith("module"):
            if isinstance(value, nn.Module):
                modules[name] = value
            elif with_modules:
                raise TypeError(f"{path}: expected a module, got {type(value).__name__}")
        elif not isinstance(value, Tensor):
            raise TypeError(f"{path}: expected a tensor, got {type(value).__name__}")
        elif _is_other(leaves[int(name)], value):
            raise ValueError(
                f"{path}: compiled for a call in which this was the same tensor as "
                f"{manifest.leaves[int(name)]}, got another one"
            )
        else:
            leaves[int(name)] = value

    for argument in taken:
        if argument.name in given:
            match(argument.value, given[argument.name], argument.name, leaf)
    return leaves, modules


def _is_other(known: Tensor | None, value: Tensor) -> bool:
    return known is not None and known is not value


def _by_name(
    loss: str, taken: Sequence[Argument], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    ordered = [a.name for a in taken if a.by_position]
    if len(args) > len(ordered):
        raise TypeError(
            f"{loss}: expected at most {len(ordered)} arguments by position "
            f"({', '.join(ordered) or 'none'}), got {len(args)}"
        )
    given = dict(zip(ordered, args, strict=False))
    named = {a.name for a in taken if a.by_name}
    for name, value in kwargs.items():
        if name not in named:
            raise TypeError(
                f"{loss}: unexpected argument {name!r}; expected "
                f"{', '.join(sorted(named)) or 'none'}"
            )
        if name in given:
            raise TypeError(f"{loss}: {name!r} is given twice, by position and by name")
        given[name] = value
    missing = [a.name for a in taken if a.has_tensors and a.name not in given]
    if missing:
        raise TypeError(
            f"{loss}: missing {', '.join(missing)}; got {', '.join(given) or 'nothing'}"
        )
    return given


def check_state(root: Root, state: Mapping[str, Any], also: set[str]) -> None:
    """Check a module's state against what the loss was compiled with.

    Args:
        root: What is expected.
        state: Its ``state_dict()``.
        also: Further keys that may be there.

    Raises:
        TypeError: It is no mapping.
        ValueError: Keys are missing or unknown, or a shape or dtype differs; names them.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{root.name}: expected a state_dict, got {type(state).__name__}")
    missing = [key for key in root.state if key not in state]
    extra = [key for key in state if key not in root.state and key not in also]
    if missing or extra:
        said = [f"missing {', '.join(missing)}"] * bool(missing)
        said += [f"unexpected {', '.join(map(str, extra))}"] * bool(extra)
        raise ValueError(f"the state of {root.name}: {'; '.join(said)}")
    for key, entry in root.state.items():
        x = state[key]
        if entry.shape is None or entry.dtype is None:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{root.name}.{key}: expected a tensor, got {type(x).__name__}")
        if x.shape != entry.shape or x.dtype != dtype_named(entry.dtype):
            raise ValueError(
                f"{root.name}.{key}: expected {entry.dtype} of shape {tuple(entry.shape)}, got "
                f"{_name(x.dtype)} of shape {tuple(x.shape)}"
            )


class Checker:
    """Checks the inputs of one program, as fast as Python can."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.expected = [
            (x.name, dtype_named(x.kind.dtype), torch.device(x.kind.device), x.kind, _fixed(x))
            for x in program.inputs
        ]

    def __call__(self, inputs: Sequence[Tensor]) -> dict[str, int]:
        """Return the sizes of a call.

        Raises:
            ValueError: A tensor's dtype, device, shape or memory layout is not what was compiled
                for, or a size is outside of its range; names the argument, both, and what to do.
        """
        sizes = self._sizes(inputs)
        for x, (name, dtype, device, kind, fixed) in zip(inputs, self.expected, strict=True):
            if x.dtype != dtype:
                raise ValueError(f"{name}: expected {kind.dtype}, got {_name(x.dtype)}")
            if x.device != device:
                raise ValueError(f"{name}: expected a tensor on {kind.device}, got {x.device}")
            shape = fixed
            if shape is None:
                shape = tuple(evaluated(size, sizes) for size in kind.shape)
            if x.shape != shape:
                raise ValueError(self._other_shape(name, x, kind.shape, shape))
            if x.layout is not torch.strided:
                raise ValueError(f"{name}: expected a dense tensor, got {x.layout}")
            if x.is_contiguous() and kind.order == tuple(range(x.dim())):
                continue
            if not is_in_order(x, kind.order):
                raise ValueError(
                    f"{name}: expected memory in the order of dimensions {kind.order}, got strides "
                    f"{x.stride()} for shape {tuple(x.shape)}; "
                    + ("call .contiguous()" if kind.order == tuple(range(x.dim())) else "")
                )
        return sizes

    def _other_shape(self, name: str, x: Tensor, shape: Any, now: tuple[int, ...]) -> str:
        said = f"({', '.join(map(shown, shape))})"
        if _has_names(shape):
            said += f", which is {now} here,"
        return f"{name}: expected shape {said} got {tuple(x.shape)}".replace(") got", "), got")

    def _sizes(self, inputs: Sequence[Tensor]) -> dict[str, int]:
        found: dict[str, int] = {}
        for size in self.program.sizes:
            name, x = self.program.inputs[size.input].name, inputs[size.input]
            if size.dim >= x.dim() or x.dim() != len(self.program.inputs[size.input].kind.shape):
                expected = len(self.program.inputs[size.input].kind.shape)
                raise ValueError(f"{name}: expected {expected} dimensions, got {x.dim()}")
            number = x.shape[size.dim]
            if number < size.least or (size.most is not None and number > size.most):
                raise ValueError(
                    f"{name}: size {number} in dimension {size.dim} ({size.name}) is outside of "
                    f"the range compiled for, {shown_range(size.least, size.most)}"
                )
            if found.setdefault(size.name, number) != number:
                raise ValueError(
                    f"{name}: size {number} in dimension {size.dim} differs from {size.name} = "
                    f"{found[size.name]} elsewhere in the call"
                )
        for condition in self.program.conditions:
            if not evaluated(condition, found):
                raise ValueError(
                    f"sizes {found}: the loss was compiled for {shown(condition)} only"
                )
        return found


def _fixed(x: Input) -> tuple[int, ...] | None:
    return None if _has_names(x.kind.shape) else tuple(x.kind.shape)


def _has_names(shape: Sequence[Any]) -> bool:
    return any(type(size) is not int for size in shape)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
