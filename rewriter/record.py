"""Run a loss once and return what it did."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FrameType, ModuleType
from typing import Any

import mpmath
import sympy
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from passes.graph import is_users
from passes.tracing import without_fused_kernels
from rewriter import stateful
from rewriter.announced import unannounced
from rewriter.capture import replaced
from rewriter.errors import CaptureError
from rewriter.generators import Generators, generators_restored
from rewriter.host_calls import line_of
from rewriter.naming import module_paths
from rewriter.options import disabled
from rewriter.programs import LIBRARY, owner_of
from rewriter.reach import EVERY_NAME, Global, asks_for_any_name, names_in
from rewriter.recording import Input, Recording
from rewriter.sizes import Sizes


@dataclass
class Recorded:
    """What one run of a loss did.

    Attributes:
        module: The calls it made, as a graph; its outputs are the tensors that were computed.
        inputs: All tensors that it read and had not made.
        used: Those that the graph takes, in order.
        outputs: What the loss returned.
        places: For each leaf of that: ``("output", i)``, ``("input", i)`` or ``("value", leaf)``.
        tensors: The graph's outputs as they were computed.
        gradients: Those of their sum, by input; None if PyTorch has none.
        generators: The states of the random generators before and after.
        names: Names that the code mentions.
        globals: Globals of libraries that their code mentions.
        modes: The modules that were called, and whether they were in train mode.
        sizes: Those of the arguments that the graph does not fix; None if it fixes all.
    """

    module: GraphModule
    inputs: list[Input]
    used: list[Input]
    outputs: Any
    places: list[tuple[str, Any]]
    tensors: list[Tensor]
    gradients: dict[Input, Tensor | None] | None
    generators: tuple[Generators, Generators]
    names: set[str]
    globals: list[Global]
    modes: dict[nn.Module, bool]
    sizes: Sizes | None

    @property
    def values(self) -> list[Any]:
        """The graph's inputs in this run."""
        values: list[Any] = [entry.start for entry in self.used]
        if self.sizes is not None:
            values += [self.sizes.here[i] for i in self.sizes.taken]
        return values


class Names:
    """Collect the names that executed code mentions: attributes and globals it can have read.

    Attributes:
        has_drawn: Whether the operating system was asked for random bytes.
    """

    def __init__(self) -> None:
        self.codes: set[CodeType] = set()
        self.has_drawn = False
        self.is_ours: Callable[[], bool] = bool  # whether what runs is not the user's doing
        self._of_libraries: dict[CodeType, dict[str, Any]] = {}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            self._add(frame)
        elif event == "c_call" and argument is os.urandom:
            self.has_drawn = True

    def _add(self, frame: FrameType) -> None:
        if frame.f_code not in self.codes:
            self.codes.add(frame.f_code)
            if owner_of(frame.f_code.co_filename) == LIBRARY:
                self._of_libraries[frame.f_code] = frame.f_globals

    @property
    def globals(self) -> list[Global]:
        """The globals of libraries that their code mentions: data, no functions."""
        found: dict[str, Global] = {}
        for code, values in self._of_libraries.items():
            for name in names_in(code):
                if name in values and not _is_code(values[name]):
                    path = f"{values.get('__name__', '?')}.{name}"
                    found[path] = Global(path, values, name)
        return list(found.values())

    @property
    def names(self) -> set[str]:
        found: set[str] = set()
        for code in self.codes:
            if code.co_filename.startswith((*_SYMPY, "<frozen ")):
                continue  # called by PyTorch: for symbolic sizes, or Python's own, for an import
            if is_users(code.co_filename) or code.co_filename.startswith(_TORCH_NN):
                found.update(code.co_names, code.co_freevars)
                found.update(c for c in code.co_consts if isinstance(c, str))
            if is_users(code.co_filename) and asks_for_any_name(code):
                found.add(EVERY_NAME)
        return found


def _is_code(value: Any) -> bool:
    return callable(value) or isinstance(value, ModuleType) or value is None


_TORCH_NN = os.path.dirname(nn.__file__)
_SYMPY = tuple(os.path.dirname(str(library.__file__)) for library in (sympy, mpmath))


def record(
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
    known: Mapping[int, tuple[str, bool]],
    fixed: set[int],
    *,
    shake: bool,
    gradients: bool,
    sizes: Sequence[int] | None = None,
    names: Names | None = None,
) -> Recorded:
    """Run a loss once and return the calls that it made; nothing of its tensors, gradients or
    random generators stays changed.

    Args:
        function: The loss.
        args: Its arguments.
        kwargs: Its keyword arguments.
        known: Tensors that it can reach, by id: their names, and whether they are arguments.
        fixed: Ids of tensors that keep their values.
        shake: Whether the others get other values than they have.
        gradients: Whether to compute the gradients too.
        sizes: See `Recording`.
        names: Is told of all Python that is run.

    Raises:
        CaptureError: It did what cannot be recorded.
    """
    recording = Recording(known, fixed, shake=shake, sizes=sizes)
    names = names or Names()
    names.is_ours = lambda: recording.is_busy
    modes: dict[nn.Module, bool] = {}
    profile = sys.getprofile()
    with contextlib.ExitStack() as stack:
        start = stack.enter_context(generators_restored())
        # Casts of parameters that are kept hold for other values than the recording's.
        torch.clear_autocast_cache()
        stack.callback(torch.clear_autocast_cache)
        stack.enter_context(recording.cleanup)
        stack.enter_context(disabled())
        stack.enter_context(without_fused_kernels())
        stack.enter_context(stateful.levels_restored())
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for owner, name, value in list(unannounced(recording)):
            stack.enter_context(replaced(owner, name, value))

        paths = module_paths(function, args, kwargs)

        def enter(module: nn.Module, _: Any) -> None:
            modes.setdefault(module, module.training)
            recording.modules.append((paths.get(module, ""), type(module)))

        def leave(*_: Any) -> None:
            del recording.modules[-1:]

        stack.callback(register_module_forward_pre_hook(enter).remove)
        stack.callback(register_module_forward_hook(leave, always_call=True).remove)
        try:
            sys.setprofile(names)
            with recording:
                outputs = function(*args, **kwargs)
        except CaptureError:
            raise
        except Exception as error:
            if recording.refused is not None:
                raise recording.refused from error
            frames = [f for f, _ in traceback.walk_tb(error.__traceback__)]
            own = [f for f in frames if is_users(f.f_code.co_filename)]
            text = (str(error).splitlines() or [""])[0]
            raise CaptureError(f"{type(error).__name__}: {text}", line_of(own)) from error
        finally:
            sys.setprofile(profile)
        end = Generators.now()
        if recording.refused is not None:
            raise recording.refused
        if names.has_drawn:
            raise CaptureError("the loss draws random bytes of the operating system")
        tensors, places, used = recording.outputs_of(outputs)
        found = recording.gradients(tensors) if gradients else None
        tensors = [x.detach().clone() for x in tensors]
        module = GraphModule(nn.Module(), recording.graph)
    return Recorded(
        module=module,
        inputs=recording.inputs,
        used=used,
        outputs=outputs,
        places=places,
        tensors=tensors,
        gradients=found,
        generators=(start, end),
        names=names.names,
        globals=names.globals,
        modes=modes,
        sizes=recording.sizes,
    )
