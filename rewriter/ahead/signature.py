"""A call of a loss, taken apart: its arguments, the tensors among them, the modules it reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.ahead.manifest import Argument
from rewriter.ahead.structure import describe, leaves_in, replaced
from rewriter.errors import CaptureError
from rewriter.naming import top_modules

_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_BY_NAME = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class Call:
    """A call to compile for.

    Attributes:
        arguments: What each argument is.
        tensors: The tensors among them by name; leaves of autograd that share the caller's memory.
        roots: The modules that the loss reads, by name.
        args: Arguments to call the loss with, with these tensors in them.
        kwargs: Keyword arguments to call it with.
    """

    arguments: tuple[Argument, ...]
    tensors: dict[str, Tensor]
    roots: dict[str, nn.Module]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def take_apart(
    function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Call:
    """Take a call apart.

    Raises:
        TypeError: The function does not take these arguments.
        CaptureError: A tensor among them is of a subclass or layout that no artifact holds.
    """
    signature = inspect.signature(function)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    roots = top_modules(function, args, dict(kwargs))
    root_of = {id(module): name for name, module in roots.items()}
    number: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    own: dict[int, Tensor] = {}

    def leaf(path: str, value: Any) -> dict[str, Any] | None:
        if isinstance(value, nn.Module):
            roots.setdefault(root_of.setdefault(id(value), path), value)
            return {"module": root_of[id(value)]}
        if not isinstance(value, Tensor):
            return None
        if id(value) not in number:
            _check_plain(path, value)
            number[id(value)] = len(number)
            own[id(value)] = value.detach().requires_grad_(value.requires_grad)
            tensors[path] = own[id(value)]
        return {"tensor": number[id(value)]}

    arguments = []
    for name, value, by_position, by_name in _flat(signature, bound):
        tree = describe(name, value, leaf)
        kinds = {kind for kind, _ in leaves_in(tree)}
        arguments.append(
            Argument(
                name=name,
                by_position=by_position,
                by_name=by_name,
                value=tree,
                is_module=bool(kinds) and kinds <= {"module", "opaque"},
                has_tensors="tensor" in kinds,
            )
        )

    def swapped(value: Any) -> Any:
        return replaced(value, lambda x: own.get(id(x), x) if isinstance(x, Tensor) else x)

    for name, value in bound.arguments.items():
        bound.arguments[name] = swapped(value)
    return Call(tuple(arguments), tensors, roots, bound.args, bound.kwargs)


def _check_plain(path: str, x: Tensor) -> None:
    if type(x) not in (Tensor, nn.Parameter) or x.layout is not torch.strided:
        raise CaptureError(
            f"{path} is a {type(x).__name__} of layout {x.layout}, not a plain tensor"
        )


def _flat(
    signature: inspect.Signature, bound: inspect.BoundArguments
) -> Iterator[tuple[str, Any, bool, bool]]:
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            yield from ((f"{name}.{i}", item, True, False) for i, item in enumerate(value))
        elif kind is inspect.Parameter.VAR_KEYWORD:
            yield from ((key, item, False, True) for key, item in value.items())
        else:
            yield name, value, kind in _BY_POSITION, kind in _BY_NAME
