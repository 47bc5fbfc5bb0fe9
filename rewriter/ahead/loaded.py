"""A loss and its gradients from a file: called with a state, or like the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rewriter.ahead.arguments import check_state, read_call
from rewriter.ahead.bind import ASK_FOR_BOTH, Bound, refuse_transforms
from rewriter.ahead.manifest import Input, Manifest, Root
from rewriter.ahead.run import Runner

State = Mapping[str, Any]


class Loaded:
    """A loss and its gradients, from a file.

    Attributes:
        manifest: What the file says of itself.
        sha256: The digest of that.
    """

    def __init__(self, manifest: Manifest, sha256: str, runners: Sequence[Runner]) -> None:
        self.manifest, self.sha256 = manifest, sha256
        self._runners = list(runners)
        self._slot = manifest.slots[0]
        self._last: tuple[tuple[int, ...], Bound] | None = None

    def train(self, mode: bool = True) -> Loaded:
        """Let `value_and_grad` and `value` be those of train mode, or eval mode; return self.

        Raises:
            ValueError: The loss was not compiled for it.
        """
        wanted = "train" if mode else "eval"
        slots = self.manifest.slots
        found = [s for s in slots if s.modes is None or s.name == wanted]
        if not found:
            names = ", ".join(slot.name for slot in slots)
            raise ValueError(f"{wanted}: compiled for {names}; {ASK_FOR_BOTH}")
        self._slot = found[0]
        return self

    def eval(self) -> Loaded:
        """Let `value_and_grad` and `value` be those of eval mode; return self."""
        return self.train(False)

    def value_and_grad(
        self, state: State, /, *args: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Tensor]]:
        """Return the loss and its gradients by name, as `OptimizedLoss.value_and_grad` does.

        What required grad when the loss was compiled has a gradient. State that the loss updates is
        written to the tensors of ``state``.

        Args:
            state: The module's ``state_dict()``; with several modules, or none, a dict of those by
                the modules' names.
            *args: The loss's arguments, without modules.
            **kwargs: The same, by name.

        Raises:
            TypeError: Arguments are missing or too many, or the loss returns no scalar.
            ValueError: A key, shape, dtype, device, memory layout or size is not what the loss was
                compiled for.
        """
        runner = self._runners[self._slot.program]
        leaves, inputs, sizes = self._inputs(runner, state, args, kwargs)
        return runner.value_and_grad(inputs, leaves, sizes)

    def value(self, state: State, /, *args: Any, **kwargs: Any) -> Any:
        """Return the loss alone, computed without gradients; see `value_and_grad`."""
        runner = self._runners[self._slot.program]
        leaves, inputs, sizes = self._inputs(runner, state, args, kwargs)
        with torch.no_grad():
            return runner.result(runner.value(inputs, sizes), inputs, leaves)

    def _inputs(
        self, runner: Runner, state: State, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[list[Any], list[Tensor], dict[str, int]]:
        refuse_transforms()
        leaves, _ = read_call(self.manifest, args, kwargs, with_modules=False)
        by_root = self._states(state)
        updated = [runner.program.inputs[i] for i in runner.program.updated]
        inputs = []
        for x in runner.program.inputs:
            if x.role == "argument":
                inputs.append(leaves[x.leaf])
            elif x.role == "state" and any(key in by_root[x.root] for key in x.keys):
                inputs.append(_from_state(x, by_root[x.root]))
            elif x in updated:
                raise ValueError(
                    f"{x.name}: state_dict() leaves out this buffer, which the loss updates; add "
                    f"it to the state as {x.keys[0]!r}"
                )
            else:
                inputs.append(runner.constant(x))
        return leaves, inputs, runner.check(inputs)

    def _states(self, state: State) -> Mapping[str, State]:
        roots = self.manifest.roots
        if not isinstance(state, Mapping):
            raise TypeError(f"state: expected a state_dict, got {type(state).__name__}")
        if len(roots) == 1:
            state = {roots[0].name: state}
        names = [root.name for root in roots]
        if set(state) != set(names):
            expected = ", ".join(names) or "no modules"
            raise ValueError(
                f"state: expected a dict with the state_dict of each of {expected}; got keys "
                f"{', '.join(map(str, list(state)[:8])) or 'none'}"
            )
        for root in roots:
            check_state(root, state[root.name], self._left_out(root))
        return state

    def _left_out(self, root: Root) -> set[str]:
        programs = self.manifest.programs
        mine = [x for p in programs for x in p.inputs if x.root == root.name and x.stored]
        return {key for x in mine for key in x.keys}

    def bind(self, module: nn.Module | Mapping[str, nn.Module]) -> Bound:
        """Return the loss of a module, called like the loss but without modules as arguments.

        Args:
            module: The module; with several, a dict of them by name. Its class does not matter, its
                ``state_dict()`` must have the keys and shapes that the loss was compiled with.

        Raises:
            TypeError: It is no module.
            ValueError: A module or a key is missing or unknown, or a shape or dtype differs.
        """
        names = [root.name for root in self.manifest.roots]
        modules = {names[0]: module} if isinstance(module, nn.Module) and names else module
        if not isinstance(modules, Mapping):
            raise TypeError(f"bind: expected a dict of modules, got {type(module).__name__}")
        if set(modules) != set(names):
            raise ValueError(
                f"bind: expected the modules {', '.join(names) or 'none'}, got "
                f"{', '.join(map(str, modules)) or 'none'}"
            )
        for root in self.manifest.roots:
            if not isinstance(modules[root.name], nn.Module):
                kind = type(modules[root.name]).__name__
                raise TypeError(f"bind: expected a module as {root.name}, got {kind}")
            check_state(root, modules[root.name].state_dict(), set())
        return Bound(self.manifest, self._runners, modules)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the loss exactly as the decorated one, modules among the arguments.

        Raises:
            TypeError, ValueError: As `bind` and `Bound.__call__`; or the loss reads a module that
                is no argument.
        """
        _, modules = read_call(self.manifest, args, kwargs, with_modules=True)
        missing = [root.name for root in self.manifest.roots if root.name not in modules]
        if missing:
            raise TypeError(
                f"{self.manifest.loss}: {', '.join(missing)} is no argument of the loss; call "
                "bind(...) with it"
            )
        key = tuple(id(modules[root.name]) for root in self.manifest.roots)
        if self._last is None or self._last[0] != key:
            self._last = key, self.bind(modules)
        return self._last[1].run(args, kwargs, with_modules=True)

    def __repr__(self) -> str:
        made = self.manifest
        names = ", ".join(argument.name for argument in made.arguments)
        return f"<{made.form} {made.loss}({names}), {self.sha256[:12]}>"


def _from_state(x: Input, state: State) -> Tensor:
    """Return a tensor of a state; several names of one tensor must still be one."""
    found = {key: state[key] for key in x.keys if key in state}
    first = next(iter(found))
    for key, other in found.items():
        if other.data_ptr() != found[first].data_ptr() or other.shape != found[first].shape:
            raise ValueError(
                f"{x.root}: {first} and {key} were one tensor when the loss was compiled, and are "
                "two in this state"
            )
    return found[first]
