"""A loaded loss with its modules, used exactly like the decorated loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from rewriter.ahead.arguments import read_call
from rewriter.ahead.manifest import Input, Manifest
from rewriter.ahead.run import Runner
from rewriter.capture import is_transformed
from rewriter.errors import OptimizeNestedError

ASK_FOR_BOTH = 'compile with modes=["train", "eval"] to have both'


class Bound:
    """A loaded loss with its modules.

    Submodules are looked up when it is first called; bind again after replacing one. Parameters and
    buffers are looked up at each call.
    """

    def __init__(
        self, manifest: Manifest, runners: Sequence[Runner], modules: Mapping[str, nn.Module]
    ) -> None:
        self.manifest, self.modules = manifest, dict(modules)
        self._runners = runners
        self._places: dict[int, list[Any]] = {}
        self._named = [(n, list(m.named_modules())) for n, m in self.modules.items()]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss; ``backward()`` fills ``.grad`` as for the loss as written.

        The mode that the modules are in decides which program runs; under `torch.no_grad` only the
        value is computed. State that the loss updates is written to the modules.

        Args:
            *args: The loss's arguments, without modules.
            **kwargs: The same, by name.

        Raises:
            TypeError: Arguments are missing or too many.
            ValueError: A shape, dtype, device, memory layout, size, mode or plain value is not what
                the loss was compiled for, or a tensor requires grad that did not then.
        """
        return self.run(args, kwargs, with_modules=False)

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any], *, with_modules: bool) -> Any:
        """Call it, with modules among the arguments or without; see `__call__`."""
        runner, leaves, inputs, sizes = self._inputs(args, kwargs, with_modules)
        return runner.result(runner(inputs, sizes), inputs, leaves)

    def value_and_grad(self, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Tensor]]:
        """Return the loss and its gradients by name, as `OptimizedLoss.value_and_grad` does; no
        ``.grad`` is touched."""
        runner, leaves, inputs, sizes = self._inputs(args, kwargs, with_modules=False)
        return runner.value_and_grad(inputs, leaves, sizes)

    def _inputs(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], with_modules: bool
    ) -> tuple[Runner, list[Any], list[Tensor], dict[str, int]]:
        refuse_transforms()
        leaves, _ = read_call(self.manifest, args, kwargs, with_modules=with_modules)
        runner = self._runners[self._program()]
        inputs = []
        for x, (owner, name) in zip(runner.program.inputs, self._owners(runner), strict=True):
            if owner is not None:
                inputs.append(getattr(owner, name))
            else:
                inputs.append(leaves[x.leaf] if x.role == "argument" else runner.constant(x))
        return runner, leaves, inputs, runner.check(inputs)

    def _program(self) -> int:
        for slot in self.manifest.slots:
            if slot.modes is None or self._is_in(slot.modes):
                return slot.program
        slots = self.manifest.slots
        names = ", ".join(slot.name for slot in slots)
        modes = {m.training for _, modules in self._named for _, m in modules}
        if len(slots) > 1 or len(modes) > 1:
            what = "call train() or eval() on all of them: some are in each mode"
        else:
            what = f"the modules are in another mode; {ASK_FOR_BOTH}"
        raise ValueError(f"{self.manifest.loss}: compiled for {names}, and {what}")

    def _is_in(self, modes: Mapping[str, Mapping[str, bool]]) -> bool:
        return all(
            modes[name].get(path, module.training) == module.training
            for name, modules in self._named
            if name in modes
            for path, module in modules
        )

    def _owners(self, runner: Runner) -> list[Any]:
        """Return for each input the submodule that has it, None for one that is no state."""
        if id(runner) not in self._places:
            self._places[id(runner)] = [self._owner(x) for x in runner.program.inputs]
        return self._places[id(runner)]

    def _owner(self, x: Input) -> tuple[Any, str]:
        if x.role != "state":
            return None, ""
        path, _, name = x.keys[0].rpartition(".")
        try:
            owner = self.modules[x.root].get_submodule(path)
        except AttributeError:
            owner = None
        if not isinstance(getattr(owner, name, None), Tensor):
            raise ValueError(f"{x.name}: the module that is bound has no tensor {x.keys[0]!r}")
        for key in x.keys[1:]:
            path, _, other = key.rpartition(".")
            if getattr(self.modules[x.root].get_submodule(path), other) is not getattr(owner, name):
                raise ValueError(
                    f"{x.root}: {x.keys[0]} and {key} were one tensor when the loss was compiled, "
                    "and are two in the module that is bound"
                )
        return owner, name


def refuse_transforms() -> None:
    """Check that compiled code may be called here.

    Raises:
        OptimizeNestedError: A transform, a dispatch mode or another compilation is open.
    """
    if is_transformed():
        raise OptimizeNestedError(
            "an artifact cannot be called inside of a torch.func transform, a dispatch mode or "
            "torch.compile: it is compiled already"
        )
