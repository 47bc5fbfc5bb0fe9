"""A function behind recordings of it: ``capture="trace"``.

A recording holds for calls that read the same: tensors of the same kind, equal numbers, the same
functions, modules in the same mode. It is made twice, with different values, and its graph is run
on the second ones; whatever of the two does not agree is a refusal, not a number.
"""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.utils import _pytree as pytree

from passes.graph import where
from passes.tracing import AnySizes
from rewriter.as_written import gradients_of, run_as_written
from rewriter.capture import MAX_SPECIALISATIONS, is_capturing
from rewriter.effects import Effect, Effects, unsteady
from rewriter.errors import CaptureError, InternalError, NestedGradientWarning, OptimizeNestedError
from rewriter.generators import Generators, HostGenerators, generators_restored
from rewriter.guarded import Miss, NoSpecialisation
from rewriter.host_state import HostState
from rewriter.naming import modules_in
from rewriter.quick_guards import QuickGuards
from rewriter.reach import Global, Kind, aliases, arguments, is_same, kind_of, reached
from rewriter.record import Recorded, record
from rewriter.recording import Input
from rewriter.sizes import Sizes, is_of_sizes, number


@dataclass(frozen=True, eq=False)
class _Specialisation:
    """What was built for one kind of call.

    Attributes:
        names: Names that the code mentions.
        globals: Globals of libraries that it reads.
        kinds: What the call could read, by path.
        aliases: Which paths were the same tensor.
        surroundings: What else PyTorch computes by.
        sources: Where each input of the step is: a path, a weak reference, or a constant.
        held: For tensors found by reference or read by host code, what they have to be.
        modes: Modules that are called and have no path, and whether they were in train mode.
        sizes: Those that the recording does not fix; None if it fixes all.
        step: The step.
        places: What each leaf of the result is.
        spec: What the leaves are put together to.
    """

    names: set[str]
    globals: tuple[Global, ...]
    kinds: dict[str, Any]
    volatile: frozenset[str]
    aliases: dict[str, str]
    surroundings: Any
    sources: tuple[Any, ...]
    held: tuple[tuple[Any, Any, Tensor | None], ...]
    modes: tuple[tuple[weakref.ref[Any], bool], ...]
    sizes: FreeSizes | None
    step: Callable[..., Sequence[Any]]
    places: list[tuple[str, Any]]
    spec: Any

    def inputs(self, found: dict[str, Any], surroundings: Any) -> list[Any] | None:
        """Return the step's inputs for a call; None if it is a call of another kind."""
        found = {path: x for path, x in found.items() if not _below(path, self.volatile)}
        if surroundings != self.surroundings or found.keys() != self.kinds.keys():
            return None
        if not all(is_same(x, self.kinds[path]) for path, x in found.items()):
            return None
        if aliases(found) != self.aliases:
            return None
        return self._inputs_at(found)

    def inputs_again(
        self, fresh: dict[str, Any], fixed: dict[str, Any], surroundings: Any
    ) -> list[Any] | None:
        """Return the step's inputs for a call for which only the data among the arguments can be of
        another kind.

        Args:
            fresh: These data, by path.
            fixed: What else the call reads: it is as it was.
            surroundings: What PyTorch computes by.
        """
        if surroundings != self.surroundings:
            return None
        if not all(is_same(x, self.kinds[path]) for path, x in fresh.items()):
            return None
        return self._inputs_at(ChainMap(fresh, fixed))

    def _inputs_at(self, found: Mapping[str, Any]) -> list[Any] | None:
        if any(getattr(module(), "training", None) != mode for module, mode in self.modes):
            return None
        for source, kind, value in self.held:
            x = _at(source, found)
            if x is None or not is_same(x, kind):
                return None
            if value is not None and not torch.equal(x, value):
                return None
        inputs = [_at(source, found) for source in self.sources]
        if self.sizes is None:
            return inputs
        sizes = self.sizes.of(found)
        return None if sizes is None else inputs + sizes

    def miss(self, found: dict[str, Any], surroundings: Any) -> Miss:
        """Return why `inputs` are None for a call."""
        if surroundings != self.surroundings:
            return Miss("the modes of PyTorch", ())
        found = {path: x for path, x in found.items() if not _below(path, self.volatile)}
        changed = sorted(found.keys() ^ self.kinds.keys())
        if changed:
            # Of a list that has grown: the list.
            return Miss("another structure", (changed[0].rpartition(".")[0] or changed[0],))
        for path, x in found.items():
            if not is_same(x, self.kinds[path]):
                return Miss("another value", (path,))
        return Miss("what the loss found by itself", ())

    def __call__(self, inputs: list[Any]) -> Any:
        outputs = self.step(*inputs)
        kinds = {"output": outputs, "input": inputs}
        leaves = [x if kind == "value" else kinds[kind][x] for kind, x in self.places]
        return pytree.tree_unflatten(leaves, self.spec)


def _below(path: str, roots: frozenset[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def _at(source: Any, found: Mapping[str, Any]) -> Any:
    if isinstance(source, str):
        return found[source]
    return source() if isinstance(source, weakref.ref) else source


@dataclass(frozen=True)
class FreeSizes:
    """Sizes that a recording does not fix.

    Attributes:
        any: What the recording takes for granted of them.
        places: For each the path of a tensor, and the dimension that has it.
        taken: Those that the step takes.
    """

    any: AnySizes
    places: tuple[tuple[str, int], ...]
    taken: tuple[int, ...]

    def of(self, found: Mapping[str, Any]) -> list[int] | None:
        """Return the sizes that the step takes; None if the recording does not hold for them."""
        sizes = [found[path].shape[dim] for path, dim in self.places]
        return [sizes[i] for i in self.taken] if self.any.admits(sizes) else None


class Recorder:
    """Call a function as the graph that was recorded of it; record it for each kind of call.

    Args:
        function: The user's function.
        build: Returns what computes the outputs of a graph from its inputs.
        check: Whether the recording is compared once more with a run on the caller's own values.
        dynamic: Whether a recording holds for other sizes of the arguments too: as in
            `torch.compile`, None means from the second one on.
        is_careful: Whether a loss is refused that changes anything beside tensors, or reads what
            cannot be compared from call to call; else it is left to the user.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        build: Callable[..., Any],
        *,
        check: bool,
        dynamic: bool | None,
        is_careful: bool = False,
    ) -> None:
        self.function, self.build, self.check = function, build, check
        self.dynamic, self.is_careful = dynamic, is_careful
        self._is_making_only = False
        self._last: tuple[_Specialisation, QuickGuards] | None = None
        self._shapes: set[Any] = set()  # of the arguments
        self._made: list[_Specialisation] = []
        self._used: set[_Specialisation] = set()

    def made(self) -> list[Any]:
        """Return the recordings."""
        return [*self._made]

    def is_used_again(self, made: Any, /) -> bool:
        """Whether a recording has had a second call."""
        return made in self._used

    @contextlib.contextmanager
    def only_making(self) -> Iterator[None]:
        """Make a recording in the block, and do not run it."""
        self._is_making_only = True
        try:
            yield
        finally:
            self._is_making_only = False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the recording that holds; make one if none does.

        Raises:
            NoSpecialisation: There are some, and none holds; this is no time for another.
            CaptureError: The function cannot be recorded.
        """
        surroundings = _surroundings()
        if self._last is not None:
            inputs = self._last_again(args, kwargs, surroundings)
            if inputs is not None:
                return self._last[0](inputs)
        misses: list[Miss] = []
        walks: list[tuple[Any, dict[str, Any]]] = []
        for specialisation in self._made:
            key = specialisation.names, [g.path for g in specialisation.globals]
            found = next((w for n, w in walks if n == key), None)
            if found is None:
                read = specialisation.names, specialisation.globals
                found = reached(self.function, args, kwargs, *read)
                walks.append((key, found))
            inputs = specialisation.inputs(found, surroundings)
            if inputs is not None:
                self._used.add(specialisation)
                self._last = self._quick(specialisation, args, kwargs)
                return specialisation(inputs)
            misses.append(specialisation.miss(found, surroundings))
        if misses and not is_capturing():
            raise NoSpecialisation(misses)
        if len(self._made) >= MAX_SPECIALISATIONS:
            raise CaptureError(f"more than {MAX_SPECIALISATIONS} specialisations")
        specialisation = self._record(args, kwargs)
        read = specialisation.names, specialisation.globals
        inputs = specialisation.inputs(reached(self.function, args, kwargs, *read), surroundings)
        if inputs is None:
            raise CaptureError("what the loss reads changes by itself from call to call")
        self._made.append(specialisation)
        return None if self._is_making_only else specialisation(inputs)

    def _quick(
        self, made: _Specialisation, args: Any, kwargs: Any
    ) -> tuple[_Specialisation, QuickGuards] | None:
        """Return how to find out quickly that the next call is of the same kind."""
        if made.volatile:
            return None
        guards = QuickGuards(self.function, args, kwargs, made.names, made.globals)
        return (made, guards) if guards.is_possible else None

    def _last_again(self, args: Any, kwargs: Any, surroundings: Any) -> list[Any] | None:
        """Return the inputs of the specialisation that served the call before, if it serves this
        one; None if a walk has to decide."""
        assert self._last is not None
        made, guards = self._last
        fresh = guards.fresh(args, kwargs)
        return None if fresh is None else made.inputs_again(fresh, guards.fixed, surroundings)

    def _record(self, args: Any, kwargs: Any) -> _Specialisation:
        shapes = (
            x.shape
            for x in arguments(self.function, args, kwargs).values()
            if isinstance(x, Tensor)
        )
        self._shapes.add(tuple(shapes))
        if self.dynamic is False or (self.dynamic is None and len(self._shapes) == 1):
            return self._recorded(args, kwargs, [], symbolic=False)
        lines: list[str] = []
        try:
            made = self._recorded(args, kwargs, lines, symbolic=True)
            reason = f"{lines[0]} asks for it as a number" if lines else None
        except CaptureError as error:
            made, reason = self._recorded(args, kwargs, lines, symbolic=False), str(error)
        if self.dynamic and reason:
            warnings.warn(
                f"optimize_nested: capture='trace', dynamic=True: a recording holds for one size "
                f"of an argument only: {reason}",
                NestedGradientWarning,
                stacklevel=5,
            )
        return made

    def _recorded(
        self, args: Any, kwargs: Any, lines: list[str], *, symbolic: bool
    ) -> _Specialisation:
        """Run the loss several times and build what the runs agree on.

        Args:
            args: Its arguments.
            kwargs: Its keyword arguments.
            lines: Is given the lines that fix sizes.
            symbolic: Whether to let their sizes be any.
        """
        function = self.function
        data = {id(x): (n, True) for n, x in arguments(function, args, kwargs).items()}
        modes = {
            m: m.training for root in modules_in(function, args, kwargs) for m in root.modules()
        }

        def run(
            known: Any,
            fixed: set[int],
            *,
            shake: bool = False,
            first: bool = False,
            sizes: Sequence[int] | None = None,
        ) -> Recorded:
            try:
                recorded = self._run(
                    args, kwargs, known, fixed, shake=shake, gradients=not first, sizes=sizes
                )
                if any(module.training != mode for module, mode in modes.items()):
                    raise CaptureError("the loss leaves a module in another mode")
                return recorded
            finally:
                for module, mode in modes.items():
                    module.training = mode

        with HostGenerators() as generators:
            first, sizes = run(data, set(), first=True), None
            if symbolic:
                model = run(data, set(), first=True, sizes=())
                if _difference(first, model):
                    first = run(data, set(), first=True)  # the state that the loss keeps exists now
                if difference := _difference(first, model):
                    raise difference
                assert model.sizes is not None
                lines += model.sizes.fixed_at()
                first, sizes = model, model.sizes.others()
            names = set(first.names)
            before = reached(function, args, kwargs, names)
            known = {id(x): (p, False) for p, x in before.items() if isinstance(x, Tensor)} | {
                i: (p, True) for i, (p, _) in data.items()
            }
            fixed = {id(i.tensor) for i in first.inputs if i.was_read}
            second = run(known, fixed, shake=True, sizes=sizes)
            after = reached(function, args, kwargs, names)
            volatile = frozenset(
                path
                for path in {*before, *after}
                if path not in before or path not in after or not _is_still(before, after, path)
            )
            last, difference = second, _difference(first, second)
            if difference or volatile or self.check:
                # State that the loss keeps may have been made by the first run; and what stays of
                # it should come from a run on the caller's own values.
                last = run(known, fixed, sizes=None if sizes is None else ())
                difference = _difference(second, last)
        if volatile and self.is_careful:
            raise CaptureError(f"the loss changes `{min(volatile)}` at each call")
        if generators.have_moved:
            # What one gave need not show in what was recorded, such as the branch that was taken.
            raise CaptureError(
                "the loss draws from a random generator of Python or NumPy",
                difference.where if difference else "?",
            )
        if difference is not None:
            raise difference
        _verify(second)
        if last is not second:
            _verify(last)
        _refuse_unnoticed(second, last if last is not second else first)
        # A module that only one of the runs has called was made by it.
        modes = {m: mode for m, mode in second.modes.items() if m in first.modes}
        return self._built(second, names | second.names, volatile, modes, args, kwargs)

    def _run(self, args: Any, kwargs: Any, *known: Any, **how: Any) -> Recorded:
        """Run the loss once and return what it did.

        Raises:
            CaptureError: It did what cannot be recorded.
        """
        if not self.is_careful:
            return record(self.function, args, kwargs, *known, **how)
        state = HostState(self.function, args, kwargs)
        if state.is_too_large:
            raise CaptureError("the loss can reach more objects than can be compared")
        if path := state.moving():
            raise CaptureError(f"the loss can move `{path}`")
        try:
            effects = Effects(state, is_stopped=True)
            recorded = record(self.function, args, kwargs, *known, **how, names=effects)
        except Effect as effect:
            raise effect.refusal from None
        finally:
            changed = state.changes()
            if changed:
                state.restore()
        if changed:
            raise CaptureError(f"the loss changes `{changed[0]}`")
        return recorded

    def _built(
        self,
        recorded: Recorded,
        names: set[str],
        volatile: frozenset[str],
        modes: dict[torch.nn.Module, bool],
        args: Any,
        kwargs: Any,
    ) -> _Specialisation:
        others = recorded.globals if self.is_careful else ()
        found = reached(self.function, args, kwargs, names, others)
        found = {path: x for path, x in found.items() if not _below(path, volatile)}
        if self.is_careful and (what := unsteady(found)):
            raise CaptureError(f"the loss can read {what}")
        known = {x.id for x in found.values() if isinstance(x, Kind)}
        path_of = {id(x): p for p, x in reversed(found.items()) if isinstance(x, Tensor)}
        _refuse_written_aliases(recorded.inputs)
        sources: dict[Input, Any] = {}
        for entry in recorded.inputs:
            if entry.is_constant:
                sources[entry] = entry.value
            else:
                sources[entry] = path_of.get(id(entry.tensor)) or weakref.ref(entry.tensor)
        held = tuple(
            (source, kind_of(entry.tensor), entry.value if entry.was_read else None)
            for entry, source in sources.items()
            if entry.was_read or isinstance(source, weakref.ref)
        )
        lost = [i for i, source in sources.items() if isinstance(source, weakref.ref)]
        if lost and self.is_careful:
            raise CaptureError(
                "the loss finds a tensor to which no attribute, closure or global leads",
                where(next(iter(lost[0].node.users), lost[0].node)),
            )
        used = recorded.used
        free, sizes = _free_sizes(recorded, found)
        try:
            step = self.build(recorded.module, recorded.values)
        except OptimizeNestedError:
            raise
        except Exception as error:
            raise InternalError(error, recorded.module) from error
        return _Specialisation(
            names=names,
            globals=tuple(others),
            kinds={path: kind_of(x, free.get(id(x), ())) for path, x in found.items()},
            volatile=volatile,
            aliases=aliases(found),
            surroundings=_surroundings(),
            sources=tuple(sources[entry] for entry in used),
            held=held,
            modes=tuple((weakref.ref(m), mode) for m, mode in modes.items() if id(m) not in known),
            sizes=sizes,
            step=step,
            places=recorded.places,
            spec=pytree.tree_structure(recorded.outputs),
        )


def _free_sizes(
    recorded: Recorded, found: dict[str, Any]
) -> tuple[dict[int, tuple[int, ...]], FreeSizes | None]:
    """Return which dimensions of tensors are not fixed, by id, and what there is to know of their
    sizes.

    Raises:
        CaptureError: The recording does not hold for the sizes of the call.
    """
    sizes = recorded.sizes
    if sizes is None:
        return {}, None
    path_of = {id(x): path for path, x in found.items()}
    free = {id(entry.tensor): sizes.free_dims(entry) for entry in recorded.inputs}
    lost = [entry for entry, _ in sizes.sources if id(entry.tensor) not in path_of]
    if lost or not sizes.any.admits(sizes.of_call):
        raise CaptureError("recorded twice, with different sizes, the loss is two graphs")
    places = tuple((path_of[id(entry.tensor)], dim) for entry, dim in sizes.sources)
    return free, FreeSizes(sizes.any, places, sizes.taken)


def _is_still(before: dict[str, Any], after: dict[str, Any], path: str) -> bool:
    old, new = before[path], after[path]
    if isinstance(old, Tensor) or isinstance(new, Tensor):
        return old is new
    return is_same(new, kind_of(old))


def _surroundings() -> Any:
    """Return what PyTorch computes by, beside the arguments."""
    casts = [
        (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        for kind in ("cpu", "cuda")
    ]
    return casts, torch.get_default_dtype(), torch.get_default_device()


def _difference(one: Recorded, other: Recorded) -> CaptureError | None:
    """Return how two recordings of a call differ."""
    index, numbers = _calls(one), _calls(other)
    start = "recorded twice, with different values, the loss is two graphs: "
    pairs = list(zip(index, numbers, strict=False))
    by_number = one.sizes is None or other.sizes is None
    for a, b in pairs:
        same_call = a.op == b.op and (a.target == b.target or a.op == "placeholder")
        same_line = where(a) == where(b)
        mine = _plain(a, index, None if by_number else one.sizes)
        theirs = _plain(b, numbers, None if by_number else other.sizes)
        if not (same_call and _equal(mine, theirs)):
            what = f"{a.format_node()}" + (f", and {b.format_node()}" if same_call else "")
            line = where(b) if same_line else f"{where(a)}, and {where(b)}"
            return CaptureError(f"{start}{what}", line)
    if len(index) != len(numbers):
        extra = list(max((index, numbers), key=len))[len(pairs) - 1]
        return CaptureError(f"{start}{extra.format_node()} in one only", where(extra))
    for a, b in zip(one.inputs, other.inputs, strict=True):
        if a.is_constant != b.is_constant or (a.is_constant and not _close(a.value, b.value, 0.0)):
            user = next(iter(b.node.users), b.node)
            return CaptureError(f"{start}a constant differs, {b.node.name}", where(user))
    if not _equal(one.places, other.places):
        return CaptureError(f"{start}it returns {one.places}, and {other.places}")
    return None


def _calls(recorded: Recorded) -> dict[Node, int]:
    """Number what a graph does, what it computes of sizes not counted."""
    sizes = () if recorded.sizes is None else recorded.sizes.nodes
    found = [n for n in recorded.module.graph.nodes if n not in sizes and not is_of_sizes(n)]
    return {node: index for index, node in enumerate(found)}


def _plain(node: Node, index: dict[Node, int], sizes: Sizes | None) -> Any:
    """Return what a node is called with; what is computed of sizes as an expression in them, or, if
    there are none, as a number."""
    if node.op == "placeholder":
        return None

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, Node) or leaf in index:
            return ("node", index[leaf]) if isinstance(leaf, Node) else leaf
        return number(leaf.meta["example_value"]) if sizes is None else sizes.written(leaf)

    return map_aggregate([node.args, node.kwargs], plain)


def _equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, slice):
        return _equal((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    return a == b or (a != a and b != b)


def _refuse_unnoticed(one: Recorded, other: Recorded) -> None:
    """Refuse tensors that each run has made anew without our notice. That two runs make the same
    proves nothing: what has made it may have read an argument that was not noticed before, and had
    the same values in both.

    Raises:
        CaptureError: There is one.
    """
    for a, b in zip(one.inputs, other.inputs, strict=True):
        if not a.is_constant and a.tensor is not b.tensor:
            user = next(iter(a.node.users), a.node)
            raise CaptureError(
                f"a tensor {tuple(a.tensor.shape)} that is made anew in each run, by a function of "
                "which PyTorch gives no notice",
                where(user),
            )


def _refuse_written_aliases(inputs: Sequence[Input]) -> None:
    storages = [i.tensor.untyped_storage()._cdata for i in inputs]
    for entry, storage in zip(inputs, storages, strict=True):
        if entry.written and storages.count(storage) > 1:
            raise CaptureError(
                "the loss writes to an input that shares memory with another one", where(entry.node)
            )


def _verify(recorded: Recorded) -> None:
    """Run the recorded graph on the values that it was recorded with.

    Raises:
        CaptureError: It computes something else than the run that was recorded: part of that was
            not seen.
    """
    used, (start, end) = recorded.used, recorded.generators
    wanted = [n for n, i in enumerate(used) if i.requires_grad]
    with generators_restored(start):
        values, own = run_as_written(recorded.module, recorded.values, wanted)
        ended = Generators.now()
    pairs = [("the value", u, v) for u, v in zip(values, recorded.tensors, strict=True)]
    pairs += [
        (f"{i.name or 'an input'}", x, i.final)
        for i, x in zip(used, own, strict=False)
        if i.written
    ]
    if recorded.gradients is not None:
        grads = gradients_of(values, [own[n] for n in wanted])
        names = [f"the gradient of {used[n].name}" for n in wanted]
        pairs += list(zip(names, grads, [recorded.gradients[used[n]] for n in wanted], strict=True))
    for name, mine, theirs in pairs:
        if mine is None or theirs is None:
            same = mine is theirs
        else:
            same = _close(mine, theirs, _tolerance(theirs))
        if not same:
            raise CaptureError(
                f"{name} of the loss is not that of the recorded graph: it computes by other means "
                "than PyTorch's functions, such as memory shared with NumPy"
            )
    if ended != end:
        raise CaptureError("the loss seeds a random generator")


def _tolerance(x: Tensor) -> float:
    if not x.dtype.is_floating_point and not x.dtype.is_complex:
        return 0.0
    return 1e-9 if torch.finfo(x.dtype).eps < 1e-12 else 1e3 * torch.finfo(x.dtype).eps


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = a.detach(), b.detach()
    if a.numel() == 0 or not (b.dtype.is_floating_point or b.dtype.is_complex):
        return torch.equal(a, b)
    finite = b[torch.isfinite(b)].abs()
    size = finite.max().item() if finite.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * size, equal_nan=True)
